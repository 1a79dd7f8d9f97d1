"""Decoding on the CPU: the engine against transformers, with the packed model and with the float one.

    python -m benchmarks.bench_decode [--model DIR] [--packed DIR] [--tokens 48] [--repeats 9]
        [--threads N] [--json FILE]

Three sides continue one prompt greedily, in one process and by turns: `w2a4.Engine` and `model.generate`
with the packed model, and `model.generate` with the float model in float32. The end token counts for
nothing, so that all make as many tokens. Before the clock starts, the engine's tokens must be those of the
packed model's own `generate`. The model is the demo's if none is given, and it is packed by round to
nearest, for this run only, if no packed one is given.
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
from w2a4.cli import demo
from w2a4.evaluate import perplexity as evaluate
from w2a4.evaluate.report import source_name

#: Speed does not depend on how well the weights fit, so the quickest fit will do.
RECIPE = w2a4.Recipe(name="rtn", weight_method="rtn", act_clip=0.9, calib_samples=1, calib_seqlen=32)

#: `tokenised inputs, number of tokens, streamer -> new tokens`.
Generate = Callable[[Any, int, Any], Tensor]


#: What is timed, by the name it has in tables; ratios are of its seconds over the engine's.
SIDES = {
    "engine": "engine",
    "generate": "generate, the same model",
    "float32": "generate, float32",
}


@dataclass(frozen=True)
class Run:
    """Seconds until all tokens and until the first, the prompt's pass included in both."""

    seconds: float
    first: float


class Clock:
    """A streamer that notes when tokens arrive: the prompt first, then one after another."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def engine_generate(model: Any) -> Generate:
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


def measure(sides: dict[str, Generate], inputs: Any, count: int, repeats: int) -> list[dict[str, Run]]:
    """A run of each side, `repeats` times, each time another one first; one short run of each before."""
    for generate in sides.values():
        generate(inputs, 2, None)
    rounds, names = [], [*sides]
    for repeat in tqdm(range(repeats), unit="round", disable=not sys.stderr.isatty()):
        turn = repeat % len(names)
        rounds.append({name: timed(sides[name], inputs, count) for name in names[turn:] + names[:turn]})
    return rounds


def summary(rounds: list[dict[str, Run]], count: int) -> dict[str, dict[str, Any]]:
    """Of each side the medians over the rounds, and the range of its ratio to the engine."""
    found = {}
    for name in SIDES:
        runs = [of[name] for of in rounds]
        ratios = [of[name].seconds / of["engine"].seconds for of in rounds]
        found[name] = {
            "tokens_per_second": count / statistics.median(run.seconds for run in runs),
            "first_token_ms": 1e3 * statistics.median(run.first for run in runs),
            "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        }
    return found


def table(found: dict[str, Any], rounds: int) -> str:
    rows = []
    for name, side in found.items():
        speed, first, ratio = side["tokens_per_second"], side["first_token_ms"], side["ratio"]
        spread = f"{ratio['least']:.2f} to {ratio['most']:.2f}" if name != "engine" else ""
        rows.append((SIDES[name], f"{speed:.1f}", f"{first:.1f}", f"{ratio['median']:.2f}", spread))
    headers = ("", "tokens/s", "first token, ms", "times the engine's", "least to most")
    text = tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 4))
    return f"{text}\nMedians of {rounds} rounds."


def run(model: str, packed: str, count: int, repeats: int) -> dict[str, Any]:
    """Check, then measure.

    Returns:
        what the JSON holds but for its `meta`; without rounds and summary if the check failed.
    """
    full, tokenizer = load(model)
    small, _ = load(packed)
    if not isinstance(getattr(small.config, "quantization_config", None), w2a4.W2A4Config):
        raise click.ClickException(f"{packed} is not packed by w2a4; give what `w2a4 quantize` wrote")
    inputs = tokenizer(demo.PROMPT, return_tensors="pt", return_token_type_ids=False)
    sides = {
        "engine": engine_generate(small),
        "generate": transformers_generate(small),
        "float32": transformers_generate(full),
    }
    correct = torch.equal(sides["engine"](inputs, count, None), sides["generate"](inputs, count, None))
    result = {
        "model": source_name(model),
        "recipe": small.config.quantization_config.recipe,
        "prompt": demo.PROMPT,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "tokens": count,
        "correct": correct,
    }
    if correct:
        rounds = measure(sides, inputs, count, repeats)
        result["rounds"] = [{name: asdict(side) for name, side in of.items()} for of in rounds]
        result["summary"] = summary(rounds, count)
    return result


@click.command(help="\b\n" + __doc__)
@click.option("--model", help="A float model's directory, hub id or .gguf; the demo's by default.")
@click.option("--packed", type=click.Path(exists=True, file_okay=False), help="The same model, packed.")
@click.option("--tokens", "count", type=click.IntRange(min=2), default=48, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=9, show_default=True, help="Rounds of runs.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of all.")
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
        raise click.ClickException("the engine and model.generate give other tokens, so no times")
    print(table(result["summary"], repeats))


if __name__ == "__main__":
    main()
