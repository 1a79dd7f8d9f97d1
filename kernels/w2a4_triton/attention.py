"""`attention_kv4_prefill`: attention over the packed 4-bit cache for many queries at once.

Flash attention that reads codes: no key or value is ever in memory in more than 4 bits. Scores are
exact products of queries with codes, to which a key's scale and zero-point are applied afterwards,

    scaling * (k_scale * sum q code + k_zero * sum q)

and values are decoded into float16. Even and odd elements of a head are multiplied apart, because that is how
nibbles come out of bytes.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import expect_tensor, require
from .language import codes_as_floats, device_of, dot, triton_op, wrap_triton

DTYPES = torch.float16, torch.bfloat16
MOST_DIM = 256  # of a head

WARPS, STAGES = 8, 2


def tile_of(head_dim: int, plain: bool) -> tuple[int, int]:
    """Queries and keys of a tile: what compiles without spills for sm_80, sm_90 and sm_100.

    `plain` is without mask and sinks. It does not change the number of keys, on which bits depend.
    """
    if head_dim <= 64:
        return 128, 64
    return 128 if plain and head_dim <= 128 else 64, 32


#: Weights are counted from 2**10 at a row's largest, so that float16 holds those of 2**-24 in all its bits.
_LARGEST = tl.constexpr(10.0)


@triton.jit
def attention_kv4_prefill_kernel(
    q_ptr, k_codes_ptr, k_params_ptr, v_codes_ptr, v_params_ptr, mask_ptr, k_sink_ptr, v_sink_ptr, starts_ptr,
    out_ptr, tokens, length, capacity, sinks, sink_tokens, factor,
    q_batch, q_head, q_token, mask_batch, mask_head, mask_query,
    DIM: tl.constexpr, HALF: tl.constexpr, REPEAT: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_STARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_M queries of a head, and the keys BLOCK_N at a time, from the first on.

    A row's bits depend on the keys it sees and on nothing else: tiles of keys lie at fixed places, and one of
    which a row sees nothing multiplies what the row has by 1 and adds 0. HALF is a power of two that DIM / 2
    elements fit, `factor` is scaling * log2(e); the first `sinks` of the keys are in k_sink and v_sink, where
    a head has `sink_tokens`.
    """
    # The longest rows first, so that no program of many keys is left for the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    kv = batch * (heads // REPEAT) + head // REPEAT
    start = length - tokens
    if HAS_STARTS:
        start = tl.minimum(tl.maximum(tl.load(starts_ptr + batch), 0), start).to(tl.int32)
    end = start + tokens
    within, element = tl.arange(0, BLOCK_M), tl.arange(0, 2 * HALF)
    # Rows beyond the last repeat it, and are not stored. Offsets of 32 bits, from the first row of the tile.
    within = tl.minimum(within, tokens - 1 - tile * BLOCK_M)
    query = tile * BLOCK_M + within
    q_at = q_ptr + batch * q_batch + head * q_head + tile.to(tl.int64) * BLOCK_M * q_token
    q = tl.load(
        q_at + (within[:, None] * q_token + element[None, :]), mask=(element < DIM)[None, :], other=0.0
    )
    q_sum = tl.sum(q.to(tl.float32), axis=1)
    q_even, q_odd = tl.split(q.reshape(BLOCK_M, HALF, 2))
    mask_at = mask_ptr + batch * mask_batch + head * mask_head + tile.to(tl.int64) * BLOCK_M * mask_query
    mask_row = within * mask_query
    # The last key that each row sees; `whole` of the first keys are seen by all, in whole tiles.
    last, whole = tl.zeros((BLOCK_M,), tl.int32) + (end - 1), end // BLOCK_N * BLOCK_N
    if CAUSAL:
        last, whole = start + query, (start + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N
        end = tl.minimum(start + (tile + 1) * BLOCK_M, end)
    if HAS_SINKS or HAS_MASK:
        whole = 0  # one loop for all

    state = (
        tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, HALF), tl.float32), tl.zeros((BLOCK_M, HALF), tl.float32),
    )  # fmt: skip
    if HAS_SINKS:
        for key in range(0, tl.minimum(sinks, end)):
            seen = key <= last
            if HAS_MASK:
                seen = seen & (tl.load(mask_at + mask_row + key) != 0)
            at = (kv * sink_tokens + key) * DIM
            state = _attend_sink(state, q_even, q_odd, k_sink_ptr + at, v_sink_ptr + at, seen, factor, DIM)
    if not (HAS_SINKS or HAS_MASK):
        for key in range(0, whole, BLOCK_N):
            state = _attend(
                state, key, q_even, q_odd, q_sum, kv * capacity, k_codes_ptr, k_params_ptr, v_codes_ptr,
                v_params_ptr, mask_at, mask_row, last, end, sinks, factor, DIM, HAS_MASK, False, BLOCK_N,
            )  # fmt: skip
    for key in range(whole, end, BLOCK_N):
        state = _attend(
            state, key, q_even, q_odd, q_sum, kv * capacity, k_codes_ptr, k_params_ptr, v_codes_ptr,
            v_params_ptr, mask_at, mask_row, last, end, sinks, factor, DIM, HAS_MASK, True, BLOCK_N,
        )  # fmt: skip
    _, total, even, odd = state
    # A row that sees no key is zero.
    part = tl.div_rn(1.0, tl.where(total == 0, 1.0, total))[:, None]
    out_at = out_ptr + (((batch * tokens + tile * BLOCK_M) * heads + head) * DIM)
    row = tl.arange(0, BLOCK_M)
    stored = (tile * BLOCK_M + row < tokens)[:, None] & (element < DIM)[None, :]
    out = tl.interleave(even * part, odd * part).to(out_ptr.dtype.element_ty)
    tl.store(out_at + (row[:, None] * (heads * DIM) + element[None, :]), out, mask=stored)


