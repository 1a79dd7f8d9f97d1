"""Differentiable quantisers: what training sees of the packed formats. Plain PyTorch, or kernels of `ops`.

Every forward pass gives, to the bit, the value that the packed form stands for; gradients pass
rounding straight through (STE) and stop where a value is clipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..ops import dispatch
from ..ops.reference import a4_scale, divide
from .groups import resolve_group_size

#: How close to 0 or 1 a sigmoid of LDP is initialised. Nearer, its parameter would hardly move; at
#: 0.001 of the range a level is off by less than the rounding to int8 (1 / 254).
_MARGIN = 1e-3

#: Levels of a group that the kernels of training know: the 2-bit format.
KERNEL_LEVELS = 4

#: Least number above 0 in float16.
SMALLEST_SCALE = 2.0**-24


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`, for `hard` a rounding of `soft` to nearest.

    Exact: a number and its rounding are either within a factor of two, so that their difference is exact
    (Sterbenz), or the rounding is 0.
    """
    return soft + (hard - soft).detach()


def fake_quant_a4(x: Tensor, clip: Tensor, group_size: int = -1) -> Tensor:
    """4-bit activations: `dequantize_a4(*quantize_a4(x, clip, group_size))`, differentiable.

    Gradients, to x and clip: exactly that of `scale * code` with rounding passed through, the scale being
    a function of both. Through it a group's furthest entry from 0 feels the errors that it causes in all
    the others.

    Args:
        x: floating `[..., K]`.
        clip: float32 `[1]`, see `ops.reference.a4_scale`.
        group_size: divides K; -1 is the whole token.

    Returns:
        `[..., K]` in x's dtype; the float32 value rounded once.

    Source: learned step size, S. Esser et al. (arXiv 1902.08153), for a scale relative to max|x|.
    """
    groups = _for_kernels(x).unflatten(-1, (-1, x.shape[-1] if group_size == -1 else group_size))
    if ops.has_training_kernels(groups):
        return _FakeQuantRows.apply(groups, clip, False).flatten(-2).to(x.dtype)
    scale = a4_scale(groups, clip)[..., None]
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (groups / scale).clamp(-8, 7)
    return (straight_through(codes, codes.round()) * scale).flatten(-2).to(x.dtype)


def fake_quant_kv4(x: Tensor, clip: Tensor | float) -> Tensor:
    """4-bit keys or values: `dequantize_kv4(*quantize_kv4(x, clip))`, differentiable.

    Gradients, to x and clip (if it is a tensor): exactly that of `scale * code + zero` with roundings
    passed through, the range being a function of both.

    Args:
        x: floating `[..., head_dim]`; each row has its own scale and zero-point.
        clip: shrinks the range around its middle; a number or float32 `[1]`.

    Returns:
        `[..., head_dim]` in x's dtype; the float32 value rounded once.
    """
    rows = _for_kernels(x)
    if ops.has_training_kernels(rows):
        if not isinstance(clip, Tensor):  # filled on the device: a copy to it would have to be waited for
            clip = torch.full((1,), clip, dtype=torch.float32, device=x.device)
        return _FakeQuantRows.apply(rows, clip, True).to(x.dtype)
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    middle, half = (low + high) * 0.5, (high - low) * 0.5 * clip
    scale, zero = _half(divide(half + half, 15)), _half(middle - half)
    codes = ((rows - zero) / torch.where(scale == 0, torch.ones_like(scale), scale)).clamp(0, 15)
    return (straight_through(codes, codes.round()) * scale + zero).to(x.dtype)


