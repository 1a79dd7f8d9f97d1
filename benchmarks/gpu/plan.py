"""What a lent GPU is used for, in the order of what is learnt if it is lost. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from benchmarks.files import ROOT
from benchmarks.gpu.install import Carried
from benchmarks.gpu.session import Stage, python

#: Tests that a rehearsal runs in place of those for a GPU.
REHEARSED = ("tests/test_packing.py", "tests/test_hadamard.py")
#: Workers of the tests.
WORKERS = 8
#: Kernels that ncu looks at, one launch of each.
PROFILED = ("gemv_bmma", "gemv_imma", "attention_kv4", "hadamard", "quantize", "linear_w8")


def stages(out: Path, carried: Carried | None, gpu_arch: int | None, device: str) -> list[Stage]:
    """All of them; those that cannot run here say so by their needs."""
    results, cpu = str(out / "results.jsonl"), device == "cpu"
    smoke = ("-m", "benchmarks.smoke", "--device", device, *(("--small",) if cpu else ()))
    plan = [
        mma_rate(results, carried, gpu_arch),
        Stage("smoke", 60, python(*smoke, "--isolate", "--jsonl", results)),
        Stage("gemv", 40),
        Stage("engine", 90, needs=() if cpu else ("memory",)),
        Stage("kv4", 30),
        Stage("hadamard", 30),
        Stage("gemm", 45),
        Stage("humming", 30, needs=("gpu", "humming", "nvcc")),
        Stage("gemlite", 30, needs=("gpu", "gemlite")),
        tests(results, cpu),
        *(sanitizer(tool, results, seconds) for tool, seconds in (("memcheck", 50), ("racecheck", 50))),
        Stage("train", 100),
        Stage("step", 60),
        profile(out),
    ]
    return plan


def mma_rate(results: str, carried: Carried | None, arch: int | None) -> Stage:
    """Instruction rates, fragments, bandwidth: what every other figure is judged by."""
    binary = carried.binary(arch) if carried and arch else None
    known = ("--binary", str(binary)) if binary else ()
    return Stage("mma_rate", 25, python("-m", "benchmarks.mma_rate", *known, "--jsonl", results),
                 needs=("gpu", "mma_rate"))  # fmt: skip


def pytest(results: Path | str) -> tuple[str, ...]:
    """pytest of this tree, which may be read-only, with a line a test in the results."""
    where = ("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"))
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *where, "--jsonl", str(results))


def tests(results: str, cpu: bool) -> Stage:
    """Those for a GPU, side by side; on a CPU a few others, so that the way is tried."""
    marks, files = ("not slow", REHEARSED) if cpu else ("gpu and not slow", ("tests",))
    chosen = ("-m", marks, "-n", str(2 if cpu else WORKERS), *(str(ROOT / name) for name in files))
    return Stage("tests", 170, (*pytest(results), *chosen), needs=("xdist",))


def sanitizer(tool: str, results: str, seconds: int) -> Stage:
    """compute-sanitizer over one launch of each of our kernels."""
    command, environment = ("true",), {}
    return Stage(tool, seconds, command, environment, ("gpu", "compute-sanitizer"))


def profile(out: Path) -> Stage:
    """Counters of one launch of each of a few kernels."""
    return Stage("ncu", 45, ("true",), needs=("gpu", "ncu"))
