"""`gemm_w4a4` and `gemm_w2a4`: packed activations times packed weights on int8 tensor cores, for many tokens.

One kernel serves both; only the decoding of weights differs. Inputs with even and with odd numbers are
multiplied apart, because that is how nibbles come out of bytes, and an exact sum does not care for the order.
Prompts of a thousand tokens and more take another one on Hopper, with the same bits: `gemm_int8`.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, expect_tensor, require
from .gemm_int8 import gemm_int8
from .language import (
    device_of,
    fma,
    load_once,
    look_up_levels,
    mul_rn,
    triton_op,
    unpack_nibbles,
    wrap_triton,
)
from .tiles import Problem, Tile, choose_tile, program_tile

#: Products are 128 * 128 at most (codes count 16-fold), so this many of them fit 32 bits.
MAX_BLOCK = (2**31 - 1) // 2**14


@triton.jit
def gemm_a4_kernel(
    a_ptr, a_scale_ptr, weight_ptr, levels_ptr, scale_ptr, bias_ptr, y_ptr, tokens, out_features,
    BITS: tl.constexpr, IN: tl.constexpr, GROUP: tl.constexpr, ACT_GROUP: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[tokens, out] = sum over blocks, in order, of an exact int32 sum times (weight scale * token scale).

    A block is BLOCK inputs that share their scales, so what is rounded, and in which order, does not depend
    on the tile. With one scale a token, it is multiplied in once at the end and a block is added by an fma,
    half the instructions; with several, the order is that of `reference._linear`. Tensors are row-major: a
    uint8 [tokens, IN / 2], a_scale float32 [tokens, IN / ACT_GROUP], weight uint8 [out, IN * BITS / 8],
    levels int32 (four int8) and scale float16 [out, IN / GROUP], bias [out].
    """
    tile_m, tile_n = program_tile(tokens, out_features, BLOCK_M, BLOCK_N)
    rows, cols = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end repeat earlier ones and are not stored, so loads need no mask.
    row, col = rows % tokens, cols % out_features
    a_rows = a_ptr + row[:, None].to(tl.int64) * (IN // 2)
    weight_rows = weight_ptr + col[:, None].to(tl.int64) * (IN * BITS // 8)
    # 32 bits, which `_checked` makes sure of: a thread may hold dozens of these.
    groups, act_groups = col * (IN // GROUP), row * (IN // ACT_GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, IN, BLOCK):
        group = start // GROUP
        scale = load_once(scale_ptr + groups + group).to(tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k in range(0, BLOCK, BLOCK_K):
            a = _load_codes(a_rows + start // 2, k, 4, BLOCK, BLOCK_K)
            weight = _load_codes(weight_rows + start * BITS // 8, k, BITS, BLOCK, BLOCK_K)
            a_even, a_odd = unpack_nibbles(a)
            if BITS == 4:
                w_even, w_odd = unpack_nibbles(weight)
            else:
                w_even, w_odd = look_up_levels(weight, tl.load(levels_ptr + groups + group))
            sums = tl.dot(a_even, w_even.T, sums, out_dtype=tl.int32)
            sums = tl.dot(a_odd, w_odd.T, sums, out_dtype=tl.int32)
        if ACT_GROUP == IN:
            acc = fma(sums, scale[None, :], acc)
        else:
            a_scale = tl.load(a_scale_ptr + act_groups + start // ACT_GROUP)
            acc += mul_rn(sums.to(tl.float32), scale[None, :] * a_scale[:, None])
    # Codes counted 16-fold, a power of two: taken out once here, it rounds nothing.
    y = acc * (1 / 256 if BITS == 4 else 1 / 16)
    if ACT_GROUP == IN:
        y = mul_rn(y, tl.broadcast_to(load_once(a_scale_ptr + row)[:, None], y.shape))
    if HAS_BIAS:
        y += tl.load(bias_ptr + col).to(tl.float32)[None, :]
    inside = (rows < tokens)[:, None] & (cols < out_features)[None, :]
    y_ptrs = y_ptr + rows[:, None].to(tl.int64) * out_features + cols[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_codes(rows, k, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bytes of the codes k to k + BLOCK_K of a block, zeros (products 0) beyond its end."""
    byte = k * BITS // 8 + tl.arange(0, BLOCK_K * BITS // 8)[None, :]
    if BLOCK % BLOCK_K == 0:
        return tl.load(rows + byte)
    return tl.load(rows + byte, mask=byte < BLOCK * BITS // 8, other=0)


@triton_op("w2a4::gemm_w4a4")
def gemm_w4a4(
    a_codes: Tensor, a_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`a @ W.T + bias` with 4-bit activations and symmetric 4-bit weights: `linear_w4a4` for many tokens.

    Args:
        a_codes: uint8 `[..., in / 2]`, contiguous as every tensor here, and
        a_scale: float32 `[..., A]`, from `quantize_a4`.
        weight: uint8 `[out, in / 2]`.
        scale: float16 `[out, in / group_size]`.
        bias: floating `[out]` or None.
        group_size: of the weights; it divides the activations' group `in / A` or is a multiple of it, and
            the smaller of both, a block, is a multiple of 32 and at most 131071.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        `[..., out]`, whatever the tile and the other tokens are: with several scales a token the bits of
        `reference.linear_w4a4` (as long as no result exceeds 2**120 and no product of scales falls below
        2**-118), with one its sums rounded less often, by an fma a group, and scaled once at the end.

    Raises:
        RuntimeError: an argument is not as above.
    """
    return _gemm("gemm_w4a4", 4, a_codes, a_scale, weight, None, scale, bias, group_size, out_dtype)


@triton_op("w2a4::gemm_w2a4")
def gemm_w2a4(
    a_codes: Tensor, a_scale: Tensor, weight: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None,
    group_size: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `gemm_w4a4` with 2-bit weights: `linear_w2a4` for many tokens.

    `weight` is uint8 `[out, in / 4]`, `levels` int8 `[out, in / group_size, 4]`; a code picks one of four.
    """
    return _gemm("gemm_w2a4", 2, a_codes, a_scale, weight, levels, scale, bias, group_size, out_dtype)


@gemm_w4a4.register_fake
def _(a_codes, a_scale, weight, scale, bias, group_size, out_dtype):
    problem = _checked("gemm_w4a4", 4, a_codes, a_scale, weight, None, scale, bias, group_size)
    return _empty("gemm_w4a4", a_codes, problem, out_dtype)


@gemm_w2a4.register_fake
def _(a_codes, a_scale, weight, levels, scale, bias, group_size, out_dtype):
    problem = _checked("gemm_w2a4", 2, a_codes, a_scale, weight, levels, scale, bias, group_size)
    return _empty("gemm_w2a4", a_codes, problem, out_dtype)


def _gemm(name, bits, a_codes, a_scale, weight, levels, scale, bias, group_size, out_dtype) -> Tensor:
    problem = _checked(name, bits, a_codes, a_scale, weight, levels, scale, bias, group_size)
    y = _empty(name, a_codes, problem, out_dtype)
    tokens, out_features = problem.tokens, problem.out_features
    if tokens == 0 or out_features == 0:
        return y
    # Four int8 levels are one word; where there are none, or no bias, any pointer will do.
    words = scale if levels is None else levels.view(torch.int32).squeeze(-1)
    tensors = a_codes, a_scale, weight, words, scale, scale if bias is None else bias, y

    def launch(kernel, tile: Tile) -> None:
        if tile.int8:
            gemm_int8(problem, tile, a_codes, a_scale, weight, words, scale, bias, y)
            return
        grid = (triton.cdiv(tokens, tile.m) * triton.cdiv(out_features, tile.n),)
        kernel[grid](
            *tensors, tokens, out_features, BITS=bits, IN=problem.in_features, GROUP=problem.group,
            ACT_GROUP=problem.act_group, BLOCK=problem.block, HAS_BIAS=bias is not None,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    with device_of(a_codes):
        tile = choose_tile(problem, a_codes, lambda tile: launch(gemm_a4_kernel, tile))
        launch(wrap_triton(gemm_a4_kernel), tile)
    return y


def _empty(name: str, a_codes: Tensor, problem: Problem, out_dtype: torch.dtype) -> Tensor:
    require(name, out_dtype in FLOATS, f"out_dtype is {out_dtype}, expected one of {FLOATS}")
    return a_codes.new_empty((*a_codes.shape[:-1], problem.out_features), dtype=out_dtype)


def _checked(name, bits, a_codes, a_scale, weight, levels, scale, bias, group_size) -> Problem:
    """The problem, if every argument is as `gemm_w4a4` says."""
    problem = _problem(name, bits, a_codes, a_scale, scale, int(group_size))
    out, ins, groups = problem.out_features, problem.in_features, problem.in_features // problem.group
    expect = partial(expect_tensor, name, a_codes.device)
    expect("a_codes", a_codes, torch.uint8, (*a_scale.shape[:-1], ins // 2))
    expect("a_scale", a_scale, torch.float32, (*a_codes.shape[:-1], ins // problem.act_group))
    expect("weight", weight, torch.uint8, (out, ins * bits // 8))
    expect("scale", scale, torch.float16, (out, groups))
    if levels is not None:
        expect("levels", levels, torch.int8, (out, groups, 4))
    if bias is not None:
        expect("bias", bias, bias.dtype, (out,))
    few = scale.numel() < 2**31 and a_scale.numel() < 2**31
    require(
        name, few, f"{scale.numel()} and {a_scale.numel()} scales, expected less than 2**31; split the call"
    )
    return problem


def _problem(name: str, bits: int, a_codes: Tensor, a_scale: Tensor, scale: Tensor, group: int) -> Problem:
    """What the shapes of the scales say, if the blocks they make are ones that the kernel can sum."""
    require(name, group > 0, f"group_size={group}, expected at least 1")
    shape, a_shape = [*scale.shape], [*a_scale.shape]
    require(name, len(shape) == 2 and shape[1] > 0, f"scale has shape {shape}, expected [out, groups]")
    in_features = int(shape[1]) * group
    require(name, a_codes.dim() > 0, "a_codes has no dimension, expected [..., in / 2]")
    require(
        name, len(a_shape) > 0 and a_shape[-1] > 0 and in_features % a_shape[-1] == 0,
        f"a_scale has shape {a_shape}, its last dimension does not divide in_features={in_features}",
    )  # fmt: skip
    tokens = a_codes.shape[:-1].numel()
    problem = Problem(bits, tokens, int(shape[0]), in_features, group, in_features // int(a_shape[-1]))
    which = f"group_size={group} and the activation group {problem.act_group} of a_scale"
    divides = max(group, problem.act_group) % problem.block == 0
    require(name, divides, f"{which}: one must divide the other")
    require(name, problem.block % 32 == 0, f"{which}: expected multiples of 32; linear_w{bits}a4 takes any")
    require(name, problem.block <= MAX_BLOCK, f"{which}: a 32-bit sum holds {MAX_BLOCK} products")
    return problem
