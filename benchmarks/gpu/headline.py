"""The stages of the shared process: what the project promises, at few shapes, ours before the peers.

On a CPU the same functions run at small shapes: a rehearsal, whose times mean nothing.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import w2a4
from benchmarks import (
    bench_engine,
    bench_gemm,
    bench_gemv,
    bench_hadamard,
    bench_kv4,
    bench_quantize,
    bench_training,
    peers,
    timeline,
)
from benchmarks.faults import FAULT, device_fault, frames
from benchmarks.files import append_line, read_lines
from benchmarks.harness import Case, Options, Subject, copy_row, measure, metadata
from benchmarks.random_llama import packed_llama
from benchmarks.shapes import MODELS, LinearShape, Model
from benchmarks.targets import GEMV_RATIOS, known_copy
from w2a4.evaluate.perplexity import perplexity
from w2a4.train.run import train as run_training

#: Tokens of the prompts that a GEMM is for.
PROMPT = 2048
#: Where other projects are measured: each of their kernels is compiled and tuned for ten seconds a shape.
PROJECT_SHAPES = (LinearShape(4096, 4096), LinearShape(28672, 4096))
TINY = Model(128, 256, 4, 2, 32, 2, 512)


@dataclass
class Run:
    """What a stage needs to know, and where its rows go."""

    results: Path
    device: str
    carry: Path | None = None
    variant: str | None = None
    gbps: float = 0.0
    stage: str = ""

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    def emit(self, **entry: Any) -> None:
        of = {} if self.variant is None else {"variant": self.variant}
        append_line(self.results, {"stage": self.stage, **of, **entry})

    def measure(self, cases: Iterable[Case]) -> None:
        """Emit the rows of cases; one that raises is a wrong row, and the next one is measured."""
        options = Options(self.device, quick=True)
        for case in cases:
            try:
                for row in measure(case, options, self.gbps):
                    self.emit(**row.to_dict())
            except Exception as error:
                self.emit(op=case.op, shape=case.shape, tokens=case.tokens, dtype=case.dtype, correct=False,
                          error=describe(error), where=frames(error))  # fmt: skip
                leave_if_poisoned(self, error)


def describe(error: BaseException) -> str:
    """Its first line that says something."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def leave_if_poisoned(run: Run, error: BaseException) -> None:
    """End the process if no CUDA call can succeed any more; another one does what is left."""
    fault = device_fault()
    if fault:
        run.emit(status="died", why=f"{describe(error)}; {fault}", where=frames(error))
        sys.stdout.flush()
        os._exit(FAULT)


def gemv_shapes(small: bool) -> list[LinearShape]:
    names = ["128x64", "64x256"] if small else list(GEMV_RATIOS)
    return [LinearShape(*map(int, name.split("x"))) for name in names]


def _dtype(run: Run, dtype: torch.dtype = torch.float16) -> torch.dtype:
    return torch.float32 if run.small else dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gemv(run: Run) -> None:
    """One and eight tokens at 2 bits, then the whole linear from its input on, and 4 bits."""
    dtype = _dtype(run)
    wanted = [("linear_w2a4", 1), ("linear_w2a4", 8), ("rmsnorm_a4+linear_w2a4", 1), ("linear_w4a4", 1)]
    run.measure(
        Case(op, str(shape), tokens, _name(dtype),
             partial(bench_gemv.subject, op, shape, tokens, dtype, run.device, projects=False))
        for op, tokens in wanted
        for shape in gemv_shapes(run.small)
    )  # fmt: skip


def engine(run: Run) -> None:
    """Decoding with a whole model at two contexts, its first token, and its memory."""
    name, shape, contexts = ("llama-2-7b", MODELS["llama-2-7b"], [128, 4096])
    if run.small:
        name, shape, contexts = "tiny", TINY, [8, 40]
    options = {"device": run.device, "contexts": contexts, "batch": 1, "tokens": 3 if run.small else 64}
    for rows in bench_engine.rows_of(name, shape, options, run.gbps):
        for row in rows:
            run.emit(**asdict(row))


