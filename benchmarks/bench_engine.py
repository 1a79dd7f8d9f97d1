"""Decoding with random models of published shapes: packed, and in 16 bits through the same engine.

    python -m benchmarks.bench_engine --device cuda [--models NAME ...] [--contexts 128,4096,32768]
        [--batch 1] [--tokens 64] [--json FILE]

Each model is alone on the device while it is measured: the time to the first token of a prompt of CONTEXT
tokens, the time a token when CONTEXT tokens are in the cache, and the peak of memory with both. Beside the
engine, transformers' own `generate` continues the same prompt with the 16-bit model. Prompts beyond 4096
tokens are not read: what the cache then holds is random too. First the packed model must give the tokens
of `model.generate`. On a CPU the other model has 32 bits, and no CUDA graphs are used.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.files import write_json
from benchmarks.harness import copy_row, has_cuda_kernels, metadata, parse_tokens, warn_if_busy
from benchmarks.random_llama import float_llama, packed_llama
from benchmarks.shapes import MODELS
from w2a4.runtime.engine import Engine, inference
from w2a4.runtime.sequences import PackedSequences, StaticSequences

#: Prompts up to this length are read; a longer context is only said to be there.
LONGEST_PROMPT = 4096
#: Tokens decoded at each context, so that there is room for them.
ROOM = 256
REPEATS = 5


@dataclass
class Measured:
    """One model at one context, batch and device.

    Attributes:
        token_us: a step of decoding, of the whole batch.
        first_ms: until the first token of a prompt of the context; None if it was not read.
        generate_us: a step of transformers' `generate`; None if it was not run.
        peak_bytes: of memory, the model included, and what was there before it not; None on a CPU.
    """

    token_us: float
    first_ms: float | None
    generate_us: float | None
    peak_bytes: int | None


@dataclass
class Row:
    """As in other benchmarks' JSON, with what only a whole model has; `peer` is the 16-bit model."""

    op: str
    shape: str
    context: int
    tokens: int
    dtype: str
    cache: str
    us: float | None
    peer: str
    peer_us: float | None
    ratio: float | None
    bytes: int
    bound: float
    correct: bool
    first_ms: float | None = None
    peer_first_ms: float | None = None
    generate_us: float | None = None
    peak_bytes: int | None = None
    peer_peak_bytes: int | None = None


