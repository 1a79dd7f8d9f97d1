"""Decoding on the CPU: a packed model against the float model in float32, as transformers generates.

    python -m benchmarks.bench_decode [--model DIR] [--packed DIR] [--tokens 48] [--repeats 9]
        [--threads N] [--json FILE]

Both continue one prompt greedily, in one process and by turns; the end token counts for nothing, so that
both make as many tokens. Before the clock starts, the packed model's tokens by `w2a4.evaluate.generate`
must be those of its own `model.generate`. The model is the demo's if none is given, and it is packed by
round to nearest, for this run only, if no packed one is given.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import w2a4
from benchmarks.files import write_json
from benchmarks.harness import metadata, warn_if_busy
from w2a4 import demo, evaluate
from w2a4.report import source_name

#: Speed does not depend on how well the weights fit, so the quickest fit will do.
RECIPE = w2a4.Recipe(name="rtn", weight_method="rtn", act_clip=0.9, calib_samples=1, calib_seqlen=32)

#: `tokenised inputs, number of tokens, streamer -> new tokens`.
Generate = Callable[[Any, int, Any], Tensor]


@dataclass(frozen=True)
class Run:
    """Seconds until all tokens and until the first, the prompt's pass included in both."""

    seconds: float
    first: float


@dataclass(frozen=True)
class Pair:
    """One run each, right after one another; `ratio` is peer over ours."""

    ours: Run
    peer: Run

    @property
    def ratio(self) -> float:
        return self.peer.seconds / self.ours.seconds


class Clock:
    """A streamer that notes when tokens arrive: the prompt first, then one after another."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def packed_generate(model: Any) -> Generate:
    return lambda inputs, count, streamer=None: evaluate.generate(model, inputs, count, streamer)


def transformers_generate(model: Any) -> Generate:
    def generate(inputs: Any, count: int, streamer: Any = None) -> Tensor:
        ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, streamer=streamer)
        return ids[0, inputs["input_ids"].shape[1] :]

    return generate


def timed(generate: Generate, inputs: Any, count: int) -> Run:
    """Raises click.ClickException if it made fewer tokens."""
    clock = Clock()
    start = time.perf_counter()
    new = generate(inputs, count, clock)
    seconds = time.perf_counter() - start
    if len(new) != count:
        raise click.ClickException(f"{len(new)} tokens came out instead of {count}; the times would mislead")
    return Run(seconds, clock.times[1] - start)


def load(source: str) -> tuple[Any, Any]:
    """A model in float32 (but for what is packed) that never ends a text, and its tokenizer."""
    model, tokenizer = w2a4.load_model(source, torch.float32)
    model.generation_config.eos_token_id = None
    return model, tokenizer


def pack(source: str, out: Path) -> str:
    model, tokenizer = w2a4.load_model(source, torch.float32)
    w2a4.quantize(model, tokenizer, RECIPE, progress=sys.stderr.isatty())
    w2a4.save(model, tokenizer, out)
    return str(out)


def measure(ours: Generate, peer: Generate, inputs: Any, count: int, repeats: int) -> list[Pair]:
    """Pairs of runs, every other one with the peer first; one short run of each before."""
    for generate in (ours, peer):
        generate(inputs, 2, None)
    pairs = []
    for repeat in tqdm(range(repeats), unit="pair", disable=not sys.stderr.isatty()):
        order = (ours, peer) if repeat % 2 == 0 else (peer, ours)
        runs = {generate: timed(generate, inputs, count) for generate in order}
        pairs.append(Pair(runs[ours], runs[peer]))
    return pairs


def summary(pairs: list[Pair], count: int) -> dict[str, Any]:
    """Medians over the pairs, and the ratios' range."""

    def side(name: str) -> dict[str, float]:
        runs = [getattr(pair, name) for pair in pairs]
        seconds = statistics.median(run.seconds for run in runs)
        first = statistics.median(run.first for run in runs)
        return {"tokens_per_second": count / seconds, "first_token_ms": 1e3 * first}

    ratios = [pair.ratio for pair in pairs]
    ratio = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {"ours": side("ours"), "peer": side("peer"), "ratio": ratio}


def table(found: dict[str, Any], pairs: int) -> str:
    names = {"ours": "w2a4", "peer": "transformers, float32"}
    rows = [(name, *found[key].values()) for key, name in names.items()]
    text = tabulate(rows, ("", "tokens/s", "first token, ms"), floatfmt=("", ".1f", ".1f"))
    ratio = found["ratio"]
    return (
        f"{text}\n{ratio['median']:.2f} times as fast, median of {pairs} pairs, "
        f"{ratio['least']:.2f} to {ratio['most']:.2f}"
    )


def run(model: str, packed: str, count: int, repeats: int) -> dict[str, Any]:
    """Check, then measure.

    Returns:
        what the JSON holds but for its `meta`; without pairs and summary if the check failed.
    """
    full, tokenizer = load(model)
    small, _ = load(packed)
    if not isinstance(getattr(small.config, "quantization_config", None), w2a4.W2A4Config):
        raise click.ClickException(f"{packed} is not packed by w2a4; give what `w2a4 quantize` wrote")
    inputs = tokenizer(demo.PROMPT, return_tensors="pt", return_token_type_ids=False)
    ours, peer = packed_generate(small), transformers_generate(full)
    correct = torch.equal(ours(inputs, count, None), transformers_generate(small)(inputs, count, None))
    result = {
        "model": source_name(model),
        "recipe": small.config.quantization_config.recipe,
        "prompt": demo.PROMPT,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "tokens": count,
        "correct": correct,
    }
    if correct:
        pairs = measure(ours, peer, inputs, count, repeats)
        result["pairs"] = [asdict(pair) | {"ratio": pair.ratio} for pair in pairs]
        result["summary"] = summary(pairs, count)
    return result


@click.command(help="\b\n" + __doc__)
@click.option("--model", help="A float model's directory, hub id or .gguf; the demo's by default.")
@click.option("--packed", type=click.Path(exists=True, file_okay=False), help="The same model, packed.")
@click.option("--tokens", "count", type=click.IntRange(min=2), default=48, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=9, show_default=True, help="Pairs of runs.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of both.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
def main(model, packed, count, repeats, threads, json_file):
    if threads is not None:
        torch.set_num_threads(threads)
    warn_if_busy()
    command = shlex.join(["python", "-m", "benchmarks.bench_decode", *sys.argv[1:]])
    meta = metadata("cpu") | {"command": command}
    try:
        source = model or str(demo._model())
        with tempfile.TemporaryDirectory() as folder:
            result = run(source, packed or pack(source, Path(folder) / "packed"), count, repeats)
    except w2a4.W2A4Error as error:
        raise click.ClickException(str(error)) from None
    if json_file is not None:
        write_json(json_file, {"meta": meta, **result})
    if not result["correct"]:
        raise click.ClickException("evaluate.generate and model.generate give other tokens, so no times")
    print(table(result["summary"], repeats))


if __name__ == "__main__":
    main()
