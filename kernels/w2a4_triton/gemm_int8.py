"""The GEMM of long prompts on Hopper: weights and activations are decoded to int8 once a call, before.

Decoding in the loop costs every tile of tokens the same work again, and keeps the products from running
straight out of what the copy engine (TMA) brings to shared memory. Decoding once costs a pass over memory,
which is little where there are many tokens. The bits are those of `gemm.gemm_a4_kernel`: with one scale a
token exact integer sums, added group by group by one fma each, times the token's scale at the end; with
several, sums times (weight scale * token scale), every one of the three operations rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .language import fma, load_once, look_up_levels, mul_rn, unpack_nibbles
from .tiles import Problem, Tile, program_tile

#: Inputs a step: a group, and the width of a swizzled row in shared memory.
STEP = 128

#: Outputs or tokens of one product, whose exact sums a thread holds beside the float32 ones.
PART = 128

#: Bytes of decoded weights, and of decoded activations, that a call holds at a time.
MOST_BYTES = 256 << 20

_DECODED_TOGETHER = 128


@triton.jit
def decode_kernel(
    a_ptr, weight_ptr, levels_ptr, a_out_ptr, weight_out_ptr, a_blocks, weight_blocks, weight_programs,
    BITS: tl.constexpr, BLOCKS_A_GROUP: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Blocks of 128 codes to int8: those of the inputs 0, 2, ... of a block, then those of 1, 3, ...

    A row is a whole number of blocks, so tensors are rows of blocks without a gap. The first
    `weight_programs` programs decode weights, the others activations; codes of 4 bits count 16-fold.
    """
    program = tl.program_id(0)
    if program < weight_programs:
        block = program.to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
        codes = _load_blocks(weight_ptr, block, weight_blocks, 16 * BITS)
        if BITS == 4:
            even, odd = unpack_nibbles(codes)
        else:
            group = tl.minimum(block, weight_blocks - 1) // BLOCKS_A_GROUP
            even, odd = look_up_levels(codes, tl.load(levels_ptr + group))
        _store_blocks(weight_out_ptr, block, weight_blocks, even, odd)
    else:
        block = (program - weight_programs).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
        even, odd = unpack_nibbles(_load_blocks(a_ptr, block, a_blocks, 64))
        _store_blocks(a_out_ptr, block, a_blocks, even, odd)


@triton.jit
def _load_blocks(pointer, block, blocks, BYTES: tl.constexpr):
    places = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    return tl.load(pointer + places, mask=(block < blocks)[:, None], other=0)


@triton.jit
def _store_blocks(pointer, block, blocks, even, odd):
    places = pointer + block[:, None] * 128 + tl.arange(0, 64)[None, :]
    tl.store(places, even, mask=(block < blocks)[:, None])
    tl.store(places + 64, odd, mask=(block < blocks)[:, None])


