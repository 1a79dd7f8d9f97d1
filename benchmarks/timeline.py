"""Where a step of decoding goes: which kernels run, how often, how long, and what is left between them.

    python -m benchmarks.timeline --device cuda [--model NAME] [--context 4096] [--batch 1] [--json FILE]

A packed model of that shape with random weights decodes through the engine; the times are the profiler's, a
step. On a CPU they are those of PyTorch's ops. The bound is the time in which a copy would move the bytes
that a step must read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_engine import ROOM, moved_bytes, place_at, prompts, seconds
from benchmarks.files import write_json
from benchmarks.harness import copy_row, metadata
from benchmarks.random_llama import packed_llama
from benchmarks.shapes import MODELS, Model
from w2a4.runtime.engine import Engine, inference

#: Steps measured, after as many that are not.
STEPS = 16
#: Kernels shown; the rest is in the JSON.
SHOWN = 20


def timeline(model: Any, context: int, batch: int, device: str) -> tuple[float, list[dict[str, Any]]]:
    """Microseconds of a step without the profiler, and of each kernel in a step with it."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    engine = Engine(model, max_length=context + ROOM)
    with inference(model):
        sequences = engine.sequences(prompts(model.config.vocab_size, batch, 32), ROOM)
        if device == "cuda":
            place_at(sequences, context)

        def steps() -> None:
            for _ in range(STEPS):
                sequences.advance(sequences.logits.argmax(-1))

        steps()
        step = 1e6 * seconds(steps, device) / STEPS
        with profile(activities=[activity]) as profiler:
            seconds(steps, device)
    kernels = [_kernel(average, device) for average in profiler.key_averages()]
    return step, sorted((k for k in kernels if k["us"]), key=lambda k: -k["us"])


def _kernel(average: Any, device: str) -> dict[str, Any]:
    total = average.self_device_time_total if device == "cuda" else average.self_cpu_time_total
    return {"kernel": average.key, "calls": average.count / STEPS, "us": total / STEPS}


def bytes_by_kernel(shape: Model, context: int, model: Any, batch: int = 1) -> dict[str, float]:
    """What kernels must move in a step at least, by a part of their names; the first that fits counts."""
    act = model.dtype.itemsize
    hidden, wide = batch * shape.hidden, batch * shape.intermediate
    heads, kv = batch * shape.heads * shape.head_dim, batch * shape.kv_heads * shape.head_dim
    head = sum(p.nbytes for p in model.lm_head.parameters())
    cache = batch * context * shape.kv_heads * (shape.head_dim + 8)
    packed = sum(p.nbytes for name, p in model.model.layers.named_parameters() if "norm" not in name)
    a_layer = {
        "hadamard_quantize": wide * (2 * act + 0.5),
        "attention_kv4": heads * 2 * act + cache,
        "rope_append_kv4": (heads + 2 * kv) * act + heads * act + kv * 1.1,
        "merge_kv4": heads * act,
        "quantize": (2 * hidden + heads) * (act + 0.5),
    }
    return {"gemv": packed, "gemm_": packed, "linear_w8": head} | {
        name: shape.layers * count for name, count in a_layer.items()
    }


def bounded(
    kernels: list[dict[str, Any]], shape: Model, context: int, model: Any, gbps: float
) -> list[dict[str, Any]]:
    """Kernels with the time that a copy of their bytes takes, and how many times as long they take.

    Kernels that share the same bytes, as the GEMVs of several sizes do, share the bound by their times.
    """
    known = bytes_by_kernel(shape, context, model)
    family = [next((part for part in known if part in kernel["kernel"]), None) for kernel in kernels]
    total: dict[str | None, float] = {}
    for part, kernel in zip(family, kernels, strict=True):
        total[part] = total.get(part, 0.0) + kernel["us"]
    out = []
    for part, kernel in zip(family, kernels, strict=True):
        bound = None if part is None else known[part] / gbps / 1e3
        share = bound and bound * kernel["us"] / total[part]
        times = total[part] / bound if bound else None
        out.append(kernel | {"bound_us": share, "times_bound": times})
    return out


def table(step: float, kernels: list[dict[str, Any]], bound: float) -> str:
    lines = [(k["us"], 100 * k["us"] / step, k["calls"], k["kernel"][:70]) for k in kernels[:SHOWN]]
    busy = sum(k["us"] for k in kernels)
    return (
        tabulate(lines, ("µs a step", "%", "calls", "kernel"), floatfmt=("8.1f", "4.1f", "g", ""))
        + f"\n\na step: {step:.0f} µs; in kernels {busy:.0f}; a copy of what it reads {bound:.0f}"
    )


@click.command(help="\b\n" + __doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--model", "name", type=click.Choice(list(MODELS)), help="A published shape.")
@click.option("--context", type=click.IntRange(1), default=4096, show_default=True, help="On a GPU.")
@click.option("--batch", type=click.IntRange(1, 16), default=1, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
def main(device, name, context, batch, path):
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: torch sees no CUDA device here")
    name = name or ("llama-2-7b" if device == "cuda" else "smollm2-135m")
    context = context if device == "cuda" else 32
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = packed_llama(name, context + ROOM, device, dtype)
    step, kernels = timeline(model, context, batch, device)
    bound = moved_bytes(model, context, batch) / copy_row(device).gbps / 1e3
    if path is not None:
        facts = {"model": name, "context": context, "batch": batch, "step_us": step, "bound_us": bound}
        write_json(path, {"meta": metadata(device), **facts, "kernels": kernels})
    click.echo(table(step, kernels, bound))


if __name__ == "__main__":
    main()
