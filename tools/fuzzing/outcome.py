"""What came of a case, and the processes that cases run in, so that a crash or a hang ends one case only."""

from __future__ import annotations

import dataclasses
import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

#: Outcomes, and those of them that are faults.
CLASSES = ("right", "refused", "raw traceback", "crash", "hang", "silent difference", "partial output")
BAD = CLASSES[2:]


@dataclass
class Outcome:
    """A case, and what came of it.

    Attributes:
        note: what the case was and what it said, for someone who looks into it.
    """

    seed: int
    result: str
    note: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class RandomDraw:
    """A `Draw` of a seed, the same on every machine."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def number(self, least: int, most: int) -> int:
        return self.random.randint(least, most)

    def pick(self, options: Sequence[Any]) -> Any:
        return self.random.choice(list(options))


class Silent(AssertionError):
    """A result that is wrong without a word."""


class Partial(AssertionError):
    """Output that was left half-written."""


#: A case: takes its seed, returns `right` or `refused`, and a note.
Case = Callable[[int], tuple[str, str]]


def run_here(case: Case, seed: int) -> Outcome:
    """A case in this process."""
    start = time.monotonic()
    try:
        result, note = case(seed)
    except Silent as error:
        result, note = "silent difference", str(error)
    except Partial as error:
        result, note = "partial output", str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        result = "raw traceback"
        note = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"
    return Outcome(seed, result, " ".join(note.split())[:400], round(time.monotonic() - start, 3))


def run_forked(case: Case, seeds: Sequence[int], limit: float) -> Iterator[Outcome]:
    """Cases one after another in a forked process, in another one after a crash or a hang.

    Args:
        limit: seconds for one case.
    """
    waiting = list(seeds)
    while waiting:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        child = context.Process(target=_serve, args=(case, list(waiting), theirs), daemon=True)
        child.start()
        theirs.close()
        while waiting:
            outcome = _next(ours, child, waiting[0], limit)
            waiting.pop(0)
            yield outcome
            if outcome.result in ("crash", "hang"):
                break
        child.kill()
        child.join()


def _serve(case: Case, seeds: list[int], pipe: Any) -> None:
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin = open(os.devnull)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for seed in seeds:
        pipe.send(run_here(case, seed))


def _next(pipe: Any, child: Any, seed: int, limit: float) -> Outcome:
    try:
        if pipe.poll(limit):
            return pipe.recv()
    except EOFError:
        child.join()
        number = -(child.exitcode or 0)
        name = signal.Signals(number).name if number > 0 else f"exit code {child.exitcode}"
        return Outcome(seed, "crash", name)
    return Outcome(seed, "hang", f"over {limit:g} s", limit)


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return {name: sum(o.result == name for o in outcomes) for name in CLASSES}
