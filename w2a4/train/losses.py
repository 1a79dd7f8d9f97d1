"""Losses of a student against its full-precision teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import dispatch

#: Positions whose probabilities exist at one time. Few on a CPU: allocating 50 MB for each temporary takes
#: three times as long as the arithmetic (vocabulary of 49,152). Many on a GPU, where a launch takes as long
#: as the arithmetic of dozens of positions.
CHUNK, CUDA_CHUNK = 32, 1024

#: Least probability of the tokens that are not among the k most probable ones; less is rounding error.
LEAST_REST = 1e-6


class TopK(NamedTuple):
    """A teacher's distribution over the next token: the k most probable tokens, and the rest together.

    Attributes:
        indices: int32 `[..., k]`, the most probable tokens, the most probable one first.
        log_probs: float16 `[..., k]`, their log-probabilities.
        rest: float32 `[...]`, the log-probability of all other tokens together.
    """

    indices: Tensor
    log_probs: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopK:
        """From logits, floating `[..., vocabulary]`."""
        log_probs = logits.float().log_softmax(-1)
        top = log_probs.topk(k, -1)
        rest = (1 - top.values.exp().sum(-1)).clamp_min(LEAST_REST).log()
        return cls(top.indices.int(), top.values.half(), rest)


def distillation_loss(
    student: Tensor, teacher: Tensor | TopK, mask: Tensor | None = None, kind: str = "cakld"
) -> Tensor:
    """Mean divergence of the next-token distributions over the positions that count.

    `cakld` is `b KL(student | teacher) + (1 - b) KL(teacher | student)`, b the mean probability of the
    teacher's most probable token: a confident teacher has one mode to match, an unsure one has many to
    cover. `kl` is the second term alone (b = 0).

    Args:
        student: logits, floating `[..., vocabulary]`.
        teacher: logits of the same shape, without gradient; or `TopK`, where the rest counts as one outcome.
        mask: bool `[...]`, True where a position counts; None is everywhere.

    Returns:
        float32 scalar, differentiable in student. The gradient is the only tensor of the size of the
        logits: it is computed with the value, a few positions at a time, or in backward where Triton's
        kernels accept the logits. With Triton's kernels a logit of -inf is a token of probability 0, and
        positions that do not count are not read, see `kernels/w2a4_triton/distill.py`; without them
        either may make the loss NaN.

    Source: BitDistiller (arXiv 2402.10631), RCP (arXiv 2502.15779).
    """
    student = student.flatten(0, -2)
    if isinstance(teacher, TopK):
        target = (teacher.indices.flatten(0, -2), teacher.log_probs.flatten(0, -2), teacher.rest.flatten())
    else:
        target = (teacher.detach().flatten(0, -2),)
    keep = torch.ones(len(student), dtype=torch.bool, device=student.device)
    keep = keep if mask is None else mask.flatten()
    if len(target) == 1 and _has_kernels(student, target[0]):
        tensors = (each.contiguous() for each in (student, target[0], keep))
        return _FusedDivergence.apply(*tensors, kind == "cakld")
    confidence = _confidence(target, keep) if kind == "cakld" else student.new_zeros((), dtype=torch.float32)
    return _Divergence.apply(student, keep, confidence, *target)


def _has_kernels(*logits: Tensor) -> bool:
    return all(dispatch.has_triton_training(each.device, each.dtype) for each in logits)


def _confidence(target: tuple[Tensor, ...], keep: Tensor) -> Tensor:
    """Mean probability of the most probable token."""
    if len(target) == 3:
        highest = target[1][:, 0].float().exp()
    else:
        parts = map(Tensor.float, target[0].split(_chunk(keep)))
        highest = torch.cat([(part.amax(-1) - part.logsumexp(-1)).exp() for part in parts])
    return (highest * keep).sum() / keep.sum().clamp_min(1)


def _chunk(like: Tensor) -> int:
    return CUDA_CHUNK if like.is_cuda else CHUNK


def _log_target(target: tuple[Tensor, ...], log_p: Tensor) -> Tensor:
    """The teacher's log-probabilities `[n, vocabulary]`.

    For `TopK`, the rest is divided among the other tokens in the proportions of the student (`log_p`): so
    the sums over all tokens, and the gradients, are those over k + 1 outcomes.
    """
    if len(target) == 1:
        return target[0].float().log_softmax(-1)
    indices = target[0].long()
    known = torch.cat([target[1].float(), target[2][:, None]], -1)
    known = known - known.logsumexp(-1, keepdim=True)  # a sum of 1 again, after the rounding to float16
    log_probs, rest = known[:, :-1], known[:, -1]
    left = (1 - log_p.gather(-1, indices).exp().sum(-1)).clamp_min(LEAST_REST).log()
    return (log_p + (rest - left)[:, None]).scatter(-1, indices, log_probs)


class _Divergence(torch.autograd.Function):
    """`b KL(p | q) + (1 - b) KL(q | p)` of p = softmax(student) and q, the teacher's."""

    @staticmethod
    def forward(ctx, student: Tensor, keep: Tensor, b: Tensor, *target: Tensor) -> Tensor:
        grad = torch.empty_like(student)
        count = keep.sum().clamp_min(1)
        total = student.new_zeros((), dtype=torch.float32)
        size = _chunk(student)
        parts = zip(
            student.split(size),
            keep.split(size),
            grad.split(size),
            zip(*(t.split(size) for t in target), strict=True),
            strict=True,
        )
        for logits, kept, out, known in parts:
            log_p = logits.float().log_softmax(-1)
            log_q = _log_target(known, log_p)
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
        if scale.device.type != "cpu" or scale != 1:  # mostly 1, and the product is as large as the logits
            grad = grad * scale.to(grad.dtype)
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


class _FusedDivergence(torch.autograd.Function):
    """`_Divergence` of whole logits by Triton's kernels: one pass for the value, another in backward."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, keep: Tensor, cakld: bool) -> Tensor:
        known = torch.ops.w2a4.divergence_rows.default(student, teacher, keep)
        count = keep.sum().clamp_min(1)
        # Column 3: the log of the sum of exponentials, minus the largest logit.
        highest = (-known[:, 3]).exp()
        b = (highest * keep).sum() / count if cakld else known.new_zeros(())
        # A divergence with the factor 0 counts as 0, even if it is infinite.
        reverse, forward = ((f * known[:, i]).masked_fill(f == 0, 0) for f, i in ((b, 4), (1 - b, 5)))
        # Autograd frees a saved tensor after its use, but saves no tensor of inference mode.
        ctx.teacher, saved = (teacher, None) if teacher.is_inference() else (None, teacher)
        ctx.save_for_backward(student, saved, known, keep.float() / count, b)
        return (reverse + forward).sum() / count

    @staticmethod
    def backward(ctx, scale: Tensor):
        student, teacher, known, weight, b = ctx.saved_tensors
        teacher = ctx.teacher if teacher is None else teacher
        grad = torch.ops.w2a4.divergence_grad.default(student, teacher, known, weight * scale, b)
        return grad, None, None, None
