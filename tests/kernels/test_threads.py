"""CPU kernels on several threads: what these share is done once, whoever is late or leaves."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from support.layer_arguments import arguments, several
from w2a4 import ops

pytestmark = pytest.mark.skipif(not ops.has_layer_kernel(torch.zeros(1)), reason="no compiled kernels")


BUSY = "import time\nuntil = time.monotonic() + 2\nwhile time.monotonic() < until: pass"


@pytest.fixture
def four_threads():
    torch.set_num_threads(4)


def layers() -> torch.Tensor:
    """What three layers give, large enough that their work is shared."""
    return torch.ops.w2a4.decoder_layers(*several(hidden=512, ffn=2048))


def test_callers_do_not_disturb_each_other(four_threads):
    want, found = layers(), {}

    def call(index: int) -> None:
        torch.set_num_threads(4)  # a thread of Python's has a count of its own
        found[index] = all(torch.equal(layers(), want) for _ in range(20))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == dict.fromkeys(range(3), True)


def test_a_refused_call_leaves_threads_as_they_were(four_threads):
    want = layers()
    for _ in range(5):
        with pytest.raises(RuntimeError, match="start=9"):
            torch.ops.w2a4.decoder_layer(*arguments()[:22], 9, 0.95, 1.0)
        assert torch.equal(layers(), want)


def test_beside_busy_processes(four_threads):
    """Leaders that wait for threads without a processor work alone for a while; results stay."""
    want = layers()
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    count = 0
    while any(each.poll() is None for each in busy):
        assert torch.equal(layers(), want)
        count += 1
    assert count > 5
