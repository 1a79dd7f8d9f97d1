"""Forms of 4-bit weights and of 4-bit activations, by what each costs in perplexity when all else is exact.

    python -m benchmarks.experiments.forms [--model MODEL] [--text FILE|general|builtin]… [--windows 2]
        [--groups 32,64,-1] [--what weights|activations] [--json FILE]

The model is rotated by the recipe w4a4kv4, and then either its decoder's weights are rounded, to nearest,
or the inputs of these linears. The clip is searched: of a weight for every group, of activations for every
linear on the first window. The first token of a window keeps its activations, as it would behind an exact
prefix. A scale counts 16 bits, a zero-point 4.

    symmetric   -7 .. 7 times a scale
    signed      -8 .. 7 times a scale of either sign: what w2a4 packs
    asymmetric  0 .. 15 minus a zero-point, times a scale
    table       one table of 16 levels for the whole model, times a scale; table, signed: of either sign
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import w2a4
from benchmarks.files import commit, write_json
from w2a4 import arch
from w2a4.cli import demo
from w2a4.evaluate.perplexity import perplexity
from w2a4.format.groups import resolve_group_size
from w2a4.format.online import RotatedLinear

#: Rounds groups `[..., size]`, their range shrunk by the second argument.
Form = Callable[[Tensor, float], Tensor]

KINDS = ("weights", "activations")

WEIGHT_CLIPS = tuple(1 - 0.025 * step for step in range(17))
ACT_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)


def symmetric(x: Tensor, clip: float) -> Tensor:
    scale = (clip * x.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-12)
    return (x / scale).round().clamp(-7, 7) * scale


def furthest(x: Tensor) -> Tensor:
    """The number of each group that is furthest from 0, `[..., 1]`."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def signed(x: Tensor, clip: float) -> Tensor:
    scale = -clip * furthest(x) / 8
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).round().clamp(-8, 7) * scale


def asymmetric(x: Tensor, clip: float) -> Tensor:
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    low, high = clip * low, clip * high
    scale = ((high - low) / 15).clamp_min(1e-12)
    zero = (-low / scale).round().clamp(0, 15)
    return ((x / scale + zero).round().clamp(0, 15) - zero) * scale


