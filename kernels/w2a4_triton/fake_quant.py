"""`fake_quant_rows` and its backward on CUDA: activations, keys and values as their 4 bits give them back.

A row is a group of activations, or the head_dim of one key or value: it has a scale, and for keys and
values a zero-point, of its own. Backward computes them again instead of keeping them. A row that is longer
than a chunk is read once to find its scale and once or twice to use it, from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, expect_tensor, require
from .language import chunk_of_rows, launch_rows, mul_rn, round_even, row_op, rows_of_program


@triton.jit
def _range(x_ptr, row, rows, SIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Least and greatest of each row, and 0, or NaN where not all is finite."""
    low, high = tl.full([ROWS], float("inf"), tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    taint = tl.zeros([ROWS], tl.float32)
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(row, rows, start, SIZE, CHUNK)
        x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        # Where a value is not finite, neither is 0 * x. Maxima pass over NaN.
        taint += tl.sum(x * 0.0, axis=1)
        low = tl.minimum(low, tl.min(tl.where(exists, x, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(exists, x, float("-inf")), axis=1))
    return low, high, taint


@triton.jit
def _scale_a4(low, high, clip):
    """Scale of each row and what clip is multiplied with to give it; 1 and 0 for a row of zeros.

    And its number furthest from 0, of two opposite ones the negative.
    """
    furthest = tl.where(-low >= high, low, high)
    by_clip = tl.where(clip < 0, tl.div_rn(furthest, 8.0), tl.div_rn(tl.abs(furthest), 7.0))
    scale = tl.where(clip < 0, tl.div_rn(clip * furthest, 8.0), tl.div_rn(clip * tl.abs(furthest), 7.0))
    return tl.where(scale == 0, 1.0, scale)[:, None], tl.where(scale == 0, 0.0, by_clip), furthest


@triton.jit
def _asymmetric(low, high, clip):
    """Scale and zero-point of each row as float16 holds them, and by how much clip moves the two."""
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
def _quantise_kv(x, scale, zero):
    """The same for keys and values. A scale of 0 has no code to move."""
    steps, code, inside = _quantise(x - zero, tl.where(scale == 0, 1.0, scale), 0.0, 15.0)
    return steps, code, inside & (scale != 0)


@triton.jit
def _is(x, extreme, exists):
    """Where x is an extreme of its row."""
    return (x == extreme[:, None]) & exists


@triton.jit
def _sets_scale(x, furthest, clip, exists):
    """Where x is the number furthest from 0 of its row; its opposite too, unless the sign counts."""
    return _is(tl.where(clip < 0, x, tl.abs(x)), tl.where(clip < 0, furthest, tl.abs(furthest)), exists)


@triton.jit
def _share(gradient, count):
    """The gradient of each row's extreme, shared by the entries that are it."""
    return tl.div_rn(gradient, tl.maximum(count, 1.0))[:, None]


@triton.jit
def fake_quant_kernel(
    x_ptr, clip_ptr, y_ptr, rows, KV: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """`scale * code`, plus the zero-point for keys and values."""
    row = rows_of_program(ROWS)
    low, high, taint = _range(x_ptr, row, rows, SIZE, ROWS, CHUNK)
    clip = tl.load(clip_ptr)
    if KV:
        scale, zero, _, _ = _asymmetric(low + taint, high + taint, clip)
    else:
        scale, _, _ = _scale_a4(low + taint, high + taint, clip)
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(row, rows, start, SIZE, CHUNK)
        x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        if KV:
            code = _quantise_kv(x, scale, zero)[1]
            y = mul_rn(code, scale) + zero
        else:
            code = _quantise(x, scale, -8.0, 7.0)[1]
            y = code * scale
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def fake_quant_a4_backward_kernel(
    grad_ptr, x_ptr, clip_ptr, grad_x_ptr, grad_clip_ptr, rows, SIZE: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """To x its gradient where it is not clipped, and through the scale; to clip one sum a row."""
    row = rows_of_program(ROWS)
    low, high, taint = _range(x_ptr, row, rows, SIZE, ROWS, CHUNK)
    clip = tl.load(clip_ptr)
    scale, scale_by_clip, furthest = _scale_a4(low + taint, high + taint, clip)
    to_scale, count = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(row, rows, start, SIZE, CHUNK)
        x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        steps, code, inside = _quantise(x, scale, -8.0, 7.0)
        to_scale += tl.sum(grad * (code - tl.where(inside, steps, 0.0)), axis=1)
        count += tl.sum(_sets_scale(x, furthest, clip, exists).to(tl.float32), axis=1)
    by_furthest = to_scale * clip
    by_furthest = tl.where(clip < 0, tl.div_rn(by_furthest, 8.0), tl.div_rn(by_furthest, 7.0))
    to_furthest = _share(by_furthest, count)
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(row, rows, start, SIZE, CHUNK)
        x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        inside = _quantise(x, scale, -8.0, 7.0)[2]
        sign = tl.where(x < 0, tl.where(clip < 0, 1.0, -1.0), tl.where(x == 0, 0.0, 1.0))
        grad_x = tl.where(inside, grad, 0.0)
        grad_x += sign * tl.where(_sets_scale(x, furthest, clip, exists), to_furthest, 0.0)
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=exists)
    # Last: while nothing is written, a row that fits into a chunk is loaded only once.
    tl.store(grad_clip_ptr + row, to_scale * scale_by_clip, mask=row < rows)


@triton.jit
def fake_quant_kv4_backward_kernel(
    grad_ptr, x_ptr, clip_ptr, grad_x_ptr, grad_clip_ptr, rows, SIZE: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """To x its gradient where it is not clipped, and through scale and zero-point; to clip one sum a row."""
    row = rows_of_program(ROWS)
    low, high, taint = _range(x_ptr, row, rows, SIZE, ROWS, CHUNK)
    clip = tl.load(clip_ptr)
    scale, zero, scale_by_clip, zero_by_clip = _asymmetric(low + taint, high + taint, clip)
    to_scale, to_zero = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    lowest, highest = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(row, rows, start, SIZE, CHUNK)
        x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        steps, code, inside = _quantise_kv(x, scale, zero)
        to_scale += tl.sum(grad * (code - tl.where(inside, steps, 0.0)), axis=1)
        # Where nothing is clipped the zero-point cancels out.
        to_zero += tl.sum(tl.where(inside, 0.0, grad), axis=1)
        lowest += tl.sum(_is(x, low, exists).to(tl.float32), axis=1)
        highest += tl.sum(_is(x, high, exists).to(tl.float32), axis=1)
    by_range = tl.div_rn(to_scale * clip, 15.0)
    to_high = _share(by_range + to_zero * (0.5 - 0.5 * clip), highest)
    to_low = _share(to_zero * (0.5 + 0.5 * clip) - by_range, lowest)
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(row, rows, start, SIZE, CHUNK)
        x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        inside = _quantise_kv(x, scale, zero)[2]
        grad_x = tl.where(inside, grad, 0.0)
        grad_x += tl.where(_is(x, high, exists), to_high, 0.0) + tl.where(_is(x, low, exists), to_low, 0.0)
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=exists)
    tl.store(grad_clip_ptr + row, to_scale * scale_by_clip + to_zero * zero_by_clip, mask=row < rows)


@row_op("fake_quant_rows")
def fake_quant_rows(x: Tensor, clip: Tensor, kv: bool) -> Tensor:
    """Each row as 4 bits give it back.

    Args:
        x: float32, float16 or bfloat16 `[..., row]`, contiguous.
        clip: float32 `[1]`. Of activations the scale is `clip * max|x| / 7`, or `clip * x / 8` for the x
            furthest from 0 where clip is negative; of keys and values it shrinks the range around its middle.
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
    kernel = fake_quant_kv4_backward_kernel if kv else fake_quant_a4_backward_kernel
    launch_rows(kernel, x, x.shape[-1], grad, x, clip, grad_x, grad_clip)
    return grad_x, grad_clip


def _check(op: str, x: Tensor, clip: Tensor) -> None:
    require(op, x.dtype in FLOATS, f"x has dtype {x.dtype}, expected one of {FLOATS}")
    require(op, x.dim() > 0 and x.shape[-1] > 0, f"x has shape {[*x.shape]}, expected [..., row]")
    require(op, x.is_contiguous(), f"x of shape {[*x.shape]} is not contiguous")
    expect_tensor(op, x.device, "clip", clip, torch.float32, (1,))
