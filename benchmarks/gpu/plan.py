"""What a lent GPU is used for, in the order of what is learnt if it is lost. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from benchmarks.files import ROOT
from benchmarks.gpu.install import Carried
from benchmarks.gpu.session import Stage, python

#: Tests that a rehearsal runs in place of those for a GPU.
REHEARSED = ("tests/unit/test_packing.py", "tests/unit/test_hadamard.py")
#: Workers of the tests.
WORKERS = 8
#: Kernels that ncu looks at, one launch of each.
PROFILED = ("gemv_bmma", "gemv_imma", "attention_kv4", "hadamard", "rope_append_kv4", "linear_w8")
#: In the mangled name of every kernel of csrc/cuda, all of which are in w2a4::cuda.
OURS = "w2a44cuda"
#: A launch of each variant of them on little data.
LAUNCHES = python("-m", "benchmarks.smoke", "--device", "cuda", "--launches")


def stages(out: Path, carried: Carried | None, gpu_arch: int | None, device: str) -> list[Stage]:
    """All of them; those that cannot run here say so by their needs."""
    results, cpu = str(out / "results.jsonl"), device == "cpu"
    smoke = ("-m", "benchmarks.smoke", "--device", device, *(("--small",) if cpu else ()))
    plan = [
        mma_rate(results, carried, gpu_arch),
        Stage("smoke", 60, python(*smoke, "--isolate", "--jsonl", results)),
        Stage("gemv", 30),
        Stage("engine", 90, needs=() if cpu else ("memory",)),
        Stage("kv4", 20),
        Stage("hadamard", 30),
        Stage("gemm", 30),
        tests(results, cpu),
        sanitizer("memcheck", 45),
        sanitizer("racecheck", 60),
        profile(out),
        Stage("humming", 45, needs=("gpu", "humming", "nvcc")),
        Stage("gemlite", 40, needs=("gpu", "gemlite")),
        Stage("train", 100),
        Stage("step", 60),
    ]
    return plan


def chosen(stages: list[Stage], names: list[str]) -> list[Stage]:
    """Those of these names, in the plan's order.

    Raises:
        ValueError: no stage is called so; the message lists all.
    """
    known = [stage.name for stage in stages]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no stage; there are {', '.join(known)}")
    return [stage for stage in stages if stage.name in names]


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
    marks, files = ("not slow", REHEARSED) if cpu else ("gpu and not slow", gpu_tests())
    chosen = ("-m", marks, "-n", str(2 if cpu else WORKERS), *(str(ROOT / name) for name in files))
    return Stage("tests", 120, (*pytest(results), *chosen), needs=("xdist",))


def gpu_tests() -> tuple[str, ...]:
    """Files with tests for a GPU: each worker reads all that it is given."""
    return tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/gpu").glob("test_*.py")))


def sanitizer(tool: str, seconds: int) -> Stage:
    """compute-sanitizer's memcheck, racecheck, … over one launch of each variant of our kernels.

    Only ours are instrumented. Each tensor is an allocation of its own, or an access beyond one would hit
    what torch's allocator keeps around it and go unnoticed.
    """
    check = ("compute-sanitizer", "--tool", tool, "--kernel-name", f"kns={OURS}", "--error-exitcode", "1",
             "--print-limit", "20")  # fmt: skip
    return Stage(tool, seconds, (*check, *LAUNCHES), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                 ("gpu", "compute-sanitizer"))  # fmt: skip


def profile(out: Path) -> Stage:
    """Counters of the first launch of each kernel; the report comes back as `kernels.ncu-rep`."""
    which = ("--kernel-id", f"::regex:{'|'.join(PROFILED)}:1", "--launch-count", str(2 * len(PROFILED)))
    counters = ("ncu", "--set", "full", "--clock-control", "none", *which)
    report = ("--force-overwrite", "--export", str(out / "kernels"))
    return Stage("ncu", 45, (*counters, *report, *LAUNCHES), needs=("gpu", "ncu"))
