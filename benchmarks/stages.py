"""Commands that are run one after another on a GPU that is lent for minutes.

Each has a budget of seconds: one that takes longer is stopped, and what it wrote stays.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.files import ROOT

#: For logs and JSON of the stages.
PARTS = ROOT / "build/gpu_suite"
#: Seconds between two looks at what a stage has measured.
POLL = 5.0


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds it may take.

    Attributes:
        part: the JSON file it writes, if any.
        repeated: what to do where that file is there: run `anew` without it, `go on` from it, or `skip`.
        needed: without it, those after it are pointless.
    """

    name: str
    command: tuple[str, ...]
    budget: int
    part: Path | None = None
    repeated: Literal["anew", "go on", "skip"] = "anew"
    needed: bool = False

    def shown(self) -> str:
        return " ".join(self.command)


@dataclass
class Outcome:
    """How a stage ended: "ok", "failed", "stopped" at its budget, "skipped", or "running"."""

    name: str
    command: str
    status: str = "running"
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)


def python(name: str, budget: int, *arguments: str, part: bool = False, **rest: Any) -> Stage:
    """A stage of this Python; with `part`, it is told to write JSON."""
    file = PARTS / f"{name}.json" if part else None
    output = ("--json", str(file)) if file else ()
    return Stage(name, (sys.executable, *arguments, *output), budget, file, **rest)


def build() -> Stage:
    """The extension, for the GPU that is here."""
    return python("build", 150, "setup.py", "build_ext", "--inplace", needed=True)


def run(plan: list[Stage], look: Callable[[list[Outcome]], Any], limit: float = math.inf) -> list[Outcome]:
    """Run all in turn.

    Args:
        look: called with what there is so far, every few seconds and after each stage.
        limit: seconds for all of them.
    """
    end = time.monotonic() + limit
    PARTS.mkdir(parents=True, exist_ok=True)
    for stage in plan:
        if stage.part is not None and stage.repeated == "anew":
            stage.part.unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    for stage in tqdm(plan, unit="stage", disable=not sys.stderr.isatty()):
        outcomes.append(Outcome(stage.name, stage.shown()))
        if stage.repeated == "skip" and stage.part.is_file():
            outcomes[-1].status = "skipped"
            continue
        run_stage(stage, outcomes[-1], lambda: look(outcomes), min(stage.budget, end - time.monotonic()))
        look(outcomes)
        if outcomes[-1].status != "ok":
            print(f"{stage.name} {outcomes[-1].status}:", *outcomes[-1].tail[-15:], sep="\n  ")
            if stage.needed:
                break
    return outcomes


def run_stage(stage: Stage, outcome: Outcome, look: Callable[[], None], budget: float) -> None:
    """Run one command in a process group of its own; `look` is called every few seconds."""
    log = PARTS / f"{stage.name}.log"
    start = time.monotonic()
    environment = os.environ | {"W2A4_BUILD_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        try:
            process = subprocess.Popen(stage.command, cwd=ROOT, env=environment, stdout=output,
                                       stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        except OSError as error:
            outcome.status, outcome.tail = "failed", [f"{stage.command[0]}: {error.strerror}"]
            return
        outcome.status = _wait(process, start + budget, look)
    outcome.seconds = round(time.monotonic() - start, 1)
    outcome.tail = log.read_text(errors="replace").splitlines()[-200:]


def _wait(process: subprocess.Popen, deadline: float, look: Callable[[], None]) -> str:
    """How the process ended. It and its children are stopped at the deadline, or if this program is."""
    try:
        while (left := deadline - time.monotonic()) > 0:
            try:
                return "ok" if process.wait(timeout=min(POLL, left)) == 0 else "failed"
            except subprocess.TimeoutExpired:
                look()
        return "stopped"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def parts(plan: list[Stage]) -> dict[str, Any]:
    """What the stages have written so far, by name."""
    return {
        stage.name: json.loads(stage.part.read_text()) if stage.part.is_file() else {}
        for stage in plan
        if stage.part is not None
    }


def table(outcomes: list[dict[str, Any]]) -> str:
    return tabulate(
        [(s["name"], s["status"], s["seconds"]) for s in outcomes], ("stage", "status", "seconds")
    )


def plan_table(plan: list[Stage]) -> str:
    return tabulate([(s.name, s.budget, s.shown()) for s in plan], ("stage", "seconds", "command"))