class _FakeQuantRows(torch.autograd.Function):
    """`fake_quant_a4` of groups, or `fake_quant_kv4`, by the compiled kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, clip: Tensor, kv: bool) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.kv = kv
        return ops.fake_quant_rows(x, clip, kv)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        to_x, to_clip = ops.fake_quant_rows_backward(grad, *ctx.saved_tensors, ctx.kv)
        return to_x, to_clip.sum().reshape(1), None


def _for_kernels(x: Tensor) -> Tensor:
    """x, in float32 unless there are kernels that take it as it is."""
    return x if ops.has_training_kernels(x) else x.float()


def _half(x: Tensor) -> Tensor:
    return straight_through(x, x.half().float())


def ldp_levels(shares: Sequence[Tensor], wmin: Tensor, wmax: Tensor) -> Tensor:
    """The levels of learnable direct partitioning (LDP), before their rounding to int8.

    `lo = sigmoid(beta) * wmin` and `hi = sigmoid(gamma) * wmax` are the end levels. Between them each share
    `sigmoid(s)` takes that part of what the shares before it have left, and the last interval is the rest:
    with s1 and s2 three intervals of the relative widths a, (1 - a) b and (1 - a)(1 - b).

    Args:
        shares: beta, gamma, s1, s2, ..., as many as there are levels: floating `[...]`, before the sigmoid.
        wmin, wmax: `[...]`, least and greatest weight of the group.

    Returns:
        `[..., levels]`, lo first and hi last; ascending if lo <= hi, which weights of both signs ensure.

    Source: RCP (arXiv 2502.15779) for four levels; more are the same construction.
    """
    beta, gamma, *inner = shares
    low, high = torch.sigmoid(beta) * wmin, torch.sigmoid(gamma) * wmax
    span = high - low
    positions = []  # of the inner levels, as parts of the span
    for share in inner:
        part = torch.sigmoid(share)
        positions.append(positions[-1] + (1 - positions[-1]) * part if positions else part)
    return torch.stack([low, *(low + span * position for position in positions), high], -1)


def ldp_fake_quant(w: Tensor, shares: Sequence[Tensor], group_size: int | str = 128) -> Tensor:
    """Latent weights as their packed form gives them back: `scale * levels[code]` to the bit.

    Gradients: to w the identity where lo <= w <= hi, else 0 (the group's least and greatest weight count
    as constants); to the shares exactly that of the chosen level, with its rounding to int8 passed through.

    Args:
        w: floating `[out, in]`.
        shares: float32 `[out, G]` each, see `ldp_levels`; G = in / group_size. Kernels know four levels.
        group_size: divides `in`; -1 or `auto` as in `groups.resolve_group_size`.

    Returns:
        `[out, in]` in w's dtype.
    """
    size, four = resolve_group_size(w.shape[-1], group_size), len(shares) == KERNEL_LEVELS
    if four and dispatch.has_triton_training(w.device, w.dtype):
        return _Partition.apply(w.unflatten(-1, (-1, size)), *shares).flatten(-2)
    # Kernels take 16 bits as they are, and no copy in float32 is kept for backward.
    groups = w.unflatten(-1, (-1, size)) if four and ops.has_training_kernels(w) else _groups(w, size)
    return _Codebook.apply(groups, _sorted_levels(groups, shares)).flatten(-2).to(w.dtype)


class _Partition(torch.autograd.Function):
    """LDP of groups `[out, G, g]` by Triton's kernels, which make the levels too."""

    @staticmethod
    def forward(ctx, groups: Tensor, *shares: Tensor) -> Tensor:
        groups, shares = groups.contiguous(), [share.contiguous() for share in shares]
        y, *levels = torch.ops.w2a4.ldp_forward.default(groups, *shares)
        ctx.save_for_backward(groups, *shares, *levels)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.w2a4.ldp_backward.default(grad.contiguous(), *ctx.saved_tensors)


