"""Linear layers on packed weights.

The GEMMs of Triton are `linear_w2a4` and `linear_w4a4` for many tokens, which call them; see `dispatch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import unpack
from .table import fake_of, one_device, op


def _linear(
    a_codes: Tensor, a_scale: Tensor, weight: Tensor, scale: Tensor, bias, group_size, out_dtype
) -> Tensor:
    """Sum over blocks, in order, of the exact integer sum times (weight scale * activation scale)."""
    out_features, groups = scale.shape
    in_features = groups * group_size
    a = unpack(a_codes, 4, in_features, signed=True).double().reshape(-1, in_features)
    a_scale_rows = a_scale.reshape(-1, a_scale.shape[-1])
    act_group = in_features // a_scale.shape[-1]
    block = min(group_size, act_group)
    acc = torch.zeros(a.shape[0], out_features, device=a.device)
    for start in range(0, in_features, block):
        part = slice(start, start + block)
        exact = a[:, part] @ weight[:, part].double().T  # integers below 2**53: exact in any order
        acc = acc + exact.float() * (
            scale[:, start // group_size].float()[None, :] * a_scale_rows[:, start // act_group][:, None]
        )
    if bias is not None:
        acc = acc + bias.float()
    return acc.to(out_dtype).reshape(*a_codes.shape[:-1], out_features)


@op(
    "(Tensor a_codes, Tensor a_scale, Tensor weight, Tensor levels, Tensor scale, Tensor? bias, int "
    "group_size, ScalarType out_dtype, Tensor? residual=None) -> Tensor",
    kernels="cpu cuda",
)
def linear_w2a4(
    a_codes: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """`a @ W.T + bias + residual` with 4-bit activations and non-uniform 2-bit weights.

    Args:
        a_codes, a_scale: from `quantize_a4`, uint8 `[..., ceil(in / 2)]` and float32 `[..., A]`; the
            activation group `in / A` divides `group_size` or is a multiple of it.
        weight: uint8 `[out, ceil(in / 4)]`, 2-bit codes.
        levels: int8 `[out, in / group_size, 4]`; a code picks one.
        scale: float16 `[out, in / group_size]`; a weight is `scale * levels[code]`.
        bias: floating `[out]` or None.
        group_size: inputs of one scale.
        out_dtype: of the result.
        residual: `[..., out]` in out_dtype, added to the rounded result.

    Returns:
        `[..., out]`.
    """
    ints = _picked_levels(weight, 2, levels, group_size)
    y = _linear(a_codes, a_scale, ints, scale, bias, group_size, out_dtype)
    return y if residual is None else y + residual


def _picked_levels(weight: Tensor, bits: int, levels: Tensor, group_size: int) -> Tensor:
    """int8 `[out, in]`: of each packed code its level."""
    codes = unpack(weight, bits, levels.shape[1] * group_size).long()
    return torch.gather(levels, 2, codes.unflatten(1, (-1, group_size))).flatten(1)


@op(
    "(Tensor a_codes, Tensor a_scale, Tensor weight, Tensor levels, Tensor scale, Tensor? bias, int "
    "group_size, ScalarType out_dtype, Tensor? residual=None) -> Tensor",
    kernels="cpu",
)
def linear_w3a4(
    a_codes: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """`a @ W.T + bias + residual` with 4-bit activations and 3-bit weights, on any eight levels.

    As `linear_w2a4`, but `weight` is uint8 `[out, ceil(in / 4) + ceil(in / 8)]` of 3-bit codes and
    `levels` int8 `[out, in / group_size, 8]`.
    """
    ints = _picked_levels(weight, 3, levels, group_size)
    y = _linear(a_codes, a_scale, ints, scale, bias, group_size, out_dtype)
    return y if residual is None else y + residual


@fake_of(linear_w2a4)
@fake_of(linear_w3a4)
def _(a_codes, a_scale, weight, levels, scale, bias, group_size, out_dtype, residual=None):
    one_device(a_codes=a_codes, a_scale=a_scale, weight=weight, levels=levels, scale=scale, bias=bias,
                residual=residual)  # fmt: skip
    return a_codes.new_empty((*a_codes.shape[:-1], scale.shape[0]), dtype=out_dtype)


@op(
    "(Tensor a_codes, Tensor a_scale, Tensor weight, Tensor scale, Tensor? bias, int group_size, "
    "ScalarType out_dtype, Tensor? residual=None) -> Tensor",
    kernels="cpu cuda",
)
def linear_w4a4(
    a_codes: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """`a @ W.T + bias + residual` with 4-bit activations and symmetric 4-bit weights.

    As `linear_w2a4`, but `weight` is uint8 `[out, ceil(in / 2)]` of signed nibbles and a weight is
    `scale * code`.
    """
    ints = unpack(weight, 4, scale.shape[1] * group_size, signed=True)
    y = _linear(a_codes, a_scale, ints, scale, bias, group_size, out_dtype)
    return y if residual is None else y + residual


@fake_of(linear_w4a4)
def _(a_codes, a_scale, weight, scale, bias, group_size, out_dtype, residual=None):
    one_device(a_codes=a_codes, a_scale=a_scale, weight=weight, scale=scale, bias=bias, residual=residual)
    return a_codes.new_empty((*a_codes.shape[:-1], scale.shape[0]), dtype=out_dtype)


@op(
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor",
    kernels="cpu cuda",
)
def linear_w8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` with full-precision activations and 8-bit weights, one scale a row.

    Args:
        x: floating `[..., in]`.
        weight: int8 `[out, in]`.
        scale: float16 `[out]`; a weight is `scale * code`.
        bias: floating `[out]` or None.

    Returns:
        `[..., out]` in x's dtype, summed in float32.
    """
    y = x.float() @ weight.float().T * scale.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@fake_of(linear_w8)
def _(x, weight, scale, bias=None):
    one_device(x=x, weight=weight, scale=scale, bias=bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op(
    "(Tensor a_codes, Tensor a_scale, Tensor weight, Tensor levels, Tensor scale, Tensor? bias, "
    "SymInt group_size, ScalarType out_dtype) -> Tensor",
    kernels="triton",
)
def gemm_w2a4(
    a_codes: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `linear_w2a4`; the kernel may add groups by fma and multiply the token's scale in last."""
    return linear_w2a4(a_codes, a_scale, weight, levels, scale, bias, group_size, out_dtype)


@op(
    "(Tensor a_codes, Tensor a_scale, Tensor weight, Tensor scale, Tensor? bias, SymInt group_size, "
    "ScalarType out_dtype) -> Tensor",
    kernels="triton",
)
def gemm_w4a4(
    a_codes: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `linear_w4a4`, with the same freedom as `gemm_w2a4`."""
    return linear_w4a4(a_codes, a_scale, weight, scale, bias, group_size, out_dtype)
