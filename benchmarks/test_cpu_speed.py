"""CPU kernels under pytest-benchmark, to compare two commits; each result is checked before it is timed.

    python -m pytest benchmarks/test_cpu_speed.py --benchmark-autosave
    python -m pytest benchmarks/test_cpu_speed.py --benchmark-compare

Not part of the default run. One buffer, so hot: `benchmarks.bench_*` measure cold ones, peers and bounds.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_gemv, bench_hadamard, bench_quantize
from benchmarks.harness import Subject
from benchmarks.shapes import LinearShape


def run(benchmark, subject: Subject) -> None:
    assert subject.check()
    (call,) = subject.ours.calls(1)
    benchmark.extra_info["bytes"] = subject.bytes
    benchmark(call)


@pytest.mark.parametrize("op", bench_gemv.OPS)
@pytest.mark.parametrize("shape", [LinearShape(2048, 2048), LinearShape(576, 1536)], ids=str)
@pytest.mark.parametrize("tokens", [1, 16])
def test_linear(benchmark, op, shape, tokens):
    run(benchmark, bench_gemv.subject(op, shape, tokens, torch.float32, "cpu"))


@pytest.mark.parametrize("size", [128, 8192, 11008])
@pytest.mark.parametrize("tokens", [1, 16])
def test_hadamard(benchmark, size, tokens):
    run(benchmark, bench_hadamard.subject(size, tokens, torch.float32, "cpu"))


@pytest.mark.parametrize("op", bench_quantize.OPS)
@pytest.mark.parametrize("tokens", [1, 16])
def test_quantize(benchmark, op, tokens):
    run(benchmark, bench_quantize.subject(op, 8192, tokens, torch.float32, "cpu"))
