"""The Triton kernels in Triton's interpreter, chosen when triton is imported: hence in another process."""

import os
import re
import subprocess
import sys

import numpy
import pytest

from support.paths import TESTS


@pytest.mark.parametrize("what", ["", "_attention", "_distill", "_training"])
def test_interpreted(what):
    triton = pytest.importorskip("triton", reason="needs triton")
    versions = [tuple(map(int, re.findall(r"\d+", module.__version__)[:2])) for module in (triton, numpy)]
    if "attention" in what and versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 does not take numpy 2.4 and later")
    program = f"support/triton_interpreted{what}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", program]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
