"""Distillation losses against their definitions."""

import pytest
import torch

from support.numerics import assert_close
from w2a4.train import losses
from w2a4.train.losses import TopK, distillation_loss


def definition(student, teacher, mask, kind):
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    keep = torch.ones(student.shape[:-1], dtype=torch.bool) if mask is None else mask
    b = q.amax(-1)[keep].mean() if kind == "cakld" else 0.0
    rows = b * (p * (log_p - log_q)).sum(-1) + (1 - b) * (q * (log_q - log_p)).sum(-1)
    return rows[keep].mean()


@pytest.mark.parametrize("kind", ["cakld", "kl"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [3, 256])
def test_value_and_gradient(kind, masked, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    student = (3 * torch.randn(2, 5, 11)).requires_grad_()
    teacher = 3 * torch.randn(2, 5, 11)
    mask = torch.rand(2, 5) < 0.6 if masked else None
    loss, want = distillation_loss(student, teacher, mask, kind), definition(student, teacher, mask, kind)
    assert_close(loss, want, atol=1e-6)
    (grad,) = torch.autograd.grad(2 * loss, student)
    (expected,) = torch.autograd.grad(2 * want, student)
    assert_close(grad, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["cakld", "kl"])
@pytest.mark.parametrize("k", [1, 4])
def test_of_the_most_probable_tokens_and_the_rest(kind, k, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 4)
    student = (3 * torch.randn(2, 5, 11)).requires_grad_()
    tops = TopK.of(3 * torch.randn(2, 5, 11), k)
    assert tops.indices.shape == tops.log_probs.shape == (2, 5, k) and tops.rest.shape == (2, 5)
    probabilities = student.softmax(-1)
    chosen = probabilities.gather(-1, tops.indices.long())
    lumped = torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1).log()
    known = torch.cat([tops.log_probs.float(), tops.rest[..., None]], -1)
    torch.testing.assert_close(known.exp().sum(-1), torch.ones(2, 5), rtol=1e-3, atol=0)
    b = tops.log_probs[..., 0].float().exp().mean() if kind == "cakld" else 0.0
    p, q = lumped, known.log_softmax(-1)
    want = (b * (p.exp() * (p - q)).sum(-1) + (1 - b) * (q.exp() * (q - p)).sum(-1)).mean()
    loss = distillation_loss(student, tops, kind=kind)
    assert_close(loss, want, atol=1e-5)
    (grad,) = torch.autograd.grad(loss, student)
    (expected,) = torch.autograd.grad(want, student)
    assert_close(grad, expected, atol=1e-5)


def test_all_tokens_kept_are_the_whole_distribution():
    student, teacher = 3 * torch.randn(6, 11), 3 * torch.randn(6, 11)
    kept = distillation_loss(student, TopK.of(teacher, 11))
    # The rest has LEAST_REST at least, and log-probabilities are float16.
    assert_close(kept, distillation_loss(student, teacher), atol=2e-3)


def test_zero_where_they_agree():
    logits = torch.randn(4, 7).requires_grad_()
    loss = distillation_loss(logits, logits.detach() + 3.0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item()) < 1e-6 and grad.abs().max() < 1e-6


def test_nothing_counts():
    logits = torch.randn(4, 7).requires_grad_()
    loss = distillation_loss(logits, torch.randn(4, 7), torch.zeros(4, dtype=torch.bool))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and not grad.any()


def test_half_precision_logits():
    student, teacher = torch.randn(6, 33).bfloat16().requires_grad_(), torch.randn(6, 33).bfloat16()
    loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert_close(loss, definition(student.float(), teacher.float(), None, "cakld"), atol=1e-5)
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.dtype == torch.bfloat16
