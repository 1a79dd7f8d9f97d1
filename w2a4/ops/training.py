"""What training passes through: weights as levels give them back, rows as 4 bits do, and divergences.

The references are of the compiled kernels and of Triton's. `w2a4.format.fake_quant` and `w2a4.train.losses`
have the same mathematics in PyTorch for where there are none, differentiable by autograd and in less memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import a4_scale, dequantize_a4, divide, furthest_from_zero, quantize_a4
from .kv import dequantize_kv4, quantize_kv4
from .table import fake_of, one_device, op


def _nearest(w: Tensor, levels: Tensor) -> Tensor:
    """Index, int64 `[..., g]`, of the nearest of `levels` `[..., 4]`, ascending; of two the lower."""
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    return (w[..., None] > middles[..., None, :]).sum(-1)


@op("(Tensor w, Tensor levels) -> Tensor", kernels="cpu")
def snap(w: Tensor, levels: Tensor) -> Tensor:
    """Weights `[out, G, group_size]` as the nearest of their group's `levels` `[out, G, 4]`, ascending."""
    return levels.gather(-1, _nearest(w, levels))


@fake_of(snap)
def _(w, levels):
    one_device(w=w, levels=levels)
    return torch.empty_like(w)


@op("(Tensor grad, Tensor w, Tensor soft, Tensor levels) -> (Tensor, Tensor)", kernels="cpu")
def snap_backward(grad: Tensor, w: Tensor, soft: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """To w its gradient between the ends of `soft` `[out, G, 4]`; to each level the sum of what took it."""
    inside = (w >= soft[..., :1]) & (w <= soft[..., 3:])
    codes = _nearest(w, levels)
    return grad * inside, torch.stack([(grad * (codes == k)).sum(-1) for k in range(4)], -1)


@fake_of(snap_backward)
def _(grad, w, soft, levels):
    one_device(grad=grad, w=w, soft=soft, levels=levels)
    return torch.empty_like(w), torch.empty_like(soft)


@op("(Tensor x, Tensor clip, bool kv) -> Tensor", kernels="cpu triton")
def fake_quant_rows(x: Tensor, clip: Tensor, kv: bool) -> Tensor:
    """Each row of `[..., row]` as `dequantize_kv4` (kv) or `dequantize_a4` gives it back, in x's dtype."""
    if kv:
        return dequantize_kv4(*quantize_kv4(x, clip.reshape(())))[..., : x.shape[-1]].to(x.dtype)
    return dequantize_a4(*quantize_a4(x, clip), x.shape[-1]).to(x.dtype)


@fake_of(fake_quant_rows)
def _(x, clip, kv):
    one_device(x=x, clip=clip)
    return torch.empty_like(x)


@op("(Tensor grad, Tensor x, Tensor clip, bool kv) -> (Tensor, Tensor)", kernels="cpu triton")
def fake_quant_rows_backward(grad: Tensor, x: Tensor, clip: Tensor, kv: bool) -> tuple[Tensor, Tensor]:
    """Gradients of `scale * code + zero`, with roundings passed straight through.

    To x where it is not clipped, and through scale and zero-point to the extremes of its row, which share it
    evenly; to clip, float32 `[rows]`, of which the sum is meant.
    """
    rows, grads = x.float().reshape(-1, x.shape[-1]), grad.float().reshape(-1, x.shape[-1])
    if not kv:
        to_x, to_clip = _backward_a4(grads, rows, clip)
    else:
        to_x, to_clip = _backward_kv4(grads, rows, clip)
    return to_x.reshape(x.shape).to(x.dtype), to_clip.flatten()


@fake_of(fake_quant_rows_backward)
def _(grad, x, clip, kv):
    one_device(grad=grad, x=x, clip=clip)
    return torch.empty_like(x), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _shared(gradient: Tensor, extremes: Tensor) -> Tensor:
    """A row's gradient, in equal parts to those of its elements that are extremes."""
    return torch.where(extremes, gradient / extremes.sum(-1, keepdim=True).clamp_min(1), 0.0)


def _backward_a4(grad: Tensor, x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    signed, most, furthest = clip < 0, x.abs().amax(-1, keepdim=True), furthest_from_zero(x)[:, None]
    scale = a4_scale(x, clip)[:, None]
    steps = x / _divisor(scale)
    inside = (steps >= -8) & (steps <= 7)
    to_scale = (grad * (steps.clamp(-8, 7).round() - torch.where(inside, steps, 0.0))).sum(-1, keepdim=True)
    to_scale = torch.where(scale == 0, 0.0, to_scale)  # a row of zeros has scale 1, whatever clip is
    if signed:
        to_x = grad * inside + _shared(to_scale * clip / 8, x == furthest)
        return to_x, to_scale * furthest / 8
    to_x = grad * inside + x.sign() * _shared(to_scale * clip / 7, x.abs() == most)
    return to_x, to_scale * most / 7


def _backward_kv4(grad: Tensor, x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    middle, half = (low + high) * 0.5, (high - low) * 0.5 * clip
    scale, zero = divide(half + half, 15).half().float(), (middle - half).half().float()
    steps = (x - zero) / _divisor(scale)
    inside = (steps >= 0) & (steps <= 15) & (scale != 0)  # else codes move nothing
    to_scale = (grad * (steps.clamp(0, 15).round() - torch.where(inside, steps, 0.0))).sum(-1, keepdim=True)
    to_zero = (grad * ~inside).sum(-1, keepdim=True)  # it cancels out of what is not clipped
    by_range = to_scale * clip / 15
    to_high = by_range + to_zero * (0.5 - 0.5 * clip)
    to_low = to_zero * (0.5 + 0.5 * clip) - by_range
    to_x = grad * inside + _shared(to_high, x == high) + _shared(to_low, x == low)
    return to_x, to_scale * (high - low) / 15 + to_zero * (low - high) * 0.5


@op(
    "(Tensor w, Tensor beta, Tensor gamma, Tensor s1, Tensor s2) -> (Tensor, Tensor, Tensor, Tensor)",
    kernels="triton",
)
def ldp_forward(
    w: Tensor, beta: Tensor, gamma: Tensor, s1: Tensor, s2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights `[out, G, group_size]` as their packed 2-bit form gives them back, and the levels of it.

    Returns:
        `[out, G, group_size]` in w's dtype; the levels before they are rounded, float32 `[out, G, 4]`,
        ascending; as they are stored, int8 of that shape and float16 scales `[out, G]`.
    """
    x = w.float()
    low, high, first, second = _partition(x, beta, gamma, s1, s2)
    soft = torch.stack([low, low + (high - low) * first, low + (high - low) * second, high], -1)
    soft = soft.sort(-1).values
    scale = divide(soft.abs().amax(-1), 127).clamp(2.0**-24, torch.finfo(torch.float16).max)
    # Where float16 holds few bits the scale is rounded up, so that what it divides keeps its range.
    tiny = scale < torch.finfo(torch.float16).smallest_normal
    scale = torch.where(tiny, (scale * 2**24).ceil() * 2.0**-24, scale).half()
    levels = (soft / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return snap(x, levels.float() * scale.float()[..., None]).to(w.dtype), soft, levels, scale


def _partition(x: Tensor, beta: Tensor, gamma: Tensor, s1: Tensor, s2: Tensor) -> tuple[Tensor, ...]:
    """The end levels of each group, and where in between the others lie, from 0 to 1."""
    first = torch.sigmoid(s1)
    second = first + (1 - first) * torch.sigmoid(s2)
    return torch.sigmoid(beta) * x.amin(-1), torch.sigmoid(gamma) * x.amax(-1), first, second


@op(
    "(Tensor grad, Tensor w, Tensor beta, Tensor gamma, Tensor s1, Tensor s2, Tensor soft, Tensor levels, "
    "Tensor scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels="triton",
)
def ldp_backward(
    grad: Tensor,
    w: Tensor,
    beta: Tensor,
    gamma: Tensor,
    s1: Tensor,
    s2: Tensor,
    soft: Tensor,
    levels: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to w, in its dtype, and to beta, gamma, s1 and s2; soft and the rest are `ldp_forward`'s.

    To w the identity where `soft[..., 0] <= w <= soft[..., 3]`, else 0; its extremes count as constants.
    """
    x = w.float()
    to_w, to_soft = snap_backward(grad.float(), x, soft, levels.float() * scale.float()[..., None])
    low, high, first, second = _partition(x, beta, gamma, s1, s2)
    # Where the ends have passed each other, so have the levels between them.
    to = torch.where((high < low)[..., None], to_soft.flip(-1), to_soft).unbind(-1)
    b, c, a, rest = (torch.sigmoid(share) for share in (beta, gamma, s1, s2))
    to_low = to[0] + to[1] * (1 - first) + to[2] * (1 - second)
    to_high = to[1] * first + to[2] * second + to[3]
    to_a, to_rest = (high - low) * (to[1] + to[2] * (1 - rest)), (high - low) * to[2] * (1 - first)
    return (
        to_w.to(w.dtype), to_low * low * (1 - b), to_high * high * (1 - c), to_a * a * (1 - a),
        to_rest * rest * (1 - rest),
    )  # fmt: skip


@op("(Tensor student, Tensor teacher, Tensor keep) -> Tensor", kernels="triton")
def divergence_rows(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """What the divergences of p = softmax(student) and q = softmax(teacher) are made of.

    Args:
        student, teacher: floating `[n, vocabulary]`.
        keep: bool `[n]`, the rows that count.

    Returns:
        float32 `[n, 6]`: of the student the largest logit, and the log of the sum of exponentials relative
        to it, of the teacher the same, then KL(p | q) and KL(q | p); zeros in rows that do not count.
    """
    known = []
    for logits in (student.float(), teacher.float()):
        largest = logits.amax(-1)
        known += [largest, (logits - largest[:, None]).logsumexp(-1)]
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    gap = log_p - log_q
    known += [_weighted(log_p.exp(), gap).sum(-1), -_weighted(log_q.exp(), gap).sum(-1)]
    return torch.where(keep[:, None], torch.stack(known, -1), 0.0)


def _weighted(factor: Tensor, x: Tensor) -> Tensor:
    """`factor * x`, and 0 where the factor is 0, whatever x is."""
    return torch.where(factor == 0, 0.0, factor * x)


@op("(Tensor student, Tensor teacher, Tensor known, Tensor weight, Tensor b) -> Tensor", kernels="triton")
def divergence_grad(student: Tensor, teacher: Tensor, known: Tensor, weight: Tensor, b: Tensor) -> Tensor:
    """The gradient of `sum(weight * (b KL(p | q) + (1 - b) KL(q | p)))` to student, in its dtype.

    Args:
        student, teacher: as in `divergence_rows`.
        known: what that gave.
        weight: float32 `[n]`, 0 where a row does not count.
        b: float32 `[]`, taken for a constant.
    """
    log_p = (student.float() - known[:, :1]) - known[:, 1:2]
    log_q = (teacher.float() - known[:, 2:3]) - known[:, 3:4]
    p, q, reverse = log_p.exp(), log_q.exp(), known[:, 4:5]
    grad = _weighted(b, _weighted(p, log_p - log_q - reverse)) + _weighted(1 - b, p - q)
    return _weighted(weight[:, None], grad).to(student.dtype)