def prompts(vocabulary: int, batch: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return list(torch.randint(0, vocabulary, (batch, length), generator=generator))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def place_at(sequences: Any, context: int) -> None:
    """Let the sequences go on after `context` tokens, whatever the cache holds there."""
    if isinstance(sequences, PackedSequences):
        sequences.lengths.fill_(context)
        sequences.longest = context
    elif isinstance(sequences, StaticSequences):
        sequences.position.fill_(context)
        for layer in sequences.cache.layers:
            layer.cumulative_length.fill_(context)
    else:
        raise click.ClickException(f"the engine runs this model without a cache of fixed size; give contexts "
                                   f"up to {LONGEST_PROMPT}")  # fmt: skip


def step_us(engine: Engine, ids: list[torch.Tensor], context: int, count: int, device: str) -> float:
    """Median over repeats of the time of a step, after one warm-up."""
    with inference(engine.model):
        sequences = engine.sequences(ids, ROOM)

        def steps() -> None:
            for _ in range(count):
                sequences.advance(sequences.logits.argmax(-1))

        times = []
        for _ in range(1 + REPEATS):
            if device == "cuda":
                place_at(sequences, context)
            else:
                sequences = engine.sequences(ids, ROOM)
            times.append(seconds(steps, device) / count)
    return 1e6 * statistics.median(times[1:])


def greedy(model: Any, ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """By transformers, which without a mask would take token 0 for padding."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    return model.generate(ids, max_new_tokens=max_new_tokens, **options)


def generate_us(model: Any, ids: list[torch.Tensor], count: int, device: str) -> float:
    """A step of transformers' `generate`: the difference between many tokens and one."""
    run = functools.partial(greedy, model, torch.stack(ids).to(device))
    run(max_new_tokens=2)
    one = seconds(lambda: run(max_new_tokens=1), device)
    return 1e6 * (seconds(lambda: run(max_new_tokens=1 + count), device) - one) / count


def held_bytes(device: str) -> int:
    """Of GPU memory that tensors take."""
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def measure(
    model: Any, contexts: list[int], batch: int, count: int, device: str, generate: bool, before: int
):
    """`Measured` of each context; `before` are the bytes that were held without the model."""
    found = []
    for context in tqdm(contexts, unit="context", disable=not sys.stderr.isatty()):
        # A cache no longer than it must be: transformers' attention goes through all of a static one.
        engine = Engine(model, max_length=context + ROOM)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ids = prompts(model.config.vocab_size, batch, context if context <= LONGEST_PROMPT else 32)
        first = per_token = None
        if context <= LONGEST_PROMPT:
            runs = [seconds(functools.partial(engine.generate, ids, 1), device) for _ in range(5)]
            first = 1e3 * statistics.median(runs[2:])  # with the second one a graph is captured
        us = step_us(engine, ids, context, count, device)
        peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
        del engine
        if generate and context <= LONGEST_PROMPT:
            per_token = generate_us(model, ids, count, device)
        found.append(Measured(us, first, per_token, peak))
    return found


def is_right(model: Any, device: str) -> bool:
    """The engine gives the tokens of `model.generate`, over several chunks of the cache."""
    (ids,) = prompts(model.config.vocab_size, 1, 40)
    want = greedy(model, ids[None].to(device), 24)[0, 40:].tolist()
    got = Engine(model).generate([ids], 24)[0].tolist()
    if got != want:
        print(f"tokens of the engine: {got}, of generate: {want}", file=sys.stderr)
    return got == want


def moved_bytes(model: Any, context: int, batch: int) -> int:
    """What a step reads at least: every weight but the embedding's, and the packed cache."""
    config = model.config
    embedding = {id(p) for p in model.model.embed_tokens.parameters()}
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in embedding)
    head = config.head_dim + 8  # bytes of a key and a value with their scales and zero-points
    return weights + batch * context * config.num_hidden_layers * config.num_key_value_heads * head


def rows_of(name: str, shape: Any, options: dict[str, Any], copy_gbps: float) -> Iterator[list[Row]]:
    """The rows of one shape twice: with the packed model measured, then with the other one beside it."""
    device, contexts, batch, count = (options[key] for key in ("device", "contexts", "batch", "tokens"))
    dtype = torch.float16 if device == "cuda" else torch.float32
    positions = max(contexts) + ROOM
    before = held_bytes(device)
    model = packed_llama(shape, positions, device, dtype)
    right = is_right(model, device)
    moved = [moved_bytes(model, context, batch) for context in contexts]
    ours = measure(model, contexts, batch, count, device, False, before)
    del model
    gc.collect()
    rows = [
        Row("decode", name, context, batch, "w2a4kv4", "cold", None, f"engine.{str(dtype)[6:]}", None, None,
            moved[i], moved[i] / copy_gbps / 1e3, right)
        for i, context in enumerate(contexts)
    ]  # fmt: skip
    for row, a in zip(rows, ours, strict=True):
        row.us, row.first_ms, row.peak_bytes = a.token_us, a.first_ms, a.peak_bytes
    yield rows
    before = held_bytes(device)
    model = float_llama(shape, positions, device, dtype)
    theirs = measure(model, contexts, batch, count, device, True, before)
    del model
    gc.collect()
    for row, b in zip(rows, theirs, strict=True):
        row.peer_us, row.ratio = b.token_us, b.token_us / row.us
        row.peer_first_ms, row.generate_us, row.peer_peak_bytes = b.first_ms, b.generate_us, b.peak_bytes
    yield rows


def table(rows: list[Row]) -> str:
    def shown(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
        return "" if value is None else f"{value * scale:.{digits}f}"

    lines = []
    for row in rows:
        us, peak, other = row.us, row.peak_bytes, row.peer_peak_bytes
        lines.append((
            row.shape, row.context, row.tokens, shown(us and 1e6 * row.tokens / us), shown(row.ratio, 1, 2),
            shown(us and row.bound / us, 1, 2), shown(row.generate_us and row.generate_us / us, 1, 2),
            shown(row.first_ms), shown(row.peer_first_ms), shown(peak, 1e-9, 2),
            shown(peak and other and peak / other, 1, 2), "" if row.correct else "WRONG",
        ))  # fmt: skip
    headers = (
        "model", "context", "batch", "tokens/s", f"times {rows[0].peer}", "of a copy's speed",
        "times generate", "first token, ms", "the other's", "peak GB", "of the other's", "",
    )  # fmt: skip
    return tabulate(lines, headers, disable_numparse=True)


@click.command(help="\b\n" + __doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--models", multiple=True, type=click.Choice(list(MODELS)), help="May be repeated.")
@click.option("--contexts", callback=parse_tokens, default="128,4096,32768", show_default=True)
@click.option("--batch", type=click.IntRange(1, 16), default=1, show_default=True)
@click.option("--tokens", type=click.IntRange(2, ROOM // 2), default=64, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
def main(device, models, contexts, batch, tokens, json_file):
    if device == "cuda" and not (torch.cuda.is_available() and has_cuda_kernels()):
        raise click.ClickException(
            "--device cuda: there is no CUDA device here, or no CUDA kernels were built"
        )
    if device == "cpu":
        warn_if_busy()
        if max(contexts) > LONGEST_PROMPT:
            raise click.ClickException(f"--contexts {max(contexts)}: at most {LONGEST_PROMPT} on a CPU")
    models = models or (
        ("llama-2-7b", "llama-3-8b", "llama-3.2-1b") if device == "cuda" else ("smollm2-135m",)
    )
    options = {"device": device, "contexts": list(contexts), "batch": batch, "tokens": tokens}
    meta, rows = metadata(device) | {"options": options}, []
    copy = copy_row(device)
    for name in models:
        before = rows
        try:
            for found in rows_of(name, MODELS[name], options, copy.gbps):
                rows = [*before, *found]
                if json_file is not None:
                    write_json(json_file, {"meta": meta, "rows": [copy.to_dict(), *map(asdict, rows)]})
        except torch.cuda.OutOfMemoryError as error:
            message = str(error).splitlines()[0]
            raise click.ClickException(
                f"{name}: out of GPU memory: {message}; give smaller --contexts"
            ) from None
    print(table(rows))
    if not all(row.correct for row in rows):
        raise click.ClickException("the engine and model.generate give other tokens: no time above counts")


if __name__ == "__main__":
    main()
