"""`fake_quant.ldp_fake_quant` and its backward on CUDA: weights as the nearest level that their group trains.

The levels are made of what LDP trains in the same kernels. One after another, in PyTorch, that took sixty
launches a linear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, expect_tensor, require
from .language import chunk_of_rows, launch_rows, round_even, rows_of_program, triton_op, wrap_triton


@triton.jit
def _levels(levels_ptr, group, known):
    """The four levels of each group, `[groups, 1]`."""
    first = tl.load(levels_ptr + 4 * group, mask=known, other=0.0)[:, None]
    second = tl.load(levels_ptr + 4 * group + 1, mask=known, other=0.0)[:, None]
    third = tl.load(levels_ptr + 4 * group + 2, mask=known, other=0.0)[:, None]
    fourth = tl.load(levels_ptr + 4 * group + 3, mask=known, other=0.0)[:, None]
    return first, second, third, fourth


@triton.jit
def _nearest(w, first, second, third, fourth):
    """Codes 0..3 of the levels nearest to the weights, ties to the lower."""
    code = (w > (second + first) * 0.5).to(tl.int32)
    code += (w > (third + second) * 0.5).to(tl.int32)
    return code + (w > (fourth + third) * 0.5).to(tl.int32)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))


@triton.jit
def _shares(beta_ptr, gamma_ptr, s1_ptr, s2_ptr, group, known):
    """Of the least and the greatest weight, of the range up to the second level, and of what is left."""
    beta = _sigmoid(tl.load(beta_ptr + group, mask=known, other=0.0))
    gamma = _sigmoid(tl.load(gamma_ptr + group, mask=known, other=0.0))
    first = _sigmoid(tl.load(s1_ptr + group, mask=known, other=0.0))
    rest = _sigmoid(tl.load(s2_ptr + group, mask=known, other=0.0))
    return beta, gamma, first, rest


@triton.jit
def _extremes(w_ptr, group, groups, SIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Least and greatest weight of each group, NaN where not all is finite: minima pass over it."""
    low, high = tl.full([ROWS], float("inf"), tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    taint = tl.zeros([ROWS], tl.float32)
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(group, groups, start, SIZE, CHUNK)
        w = tl.load(w_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        taint += tl.sum(w * 0.0, axis=1)
        low = tl.minimum(low, tl.min(tl.where(exists, w, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(exists, w, float("-inf")), axis=1))
    return low + taint, high + taint


@triton.jit
def _in_order(a, b):
    return tl.minimum(a, b), tl.maximum(a, b)


@triton.jit
def _fp16_scale(largest):
    """A 127th of it as `fake_quant.fp16_scale` rounds it to float16: below its normal numbers up."""
    scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    scale = tl.minimum(tl.maximum(scale, 2.0**-24), 65504.0)
    steps = scale * 2.0**24
    whole = round_even(tl.minimum(steps, 2048.0))
    whole = tl.where(whole < steps, whole + 1.0, whole)
    return tl.where(scale >= 2.0**-14, scale, whole * 2.0**-24).to(tl.float16)


@triton.jit
def _rounded(level, scale):
    return round_even(tl.minimum(tl.maximum(tl.div_rn(level, scale), -127.0), 127.0))


@triton.jit
def ldp_forward_kernel(
    w_ptr, beta_ptr, gamma_ptr, s1_ptr, s2_ptr, y_ptr, soft_ptr, levels_ptr, scale_ptr, groups,
    SIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The levels of each group, as numbers and as stored, and each weight as the nearest of those stored."""
    group = rows_of_program(ROWS)
    known = group < groups
    beta, gamma, share, rest = _shares(beta_ptr, gamma_ptr, s1_ptr, s2_ptr, group, known)
    least, greatest = _extremes(w_ptr, group, groups, SIZE, ROWS, CHUNK)
    first, fourth = beta * least, gamma * greatest
    span = fourth - first
    second, third = first + span * share, first + span * (share + (1.0 - share) * rest)
    # One sign of weights may let the ends pass each other, and rounding neighbours.
    first, fourth = _in_order(first, fourth)
    second, third = _in_order(second, third)
    first, second = _in_order(first, second)
    third, fourth = _in_order(third, fourth)
    second, third = _in_order(second, third)
    half = _fp16_scale(tl.maximum(tl.abs(first), tl.abs(fourth)) + 0.0 * span)
    scale = half.to(tl.float32)
    tl.store(soft_ptr + 4 * group, first, mask=known)
    tl.store(soft_ptr + 4 * group + 1, second, mask=known)
    tl.store(soft_ptr + 4 * group + 2, third, mask=known)
    tl.store(soft_ptr + 4 * group + 3, fourth, mask=known)
    first, second = _rounded(first, scale), _rounded(second, scale)
    third, fourth = _rounded(third, scale), _rounded(fourth, scale)
    tl.store(levels_ptr + 4 * group, first.to(tl.int8), mask=known)
    tl.store(levels_ptr + 4 * group + 1, second.to(tl.int8), mask=known)
    tl.store(levels_ptr + 4 * group + 2, third.to(tl.int8), mask=known)
    tl.store(levels_ptr + 4 * group + 3, fourth.to(tl.int8), mask=known)
    tl.store(scale_ptr + group, half, mask=known)
    taint = (0.0 * span)[:, None]
    first, second = (first * scale)[:, None], (second * scale)[:, None]
    third, fourth = (third * scale)[:, None], (fourth * scale)[:, None]
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(group, groups, start, SIZE, CHUNK)
        w = tl.load(w_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        code = _nearest(w, first, second, third, fourth)
        low, high = tl.where(code > 0, second, first), tl.where(code > 2, fourth, third)
        y = tl.where(code > 1, high, low) + taint
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def ldp_backward_kernel(
    grad_ptr, w_ptr, beta_ptr, gamma_ptr, s1_ptr, s2_ptr, soft_ptr, levels_ptr, scale_ptr, grad_w_ptr,
    grad_beta_ptr, grad_gamma_ptr, grad_s1_ptr, grad_s2_ptr, groups,
    SIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """To a weight its gradient where it lies between the end levels; what came to all weights of a level
    goes on to what the levels are made of.
    """
    group = rows_of_program(ROWS)
    known = group < groups
    scale = tl.load(scale_ptr + group, mask=known, other=0.0).to(tl.float32)[:, None]
    first, second, third, fourth = _levels(levels_ptr, group, known)
    first, second = first.to(tl.float32) * scale, second.to(tl.float32) * scale
    third, fourth = third.to(tl.float32) * scale, fourth.to(tl.float32) * scale
    low = tl.load(soft_ptr + 4 * group, mask=known, other=0.0)[:, None]
    high = tl.load(soft_ptr + 4 * group + 3, mask=known, other=0.0)[:, None]
    beta, gamma, share, rest = _shares(beta_ptr, gamma_ptr, s1_ptr, s2_ptr, group, known)
    least, greatest = _extremes(w_ptr, group, groups, SIZE, ROWS, CHUNK)
    to_first, to_second = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    to_third, to_fourth = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(group, groups, start, SIZE, CHUNK)
        w = tl.load(w_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        grad_w = grad * ((w >= low) & (w <= high)).to(tl.float32)
        tl.store(grad_w_ptr + offsets, grad_w.to(grad_w_ptr.dtype.element_ty), mask=exists)
        code = _nearest(w, first, second, third, fourth)
        to_first += tl.sum(tl.where(code == 0, grad, 0.0), axis=1)
        to_second += tl.sum(tl.where(code == 1, grad, 0.0), axis=1)
        to_third += tl.sum(tl.where(code == 2, grad, 0.0), axis=1)
        to_fourth += tl.sum(tl.where(code == 3, grad, 0.0), axis=1)
    span = gamma * greatest - beta * least
    # Where the ends have passed each other, so have the levels between them.
    to_low, to_high = tl.where(span < 0, to_fourth, to_first), tl.where(span < 0, to_first, to_fourth)
    near, far = tl.where(span < 0, to_third, to_second), tl.where(span < 0, to_second, to_third)
    place = share + (1.0 - share) * rest  # of the third level in the range
    to_beta = (to_low + near * (1.0 - share) + far * (1.0 - place)) * least
    to_gamma = (near * share + far * place + to_high) * greatest
    to_share, to_rest = span * (near + far * (1.0 - rest)), span * far * (1.0 - share)
    tl.store(grad_beta_ptr + group, to_beta * beta * (1.0 - beta), mask=known)
    tl.store(grad_gamma_ptr + group, to_gamma * gamma * (1.0 - gamma), mask=known)
    tl.store(grad_s1_ptr + group, to_share * share * (1.0 - share), mask=known)
    tl.store(grad_s2_ptr + group, to_rest * rest * (1.0 - rest), mask=known)


@triton_op("w2a4::ldp_forward")
def ldp_forward(
    w: Tensor, beta: Tensor, gamma: Tensor, s1: Tensor, s2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights as their packed 2-bit form gives them back, and the levels of it.

    Args:
        w: float32, float16 or bfloat16 `[out, G, group_size]`, contiguous as every tensor here.
        beta, gamma, s1, s2: float32 `[out, G]`, see `fake_quant.ldp_levels`.

    Returns:
        `[out, G, group_size]` in w's dtype; the levels before they are rounded, float32 `[out, G, 4]`,
        ascending; as they are stored, int8 of that shape and float16 scales `[out, G]`.
    """
    outputs = _empty_forward(w, beta, gamma, s1, s2)
    launch_rows(wrap_triton(ldp_forward_kernel), w, w.shape[-1], w, beta, gamma, s1, s2, *outputs)
    return outputs


@triton_op("w2a4::ldp_backward")
def ldp_backward(
    grad: Tensor, w: Tensor, beta: Tensor, gamma: Tensor, s1: Tensor, s2: Tensor, soft: Tensor,
    levels: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to w, in its dtype, and to beta, gamma, s1 and s2; soft and the rest are `ldp_forward`'s.

    To w the identity where `soft[..., 0] <= w <= soft[..., 3]`, else 0; its extremes count as constants.
    """
    outputs = _empty_backward(grad, w, beta, gamma, s1, s2, soft, levels, scale)
    inputs = grad, w, beta, gamma, s1, s2, soft, levels, scale
    launch_rows(wrap_triton(ldp_backward_kernel), w, w.shape[-1], *inputs, *outputs)
    return outputs


@ldp_forward.register_fake
def _empty_forward(w, beta, gamma, s1, s2):
    _check("ldp_forward", w, beta, gamma, s1, s2)
    soft = w.new_empty((*w.shape[:2], 4), dtype=torch.float32)
    scale = w.new_empty(w.shape[:2], dtype=torch.float16)
    return torch.empty_like(w), soft, torch.empty_like(soft, dtype=torch.int8), scale


@ldp_backward.register_fake
def _empty_backward(grad, w, beta, gamma, s1, s2, soft, levels, scale):
    name = "ldp_backward"
    _check(name, w, beta, gamma, s1, s2)
    expect_tensor(name, w.device, "grad", grad, w.dtype, w.shape)
    expect_tensor(name, w.device, "soft", soft, torch.float32, (*w.shape[:2], 4))
    expect_tensor(name, w.device, "levels", levels, torch.int8, (*w.shape[:2], 4))
    expect_tensor(name, w.device, "scale", scale, torch.float16, w.shape[:2])
    return torch.empty_like(w), *(torch.empty_like(beta) for _ in range(4))


def _check(op: str, w: Tensor, *shares: Tensor) -> None:
    require(op, w.dtype in FLOATS, f"w has dtype {w.dtype}, expected one of {FLOATS}")
    shaped = w.dim() == 3 and w.shape[2] > 0 and w.is_contiguous()
    require(op, shaped, f"w has shape {[*w.shape]}, expected [out, groups, group_size], contiguous")
    for name, tensor in zip(("beta", "gamma", "s1", "s2"), shares, strict=True):
        expect_tensor(op, w.device, name, tensor, torch.float32, w.shape[:2])
