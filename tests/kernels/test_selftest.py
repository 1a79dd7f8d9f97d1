"""`w2a4.ops.selftest`, which `w2a4 doctor` runs: every op has a call, and a wrong kernel is told."""

import dataclasses

import pytest
import torch

from w2a4 import ops
from w2a4.ops import selftest
from w2a4.ops.table import OPS

CPU = torch.device("cpu")

compiled = pytest.mark.skipif(not ops.has_training_kernels(torch.zeros(1)), reason="no compiled kernels")


def found(name: str) -> selftest.Verdict:
    return selftest.run(CPU)[name]


@compiled
def test_every_op_with_a_kernel_is_right():
    verdicts = selftest.run(CPU)
    assert list(verdicts) == list(OPS)
    for name, verdict in verdicts.items():
        has = "cpu" in OPS[name].kernels
        assert verdict.right is (True if has else None), (name, verdict)
        assert verdict.kernel == ("cpu" if has else "reference") and bool(verdict.why) != has


@compiled
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if "cpu" in op.kernels])
def test_another_result_is_told(name, monkeypatch):
    """A reference that answers what a kernel of another op, or of other data, would."""

    def wrong(*args):
        result = OPS_BEFORE.reference(*args)
        results = result if isinstance(result, tuple) else (result,)
        for each in selftest._tensors((results, args)):
            if each.numel() > 1:
                each.copy_(each.flatten().roll(1).view(each.shape))
        return result

    OPS_BEFORE = OPS[name]
    monkeypatch.setitem(OPS, name, dataclasses.replace(OPS_BEFORE, reference=wrong))
    verdict = found(name)
    assert verdict.right is False and ("differ" in verdict.why or "are off" in verdict.why), verdict


@compiled
def test_an_op_that_raises_is_wrong_and_the_others_go_on(monkeypatch):
    arguments = torch.zeros(3, 5), torch.zeros(2), torch.zeros(2), None
    monkeypatch.setattr(selftest._Arguments, "linear_w8", lambda self: arguments)
    verdict = found("linear_w8")
    assert verdict.right is False and verdict.why.startswith("RuntimeError: ")
    assert selftest.run(CPU)["hadamard"].right


@pytest.mark.gpu
def test_every_op_is_right_on_a_gpu():
    verdicts = selftest.run(torch.device("cuda", 0))
    assert not {name: each for name, each in verdicts.items() if each.right is False}
