"""Stages that run one after another on a machine that is lent for minutes. Imports no torch.

What a stage finds is a line of `results.jsonl`, on the disk at once; all output is in `stages.log`. Each
stage has a limit. One that fails, hangs or dies costs itself only: what runs in the shared process, which is
started once because each start costs many seconds, goes on in a new one with the stages that are left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.files import append_line, read_lines

#: Seconds that the shared process may take until its first stage begins, and between two of them.
START = 90
#: Seconds between two looks at a process.
POLL = 0.2
#: Less time than this is not worth a stage.
LEAST = 5
#: Lines of a failed stage's output that its result keeps.
TAIL = 15


@dataclass(frozen=True)
class Stage:
    """A command, or a function of `headline` that is run in the shared process.

    Attributes:
        seconds: its limit.
        command: None for one of the shared process.
        environment: added to that of the command.
        needs: reasons not to run it, each a name that `Session.missing` may hold.
    """

    name: str
    seconds: int
    command: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


class Session:
    """Runs stages and writes down what becomes of them.

    Attributes:
        results: JSON lines: rows of measurements, and for each stage one with its `status`, which is "ok",
            "failed", "stopped" (at its limit), "died" (of a signal or a fault) or "left out", and `why`.
        missing: what this machine lacks, and why that matters, by name.
        rebuild: called once if the shared process cannot even start; says whether another try makes sense.
    """

    def __init__(self, folder: Path, shared: list[str], seconds: float, environment: Mapping[str, str]):
        """
        Args:
            shared: the shared process's command; names of stages are appended.
            seconds: for all stages together.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.results, self.log = folder / "results.jsonl", folder / "stages.log"
        self.shared, self.end = shared, time.monotonic() + seconds
        self.environment = dict(environment)
        self.missing: dict[str, str] = {}
        self.rebuild: Callable[[], bool] | None = None

    def note(self, **entry: Any) -> None:
        """Write a line down, and a stage's status on the terminal too."""
        append_line(self.results, entry)
        if "status" in entry:
            why = f": {entry['why']}" if entry.get("why") else ""
            print(
                f"{entry['stage']:<14} {entry['status']:<8} {entry.get('seconds', 0):6.1f} s{why}", flush=True
            )

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, stages: list[Stage]) -> None:
        """All in turn, as far as the time goes."""
        waiting = []
        for stage in stages:
            lacks = [self.missing[name] for name in stage.needs if name in self.missing]
            if lacks:
                self.note(stage=stage.name, status="left out", why=lacks[0])
            else:
                waiting.append(stage)
        while waiting:
            if self.left() < LEAST:
                for stage in waiting:
                    self.note(stage=stage.name, status="left out", why="no time left")
                return
            if waiting[0].command is not None:
                self.run_command(waiting.pop(0))
                continue
            count = next((i for i, stage in enumerate(waiting) if stage.command is not None), len(waiting))
            waiting = [*self.run_shared(waiting[:count]), *waiting[count:]]

    def run_command(self, stage: Stage) -> bool:
        """Whether it ended well within its limit."""
        begun, offset = time.monotonic(), self._log_size()
        process = self._start(stage.name, list(stage.command or ()), stage.environment)
        if isinstance(process, str):
            self.note(stage=stage.name, status="failed", seconds=0.0, why=process)
            return False
        ended = _wait(process, begun + min(stage.seconds, self.left()))
        self._say_how(stage, ended, time.monotonic() - begun, offset)
        return ended == 0

    def run_shared(self, stages: list[Stage]) -> list[Stage]:
        """Run stages in one process as far as that lives; returns those that are still to be run."""
        seen, log_start = self._results_size(), self._log_size()
        process = self._start("shared", [*self.shared, *(stage.name for stage in stages)], {})
        if isinstance(process, str):
            self.note(stage=stages[0].name, status="failed", seconds=0.0, why=process)
            return stages[1:]
        by_name = {stage.name: stage for stage in stages}
        watch = Watch(self.results, seen, by_name, self.end)
        try:
            while process.poll() is None and not watch.late():
                time.sleep(POLL)
        finally:
            ended = process.poll()
            _kill(process)
        watch.late()  # what was written since the last look
        if watch.current is not None:
            self._say_how(watch.current, ended, watch.seconds(), log_start)
            watch.done.add(watch.current.name)
        elif not watch.done:
            if not watch.began and self.rebuild is not None and self._rebuilt():
                return stages
            self._say_how(stages[0], ended or None, watch.seconds(), log_start)  # 0 would be no reason
            watch.done.add(stages[0].name)
        return [stage for stage in stages if stage.name not in watch.done]

    def _rebuilt(self) -> bool:
        rebuild, self.rebuild = self.rebuild, None
        return rebuild()

    def _say_how(self, stage: Stage, ended: int | None, seconds: float, offset: int) -> None:
        """Write a stage's status down; `ended` is None for a process that had to be killed."""
        tail = self._tail(offset)
        entry: dict[str, Any] = {"stage": stage.name, "seconds": round(seconds, 1)}
        if ended == 0:
            self.note(**entry, status="ok")
        elif ended is None:
            self.note(**entry, status="stopped", why=f"not done within its {seconds:.0f} s", tail=tail)
        elif ended < 0:
            self.note(**entry, status="died", why=f"of {_signal_name(-ended)}", tail=tail)
        else:
            said = next((line.strip() for line in reversed(tail) if line.strip()), "")
            self.note(**entry, status="failed", why=f"exit code {ended}; {said[-300:]}", tail=tail)

    def _start(self, name: str, command: list[str], more: Mapping[str, str]) -> subprocess.Popen | str:
        """A process group whose output goes to the log, or why there is none."""
        with self.log.open("ab") as log:
            log.write(f"\n==== {name}: {' '.join(command)}\n".encode())
            log.flush()
            try:
                return subprocess.Popen(
                    command, env=self.environment | dict(more), stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                return f"{command[0]}: {error.strerror}"

    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _results_size(self) -> int:
        return self.results.stat().st_size if self.results.exists() else 0

    def _tail(self, offset: int) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(offset)
            return log.read().decode(errors="replace").splitlines()[-TAIL:]


class Watch:
    """What the shared process says it is doing, read from the results: a `begin`, then a `status` a stage."""

    def __init__(self, results: Path, seen: int, stages: dict[str, Stage], end: float):
        self.results, self.seen, self.stages, self.end = results, seen, stages, end
        self.done: set[str] = set()
        self.current: Stage | None = None
        self.began = False
        self.since = time.monotonic()

    def late(self) -> bool:
        """Whether the process is over a limit, after a look at what it wrote."""
        entries, self.seen = read_lines(self.results, self.seen)
        for entry in entries:
            stage = self.stages.get(entry.get("stage", ""))
            if stage is None:
                continue
            if entry.get("event") == "begin":
                self.current, self.since, self.began = stage, time.monotonic(), True
            elif "status" in entry:
                self.current, self.since = None, time.monotonic()
                self.done.add(stage.name)
                print(f"{stage.name:<14} {entry['status']:<8} {entry.get('seconds', 0):6.1f} s", flush=True)
        limit = START if self.current is None else self.current.seconds
        return time.monotonic() > min(self.since + limit, self.end)

    def seconds(self) -> float:
        return time.monotonic() - self.since


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def _wait(process: subprocess.Popen, deadline: float) -> int | None:
    """Exit code; None if it had to be killed at the deadline."""
    try:
        return process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """The whole group, also what an ended process has left running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
