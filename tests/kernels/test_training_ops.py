"""The compiled kernels that training passes through do what `w2a4.format.fake_quant` does in PyTorch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.op_arguments import assert_refused, bad_arguments, opcheck
from support.paths import ROOT
from w2a4 import ops
from w2a4.format import fake_quant as quantizers

HERE = Path(__file__).parent

compiled = pytest.mark.skipif(not ops.has_training_kernels(torch.zeros(1)), reason="no compiled kernels")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def rows(*shape: int) -> torch.Tensor:
    """Also of zeros, equal numbers, ties for the largest of one sign and both, one sign, tiny and huge."""
    x = randn(*shape)
    flat = x.flatten(0, -2)
    flat[0], flat[1] = 0, -3.25
    flat[2, : shape[-1] // 2] = flat[2].abs().max()
    flat[3] = flat[3].abs() + 5
    flat[4] *= 1e-30
    flat[5] *= 1e4
    flat[6] = -0.0
    flat[7, :2] = torch.tensor([9.0, -9.0])
    return x


def ldp(x: torch.Tensor, *levels: torch.Tensor) -> torch.Tensor:
    return quantizers.ldp_fake_quant(x, levels, x.shape[-1] // levels[0].shape[-1])


def ldp_parameters(out: int, groups: int) -> tuple[torch.Tensor, ...]:
    return tuple(2 * randn(out, groups, i + 1)[..., 0] for i in range(4))


CASES = {
    "a4": (quantizers.fake_quant_a4, rows(9, 96), (torch.tensor([0.8]),)),
    "a4 odd": (quantizers.fake_quant_a4, rows(3, 5, 37), (torch.tensor([1.0]),)),
    "a4 all codes": (quantizers.fake_quant_a4, rows(9, 96), (torch.tensor([-0.8]),)),
    "a4 all codes odd": (quantizers.fake_quant_a4, rows(3, 5, 37), (torch.tensor([-1.0]),)),
    "kv4": (quantizers.fake_quant_kv4, rows(2, 3, 4, 64), (torch.tensor([0.7]),)),
    "kv4 odd": (quantizers.fake_quant_kv4, rows(9, 11), (torch.tensor([0.95]),)),
    "ldp": (ldp, rows(12, 256), ldp_parameters(12, 4)),
    "ldp odd": (ldp, rows(12, 70), ldp_parameters(12, 10)),
    "ldp row": (ldp, rows(12, 33), ldp_parameters(12, 1)),
}


def gradients(function, x: torch.Tensor, others: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, *others)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, randn(*y.shape))]


@compiled
@pytest.mark.parametrize(("function", "x", "others"), CASES.values(), ids=CASES)
def test_they_are_the_python_code(function, x, others, monkeypatch):
    got = gradients(function, x, others)
    monkeypatch.setattr(ops, "has_training_kernels", lambda x: False)
    want = gradients(function, x, others)
    assert torch.equal(got[0], want[0])
    for ours, theirs, leaf in zip(got[1:], want[1:], (x, *others), strict=True):
        # float32 sums of x.numel() terms in another order, relative to the largest of a tensor.
        error = 1e-6 * x.shape[-1] * theirs.abs().max()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=float(error))
        assert ours.shape == leaf.shape


@compiled
@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad, kv):
    x = randn(3, 32)
    x[1, 5] = bad
    y = ops.fake_quant_rows(x, torch.tensor([0.9]), kv)
    assert y[[0, 2]].isfinite().all() and y[1].isnan().all()


@compiled
@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set_gives_the_same_bits(isa, tmp_path):
    code = f"import torch, test_training_ops as t; torch.save(t.results(), {str(tmp_path / 'out')!r})"
    env = {
        **os.environ,
        "W2A4_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE))),
    }
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    for ours, theirs in zip(results(), torch.load(tmp_path / "out"), strict=True):
        assert torch.equal(ours, theirs)


def results() -> list[torch.Tensor]:
    return [t for case in CASES.values() for t in gradients(*case)]


CLIP, W, LEVELS = torch.tensor([0.9]), randn(3, 2, 8), randn(3, 2, 4).sort(-1).values


@compiled
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("snap", (W, LEVELS)),
        ("snap_backward", (W, W, LEVELS, LEVELS)),
        ("fake_quant_rows", (W, CLIP, True)),
        ("fake_quant_rows_backward", (W, W, CLIP, False)),
    ],
)
def test_opcheck(name, args):
    opcheck(name, args)


BAD = [
    ("snap", (W.half(), LEVELS), "w has dtype float16, expected float32"),
    ("snap", (W[0], LEVELS), r"w has shape \[2, 8\], expected \[out, groups, group_size\]"),
    ("snap", (W, LEVELS[:, :1].contiguous()), r"levels has shape \[3, 1, 4\], expected \[3, 2, 4\]"),
    ("snap", (W.transpose(0, 1), LEVELS), "w of shape .* is not contiguous"),
    ("snap_backward", (W[:, :1].contiguous(), W, LEVELS, LEVELS), r"grad has shape \[3, 1, 8\]"),
    ("snap_backward", (W, W, W, LEVELS), r"soft has shape \[3, 2, 8\]"),
    ("fake_quant_rows", (W, torch.ones(2), True), r"clip has shape \[2\], expected \[1\]"),
    ("fake_quant_rows", (torch.tensor(1.0), CLIP, True), "x has no dimension"),
    ("fake_quant_rows", (torch.zeros(2, 0), CLIP, True), r"x has shape \[2, 0\]"),
    ("fake_quant_rows_backward", (W[0], W, CLIP, True), r"grad has shape \[2, 8\], expected that of x"),
]


@compiled
@pytest.mark.parametrize("name,args,message", bad_arguments(BAD))
def test_bad_argument(name, args, message):
    assert_refused(name, args, message)


MIXED = [
    ("snap", (W, LEVELS)),
    ("snap_backward", (W, W, LEVELS, LEVELS)),
    ("fake_quant_rows", (W, torch.ones(1), False)),
    ("fake_quant_rows_backward", (W, W, torch.ones(1), True)),
]


@pytest.mark.parametrize(("name", "args"), MIXED)
def test_a_meta_tensor_among_others_is_refused(name, args):
    """Else the shape of a result, without data, would pass for one."""
    for place, each in enumerate(args):
        if isinstance(each, torch.Tensor):
            mixed = [*args[:place], each.to("meta"), *args[place + 1 :]]
            with pytest.raises(RuntimeError, match="different devices"):
                getattr(torch.ops.w2a4, name)(*mixed)
