"""What the programs of test_triton_interpreter.py share."""

import pytest

from w2a4.ops import dispatch


@pytest.fixture
def on_triton(monkeypatch):
    """Triton's kernels, whatever else could run a call."""
    monkeypatch.setattr(dispatch, "backend", "triton")
