"""Losses of a student against its full-precision teacher."""

from __future__ import annotations

import torch
from torch import Tensor

#: Positions whose probabilities exist at one time. Few: memory of 50 MB, had anew for each temporary,
#: costs more than the arithmetic (three times, on a CPU with a vocabulary of 49,152).
CHUNK = 32


def distillation_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, kind: str = "cakld"
) -> Tensor:
    """Mean divergence of the next-token distributions over the positions that count.

    `cakld` is `b KL(student | teacher) + (1 - b) KL(teacher | student)`, b the mean probability of the
    teacher's first choice: where it is sure, the student should seek that mode, else cover all.
    `kl` is the second term alone (b = 0).

    Args:
        student: logits, floating `[..., vocabulary]`.
        teacher: logits of the same shape, without gradient.
        mask: bool `[...]`, True where a position counts; None is everywhere.

    Returns:
        float32 scalar, differentiable in student. The gradient is computed with the value, a few
        positions at a time, so that nothing of the size of the logits is kept but itself.

    Source: BitDistiller (arXiv 2402.10631), RCP (arXiv 2502.15779).
    """
    student, teacher = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    keep = torch.ones(len(student), dtype=torch.bool, device=student.device)
    keep = keep if mask is None else mask.flatten()
    confidence = _confidence(teacher, keep) if kind == "cakld" else student.new_zeros((), dtype=torch.float32)
    return _Divergence.apply(student, teacher, keep, confidence)


def _confidence(teacher: Tensor, keep: Tensor) -> Tensor:
    """Mean probability of the most probable token."""
    tops = [(part.amax(-1) - part.logsumexp(-1)).exp() for part in map(Tensor.float, teacher.split(CHUNK))]
    return (torch.cat(tops) * keep).sum() / keep.sum().clamp_min(1)


class _Divergence(torch.autograd.Function):
    """`b KL(p | q) + (1 - b) KL(q | p)` of p = softmax(student) and q = softmax(teacher)."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, keep: Tensor, b: Tensor) -> Tensor:
        grad = torch.empty_like(student)
        count = keep.sum().clamp_min(1)
        total = student.new_zeros((), dtype=torch.float32)
        parts = zip(
            student.split(CHUNK), teacher.split(CHUNK), keep.split(CHUNK), grad.split(CHUNK), strict=True
        )
        for logits, target, kept, out in parts:
            log_p, log_q = logits.float().log_softmax(-1), target.float().log_softmax(-1)
            p, q, gap = log_p.exp(), log_q.exp(), log_p - log_q
            reverse = (p * gap).sum(-1, keepdim=True)
            forward = -(q * gap).sum(-1, keepdim=True)
            rows = kept[:, None] / count
            total += ((b * reverse + (1 - b) * forward) * rows).sum()
            # d KL(p | q) = p (log p/q - KL), d KL(q | p) = p - q, in the student's logits.
            out.copy_((b * p * (gap - reverse) + (1 - b) * (p - q)) * rows)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * scale.to(grad.dtype), None, None, None