def kv4(run: Run) -> None:
    """Attention over a long cache, appending to it, and a prompt."""
    dtype = _dtype(run)
    long, short = ((4, 2, 32, 64), (4, 2, 32, 32)) if run.small else ((32, 8, 128, 32768), (32, 8, 128, 4096))
    wanted = [
        ("attention_kv4", bench_kv4.attention, long, 4),
        ("attention_kv4", bench_kv4.attention, short, 4),
        ("rope_append_kv4", bench_kv4.rope_append, short, 3),
        ("prefill_kv4", bench_kv4.prefill, short, 4),
    ]
    run.measure(
        Case(op, "x".join(map(str, shape[:width])), 1, _name(dtype),
             partial(build, shape, 1, dtype, run.device))
        for op, build, shape, width in wanted
    )  # fmt: skip


def hadamard(run: Run) -> None:
    """The transform at 16 MB, and every fused quantiser at one token and at many."""
    dtype = _dtype(run)
    widths = (64, 96) if run.small else (4096, 11008, 14336, 28672)
    rows = 4 if run.small else None
    wanted = [(width, rows or -(-bench_hadamard.LARGE // (2 * width * dtype.itemsize))) for width in widths]
    if not run.small:  # beside hadamard_a4 below
        wanted += [(width, tokens) for width in (11008, 14336) for tokens in (1, PROMPT)]
    cases = [
        Case("hadamard", str(width), count, _name(dtype),
             partial(bench_hadamard.subject, width, count, dtype, run.device))
        for width, count in wanted
    ]  # fmt: skip
    cases += [
        Case(op, str(width), tokens, _name(dtype),
             partial(bench_quantize.subject, op, width, tokens, dtype, run.device))
        for tokens in (1, 4 if run.small else PROMPT)
        for op in bench_quantize.OPS
        for width in ((64,) if run.small else (4096,) if "hadamard" not in op else (11008, 14336))
    ]  # fmt: skip
    run.measure(cases)


def gemm(run: Run) -> None:
    """A prompt through two shapes, at 2 and 4 bits."""
    dtype = _dtype(run, torch.bfloat16)
    shapes = [LinearShape(64, 128)] if run.small else [LinearShape(4096, 4096), LinearShape(14336, 4096)]
    tokens = 32 if run.small else PROMPT
    run.measure(
        Case(op, str(shape), tokens, _name(dtype),
             partial(bench_gemm.subject, op, shape, tokens, dtype, run.device, False, False, projects=False))
        for shape in shapes
        for op in bench_gemm.OPS
    )  # fmt: skip


def project(name: str, run: Run) -> None:
    """Another project's 2-bit kernels beside ours, at one token."""

    def beside(make: Callable, shape: LinearShape) -> Subject:
        dtype = _dtype(run)
        ours = bench_gemv.subject("linear_w2a4", shape, 1, dtype, run.device, projects=False)
        x = torch.randn(1, shape.features, dtype=dtype, device=run.device)
        try:
            peer = make(x, shape.out, shape.group)
            if peer is not None:
                peer.calls(1)[0]()  # which compiles it
        except Exception as error:  # theirs, so nothing of ours is wrong
            leave_if_poisoned(run, error)
            run.emit(peer=name, shape=str(shape), peer_error=describe(error), where=frames(error))
            peer = None
        return Subject(ours.ours, [] if peer is None else [peer], ours.bytes, ours.check)

    run.measure(
        Case("linear_w2a4", str(shape), 1, _name(_dtype(run)), partial(beside, make, shape))
        for make in peers.PROJECTS[name]
        for shape in (gemv_shapes(True) if run.small else PROJECT_SHAPES)
    )


def train(run: Run) -> None:
    """A minute of training the carried small model to W2A4KV4, judged on text that it was not trained on."""
    if run.carry is None:
        raise FileNotFoundError("the small model and its text are in the folder that --carry names")
    model, tokenizer = w2a4.load_model(str(run.carry / "model"), dtype=torch.float32)
    text = {name: (run.carry / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "held_out")}
    score = partial(perplexity, model.to(run.device), tokenizer, [text["held_out"]], seqlen=256,
                    windows=2 if run.small else 64, progress=False)  # fmt: skip
    before = score()["perplexity"]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "text.txt"
        data.write_text(text["train"][: 20_000 if run.small else None], encoding="utf-8")
        recipe = w2a4.Recipe.load("w2a4kv4-rcp-quick").override(**{
            "training.minutes": 0.05 if run.small else 1.0, "training.data": str(data),
            "training.batch_size": 2 if run.small else 64, "training.seqlen": 256, "calib_seqlen": 256,
            "calib_samples": 4 if run.small else 64,
        })  # fmt: skip
        run_training(model, tokenizer, recipe, Path(folder) / "work", [text["train"]], progress=False,
                     device=torch.device(run.device))  # fmt: skip
    after, facts = score()["perplexity"], model.w2a4_report.training
    run.emit(op="train", shape="testbed", tokens=facts["tokens"], steps=facts["steps"], dtype="w2a4kv4",
             perplexity=after, full_precision=before, ratio=after / before, losses=facts["losses"],
             minutes=facts["minutes"], correct=all(map(math.isfinite, facts["losses"])))  # fmt: skip


def step(run: Run) -> None:
    """A step of training everything quantised, against a plain one."""
    layers, tokens, repeats = (1, 64, 1) if run.small else (6, 8192, 5)
    ids = torch.randint(49152, (max(1, tokens // 512), min(tokens, 512)), device=run.device)
    for row in bench_training.measured(layers, ids, repeats):
        run.emit(op="training step", shape=f"{layers} layers", tokens=tokens, kind=row["step"],
                 us=1e6 * row["s"], slowdown=row["ratio"], correct=True)  # fmt: skip


def tune(run: Run, shape: str) -> None:
    """Check and measure every tile of the Triton GEMM on one shape, and keep the fastest."""
    out, features = map(int, shape.split("x"))
    dtype, tokens = _dtype(run, torch.bfloat16), 32 if run.small else PROMPT
    tiles = not run.small  # a CPU has none to measure
    run.measure(
        Case(op, shape, tokens, _name(dtype),
             partial(bench_gemm.subject, op, LinearShape(out, features), tokens, dtype, run.device, False,
                     tiles, projects=False))
        for op in bench_gemm.OPS
    )  # fmt: skip


def steps(run: Run) -> None:
    """One step of decoding, kernel by kernel, each beside the time that its bytes take."""
    shape, context = (TINY, 32) if run.small else (MODELS["llama-2-7b"], 4096)
    model = packed_llama(shape, context + bench_engine.ROOM, run.device, _dtype(run))
    step_us, kernels = timeline.timeline(model, context, 1, run.device)
    for kernel in timeline.bounded(kernels, shape, context, model, run.gbps):
        run.emit(op="timeline", context=context, step_us=step_us, **kernel)


STAGES: dict[str, Callable[..., None]] = {
    "gemv": gemv,
    "engine": engine,
    "kv4": kv4,
    "hadamard": hadamard,
    "gemm": gemm,
    "train": train,
    "step": step,
    "tune": tune,
    "timeline": steps,
    **{name: partial(project, name) for name in peers.PROJECTS},
}


def work(
    names: Iterable[str], results: Path, device: str, carry: Path | None = None, variant: str | None = None
) -> None:
    """Run stages one after another, each with a `begin` and a `status` in the results.

    Args:
        names: of `STAGES`; what stands behind a colon is the stage's argument.
        variant: which of two builds this is; in every line.
    """
    torch.manual_seed(0)
    run = Run(results, device, carry, variant)
    run.emit(stage="machine", **metadata(device))
    copy = copy_row(device)
    run.gbps = max(copy.gbps, known_copy(read_lines(results)[0]) or 0.0)
    run.emit(stage="copy", **copy.to_dict())
    for run.stage in names:
        run.emit(event="begin")
        begun = time.monotonic()
        status: dict[str, Any] = {"status": "ok"}
        try:
            name, _, argument = run.stage.partition(":")
            STAGES[name](run, *([argument] if argument else []))
        except Exception as error:
            leave_if_poisoned(run, error)
            status = {"status": "failed", "why": describe(error), "where": frames(error)}
        run.emit(seconds=round(time.monotonic() - begun, 1), **status)
        forget(device)


def forget(device: str) -> None:
    """Free what the benches keep between their rows."""
    for kept in (bench_gemv.weights, bench_gemv.full_weights, bench_kv4.packed, bench_kv4.plain,
                 bench_hadamard.dense, peers.copy_of):  # fmt: skip
        kept.cache_clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
