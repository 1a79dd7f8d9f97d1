"""Shared set-up: every test starts from the same seed, and leaves torch's thread count as it was.

What a run on a GPU needs besides (limits, JSON lines, leaving after a fault) is in watch.py.
"""

import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# `benchmarks` is the source tree's, whatever else is installed under that name, but a w2a4 that is installed
# wins over the tree's own, which has no kernels unless it was built in place.
sys.path.insert(0, str(ROOT))
import benchmarks  # noqa: E402, F401

sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != ROOT), str(ROOT)]

from support import watch  # noqa: E402

# A shell has what it starts with `&` ignore SIGINT, and so would what tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread(_threads):
    """Models and matrices this small lose by threads, and badly on a busy machine."""
    torch.set_num_threads(1)


def pytest_addoption(parser):
    watch.add_options(parser)


def pytest_configure(config):
    watch.configure(config)


def pytest_collection_modifyitems(items):
    watch.limit(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
