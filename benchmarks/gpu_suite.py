"""Everything that needs a GPU, in one command of under ten minutes.

    python -m benchmarks.gpu_suite --json FILE [--dry-run] [--decode] [--sanitizer] [--ncu]

Builds w2a4 with its CUDA kernels, runs the tests that need a GPU, measures instructions and kernels, and
ends with the targets and whether they are met. A stage that takes longer than its budget is stopped; what
it measured stays. FILE is rewritten every few seconds. Instead of the measurements, --decode measures whole
models, --sanitizer runs those tests that have "kernel" in their name under compute-sanitizer, and --ncu
profiles a step of decoding and the GEMV.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click
from tabulate import tabulate

from benchmarks import stages
from benchmarks.files import commit, now, write_json
from benchmarks.mma_rate import this_arch
from benchmarks.stages import PARTS, Outcome, Stage, python
from benchmarks.targets import targets

PYTEST = ("-m", "pytest", "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider")
GEMV_MODELS = ("llama-2-7b", "llama-3-8b", "llama-2-70b")


def plan_of(decode: bool, sanitizer: bool, ncu: bool) -> list[Stage]:
    """What to run, in order."""
    build = stages.build()
    models = [word for model in GEMV_MODELS for word in ("--models", model)]
    cuda = ("--device", "cuda", "--quick")
    if decode:
        return [build, *_decode()]
    if sanitizer or ncu:
        return [build, *(_sanitizers() if sanitizer else []), *(_profiles(cuda) if ncu else [])]
    return [
        build,
        python("tests", 120, *PYTEST),
        python("mma_rate", 25, "-m", "benchmarks.mma_rate", part=True),
        python("bench_gemv", 85, "-m", "benchmarks.bench_gemv", *cuda, *models, part=True),
        python("bench_gemm", 95, "-m", "benchmarks.bench_gemm", *cuda, part=True),
        python("bench_hadamard", 40, "-m", "benchmarks.bench_hadamard", *cuda, part=True),
        python("bench_quantize", 40, "-m", "benchmarks.bench_quantize", *cuda, part=True),
        python("bench_kv4", 45, "-m", "benchmarks.bench_kv4", *cuda, part=True),
    ]


def _decode() -> list[Stage]:
    """A stage a model, and one of a batch."""
    bench = ("-m", "benchmarks.bench_engine", "--device", "cuda", "--models")
    return [
        python("decode_7b", 150, *bench, "llama-2-7b", part=True),
        python("decode_8b", 150, *bench, "llama-3-8b", part=True),
        python("decode_1b", 75, *bench, "llama-3.2-1b", part=True),
        python(
            "decode_1b_16", 75, *bench, "llama-3.2-1b", "--batch", "16", "--contexts", "128,4096", part=True
        ),
    ]


def _sanitizers() -> list[Stage]:
    tests = (sys.executable, *PYTEST, "-k", "kernel")
    check = ("compute-sanitizer", "--error-exitcode", "1", "--tool")
    return [Stage(tool, (*check, tool, *tests), 140) for tool in ("memcheck", "racecheck", "synccheck")]


def _profiles(options: tuple[str, ...]) -> list[Stage]:
    """Of a step of decoding, and of the first launches of one model's GEMV; the report of these is
    `gemv.ncu-rep` beside the logs.
    """
    steps = python("timeline", 60, "-m", "benchmarks.timeline", "--device", "cuda", part=True)
    bench = (sys.executable, "-m", "benchmarks.bench_gemv", *options, "--models", GEMV_MODELS[0])
    kernels = ("--kernel-name", "regex:gemv|quantize", "--launch-count", "20")
    report = ("--force-overwrite", "--export", str(PARTS / "gemv"))
    counters = Stage(
        "ncu",
        ("ncu", "--set", "full", "--clock-control", "none", *kernels, *report, *bench, "--tokens", "1"),
        200,
    )
    return [steps, counters]


def merged(outcomes: list[Outcome], plan: list[Stage]) -> dict:
    """All results so far: rows of all benchmarks, instruction rates, outcomes, targets."""
    parts = stages.parts(plan)
    rows = [row for part in parts.values() for row in part.get("rows", [])]
    metas = {name: part["meta"] for name, part in parts.items() if "meta" in part}
    return {
        "meta": {"commit": commit(), "date": now(), "parts": metas},
        "stages": [asdict(outcome) for outcome in outcomes],
        "mma_rate": parts.get("mma_rate", {}),
        "timeline": parts.get("timeline", {}),
        "rows": rows,
        "targets": [asdict(target) for target in targets(rows)],
    }


def summary(result: dict) -> str:
    """Stages, targets, and whether everything that was measured is correct."""
    ran = stages.table(result["stages"])
    rows = result["rows"]
    if not rows:
        return ran
    met = {None: "not measured", True: "yes", False: "NO"}
    lines = [(t["name"], t["wanted"], t["measured"], met[t["met"]]) for t in result["targets"]]
    wrong = sorted(
        {f"{row['op']} {row['shape']}, {row['tokens']} tokens" for row in rows if not row["correct"]}
    )
    right = f"all {len(rows)} rows are correct" if not wrong else f"wrong: {'; '.join(wrong)}"
    return "\n\n".join((ran, tabulate(lines, ("target", "wanted", "measured", "met"), floatfmt=".2f"), right))


@click.command(help="\b\n" + __doc__)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
@click.option("--dry-run", is_flag=True, help="Print the stages and do nothing.")
@click.option("--decode", is_flag=True, help="Decoding with whole models instead.")
@click.option("--sanitizer", is_flag=True, help="Tests under compute-sanitizer instead.")
@click.option("--ncu", is_flag=True, help="Profiles instead.")
def main(json_file, dry_run, decode, sanitizer, ncu):
    plan = plan_of(decode, sanitizer, ncu)
    if dry_run:
        print(stages.plan_table(plan))
        return
    if json_file is None:
        raise click.ClickException("--json FILE is missing: results go there as they come")
    this_arch()  # fails in one line without a GPU
    outcomes = stages.run(plan, lambda outcomes: write_json(json_file, merged(outcomes, plan)))
    print(summary(merged(outcomes, plan)))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise click.ClickException("a stage failed; its output is above and in " + str(PARTS))


if __name__ == "__main__":
    main()
