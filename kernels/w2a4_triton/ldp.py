"""`snap` and its backward on CUDA: weights as the nearest of the four levels that their group trains."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, expect_tensor, require
from .language import chunk_of_rows, launch_rows, row_op, rows_of_program


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
def snap_kernel(
    w_ptr, levels_ptr, y_ptr, groups, SIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """Each weight as the nearest of its group's levels."""
    group = rows_of_program(ROWS)
    first, second, third, fourth = _levels(levels_ptr, group, group < groups)
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(group, groups, start, SIZE, CHUNK)
        w = tl.load(w_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        code = _nearest(w, first, second, third, fourth)
        low, high = tl.where(code > 0, second, first), tl.where(code > 2, fourth, third)
        y = tl.where(code > 1, high, low)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def snap_backward_kernel(
    grad_ptr, w_ptr, soft_ptr, levels_ptr, grad_w_ptr, grad_soft_ptr, groups,
    SIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """To a weight its gradient where it lies between the end levels, to a level the sum of what chose it."""
    group = rows_of_program(ROWS)
    known = group < groups
    first, second, third, fourth = _levels(levels_ptr, group, known)
    low = tl.load(soft_ptr + 4 * group, mask=known, other=0.0)[:, None]
    high = tl.load(soft_ptr + 4 * group + 3, mask=known, other=0.0)[:, None]
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
    tl.store(grad_soft_ptr + 4 * group, to_first, mask=known)
    tl.store(grad_soft_ptr + 4 * group + 1, to_second, mask=known)
    tl.store(grad_soft_ptr + 4 * group + 2, to_third, mask=known)
    tl.store(grad_soft_ptr + 4 * group + 3, to_fourth, mask=known)


@row_op("snap")
def snap(w: Tensor, levels: Tensor) -> Tensor:
    """Each weight as the nearest of its group's levels, ties to the lower.

    Args:
        w: float32, float16 or bfloat16 `[out, G, group_size]`, contiguous as every tensor here.
        levels: float32 `[out, G, 4]`, ascending.

    Returns:
        `[out, G, group_size]` in w's dtype.
    """
    _check("snap", w, levels=levels)
    y = torch.empty_like(w)
    launch_rows(snap_kernel, w, w.shape[-1], w, levels, y)
    return y


@row_op("snap_backward")
def snap_backward(grad: Tensor, w: Tensor, soft: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to w, in w's dtype, and to soft, float32.

    To w the identity where `soft[..., 0] <= w <= soft[..., 3]`, else 0; to soft, for each level, the sum
    over the weights that took it. `soft` are the `levels` before their rounding; `grad` is as w.
    """
    _check("snap_backward", w, soft=soft, levels=levels)
    expect_tensor("snap_backward", w.device, "grad", grad, w.dtype, w.shape)
    grad_w, grad_soft = torch.empty_like(w), torch.empty_like(soft)
    launch_rows(snap_backward_kernel, w, w.shape[-1], grad, w, soft, levels, grad_w, grad_soft)
    return grad_w, grad_soft


def _check(op: str, w: Tensor, **levels: Tensor) -> None:
    require(op, w.dtype in FLOATS, f"w has dtype {w.dtype}, expected one of {FLOATS}")
    shaped = w.dim() == 3 and w.shape[2] > 0 and w.is_contiguous()
    require(op, shaped, f"w has shape {[*w.shape]}, expected [out, groups, group_size], contiguous")
    for name, tensor in levels.items():
        expect_tensor(op, w.device, name, tensor, torch.float32, (*w.shape[:2], 4))
