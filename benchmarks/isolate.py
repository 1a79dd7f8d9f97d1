"""Cases in another process, and what is left of them in the next one when that dies, hangs or gives up.

The program that is run tells on stdout, in lines of a word and the name of a case, how far it is; see `tell`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import FAULT
from benchmarks.files import ROOT

BEGUN, RIGHT, WRONG, LEFT_OUT = "begun", "ok", "WRONG", "left-out"
#: Seconds until a process tells of its first case: it imports torch, on a machine that is busy.
STARTUP = 90.0
#: Seconds that a process may take to end after its last case, before it is killed.
ENDING = 2.0

#: Told the name of a case that ended its process, the seconds it had taken, and what happened.
Lost = Callable[[str, float, str], None]


def tell(*words: str) -> None:
    print(" ".join(words).rstrip(), flush=True)


def environment() -> dict[str, str]:
    """That of another Python: it imports w2a4 from where this one does, and `benchmarks` from here."""
    spec = importlib.util.find_spec("w2a4")
    home = [str(Path(spec.origin).parents[1])] if spec is not None and spec.origin else []
    paths = [*home, *os.environ.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)]
    joined = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    return os.environ | {"PYTHONPATH": joined, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def run(command: list[str], names: list[str], limit: float, lost: Lost) -> bool:
    """Run `command --only NAMES` until every case has ended; whether all ended right.

    A process that is gone before it told of any case is not tried again.
    """
    left, right = list(names), True
    while left:
        child = Child([*command, "--only", ",".join(left)], limit)
        told = child.follow(len(left))
        right &= WRONG not in told.values()
        left = [name for name in left if name not in told]
        if not left:
            break
        right = False
        broken = [child.current] if child.current is not None else [] if told else list(left)
        for name in broken:
            tell(WRONG, name, child.reason)
            lost(name, child.seconds, child.reason)
        left = [name for name in left if name not in broken]
        if left:
            print(f"{child.reason}; {len(left)} cases are left, in another process", flush=True)
    return right


class Child:
    """One process.

    Attributes:
        current: the case it had begun and not ended when it was gone, or None.
        seconds: that this case had taken.
        reason: how the process ended.
    """

    def __init__(self, command: list[str], limit: float) -> None:
        self.limit, self.current, self.seconds, self.reason = limit, None, 0.0, ""
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def follow(self, count: int) -> dict[str, str]:
        """Word of each case that ended, until all of so many have, or the process is gone.

        The end of its output is not waited for: a process of its own may hold that for longer.
        """
        told: dict[str, str] = {}
        begun, allowed = time.monotonic(), STARTUP
        try:
            while len(told) < count:
                line = self._lines.get(timeout=max(0.0, begun + allowed - time.monotonic()))
                if line is None:
                    break
                print(line, end="", flush=True)
                word, _, rest = line.partition(" ")
                name = rest.split(" ")[0].strip()
                if word == BEGUN:
                    self.current, begun, allowed = name, time.monotonic(), self.limit
                elif word in (RIGHT, WRONG, LEFT_OUT):
                    told[name], self.current = word, None
            self.reason = ended(self._process.wait(timeout=ENDING))
        except (queue.Empty, subprocess.TimeoutExpired):
            self.reason = f"took more than {allowed:g} s"
        finally:
            self.seconds = time.monotonic() - begun
            self._stop()
        return told

    def _stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it; it is not waited for
                self._process.wait(timeout=10)


def ended(code: int) -> str:
    """An exit code in words."""
    if code == FAULT:
        return "the process left after a fault of the GPU"
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process exited with {code}"
