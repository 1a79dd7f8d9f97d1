"""A step of training with everything quantised, against a plain step of the same model.

    python -m benchmarks.bench_training [--layers 6] [--tokens 1024] [--repeats 7] [--device cuda]
        [--json FILE]

A LLaMA with SmolLM2-135M's widths and random weights, on a GPU under bfloat16's autocast as Trainer has it,
there also as the CUDA graph that `w2a4 train` makes of it; loss is cross-entropy, so that no teacher counts.
Embedding, norms and head are frozen in both.
Steps of both kinds take turns in one process; peak memory is that of a process of its own for each. Before
the clock starts, the fake-quantised model's logits must be those of the packed model it becomes.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import w2a4
from benchmarks.files import write_json
from benchmarks.harness import metadata, warn_if_busy
from w2a4.ops.devices import peak_memory_mb, pick_device
from w2a4.train.graphs import GradientGraph, causal_logits
from w2a4.train.optimizer import parameter_groups
from w2a4.train.prepare import convert, prepare

#: Where training begins does not matter to its speed.
RECIPE = w2a4.Recipe.load("w2a4kv4-rcp-quick").override(
    **{"training.init": "lloyd", "calib_samples": 1, "calib_seqlen": 32, "act_clip": 0.9}
)

KINDS = ("plain", "quantised", "quantised, checkpointing")
GRAPH = "quantised, graph"


def build(kind: str, layers: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    if kind == "plain":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("_proj" in name)  # what the others train
    else:
        prepare(model, None, RECIPE, torch.randint(config.vocab_size, (1, 32)), progress=False)
    if kind == "quantised, checkpointing":
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model.train()


def stepper(kind: str, layers: int, ids: Tensor) -> Callable[[], None]:
    """A function that makes one step of AdamW."""
    model = build(kind, layers).to(ids.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = parameter_groups(model, RECIPE.training) if kind != "plain" else trained
    optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=True)
    graph = (
        GradientGraph(partial(_causal_loss, model), trained, ids, accumulate=False) if kind == GRAPH else None
    )

    def step() -> None:
        if graph is not None:
            graph.run(ids)
        else:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)

    return step


def _causal_loss(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = causal_logits(model, ids)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def memory(kind: str, layers: int, ids: Tensor) -> float:
    """Peak MB of a process that makes two steps, less what it had before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (kind, layers, ids.cpu(), ids.device))


def _memory(kind: str, layers: int, ids: Tensor, device: torch.device) -> float:
    before = peak_memory_mb(device)
    step = stepper(kind, layers, ids.to(device))
    step()
    step()
    return peak_memory_mb(device) - before


@torch.no_grad()
def is_right(layers: int, ids: Tensor) -> bool:
    model = build("quantised", layers).to(ids.device).eval()
    want = model(input_ids=ids, use_cache=False).logits
    packed = convert(copy.deepcopy(model))(input_ids=ids, use_cache=False).logits
    return bool((packed - want).norm() < 0.05 * want.norm())


def measured(layers: int, ids: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a step of each kind, in turns, and how many times those of a plain step.

    Raises:
        click.ClickException: the fake-quantised model is not the packed one.
    """
    if not is_right(min(layers, 2), ids[:1, :64]):
        raise click.ClickException("the fake-quantised model is not the packed one; nothing was timed")
    steps = {kind: stepper(kind, layers, ids) for kind in (*KINDS, *[GRAPH] * ids.is_cuda)}
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in tqdm(range(repeats + 1), unit="round", disable=not sys.stderr.isatty()):
        for kind, step in steps.items():
            begun = time.perf_counter()
            step()
            times[kind].append(time.perf_counter() - begun)
    rows = []
    for kind, values in times.items():
        values = values[1:]  # the first one warms up
        ratio = statistics.median(a / b for a, b in zip(values, times["plain"][1:], strict=True))
        rows.append({"step": kind, "s": statistics.median(values), "times": values, "ratio": ratio})
    return rows


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--layers", default=6, show_default=True)
@click.option("--tokens", default=1024, show_default=True, help="A step's, in sequences of at most 512.")
@click.option("--repeats", default=7, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Or cuda.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write results here.")
def main(layers: int, tokens: int, repeats: int, device: str, path: Path | None) -> None:
    warn_if_busy()
    ids = torch.randint(49152, (max(1, tokens // 512), min(tokens, 512))).to(pick_device(device))
    rows = measured(layers, ids, repeats)
    for row in rows:
        row["peak_mb"] = memory(row["step"], layers, ids)
    for row in rows:
        row["memory_ratio"] = row["peak_mb"] / rows[0]["peak_mb"]
    if path is not None:
        write_json(
            path, {"meta": metadata(ids.device.type), "layers": layers, "tokens": ids.numel(), "rows": rows}
        )
    head = ("step", "s", "ratio", "peak_mb", "memory_ratio")
    click.echo(tabulate([[row[key] for key in head] for row in rows], head, floatfmt=".2f"))


if __name__ == "__main__":
    main()