class Table:
    """16 levels in [-1, 1] by Lloyd-Max, of numbers divided by the largest of their group."""

    def __init__(self, sample: Tensor, signed: bool):
        self.signed = signed
        parts = (sample / self._unit(sample, 1.0)).flatten()
        levels = torch.quantile(parts[:: max(1, len(parts) // 1_000_000)], torch.linspace(0.01, 0.99, 16))
        for _ in range(60):
            code = torch.bucketize(parts, (levels[1:] + levels[:-1]) / 2)
            sums = torch.zeros(16).index_add_(0, code, parts)
            levels = sums / torch.bincount(code, minlength=16).clamp_min(1)
        self.levels = levels

    def _unit(self, x: Tensor, clip: float) -> Tensor:
        largest = -furthest(x) if self.signed else x.abs().amax(-1, keepdim=True)
        return torch.where(largest == 0, torch.ones_like(largest), clip * largest)

    def __call__(self, x: Tensor, clip: float) -> Tensor:
        unit = self._unit(x, clip)
        return self.levels[torch.bucketize(x / unit, (self.levels[1:] + self.levels[:-1]) / 2)] * unit


def best_of_clips(groups: Tensor, form: Form) -> Tensor:
    """Every group with the clip of its least squared error."""
    best, least = groups, torch.full(groups.shape[:-1], torch.inf)
    for clip in WEIGHT_CLIPS:
        rounded = form(groups, clip)
        error = (rounded - groups).square().sum(-1)
        best = torch.where((error < least)[..., None], rounded, best)
        least = torch.minimum(error, least)
    return best


class Rounded:
    """The inputs of a linear, all but a window's first token rounded; for `register_forward_pre_hook`."""

    def __init__(self, form: Form, group: int):
        self.form, self.group, self.clip = form, group, 0.0

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        x = arguments[0]
        parts = x[:, 1:].unflatten(-1, (-1, resolve_group_size(x.shape[-1], self.group)))
        if not self.clip:
            self.clip = min(
                ACT_CLIPS, key=lambda clip: float((self.form(parts, clip) - parts).square().sum())
            )
        return torch.cat([x[:, :1], self.form(parts, self.clip).flatten(-2)], 1)


class _Split(nn.Module):
    """A RotatedLinear whose hooks see what its weight multiplies."""

    def __init__(self, linear: RotatedLinear):
        super().__init__()
        self.rotation = linear.rotation
        self.linear = nn.Linear(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.linear.weight, self.linear.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rotation.apply(x))


def linears(model: nn.Module) -> list[nn.Linear]:
    """The decoder's linears; the rotation of an input becomes a module before them."""
    family, found = arch.of_model(model), []
    for layer in model.model.layers:
        for path, linear in family.linears(layer).items():
            if isinstance(linear, RotatedLinear):
                linear = _Split(linear)
                layer.set_submodule(path, linear)
            found.append(linear.linear if isinstance(linear, _Split) else linear)
    return found


@torch.no_grad()
def run(
    model: nn.Module, score: Callable[[], list[float]], groups: list[int], what: Sequence[str] = KINDS
) -> list[dict[str, Any]]:
    """A row a form, group and what is rounded: ratios to full precision, as `score` gives them."""
    found = linears(model)
    exact = [linear.weight.detach().clone() for linear in found]
    full, rows = score(), []

    def add(kind: str, name: str, group: int, bits: float) -> None:
        ratios = [a / b for a, b in zip(score(), full, strict=True)]
        rows.append({"what": kind, "form": name, "group": group, "bits": bits, "ratios": ratios})
        click.echo(json.dumps(rows[-1]), err=True)

    for group in groups if "weights" in what else ():
        sizes = [resolve_group_size(weight.shape[1], group) for weight in exact]
        numbers = sum(w.numel() for w in exact)
        scales = sum(w.numel() / size for w, size in zip(exact, sizes, strict=True)) / numbers
        chosen = [(w, s) for w, s in zip(exact, sizes, strict=True)][::10]
        sample = [w[::8].unflatten(1, (-1, s)) for w, s in chosen]
        forms: dict[str, Form] = {"symmetric": symmetric, "signed": signed, "asymmetric": asymmetric}
        if len({s for _, s in chosen}) == 1:
            forms |= {"table": Table(torch.cat([s.flatten(0, 1) for s in sample]), False)}
            forms |= {"table, signed": Table(torch.cat([s.flatten(0, 1) for s in sample]), True)}
        for name, form in forms.items():
            for linear, weight, size in tqdm(
                zip(found, exact, sizes, strict=True), total=len(found), disable=not sys.stderr.isatty()
            ):
                linear.weight.copy_(best_of_clips(weight.unflatten(1, (-1, size)), form).flatten(1))
            add("weights", name, group, 4 + (20 if name == "asymmetric" else 16) * scales)
    for linear, weight in zip(found, exact, strict=True):
        linear.weight.copy_(weight)
    for group in groups if "activations" in what else ():
        for name, form in {"symmetric": symmetric, "signed": signed, "asymmetric": asymmetric}.items():
            hooks = [linear.register_forward_pre_hook(Rounded(form, group)) for linear in found]
            add("activations", name, group, 4)
            for hook in hooks:
                hook.remove()
    return rows


def table(rows: list[dict[str, Any]], texts: tuple[str, ...]) -> str:
    cells = [
        (row["what"], row["form"], row["group"], f"{row['bits']:.3f}", *(f"{r:.4f}" for r in row["ratios"]))
        for row in rows
    ]
    headers = ("rounded", "form", "group", "bits", *texts)
    return tabulate(
        cells, headers, disable_numparse=True, colalign=("left", "left", *["right"] * (2 + len(texts)))
    )


@click.command(help="\b\n" + __doc__)
@click.option("--model", help="A float model's directory, hub id or .gguf; the demo's by default.")
@click.option("--text", "texts", multiple=True, default=("general", "builtin"), help="Repeatable.")
@click.option("--windows", type=click.IntRange(min=1), default=2, show_default=True, help="Of each text.")
@click.option("--seqlen", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option("--groups", default="32,64,-1", show_default=True, help="Inputs that share a scale; -1 is all.")
@click.option("--what", multiple=True, type=click.Choice(KINDS), default=KINDS, help="Repeatable.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
def main(model, texts, windows, seqlen, groups, what, json_file):
    source = model or str(demo._model())
    loaded, tokenizer = w2a4.load_model(source, torch.float32)
    w2a4.rotate(loaded, w2a4.Recipe.load("w4a4kv4").rotation)

    def score() -> list[float]:
        return [
            perplexity(loaded, tokenizer, t, seqlen, windows, progress=False)["perplexity"] for t in texts
        ]

    rows = run(loaded, score, [int(group) for group in groups.split(",")], what)
    if json_file is not None:
        meta = {"commit": commit(), "texts": texts, "windows": windows, "seqlen": seqlen}
        write_json(json_file, {"meta": meta, "rows": rows})
    print(table(rows, texts))


if __name__ == "__main__":
    main()
