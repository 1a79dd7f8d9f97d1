"""`attention_kv4_prefill`: attention over the packed 4-bit cache for many queries at once.

Every tile of queries of every head of a group meets the same keys and values. Hence a call decodes these
once, into 16 bits that it keeps for itself, and flash attention reads that. Keys become their codes, which
16 bits hold exactly; a key's scale and zero-point are applied to the products, in float32:

    scaling * (k_scale * sum q code + k_zero * sum q)

Values become float16, rounded once.
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

#: Of decoded keys and values, in bytes, at a time; but all of a KV head of a sequence in any case.
MOST_DECODED = 256 << 20
#: Keys that a program of `decode_kv4_kernel` takes; tiles of keys are a multiple of it.
DECODED_KEYS = 32
WARPS = 8


def tile_of(head_dim: int, masked: bool, arch: int) -> tuple[int, int, int]:
    """Queries and keys of a tile, and stages of its loop, on sm_`arch`: what compiles without spills.

    Bits depend on it, but not on how many queries there are. A block has 227 KiB of shared memory on sm_90
    and sm_100; elsewhere tiles fit the 99 KiB of sm_86, sm_89 and sm_120.
    """
    stages = 3 if arch in (90, 100, 103) else 2
    if head_dim > 128:
        return 64 if masked or stages == 2 else 128, 32, stages
    keys = 128 if arch == 90 and (head_dim > 64 or not masked) else 64
    return 64 if masked else 128, keys, stages


def arch_of(device: torch.device) -> int:
    """90 of sm_90; and for the interpreter."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


#: Weights are counted from 2**10 at a row's largest, so that float16 holds those of 2**-24 in all its bits.
_LARGEST = tl.constexpr(10.0)


