"""`fake_quant_rows` and its backward on CUDA: activations, keys and values as their 4 bits give them back.

A row is a group of activations, or the head_dim of one key or value: it has a scale, and for keys and
values a zero-point, of its own. Backward computes them again instead of keeping them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, expect_tensor, require
from .language import launch_rows, mul_rn, round_even, row_op, rows_of_program


@triton.jit
def _symmetric(x, clip):
    """Scale of each row and what clip is multiplied with to give it; 1 and 0 for a row of zeros."""
    # Where a value is not finite, neither is 0 * x, and the whole row shall be NaN. Maxima pass over NaN.
    largest = tl.max(tl.abs(x), axis=1) + tl.sum(x * 0.0, axis=1)
    scale = tl.div_rn(clip * largest, 7.0)
    return tl.where(scale == 0, 1.0, scale)[:, None], tl.where(scale == 0, 0.0, tl.div_rn(largest, 7.0))


@triton.jit
def _range(x, exists):
    """Least and greatest of each row."""
    low = tl.min(tl.where(exists, x, float("inf")), axis=1)
    return low, tl.max(tl.where(exists, x, float("-inf")), axis=1)


@triton.jit
def _asymmetric(x, exists, clip):
    """Scale and zero-point of each row as float16 holds them, and by how much clip moves the two."""
    taint = tl.sum(x * 0.0, axis=1)
    low, high = _range(x, exists)
    low, high = low + taint, high + taint
    # Not fused with the addition and subtraction below.
    middle, half = (low + high) * 0.5, mul_rn((high - low) * 0.5, clip)
    scale = tl.div_rn(half + half, 15.0).to(tl.float16).to(tl.float32)
    zero = (middle - half).to(tl.float16).to(tl.float32)
    return scale[:, None], zero[:, None], tl.div_rn(high - low, 15.0), (low - high) * 0.5


@triton.jit
def _quantise(x, divisor, least, most):
    """Codes before and after rounding, and where they are not clipped."""
    steps = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    inside = (steps >= least) & (steps <= most)
    clipped = tl.where(steps < least, least, tl.where(steps > most, most, steps))
    return steps, round_even(clipped), inside


@triton.jit
def _to_extreme(x, extreme, exists, gradient):
    """The gradient of each row's extreme, shared by the entries that are it."""
    is_it = (x == extreme[:, None]) & exists
    count = tl.maximum(tl.sum(is_it.to(tl.float32), axis=1), 1.0)
    return tl.where(is_it, tl.div_rn(gradient, count)[:, None], 0.0)


@triton.jit
def fake_quant_kernel(
    x_ptr, clip_ptr, y_ptr, rows, KV: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """`scale * code`, plus the zero-point for keys and values."""
    row, offsets, exists = rows_of_program(rows, SIZE, ROWS, PADDED)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    clip = tl.load(clip_ptr)
    if KV:
        scale, zero, _, _ = _asymmetric(x, exists, clip)
        _, code, _ = _quantise(x - zero, tl.where(scale == 0, 1.0, scale), 0.0, 15.0)
        y = mul_rn(code, scale) + zero
    else:
        scale, _ = _symmetric(x, clip)
        _, code, _ = _quantise(x, scale, -8.0, 7.0)
        y = code * scale
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def fake_quant_backward_kernel(
    grad_ptr, x_ptr, clip_ptr, grad_x_ptr, grad_clip_ptr, rows, KV: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """To x its gradient where it is not clipped, and through scale and zero-point; to clip one sum a row."""
    row, offsets, exists = rows_of_program(rows, SIZE, ROWS, PADDED)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    clip = tl.load(clip_ptr)
    if KV:
        scale, zero, scale_by_clip, zero_by_clip = _asymmetric(x, exists, clip)
        steps, code, inside = _quantise(x - zero, tl.where(scale == 0, 1.0, scale), 0.0, 15.0)
        # Where nothing is clipped the zero-point cancels out, and a scale of 0 has no code to move.
        inside = inside & (scale != 0)
        to_scale = tl.sum(grad * (code - tl.where(inside, steps, 0.0)), axis=1)
        to_zero = tl.sum(tl.where(inside, 0.0, grad), axis=1)
        low, high = _range(x, exists)
        by_range = to_scale * clip / 15.0
        by_extremes = _to_extreme(x, high, exists, by_range + to_zero * (0.5 - 0.5 * clip))
        by_extremes += _to_extreme(x, low, exists, to_zero * (0.5 + 0.5 * clip) - by_range)
        to_clip = to_scale * scale_by_clip + to_zero * zero_by_clip
    else:
        scale, scale_by_clip = _symmetric(x, clip)
        steps, code, inside = _quantise(x, scale, -8.0, 7.0)
        to_scale = tl.sum(grad * (code - tl.where(inside, steps, 0.0)), axis=1)
        sign = tl.where(x < 0, -1.0, tl.where(x > 0, 1.0, 0.0))
        largest = tl.max(tl.abs(x), axis=1)
        by_extremes = sign * _to_extreme(tl.abs(x), largest, exists, to_scale * clip / 7.0)
        to_clip = to_scale * scale_by_clip
    grad_x = tl.where(inside, grad, 0.0) + by_extremes
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=exists)
    tl.store(grad_clip_ptr + row, to_clip, mask=row < rows)


@row_op("fake_quant_rows")
def fake_quant_rows(x: Tensor, clip: Tensor, kv: bool) -> Tensor:
    """Each row as 4 bits give it back.

    Args:
        x: float32, float16 or bfloat16 `[..., row]`, contiguous.
        clip: float32 `[1]`. Of activations the scale is `clip * max|x| / 7`; of keys and values it shrinks
            the range around its middle.
        kv: whether a row is of keys or values, with a zero-point.

    Returns:
        `[..., row]` in x's dtype. A row with NaN or infinity becomes NaN.
    """
    _check("fake_quant_rows", x, clip)
    y = torch.empty_like(x)
    launch_rows(fake_quant_kernel, x, x.shape[-1], x, clip, y, KV=kv)
    return y


@row_op("fake_quant_rows_backward")
def fake_quant_rows_backward(grad: Tensor, x: Tensor, clip: Tensor, kv: bool) -> tuple[Tensor, Tensor]:
    """Gradients to x, in x's dtype, and to clip, a float32 for each row, to be summed."""
    _check("fake_quant_rows_backward", x, clip)
    expect_tensor("fake_quant_rows_backward", x.device, "grad", grad, x.dtype, x.shape)
    grad_x, grad_clip = torch.empty_like(x), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    launch_rows(fake_quant_backward_kernel, x, x.shape[-1], grad, x, clip, grad_x, grad_clip, KV=kv)
    return grad_x, grad_clip


def _check(op: str, x: Tensor, clip: Tensor) -> None:
    require(op, x.dtype in FLOATS, f"x has dtype {x.dtype}, expected one of {FLOATS}")
    require(op, x.dim() > 0 and x.shape[-1] > 0, f"x has shape {[*x.shape]}, expected [..., row]")
    require(op, x.is_contiguous(), f"x of shape {[*x.shape]} is not contiguous")
    expect_tensor(op, x.device, "clip", clip, torch.float32, (1,))
