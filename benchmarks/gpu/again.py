"""The second command: what the first one raised questions about. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from benchmarks.files import ROOT, read_lines
from benchmarks.gpu import install as installing
from benchmarks.gpu.plan import pytest
from benchmarks.gpu.session import Session, Stage

#: Failed tests that are repeated, at most.
MOST_TESTS = 40
#: How often two wheels take turns.
TURNS = 2
#: Stages that two wheels are compared by.
COMPARED = ("gemv", "hadamard")


def failed_tests(results: Path) -> list[str]:
    """Tests whose last outcome in a run was not good, by the name that pytest takes.

    Raises:
        click.ClickException: the file tells of no tests.
    """
    lines, _ = read_lines(results)
    outcomes = {line["test"]: line.get("outcome") for line in lines if "test" in line}
    if not outcomes:
        raise click.ClickException(f"--from {results}: it tells of no tests; give the results.jsonl of a run")
    return [name for name, outcome in outcomes.items() if outcome not in ("passed", "skipped")]


def repeat(names: list[str], results: Path) -> Stage:
    """Failed tests in one process, each launch waited for, so that a fault is blamed on the right one."""
    files = [str(ROOT / name) for name in names[:MOST_TESTS]]
    command = (*pytest(results), "--tb", "short", *files)
    return Stage("failed tests", 90, command, {"CUDA_LAUNCH_BLOCKING": "1"})


def compare(session: Session, wheels: tuple[Path, Path]) -> list[Stage]:
    """Stages of two builds of the package in turns, each in a folder of its own.

    Raises:
        click.ClickException: one of them does not install.
    """
    found = []
    for variant, wheel in zip("ab", wheels, strict=True):
        site = installing.new_site()
        if not installing.pip_install(session, f"install {variant}", site, [wheel]):
            raise click.ClickException(f"{wheel} does not install here; {session.log} says why")
        found.append((variant, installing.environment_of(site)["PYTHONPATH"]))
    return [
        Stage(
            f"{variant}{turn}", 45, (*session.shared, "--variant", variant, *COMPARED), {"PYTHONPATH": path}
        )
        for turn in range(TURNS)
        for variant, path in found
    ]


def comparison(lines: list[dict[str, Any]]) -> str:
    """Best times of both wheels by row, and how many times as long the second takes."""
    best: dict[tuple, dict[str, float]] = {}
    for line in lines:
        if line.get("variant") and line.get("us") and line.get("peer") is None and line.get("correct"):
            key = tuple(str(line[name]) for name in ("op", "shape", "tokens", "dtype", "cache"))
            times = best.setdefault(key, {})
            times[line["variant"]] = min(line["us"], times.get(line["variant"], line["us"]))
    rows = [(*key, t["a"], t["b"], t["b"] / t["a"]) for key, t in best.items() if {"a", "b"} <= set(t)]
    head = ("op", "shape", "tokens", "dtype", "cache", "a, us", "b, us", "b / a")
    return tabulate(rows, head, floatfmt=".2f", disable_numparse=False) if rows else ""


def told(lines: list[dict[str, Any]]) -> str:
    """What the second command found, for people."""
    tests = [
        (line["test"], line["outcome"], (line.get("message") or "")[:90]) for line in lines if "test" in line
    ]
    kernels = [
        (line["kernel"][:60], line["calls"], line["us"], line["bound_us"], line["times_bound"])
        for line in lines
        if line.get("op") == "timeline"
    ]
    tiles = [
        (line["op"], line["shape"], line["tokens"], line["us"], line["peer"], line["ratio"])
        for line in lines
        if str(line.get("stage", "")).startswith("tune") and line.get("us")
    ]
    parts = [
        tabulate(tests, ("test, launches waited for", "outcome", "")) if tests else "",
        tabulate(kernels, ("kernel", "calls a step", "us a step", "bound", "times"), floatfmt=".2f")
        if kernels
        else "",
        tabulate(tiles, ("op", "shape", "tokens", "us", "peer", "ratio"), floatfmt=".2f") if tiles else "",
        comparison(lines),
    ]
    return "\n\n".join(part for part in parts if part)