@triton.jit
def decode_kv4_kernel(
    k_codes_ptr, k_params_ptr, v_codes_ptr, v_params_ptr, starts_ptr, k_ptr, v_ptr, k_factors_ptr,
    first, kv_heads, tokens, length, capacity, rows, sinks, factor,
    DIM: tl.constexpr, WIDE: tl.constexpr, HAS_STARTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Codes and decoded values of KEYS keys as `[pairs, rows, WIDE]`, and what scores are made with.

    A pair is a KV head of a sequence; those from `first` on. k_factors `[pairs, rows, 2]` takes a key's scale
    and zero-point, times `factor`. Keys that are none, or sinks, are zeros.
    """
    slot, begin = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * KEYS
    pair = first + slot
    end = length
    if HAS_STARTS:
        start = tl.load(starts_ptr + pair // kv_heads)
        end = (tl.minimum(tl.maximum(start, 0), length - tokens) + tokens).to(tl.int32)
    within, byte, element = tl.arange(0, KEYS), tl.arange(0, WIDE // 2), tl.arange(0, WIDE)
    key = begin + within
    exists = (key >= sinks) & (key < end)
    coded = exists[:, None] & (byte < DIM // 2)[None, :]
    at = (pair * capacity + begin) * (DIM // 2) + (within[:, None] * (DIM // 2) + byte[None, :])
    k_codes = tl.load(k_codes_ptr + at, mask=coded, other=0)
    v_codes = tl.load(v_codes_ptr + at, mask=coded, other=0)
    at = 2 * (pair * capacity + key)
    k_scale, k_zero = _params(k_params_ptr + at, exists)
    v_scale, v_zero = _params(v_params_ptr + at, exists)
    # A value that is not finite must reach the rows that see it and no others: it does so through the score.
    taint = v_scale * 0.0 + v_zero * 0.0
    v_scale, v_zero = tl.where(taint == 0, v_scale, 0.0), tl.where(taint == 0, v_zero, 0.0)

    even, odd = codes_as_floats(k_codes, k_ptr.dtype.element_ty)
    at = (slot * rows + begin) * WIDE + (within[:, None] * WIDE + element[None, :])
    tl.store(k_ptr + at, tl.interleave(even, odd))
    even, odd = codes_as_floats(v_codes, tl.float16)
    even = even.to(tl.float32) * v_scale[:, None] + v_zero[:, None]
    odd = odd.to(tl.float32) * v_scale[:, None] + v_zero[:, None]
    tl.store(v_ptr + at, tl.interleave(even, odd).to(tl.float16))
    at = 2 * (slot * rows + key)
    tl.store(k_factors_ptr + at, k_scale * factor)
    tl.store(k_factors_ptr + at + 1, k_zero * factor + taint)


@triton.jit
def _params(pointers, exists):
    """Scales and zero-points of keys, zeros where there are none."""
    scale = tl.load(pointers, mask=exists, other=0.0)
    return scale.to(tl.float32), tl.load(pointers + 1, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def attention_kv4_prefill_kernel(
    q_ptr, k_ptr, v_ptr, k_factors_ptr, mask_ptr, k_sink_ptr, v_sink_ptr, starts_ptr, out_ptr,
    first, kv_heads, tokens, length, rows, sinks, sink_tokens, factor,
    q_batch, q_head, q_token, mask_batch, mask_head, mask_query,
    DIM: tl.constexpr, WIDE: tl.constexpr, REPEAT: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_STARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_M queries of a head, and BLOCK_N keys of `decode_kv4_kernel` at a time.

    A row's bits depend on the keys it sees and on nothing else: tiles of keys lie at fixed places and have an
    order, and one of which a row sees nothing multiplies what the row has by 1 and adds 0. WIDE is a power of
    two that DIM elements fit, `factor` is scaling * log2(e); the first `sinks` of the keys are in k_sink and
    v_sink, where a head has `sink_tokens`.
    """
    # The longest rows first, so that no program of many keys is left for the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    slot = tl.program_id(0) // REPEAT
    pair = (first + slot).to(tl.int64)
    batch = pair // kv_heads
    head = pair % kv_heads * REPEAT + tl.program_id(0) % REPEAT
    start = length - tokens
    if HAS_STARTS:
        start = tl.minimum(tl.maximum(tl.load(starts_ptr + batch), 0), start).to(tl.int32)
    end = start + tokens
    within, element = tl.arange(0, BLOCK_M), tl.arange(0, WIDE)
    # Rows beyond the last repeat it, and are not stored. Offsets of 32 bits, from the first row of the tile.
    within = tl.minimum(within, tokens - 1 - tile * BLOCK_M)
    query = tile * BLOCK_M + within
    q_at = q_ptr + batch * q_batch + head * q_head + tile.to(tl.int64) * BLOCK_M * q_token
    q = tl.load(
        q_at + (within[:, None] * q_token + element[None, :]), mask=(element < DIM)[None, :], other=0.0
    )
    q_sum = tl.sum(q.to(tl.float32), axis=1)
    mask_at = mask_ptr + batch * mask_batch + head * mask_head + tile.to(tl.int64) * BLOCK_M * mask_query
    mask_row = within * mask_query
    # The last key that each row sees; tiles of keys before `whole` are seen by all.
    last, whole = tl.zeros((BLOCK_M,), tl.int32) + (end - 1), end // BLOCK_N * BLOCK_N
    if CAUSAL:
        last, whole = start + query, (start + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N
        end = tl.minimum(start + (tile + 1) * BLOCK_M, end)

    state = (
        tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, WIDE), tl.float32),
    )  # fmt: skip
    # Tiles that hold sinks come after the others, so that those between are in one loop without comparisons.
    front = 0
    if HAS_SINKS:
        for key in range(0, tl.minimum(sinks, end)):
            seen = key <= last
            if HAS_MASK:
                seen = seen & (tl.load(mask_at + mask_row + key) != 0)
            at = (pair * sink_tokens + key) * DIM
            state = _attend_sink(state, q, k_sink_ptr + at, v_sink_ptr + at, seen, factor, DIM)
        front = tl.cdiv(sinks, BLOCK_N) * BLOCK_N
    if HAS_MASK:
        whole = front
    whole = tl.maximum(whole, front)
    cache = slot.to(tl.int64) * rows
    if not HAS_MASK:
        for key in range(front, whole, BLOCK_N):
            state = _attend(
                state, key, q, q_sum, cache, k_ptr, v_ptr, k_factors_ptr, mask_at, mask_row, last, end,
                sinks, HAS_MASK, False, BLOCK_N,
            )  # fmt: skip
    back = tl.maximum(tl.cdiv(end, BLOCK_N) * BLOCK_N, front)
    for step in range(whole, back + front, BLOCK_N):
        key = step
        if HAS_SINKS:
            key = tl.where(step < back, step, step - back)
        state = _attend(
            state, key, q, q_sum, cache, k_ptr, v_ptr, k_factors_ptr, mask_at, mask_row, last, end,
            sinks, HAS_MASK, True, BLOCK_N,
        )  # fmt: skip
    _, total, out = state
    # A row that sees no key is zero.
    out = out * tl.div_rn(1.0, tl.where(total == 0, 1.0, total))[:, None]
    heads = kv_heads * REPEAT
    out_at = out_ptr + (((batch * tokens + tile * BLOCK_M) * heads + head) * DIM)
    row = tl.arange(0, BLOCK_M)
    stored = (tile * BLOCK_M + row < tokens)[:, None] & (element < DIM)[None, :]
    out_at += row[:, None] * (heads * DIM) + element[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _attend(
    state, first, q, q_sum, cache, k_ptr, v_ptr, k_factors_ptr, mask_at, mask_row, last, end, sinks,
    HAS_MASK: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights, and weighted sum of values, with BLOCK_N more keys.

    Unless MASKED, every row sees all of them.
    """
    key, element = tl.arange(0, BLOCK_N), tl.arange(0, q.shape[1])
    at, tile = (cache + first) * q.shape[1], key[:, None] * q.shape[1] + element[None, :]
    # One load of both, since each warp would fetch all of what has fewer elements than there are threads.
    factors = k_factors_ptr + 2 * (cache + first) + (2 * key[:, None] + tl.arange(0, 2)[None, :])
    score = dot(q, tl.load(k_ptr + at + tile).T, tl.zeros((q.shape[0], BLOCK_N), tl.float32))
    scale, zero = tl.split(tl.load(factors))
    # Written as fma, so that both loops round alike.
    score = tl.fma(score, scale[None, :], q_sum[:, None] * zero[None, :])
    if MASKED:
        key += first
        seen = (key[None, :] <= last[:, None]) & ((key < end) & (key >= sinks))[None, :]
        if HAS_MASK:
            pointers = mask_at + (mask_row[:, None] + key[None, :])
            seen = seen & (tl.load(pointers, mask=(key < end)[None, :], other=0) != 0)
        score = tl.where(seen, score, float("-inf"))

    largest, total, out = state
    largest, base, kept = _raise(largest, tl.max(score, axis=1))
    weight = tl.exp2(score - base[:, None])
    total = total * kept + tl.sum(weight, axis=1)
    out = dot(weight.to(tl.float16), tl.load(v_ptr + at + tile), out * kept[:, None])
    return largest, total, out


@triton.jit
def _attend_sink(state, q, k_ptr, v_ptr, seen, factor, DIM: tl.constexpr):
    """The same with one key more, of floats."""
    at = tl.arange(0, q.shape[1])
    k = tl.load(k_ptr + at, mask=at < DIM, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=at < DIM, other=0.0).to(tl.float32)
    score = tl.sum(q.to(tl.float32) * k[None, :], axis=1) * factor
    largest, total, out = state
    largest, base, kept = _raise(largest, tl.where(seen, score, float("-inf")))
    weight = tl.where(seen, tl.exp2(score - base), 0.0)
    # What a row does not see adds nothing, not even if it is NaN.
    out = out * kept[:, None] + tl.where(seen[:, None], weight[:, None] * v[None, :], 0.0)
    return largest, total * kept + weight, out


@triton.jit
def _raise(largest, score):
    """The largest score with one more, what weights are relative to, and the factor on earlier weights."""
    raised = tl.maximum(largest, score)
    base = tl.where(raised == float("-inf"), 0.0, raised) - _LARGEST
    return raised, base, tl.where(largest == float("-inf"), 0.0, tl.exp2(largest - raised))


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
        sums are of float32. A query's result has the same bits whatever the other queries are. Takes memory
        for decoded keys and values, see `MOST_DECODED`.

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
    kv_heads, repeat, factor = k_codes.shape[1], heads // k_codes.shape[1], scaling * math.log2(math.e)
    block_m, block_n, stages = tile_of(dim, mask is not None, arch_of(q.device))
    wide, rows = max(32, triton.next_power_of_2(dim)), triton.cdiv(length, block_n) * block_n
    # Compared first, since a slice is a constant to torch.compile, which a length is not.
    pairs, bytes = batch * kv_heads, 4 * wide * rows
    step = pairs if pairs * bytes <= MOST_DECODED else max(1, MOST_DECODED // int(bytes))
    k, v = q.new_empty(step, rows, wide), q.new_empty(step, rows, wide, dtype=torch.float16)
    k_factors = q.new_empty(step, rows, 2, dtype=torch.float32)
    with device_of(q):
        for pair in range(0, pairs, step):
            count = min(step, pairs - pair)
            wrap_triton(decode_kv4_kernel)[(rows // DECODED_KEYS, count)](
                k_codes, k_params, v_codes, v_params, first, k, v, k_factors,
                pair, kv_heads, tokens, length, k_codes.shape[2], rows, sinks, factor,
                DIM=dim, WIDE=wide, HAS_STARTS=starts is not None, KEYS=DECODED_KEYS, num_warps=4,
            )  # fmt: skip
            wrap_triton(attention_kv4_prefill_kernel)[(count * repeat, triton.cdiv(tokens, block_m))](
                q, k, v, k_factors, seen, k_floats, v_floats, first, out,
                pair, kv_heads, tokens, length, rows, sinks, sink_tokens, factor,
                *q.stride()[:3], *mask_strides, DIM=dim, WIDE=wide, REPEAT=repeat, CAUSAL=causal,
                HAS_MASK=mask is not None, HAS_SINKS=sinks > 0, HAS_STARTS=starts is not None,
                BLOCK_M=block_m, BLOCK_N=block_n, num_warps=WARPS, num_stages=stages,
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