@triton.jit
def _attend(
    state, first, q_even, q_odd, q_sum, cache, k_codes_ptr, k_params_ptr, v_codes_ptr, v_params_ptr, mask_at,
    mask_row, last, end, sinks, factor, DIM: tl.constexpr, HAS_MASK: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights, and weighted sums of values, with BLOCK_N more keys.

    Unless MASKED, every row sees all of them.
    """
    key, byte = first + tl.arange(0, BLOCK_N), tl.arange(0, q_even.shape[1])
    exists = (key >= 0)[:, None] & (byte < DIM // 2)[None, :]
    if MASKED:
        exists = exists & (key < end)[:, None]
    at = (cache + first) * (DIM // 2)
    codes = (key - first)[:, None] * (DIM // 2) + byte[None, :]
    in_cache = (key < end) & (key >= sinks)
    k_scale, k_zero = _params(k_params_ptr + 2 * (cache + first), key - first, in_cache, MASKED)
    v_scale, v_zero = _params(v_params_ptr + 2 * (cache + first), key - first, in_cache, MASKED)
    # A value that is not finite must reach the rows that see it and no others: it does so through the score.
    taint = v_scale * 0.0 + v_zero * 0.0
    v_scale, v_zero = tl.where(taint == 0, v_scale, 0.0), tl.where(taint == 0, v_zero, 0.0)

    k_even, k_odd = codes_as_floats(_load(k_codes_ptr + at + codes, exists, DIM, MASKED), q_even.dtype)
    score = dot(q_even, k_even.T, tl.zeros((q_even.shape[0], BLOCK_N), tl.float32))
    score = dot(q_odd, k_odd.T, score)
    score = score * (k_scale * factor)[None, :] + q_sum[:, None] * (k_zero * factor + taint)[None, :]
    if MASKED:
        seen = (key[None, :] <= last[:, None]) & in_cache[None, :]
        if HAS_MASK:
            pointers = mask_at + (mask_row[:, None] + key[None, :])
            seen = seen & (tl.load(pointers, mask=(key < end)[None, :], other=0) != 0)
        score = tl.where(seen, score, float("-inf"))

    largest, total, even, odd = state
    largest, base, kept = _raise(largest, tl.max(score, axis=1))
    weight = tl.exp2(score - base[:, None])
    total = total * kept + tl.sum(weight, axis=1)
    weight = weight.to(tl.float16)
    v_even, v_odd = codes_as_floats(_load(v_codes_ptr + at + codes, exists, DIM, MASKED), tl.float16)
    v_scale, v_zero = v_scale.to(tl.float16)[:, None], v_zero.to(tl.float16)[:, None]
    even = dot(weight, v_even * v_scale + v_zero, even * kept[:, None])
    odd = dot(weight, v_odd * v_scale + v_zero, odd * kept[:, None])
    return largest, total, even, odd


@triton.jit
def _attend_sink(state, q_even, q_odd, k_ptr, v_ptr, seen, factor, DIM: tl.constexpr):
    """The same with one key more, of floats."""
    at = 2 * tl.arange(0, q_even.shape[1])
    k_even, k_odd = _load_float(k_ptr + at, at < DIM), _load_float(k_ptr + at + 1, at < DIM)
    v_even, v_odd = _load_float(v_ptr + at, at < DIM), _load_float(v_ptr + at + 1, at < DIM)
    score = tl.sum(q_even.to(tl.float32) * k_even + q_odd.to(tl.float32) * k_odd, axis=1) * factor
    largest, total, even, odd = state
    largest, base, kept = _raise(largest, tl.where(seen, score, float("-inf")))
    weight, seen = tl.where(seen, tl.exp2(score - base), 0.0), seen[:, None]
    # What a row does not see adds nothing, not even if it is NaN.
    even = even * kept[:, None] + tl.where(seen, weight[:, None] * v_even, 0.0)
    odd = odd * kept[:, None] + tl.where(seen, weight[:, None] * v_odd, 0.0)
    return largest, total * kept + weight, even, odd


@triton.jit
def _raise(largest, score):
    """The largest score with one more, what weights are relative to, and the factor on earlier weights."""
    raised = tl.maximum(largest, score)
    base = tl.where(raised == float("-inf"), 0.0, raised) - _LARGEST
    return raised, base, tl.where(largest == float("-inf"), 0.0, tl.exp2(largest - raised))


@triton.jit
def _params(pointer, key, exists, MASKED: tl.constexpr):
    """Scales and zero-points of keys, zeros where there are none."""
    if MASKED:
        scale = tl.load(pointer + 2 * key, mask=exists, other=0.0)
        zero = tl.load(pointer + 2 * key + 1, mask=exists, other=0.0)
    else:
        scale, zero = tl.load(pointer + 2 * key), tl.load(pointer + 2 * key + 1)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def _load_float(pointers, exists):
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load(pointers, exists, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Bytes of codes; those that are none may be anything finite, for what they meet is zero."""
    if MASKED or 2 * pointers.shape[1] != DIM:
        return tl.load(pointers, mask=exists, other=0)
    return tl.load(pointers)


@triton_op("w2a4::attention_kv4_prefill")
def attention_kv4_prefill(
    q: Tensor, k_codes: Tensor, k_params: Tensor, v_codes: Tensor, v_params: Tensor, length: int,
    mask: Tensor | None, causal: bool, scaling: float,
    k_sink: Tensor | None = None, v_sink: Tensor | None = None, starts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`attention_kv4` for many queries, in the arithmetic of 16-bit tensor cores.

    Args:
        q: float16 or bfloat16 `[batch, q_heads, q_tokens, head_dim]`, head_dim even and 256 at most.
        The others: see `ops.attention_kv4`; caches contiguous.

    Returns:
        `[batch, q_tokens, q_heads, head_dim]` in q's dtype. Weights and values are rounded to 11 bits, all
        sums are of float32. A query's result has the same bits whatever the other queries are.

    Raises:
        RuntimeError: an argument is not as above.
    """
    out = _empty(q, k_codes, k_params, v_codes, v_params, length, mask, k_sink, v_sink, starts)
    batch, heads, tokens, dim = q.shape
    if out.numel() == 0:
        return out
    q = q if q.stride(-1) == 1 else q.contiguous()
    # Where there is none, any pointer will do.
    seen, mask_strides, k_floats, v_floats, sinks, sink_tokens = q, (0, 0, 0), q, q, 0, 0
    if mask is not None:
        seen = mask.expand(batch, heads, tokens, length)
        seen = (seen if seen.stride(-1) == 1 else mask.contiguous().expand(seen.shape)).view(torch.uint8)
        mask_strides = seen.stride()[:3]
    if k_sink is not None:
        k_floats, v_floats, sink_tokens = k_sink.contiguous(), v_sink.contiguous(), k_sink.shape[2]
        sinks = min(sink_tokens, length)
    first = q if starts is None else starts
    with device_of(q):
        block_m, block_n = tile_of(dim, mask is None and sinks == 0)
        wrap_triton(attention_kv4_prefill_kernel)[(triton.cdiv(tokens, block_m), heads, batch)](
            q, k_codes, k_params, v_codes, v_params, seen, k_floats, v_floats, first, out,
            tokens, length, k_codes.shape[2], sinks, sink_tokens, scaling * math.log2(math.e),
            *q.stride()[:3], *mask_strides,
            DIM=dim, HALF=max(16, triton.next_power_of_2(dim // 2)), REPEAT=heads // k_codes.shape[1],
            CAUSAL=causal, HAS_MASK=mask is not None, HAS_SINKS=sinks > 0, HAS_STARTS=starts is not None,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out


@attention_kv4_prefill.register_fake
def _(
    q, k_codes, k_params, v_codes, v_params, length, mask, causal, scaling, k_sink=None, v_sink=None,
    starts=None,
):  # fmt: skip
    return _empty(q, k_codes, k_params, v_codes, v_params, length, mask, k_sink, v_sink, starts)


def _empty(q, k_codes, k_params, v_codes, v_params, length, mask, k_sink, v_sink, starts) -> Tensor:
    """The result, if every argument is as `attention_kv4_prefill` says."""
    name = "attention_kv4_prefill"
    require(name, q.dim() == 4, f"q has shape {[*q.shape]}, expected [batch, q_heads, q_tokens, head_dim]")
    require(name, q.dtype in DTYPES, f"q has dtype {q.dtype}, expected one of {DTYPES}")
    batch, heads, tokens, dim = q.shape
    fits = dim % 2 == 0 and 0 < dim <= MOST_DIM
    require(name, fits, f"q has head_dim {dim}, expected an even number up to {MOST_DIM}")
    shape = [*k_codes.shape]
    grouped = len(shape) == 4 and shape[1] > 0 and heads % shape[1] == 0
    require(name, grouped, f"k_codes has shape {shape}, expected 4 dimensions and heads that divide {heads}")
    kv_heads, capacity = k_codes.shape[1:3]
    expect = partial(expect_tensor, name, q.device)
    for codes, params, which in ((k_codes, k_params, "k"), (v_codes, v_params, "v")):
        expect(f"{which}_codes", codes, torch.uint8, (batch, kv_heads, capacity, dim // 2))
        expect(f"{which}_params", params, torch.float16, (batch, kv_heads, capacity, 2))
    between = tokens <= length <= capacity
    require(name, between, f"length={length}, expected {tokens} (q_tokens) to {capacity} (the capacity)")
    if mask is not None:
        sizes = (batch, heads, tokens, length)
        ok = mask.dtype == torch.bool and mask.dim() == 4 and mask.device == q.device
        ok = (
            ok and mask.shape[2:] == sizes[2:] and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        )
        require(
            name, ok, f"mask is {mask.dtype} {[*mask.shape]} on {mask.device}, expected bool {[*sizes]} on "
            f"{q.device}; its first two may be 1",
        )  # fmt: skip
    require(name, (k_sink is None) == (v_sink is None), "k_sink and v_sink must both be given, or neither")
    if k_sink is not None:
        for which, sink in (("k_sink", k_sink), ("v_sink", v_sink)):
            expect(which, sink.contiguous(), sink.dtype, (batch, kv_heads, k_sink.shape[2], dim))
    if starts is not None:
        expect("starts", starts, torch.int64, (batch,))
    return q.new_empty(batch, tokens, heads, dim)
