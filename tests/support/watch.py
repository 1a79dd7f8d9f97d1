"""What a run on a borrowed GPU needs of pytest: limits, one JSON line a test, and no poisoned process.

`--jsonl FILE` appends {"test", "outcome", "seconds", "worker", "message"} as soon as a test has ended, also
when it took its process with it; outcomes are passed, failed, skipped, error (of a fixture), crashed and
timeout. Under pytest-xdist the controller writes.

After some faults of a kernel every later call on the GPU fails in that process. It is left then: xdist
starts another, and without xdist the run ends.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks.faults import FAULT, device_fault
from benchmarks.files import append_line

#: Seconds that a test on a GPU may take, and a slow one; others say so by a mark of their own.
LIMIT, SLOW_LIMIT = 60, 300
#: What compiles a lot or repeats what another test covers is left out where minutes count.
SLOW = pytest.mark.slow
#: What compiles besides may take longer than others, on a machine where all do.
LONG = pytest.mark.timeout(2 * LIMIT, method="thread")
#: Longest message of a line.
MESSAGE = 400


def add_options(parser: pytest.Parser) -> None:
    text = "Append a JSON line to FILE for every test, at once."
    parser.addoption("--jsonl", type=Path, metavar="FILE", help=text)


def configure(config: pytest.Config) -> None:
    # Known without pytest-timeout too, which is not needed where no test hangs.
    config.addinivalue_line("markers", "timeout(seconds, method): limit of a test, by pytest-timeout")
    config.pluginmanager.register(FaultWatch(config), "w2a4-faults")
    if hasattr(config, "workerinput"):  # or each would start a thread on every core
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workerinput["workercount"]))
    path = config.getoption("jsonl")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(path), "w2a4-lines")


def limit(items: list[pytest.Item]) -> None:
    """Tests on a GPU may take so long; a call that hangs is not interrupted, so the process goes."""
    for item in items:
        if "gpu" in item.keywords and item.get_closest_marker("timeout") is None:
            seconds = SLOW_LIMIT if "slow" in item.keywords else LIMIT
            item.add_marker(pytest.mark.timeout(seconds, method="thread"))
        marker = item.get_closest_marker("timeout")
        if marker is not None and marker.args:
            item.user_properties.append(("limit", marker.args[0]))  # what Lines tells a timeout by


class FaultWatch:
    """In every process that runs tests: leaves it after the test that broke its GPU."""

    def __init__(self, config: pytest.Config) -> None:
        self.is_worker = hasattr(config, "workerinput")
        self.fault = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        if report.when == "setup" or self.fault:
            return report
        self.fault = device_fault()
        if self.fault:
            message = f"the GPU can not be used any more in this process: {self.fault}"
            report.outcome = "failed"
            report.longrepr = f"{report.longreprtext}\n{message}".lstrip()
            report.user_properties.append(("fault", message))
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        done = yield  # with it, the reports of this test have gone to the controller
        if not self.fault:
            return done
        if self.is_worker:
            os._exit(FAULT)
        message = f"{item.nodeid}: a CUDA fault ({self.fault}); the tests after it were not run"
        pytest.exit(message, returncode=FAULT)


class Lines:
    """Writes a line when a test has ended, from the reports of its phases."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun: dict[str, float] = {}
        self.phases: dict[str, list[pytest.TestReport]] = {}
        self.written: set[str] = set()

    def pytest_runtest_logstart(self, nodeid):
        self.begun[nodeid] = time.monotonic()

    def pytest_runtest_logreport(self, report):
        test = report.nodeid
        if report.when == "???":  # xdist's, of a worker that is gone
            if test not in self.written:  # else it left on purpose, when all was said
                self._lost(report, self.phases.pop(test, []))
            return
        phases = self.phases.setdefault(test, [])
        phases.append(report)
        if report.when == "teardown":
            self._write(test, _outcome(phases), sum(phase.duration for phase in phases), report,
                        next((_last_line(phase) for phase in phases if not phase.passed), ""))  # fmt: skip
            del self.phases[test]

    def _lost(self, report, phases) -> None:
        seconds = time.monotonic() - self.begun.get(report.nodeid, time.monotonic())
        # The worker's timer starts after the controller's clock has, and nothing outlives it.
        limits = [value for phase in phases for name, value in phase.user_properties if name == "limit"]
        late = bool(limits) and seconds >= float(limits[-1])
        message = f"took more than {limits[-1]} s" if late else _last_line(report)
        self._write(report.nodeid, "timeout" if late else "crashed", seconds, report, message)

    def _write(self, test: str, outcome: str, seconds: float, report, message: str) -> None:
        node = getattr(report, "node", None)
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 3),
                "worker": node.gateway.id if node is not None else "main", "message": message}  # fmt: skip
        self.written.add(test)
        append_line(self.path, line)


def _outcome(phases: list[pytest.TestReport]) -> str:
    if any(name == "fault" for phase in phases for name, _ in phase.user_properties):
        return "crashed"
    worst = next((phase for phase in phases if phase.failed), None)
    if worst is not None:
        return "failed" if worst.when == "call" else "error"
    return "skipped" if any(phase.skipped for phase in phases) else "passed"


def _last_line(report: pytest.TestReport) -> str:
    """Of a failure what was raised, of a skip why, shortened; of a fault what it was."""
    faults = [value for name, value in report.user_properties if name == "fault"]
    if faults:
        return faults[0][:MESSAGE]
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:MESSAGE]
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else report.longreprtext).strip().splitlines()
    # An assertion tells the most in its first line, and what pytest adds follows.
    return (lines[0] if crash is not None else lines[-1])[:MESSAGE] if lines else ""
