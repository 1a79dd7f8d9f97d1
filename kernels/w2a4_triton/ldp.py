"""Fake quantisation of weights to four levels a group, what learnable direct partitioning trains through.

The levels themselves are few, and `w2a4.quantizers` computes and rounds them in PyTorch, so that they are
those of the packed weights to the bit; what touches every weight is here:

    low, high = group_range(w, group_size)
    soft = sorted levels of low, high and the parameters              [out, G, 4], differentiable
    hard = scale * int8 levels, soft as it is stored                  [out, G, 4]
    y = codebook(w, soft, hard)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import expect_tensor, require
from .language import launch_rows, rows_of_program, triton_op, wrap_triton


@triton.jit
def _nearest(w, hard_ptr, group, known):
    """Codes 0..3 of the levels nearest to the weights, ties to the lower, and the levels `[groups, 1]`."""
    first = tl.load(hard_ptr + 4 * group, mask=known, other=0.0)[:, None]
    second = tl.load(hard_ptr + 4 * group + 1, mask=known, other=0.0)[:, None]
    third = tl.load(hard_ptr + 4 * group + 2, mask=known, other=0.0)[:, None]
    fourth = tl.load(hard_ptr + 4 * group + 3, mask=known, other=0.0)[:, None]
    code = (w > (second + first) * 0.5).to(tl.int32)
    code += (w > (third + second) * 0.5).to(tl.int32)
    code += (w > (fourth + third) * 0.5).to(tl.int32)
    return code, first, second, third, fourth


@triton.jit
def group_range_kernel(
    w_ptr, low_ptr, high_ptr, groups, SIZE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr
):
    """Least and greatest of SIZE weights a group, float32; not a number where a weight is not finite."""
    group, offsets, exists = rows_of_program(groups, SIZE, ROWS, PADDED)
    w = tl.load(w_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    # Minimum and maximum pass over NaN on GPUs; 0 * w does not.
    taint = tl.sum(w * 0.0, axis=1)
    low = tl.min(tl.where(exists, w, float("inf")), axis=1) + taint
    high = tl.max(tl.where(exists, w, float("-inf")), axis=1) + taint
    tl.store(low_ptr + group, low, mask=group < groups)
    tl.store(high_ptr + group, high, mask=group < groups)


@triton.jit
def codebook_kernel(
    w_ptr, hard_ptr, y_ptr, groups, SIZE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr
):
    """Each weight as the nearest of its group's levels."""
    group, offsets, exists = rows_of_program(groups, SIZE, ROWS, PADDED)
    w = tl.load(w_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    code, first, second, third, fourth = _nearest(w, hard_ptr, group, group < groups)
    low, high = tl.where(code > 0, second, first), tl.where(code > 2, fourth, third)
    y = tl.where(code > 1, high, low)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def codebook_backward_kernel(
    grad_ptr, w_ptr, soft_ptr, hard_ptr, grad_w_ptr, grad_soft_ptr, groups,
    SIZE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """To a weight its gradient where it lies between the end levels, to a level the sum of what chose it."""
    group, offsets, exists = rows_of_program(groups, SIZE, ROWS, PADDED)
    known = group < groups
    w = tl.load(w_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    low = tl.load(soft_ptr + 4 * group, mask=known, other=0.0)[:, None]
    high = tl.load(soft_ptr + 4 * group + 3, mask=known, other=0.0)[:, None]
    grad_w = grad * ((w >= low) & (w <= high)).to(tl.float32)
    tl.store(grad_w_ptr + offsets, grad_w.to(grad_w_ptr.dtype.element_ty), mask=exists)
    code = _nearest(w, hard_ptr, group, known)[0]
    for level in tl.static_range(4):
        chosen = tl.sum(tl.where(code == level, grad, 0.0), axis=1)
        tl.store(grad_soft_ptr + 4 * group + level, chosen, mask=known)


@triton_op("w2a4::group_range")
def group_range(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of each group, without gradient.

    Args:
        w: float32, float16 or bfloat16 `[out, in]`, contiguous.
        group_size: divides `in`.

    Returns:
        low, high: float32 `[out, in / group_size]`.

    Equivalent: `w.float().unflatten(-1, (-1, group_size)).aminmax(dim=-1)`.
    """
    _check_weight("group_range", w, group_size)
    low = w.new_empty((w.shape[0], w.shape[1] // group_size), dtype=torch.float32)
    high = torch.empty_like(low)
    launch_rows(wrap_triton(group_range_kernel), w.numel(), group_size, w, low, high)
    return low, high


@triton_op("w2a4::codebook")
def codebook(w: Tensor, soft: Tensor, hard: Tensor) -> Tensor:
    """Each weight as the nearest of its group's levels `hard`, ties to the lower; differentiable.

    Gradients: to w the identity where `soft[..., 0] <= w <= soft[..., 3]`, else 0; to soft, for each level,
    the sum over the weights that chose it; none to hard.

    Args:
        w: float32, float16 or bfloat16 `[out, in]`, contiguous as every tensor here.
        soft: float32 `[out, G, 4]`, ascending levels before rounding; G divides `in`.
        hard: float32 `[out, G, 4]`, ascending, `soft` as it is stored.

    Returns:
        `[out, in]` in w's dtype.
    """
    group_size = _check_codebook("codebook", w, soft, hard)
    y = torch.empty_like(w)
    launch_rows(wrap_triton(codebook_kernel), w.numel(), group_size, w, hard, y)
    return y


@triton_op("w2a4::codebook_backward")
def codebook_backward(grad: Tensor, w: Tensor, soft: Tensor, hard: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `codebook` to w, in w's dtype, and to soft, float32. `grad` is shaped and typed as w."""
    group_size = _check_codebook("codebook_backward", w, soft, hard)
    expect_tensor("codebook_backward", w.device, "grad", grad, w.dtype, w.shape)
    grad_w, grad_soft = torch.empty_like(w), torch.empty_like(soft)
    launch_rows(
        wrap_triton(codebook_backward_kernel), w.numel(), group_size, grad, w, soft, hard, grad_w, grad_soft
    )
    return grad_w, grad_soft


@group_range.register_fake
def _(w, group_size):
    _check_weight("group_range", w, group_size)
    low = w.new_empty((w.shape[0], w.shape[1] // group_size), dtype=torch.float32)
    return low, torch.empty_like(low)


@codebook.register_fake
def _(w, soft, hard):
    _check_codebook("codebook", w, soft, hard)
    return torch.empty_like(w)


@codebook_backward.register_fake
def _(grad, w, soft, hard):
    _check_codebook("codebook_backward", w, soft, hard)
    return torch.empty_like(w), torch.empty_like(soft)


def _save_codebook(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _codebook_gradients(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.w2a4.codebook_backward(grad.contiguous(), *ctx.saved_tensors), None


codebook.register_autograd(_codebook_gradients, setup_context=_save_codebook)


def _check_weight(op: str, w: Tensor, group_size: int) -> None:
    floats = torch.float32, torch.float16, torch.bfloat16
    require(op, w.dtype in floats, f"w has dtype {w.dtype}, expected one of {floats}")
    require(
        op, w.dim() == 2 and w.is_contiguous(), f"w has shape {[*w.shape]}, expected [out, in], contiguous"
    )
    divides = group_size > 0 and w.shape[1] % group_size == 0
    require(op, divides, f"group_size={group_size} does not divide the rows of w, shape {[*w.shape]}")


def _check_codebook(op: str, w: Tensor, soft: Tensor, hard: Tensor) -> int:
    """The group size."""
    shaped = soft.dim() == 3 and soft.shape[1] > 0
    require(op, shaped, f"soft has shape {[*soft.shape]}, expected [out, groups, 4]")
    groups = int(soft.shape[1])
    require(op, w.shape[-1] % groups == 0, f"soft has {groups} groups a row, w has shape {[*w.shape]}")
    group_size = int(w.shape[-1]) // groups
    _check_weight(op, w, group_size)
    for name, levels in (("soft", soft), ("hard", hard)):
        expect_tensor(op, w.device, name, levels, torch.float32, (w.shape[0], groups, 4))
    return group_size