@triton.jit
def gemm_int8_kernel(
    a_desc, weight_desc, y_desc, a_scale_ptr, scale_ptr, bias_ptr, tokens, out_features,
    BITS: tl.constexpr, IN: tl.constexpr, GROUP: tl.constexpr, ACT_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `gemm.gemm_a4_kernel` from int8 a [tokens, IN] and weight [out, IN], but for a_scale [A, tokens].

    With one scale a token a group is 128 inputs or IN; with several a block, the smaller group, is 128.
    The rows of a product are outputs: the two rows of a product that a thread holds then take two scales a
    step, where columns would take dozens. 256 tokens are two products, one after another, since exact
    and float32 sums of both do not fit the registers.
    """
    tile_m, tile_n = program_tile(tokens, out_features, BLOCK_M, BLOCK_N)
    token, out = tile_m * BLOCK_M, tile_n * BLOCK_N
    PARTS: tl.constexpr = 2 if BLOCK_M > 128 else 1
    WIDTH: tl.constexpr = BLOCK_M // PARTS
    # What lies beyond the end repeats earlier scales, and zeros of the descriptors; it is not stored.
    groups = scale_ptr + (out + tl.arange(0, BLOCK_N)) % out_features * (IN // GROUP)
    if ACT_GROUP < IN:
        acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        more = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        a_scales = a_scale_ptr + (token + tl.arange(0, WIDTH)) % tokens
        more_scales = a_scale_ptr + (token + WIDTH + tl.arange(0, WIDTH)) % tokens
        for k in tl.range(0, IN, 128, num_stages=STAGES):
            weight = weight_desc.load([out, k])
            scale = tl.load(groups + k // GROUP).to(tl.float32)[:, None]
            # Both before the products: they are copied stages ahead, as the codes are.
            a_scale = load_once(a_scales + k // ACT_GROUP * tokens)
            more_scale = load_once(more_scales + k // ACT_GROUP * tokens) if PARTS == 2 else a_scale
            sums = tl.dot(weight, a_desc.load([token, k]).T, out_dtype=tl.int32)
            acc += mul_rn(sums.to(tl.float32), scale * a_scale[None, :])
            if PARTS == 2:
                sums = tl.dot(weight, a_desc.load([token + WIDTH, k]).T, out_dtype=tl.int32)
                more += mul_rn(sums.to(tl.float32), scale * more_scale[None, :])
    elif GROUP == IN:
        sums = tl.zeros((BLOCK_N, WIDTH), tl.int32)
        more_sums = tl.zeros((BLOCK_N, WIDTH), tl.int32)
        for k in tl.range(0, IN, 128, num_stages=STAGES):
            weight = weight_desc.load([out, k])
            sums = tl.dot(weight, a_desc.load([token, k]).T, sums, out_dtype=tl.int32)
            if PARTS == 2:
                more_sums = tl.dot(weight, a_desc.load([token + WIDTH, k]).T, more_sums, out_dtype=tl.int32)
        scale = tl.load(groups).to(tl.float32)[:, None]
        acc = mul_rn(sums.to(tl.float32), tl.broadcast_to(scale, sums.shape))
        more = mul_rn(more_sums.to(tl.float32), tl.broadcast_to(scale, sums.shape))
    else:
        acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        more = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        for k in tl.range(0, IN, 128, num_stages=STAGES):
            weight = weight_desc.load([out, k])
            scale = tl.load(groups + k // 128).to(tl.float32)[:, None]
            acc = fma(tl.dot(weight, a_desc.load([token, k]).T, out_dtype=tl.int32), scale, acc)
            if PARTS == 2:
                a = a_desc.load([token + WIDTH, k])
                more = fma(tl.dot(weight, a.T, out_dtype=tl.int32), scale, more)
    ONE: tl.constexpr = ACT_GROUP == IN
    _store(acc, token, out, y_desc, a_scale_ptr, bias_ptr, tokens, out_features, BITS, HAS_BIAS, ONE)
    if PARTS == 2:
        token += WIDTH
        _store(more, token, out, y_desc, a_scale_ptr, bias_ptr, tokens, out_features, BITS, HAS_BIAS, ONE)


@triton.jit
def _store(
    acc, token, out, y_desc, a_scale_ptr, bias_ptr, tokens, out_features,
    BITS: tl.constexpr, HAS_BIAS: tl.constexpr, ONE_SCALE: tl.constexpr,
):  # fmt: skip
    """Sums [outputs, tokens], times token scales where there is one a token, and the bias."""
    y = acc * (1 / 256 if BITS == 4 else 1 / 16)
    if ONE_SCALE:
        row = (token + tl.arange(0, y.shape[1])) % tokens
        y = mul_rn(y, tl.broadcast_to(tl.load(a_scale_ptr + row)[None, :], y.shape))
    if HAS_BIAS:
        col = (out + tl.arange(0, y.shape[0])) % out_features
        y += tl.load(bias_ptr + col).to(tl.float32)[:, None]
    y_desc.store([token, out], y.to(y_desc.dtype).T)


def gemm_int8(
    problem: Problem, tile: Tile, a_codes: Tensor, a_scale: Tensor, weight: Tensor, words: Tensor | None,
    scale: Tensor, bias: Tensor | None, y: Tensor,
) -> None:  # fmt: skip
    """Compute y, which is contiguous, with an int8 tile of `tiles`; arguments as those of `gemm._gemm`.

    Decoded weights and activations take as many bytes as there are of them, `MOST_BYTES` each at most: where
    that is less, outputs and tokens are done in parts.
    """
    rows = max(1, MOST_BYTES // problem.in_features)
    y = y.view(problem.tokens, problem.out_features)
    a_codes, a_scale = (tensor.view(problem.tokens, -1) for tensor in (a_codes, a_scale))
    # Parts of whole tiles, which also keeps their addresses aligned.
    outs, tokens = (max(PART, rows // PART * PART) for _ in range(2))
    for out in range(0, problem.out_features, outs):
        chosen = slice(out, out + outs)
        few = None if words is None else words[chosen], scale[chosen], None if bias is None else bias[chosen]
        for token in range(0, problem.tokens, tokens):
            these = slice(token, token + tokens)
            parts = a_codes[these], a_scale[these], weight[chosen], *few, y[these, chosen]
            _part(problem, tile, *parts)


def _part(problem, tile, a_codes, a_scale, weight, words, scale, bias, y) -> None:
    a, decoded = (
        torch.empty((len(codes), problem.in_features), dtype=torch.int8, device=y.device)
        for codes in (a_codes, weight)
    )
    blocks = [tensor.numel() // STEP for tensor in (a, decoded)]
    programs = [triton.cdiv(count, _DECODED_TOGETHER) for count in blocks]
    decode_kernel[(sum(programs),)](
        a_codes, weight, weight if words is None else words, a, decoded, *blocks, programs[1],
        BITS=problem.bits, BLOCKS_A_GROUP=problem.group // STEP, TOGETHER=_DECODED_TOGETHER,
    )  # fmt: skip
    width = min(tile.m, PART)
    describe = TensorDescriptor.from_tensor
    grid = (triton.cdiv(len(a), tile.m) * triton.cdiv(len(decoded), tile.n),)
    gemm_int8_kernel[grid](
        describe(a, [width, STEP]), describe(decoded, [tile.n, STEP]), describe(y, [width, tile.n]),
        a_scale.T.contiguous(), scale, scale if bias is None else bias, len(a), len(decoded),
        BITS=problem.bits, IN=problem.in_features, GROUP=problem.group, ACT_GROUP=problem.act_group,
        HAS_BIAS=bias is not None, BLOCK_M=tile.m, BLOCK_N=tile.n, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
