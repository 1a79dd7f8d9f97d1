"""watch.py, in runs of pytest of its own: lines of JSON, limits, and leaving a process after a fault."""

import importlib.util
import json
import subprocess
import sys

import pytest

from support.paths import ROOT, TESTS

CONFTEST = f"""
import sys
sys.path += [{str(TESTS)!r}, {str(ROOT)!r}]
import pytest
from support import watch
from support.watch import add_options as pytest_addoption, configure as pytest_configure

def pytest_collection_modifyitems(items):
    watch.limit(items)
"""

INI = """
[pytest]
addopts = --strict-markers
markers =
    gpu: a
    slow: b
"""

CASES = """
import os, time
import pytest
from support import watch

def test_passes():
    pass

def test_fails():
    assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="not today")
def test_skipped():
    pass

@pytest.fixture
def broken():
    raise ValueError("no fixture")

def test_error(broken):
    pass

@pytest.fixture
def torn():
    yield
    raise ValueError("torn down")

def test_teardown(torn):
    pass
"""

CRASH = """
def test_crash():
    os._exit(11)
"""

#: Broken is the GPU of this process until it ends.
FAULT = """
def test_fault():
    watch.device_fault = lambda: "CUDA error: an illegal memory access was encountered"
    raise RuntimeError("CUDA error: misaligned address")

def test_faults_late():
    watch.device_fault = lambda: "CUDA error: unspecified launch failure"
"""

HANG = """
@pytest.mark.gpu
@pytest.mark.timeout(1.5, method="thread")
def test_hang():
    time.sleep(60)
"""

AFTER = """
@pytest.mark.parametrize("i", range(6))
def test_after(i):
    assert not watch.device_fault()
"""


def run(folder, body, *options):
    """Exit code, the lines by the name of the test, and what pytest said."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text(INI)
    (folder / "test_it.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--jsonl", "lines.jsonl", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    path = folder / "lines.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = [line["test"].split("::")[1] for line in lines]
    assert len(set(names)) == len(names), "a test has one line"
    for line in lines:
        assert list(line) == ["test", "outcome", "seconds", "worker", "message"]
        assert line["seconds"] >= 0
    return done.returncode, dict(zip(names, lines, strict=True)), done.stdout + done.stderr


def needs(*plugins):
    missing = [plugin for plugin in plugins if importlib.util.find_spec(plugin) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@pytest.mark.parametrize("options", [(), pytest.param(("-n", "2"), marks=needs("xdist"))], ids=["one", "two"])
def test_every_test_has_its_line(options, tmp_path):
    code, lines, _ = run(tmp_path, CASES, *options)
    assert code == 1
    told = {name.removeprefix("test_"): (line["outcome"], line["message"]) for name, line in lines.items()}
    assert told == {
        "passes": ("passed", ""),
        "fails": ("failed", "AssertionError: one is not two"),
        "skipped": ("skipped", "Skipped: not today"),
        "error": ("error", "ValueError: no fixture"),
        "teardown": ("error", "ValueError: torn down"),
    }
    workers = {line["worker"] for line in lines.values()}
    assert workers == {"main"} if not options else workers <= {"gw0", "gw1"}


@needs("xdist")
def test_a_crash_and_a_fault_cost_one_test_each(tmp_path):
    code, lines, output = run(tmp_path, CASES + CRASH + FAULT + AFTER, "-n", "2")
    assert code == 1
    assert lines["test_crash"]["outcome"] == "crashed" and "crashed" in lines["test_crash"]["message"]
    for name, why in (("fault", "illegal memory access"), ("faults_late", "unspecified launch failure")):
        line = lines[f"test_{name}"]
        assert line["outcome"] == "crashed" and why in line["message"]
    assert "misaligned address" in output, "what the test itself raised is told too"
    # A new worker takes over, and what comes after finds a GPU that works.
    after = [line for name, line in lines.items() if name.startswith("test_after")]
    assert len(after) == 6 and {line["outcome"] for line in after} == {"passed"}
    assert len(lines) == 14


def test_without_xdist_a_fault_ends_the_run_with_one_message(tmp_path):
    code, lines, output = run(tmp_path, CASES + FAULT + AFTER)
    assert code == 3
    assert lines["test_fault"]["outcome"] == "crashed" and "test_after[0]" not in lines
    (message,) = [line for line in output.splitlines() if "the tests after it were not run" in line]
    assert "test_it.py::test_fault: a CUDA fault" in message and "illegal memory access" in message


@needs("xdist", "pytest_timeout")
def test_a_hang_costs_one_test(tmp_path):
    code, lines, _ = run(tmp_path, CASES + HANG + AFTER, "-n", "2")
    assert code == 1
    hang = lines["test_hang"]
    assert hang["outcome"] == "timeout" and hang["message"] == "took more than 1.5 s"
    assert 1.5 <= hang["seconds"] < 30
    assert len(lines) == 12 and all(lines[f"test_after[{i}]"]["outcome"] == "passed" for i in range(6))


LIMITS = """
import pytest

@pytest.mark.gpu
def test_quick(request):
    assert request.node.get_closest_marker("timeout").args == (60,)
    assert request.node.get_closest_marker("timeout").kwargs == {"method": "thread"}

@pytest.mark.gpu
@pytest.mark.slow
def test_slow(request):
    assert request.node.get_closest_marker("timeout").args == (300,)

@pytest.mark.gpu
@pytest.mark.timeout(7)
def test_own(request):
    assert request.node.get_closest_marker("timeout").args == (7,)

def test_other(request):
    assert request.node.get_closest_marker("timeout") is None
"""


@pytest.mark.parametrize("options", [(), ("-p", "no:timeout", "-p", "no:xdist")], ids=["plugins", "none"])
def test_tests_on_a_gpu_have_a_limit_whatever_is_installed(options, tmp_path):
    code, lines, output = run(tmp_path, LIMITS, *options)
    assert code == 0 and len(lines) == 4, output
