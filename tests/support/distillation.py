"""The distillation loss against its definition in float64, to what float32 allows, on any device."""

import math

import pytest
import torch

from support.numerics import UNIT
from w2a4.ops import dispatch
from w2a4.train.losses import distillation_loss


def with_gradient(student, teacher, mask=None, kind="cakld", times=2.0):
    leaf = student.detach().clone().requires_grad_()
    loss = distillation_loss(leaf, teacher, mask, kind)
    (grad,) = torch.autograd.grad(times * loss, leaf)
    return loss.detach(), grad


def definition(student, teacher, mask, kind):
    """In float64: the loss, and how far the arithmetic of float32 may take it and a row's gradient off.

    A probability is off, relatively, by what its exponent is rounded by and the error of the sum: 12 levels
    within a chunk, one a chunk, and terms that are off by their own exponents, the log of the vocabulary in
    the mean; 8 are for the functions and products. Everything is counted twice, for both sides of a fraction.
    """
    s, t = student.double(), teacher.double()
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    p, q, gap, count = log_p.exp(), log_q.exp(), log_p - log_q, student.shape[-1]
    keep = torch.ones(len(s), dtype=torch.bool, device=s.device) if mask is None else mask
    kept = keep.sum().clamp_min(1)
    b = (q.amax(-1) * keep).sum() / kept if kind == "cakld" else s.new_zeros(())
    reverse, forward = (p * gap).sum(-1, keepdim=True), -(q * gap).sum(-1, keepdim=True)
    loss = ((b * reverse + (1 - b) * forward)[:, 0] * keep).sum() / kept
    grad = (b * p * (gap - reverse) + (1 - b) * (p - q)) * (keep / kept)[:, None]

    terms = 12 + count / 4096 + math.log(count) + 8
    p_off, q_off = terms - log_p, terms - log_q
    common = (s.amax(-1, keepdim=True) - t.amax(-1, keepdim=True)).abs() + 2 * terms
    reverse_off = (p * (s - t).abs() * p_off).sum(-1, keepdim=True) + common
    forward_off = (q * (s - t).abs() * q_off).sum(-1, keepdim=True) + common
    loss_off = b * (reverse_off + terms * reverse) + (1 - b) * (forward_off + terms * forward)
    mode = p * ((gap - reverse).abs() * p_off + reverse_off - log_p - log_q + terms)
    grad_off = b * mode + (1 - b) * (p * p_off + q * q_off)
    grad_off = grad_off + b * terms * (p * (gap - reverse).abs() + (p - q).abs())
    grad_off = 2 * UNIT * grad_off * (keep / kept)[:, None]
    # Exponentials below the least normal number have steps, or are 0.
    grad_off = grad_off + torch.finfo(torch.float32).tiny * (1 + (gap - reverse).abs())
    return loss, grad, 2 * UNIT * (loss_off[:, 0] * keep).sum() / kept, grad_off


def assert_within(got, want, off):
    """Everywhere as near as `off` says."""
    excess = (got.double() - want.double()).abs() - off
    assert (excess <= 0).all(), f"largest excess {float(excess.max()):g} at {int(excess.argmax())}"


def assert_as_defined(student, teacher, mask=None, kind="cakld", times=2.0):
    """Value and gradient are within rounding of the definition, and of the same without kernels."""
    want, exact, off, grad_off = definition(student, teacher, mask, kind)
    loss, grad = with_gradient(student, teacher, mask, kind, times)
    assert loss.dtype == torch.float32 and grad.dtype == student.dtype
    assert_within(loss, want, off)
    # The interpreter cuts off what bfloat16 does not hold. float16 has steps below its least normal number.
    dtype = torch.finfo(student.dtype)
    grad_off = times * (grad_off * (1 + dtype.eps) + exact.abs() * dtype.eps) + dtype.tiny * dtype.eps
    assert_within(grad, times * exact, grad_off)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "backend", "reference")
        plain, plain_grad = with_gradient(student, teacher, mask, kind, times)
    assert_within(loss, plain, 2 * off)
    # Without kernels the gradient is rounded before it is multiplied, and once more after.
    assert_within(grad, plain_grad, 2 * grad_off + times * dtype.tiny * dtype.eps)