class _Codebook(torch.autograd.Function):
    """Groups `[..., g]` as the nearest of their levels `[..., n]`, ascending, in their stored form.

    By hand, since a whole model's weights pass through it: beside its input, backward needs a byte a
    weight, or nothing where kernels are compiled.
    """

    @staticmethod
    def forward(ctx, groups: Tensor, soft: Tensor) -> Tensor:
        ints, scale = round_levels(soft)
        exact = ints.to(soft.dtype) * scale.to(soft.dtype)[..., None]
        ctx.compiled = soft.shape[-1] == KERNEL_LEVELS and ops.has_training_kernels(groups)
        if ctx.compiled:
            ctx.save_for_backward(groups, soft, exact)
            return ops.snap(groups, exact)
        codes = nearest_codes(groups, ints, scale)
        ctx.save_for_backward(groups, soft, codes)
        y = exact[..., :1].expand_as(groups)
        for k in range(1, soft.shape[-1]):
            y = torch.where(codes >= k, exact[..., k : k + 1], y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        if ctx.compiled:
            return ops.snap_backward(grad, *ctx.saved_tensors)
        groups, soft, codes = ctx.saved_tensors
        # Sums over "code >= k", whose differences are those of one code each.
        steps = range(soft.shape[-1] - 1)
        above = [grad.sum(-1), *((grad * (codes > k)).sum(-1) for k in steps), 0 * grad[..., 0]]
        inside = (groups >= soft[..., :1]) & (groups <= soft[..., -1:])
        return grad * inside, -torch.stack(above, -1).diff(dim=-1)


def lsq_fake_quant(w: Tensor, step: Tensor, group_size: int | str = 128, bits: int = 4) -> Tensor:
    """Latent weights as their packed form gives them back: `scale * code` to the bit.

    Gradients: to w the identity where it is not clipped, else 0; to step exactly that of
    `scale * code` with both roundings passed through.

    Args:
        w: floating `[out, in]`.
        step: float32 `[out, G]`, of either sign; its float16 is the scale.
        group_size: as in `ldp_fake_quant`.
        bits: codes are -2**(bits - 1) .. 2**(bits - 1) - 1.

    Returns:
        `[out, in]` in w's dtype.

    Source: learned step size, S. Esser et al. (arXiv 1902.08153).
    """
    size = step.abs().clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max)
    step = torch.where(step < 0, -size, size)
    scale = straight_through(step, fp16_scale(step).to(step.dtype))[..., None]
    codes = (_groups(w, group_size) / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (straight_through(codes, codes.round()) * scale).flatten(-2).to(w.dtype)


@torch.no_grad()
def ldp_to_codebook(
    w: Tensor, shares: Sequence[Tensor], group_size: int | str = 128
) -> tuple[Tensor, Tensor]:
    """The stored form of the levels; with `nearest_codes`, `scale * levels[code]` is `ldp_fake_quant`.

    Args: as for `ldp_fake_quant`.

    Returns:
        levels int8 `[out, G, n]`, ascending; scale float16 `[out, G]`.
    """
    if len(shares) == KERNEL_LEVELS and dispatch.has_triton_training(w.device, w.dtype):
        size = resolve_group_size(w.shape[-1], group_size)
        groups = w.unflatten(-1, (-1, size)).contiguous()
        return torch.ops.w2a4.ldp_forward.default(groups, *(share.contiguous() for share in shares))[2:]
    return round_levels(_sorted_levels(_groups(w, group_size), shares))


@torch.no_grad()
def codebook_to_ldp(w: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """The shares that give these levels for these weights: where training starts after a Lloyd-Max fit.

    Every sigmoid stays between 0.001 and 0.999, so that its parameter can still learn.

    Args:
        w: floating `[out, in]`.
        levels: int8 `[out, G, n]`, ascending.
        scale: float16 `[out, G]`.

    Returns:
        beta, gamma, s1, s2, ..., n in all, each float32 `[out, G]` (float64 for float64 weights).
    """
    groups = _groups(w, w.shape[1] // scale.shape[1])
    values = levels.to(groups.dtype) * scale.to(groups.dtype)[..., None]
    low, high = groups.amin(-1), groups.amax(-1)
    widths = values.diff(dim=-1)
    first, last = values[..., 0], values[..., -1]
    inner = range(levels.shape[-1] - 2)
    return (
        _logit(first, low),
        _logit(last, high),
        *(_logit(widths[..., k], last - values[..., k]) for k in inner),
    )


def nearest_codes(groups: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Index of the level `scale * levels[i]` nearest to each weight, ties to the lower.

    Args:
        groups: floating `[..., G, group_size]`.
        levels: int8 `[..., G, n]`, ascending.
        scale: float16 `[..., G]`.

    Returns:
        int8 `[..., G, group_size]`, 0..n-1.
    """
    values = levels.to(groups.dtype) * scale.to(groups.dtype)[..., None]
    middles = (values[..., 1:] + values[..., :-1]) / 2
    return sum((groups > middles[..., i : i + 1]).to(torch.int8) for i in range(middles.shape[-1]))


def _groups(w: Tensor, group_size: int | str) -> Tensor:
    """float32 (float64 stays) `[out, G, group_size]`."""
    w = w if w.dtype == torch.float64 else w.float()
    return w.unflatten(-1, (-1, resolve_group_size(w.shape[-1], group_size)))


def _sorted_levels(groups: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """`ldp_levels` of the groups, ascending also where one sign of weights lets lo pass hi."""
    low, high = groups.detach().amin(-1), groups.detach().amax(-1)
    if groups.dtype != torch.float64:
        low, high = low.float(), high.float()
    return ldp_levels(shares, low, high).sort(-1).values


def round_levels(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending levels `[..., n]` in their stored form: int8 `[..., n]` and a float16 scale `[...]`."""
    levels = levels.detach()
    scale = fp16_scale(divide(levels.abs().amax(-1), 127))
    ints = (levels / scale.to(levels.dtype)[..., None]).round().clamp(-127, 127)
    return ints.to(torch.int8), scale


@torch.no_grad()
def fp16_scale(scale: Tensor) -> Tensor:
    """A scale in float16 that is safe to divide by: neither 0 nor infinite; it keeps its sign.

    Below float16's normal numbers steps are even and each is a large part of the number. There it is rounded
    up, so that what is divided by it keeps its range; at most a step is lost, never the whole.
    """
    size = scale.detach().abs().clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max)
    normal = size >= torch.finfo(torch.float16).smallest_normal
    size = torch.where(normal, size, (size / SMALLEST_SCALE).ceil() * SMALLEST_SCALE).half()
    return torch.where(scale < 0, -size, size)


def _logit(part: Tensor, whole: Tensor) -> Tensor:
    """The parameter whose sigmoid is part / whole; 0 where whole is 0."""
    share = torch.where(whole == 0, 0.5, part / torch.where(whole == 0, 1, whole))
    return torch.logit(share.clamp(_MARGIN, 1 - _MARGIN))
