"""Ops on the 4-bit KV cache: quantisation, appending, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import divide, hadamard
from .packing import pack, unpack
from .table import OPS, fake_of, one_device, op


@op(
    "(Tensor x, float clip) -> (Tensor, Tensor)",
    kernels="cpu cuda",
)
def quantize_kv4(x: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Asymmetric 4-bit quantisation of keys or values, one scale and zero-point a token and head.

    The zero-point is the value of code 0, a float, so that groups of one sign lose nothing to a
    range that would have to reach zero, and a constant group is exact.

    Args:
        x: floating `[batch, heads, tokens, head_dim]`, head_dim even.
        clip: the range is shrunk by this factor around its middle.

    Returns:
        codes uint8 `[batch, heads, tokens, head_dim / 2]` (unsigned nibbles), params float16
        `[batch, heads, tokens, 2]`: scale, zero-point; a value is `scale * code + zero`.
    """
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    middle, half = (low + high) * 0.5, (high - low) * 0.5 * clip
    scale = divide(half + half, 15).half()
    zero = (middle - half).half()
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    codes = ((x - zero.float()[..., None]) / divisor[..., None]).nan_to_num(0.0).round().clamp(0, 15)
    codes = torch.where((scale == 0)[..., None], torch.zeros_like(codes), codes)
    return pack(codes.to(torch.int8), 4), torch.stack([scale, zero], -1)


@fake_of(quantize_kv4)
def _(x, clip):
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return codes, x.new_empty((*x.shape[:-1], 2), dtype=torch.float16)


def dequantize_kv4(codes: Tensor, params: Tensor) -> Tensor:
    """Float32 `[..., head_dim]` from what `quantize_kv4` returns."""
    ints = unpack(codes, 4, codes.shape[-1] * 2).float()
    return ints * params[..., :1].float() + params[..., 1:].float()


@op(
    "(Tensor x, Tensor(a!) codes, Tensor(b!) params, SymInt start, float clip, "
    "Tensor? starts=None, Tensor? slots=None) -> ()",
    kernels="cpu cuda",
)
def append_kv4(
    x: Tensor,
    codes: Tensor,
    params: Tensor,
    start: int,
    clip: float,
    starts: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """Quantise `x` as `quantize_kv4` and write it into a cache at token `start`, in place.

    Args:
        x: floating `[batch, heads, tokens, head_dim]`.
        codes: uint8 `[batch, heads, capacity, head_dim / 2]`, written.
        params: float16 `[batch, heads, capacity, 2]`, written.
        start: first token written; `start + tokens <= capacity`.
        clip: see `quantize_kv4`.
        starts: int64 `[batch]`, instead of `start`, which is the most of them; or None.
        slots: int64 `[batch, tokens]` or `[batch * tokens]`, where tokens go in a paged cache
            `[blocks, heads, block_size, …]`: block * block_size + position; one whose slot is negative is not
            written. None: the cache is as above.
    """
    if slots is not None:
        return _append_to_slots(x, codes, params, start, clip, starts, slots)
    most = codes.shape[2] - x.shape[2]
    if not 0 <= start <= most:
        raise RuntimeError(f"w2a4.append_kv4: start={start}, expected 0 to {most}")
    starts = torch.full((len(x),), start) if starts is None else starts
    if not all(0 <= first <= start for first in starts.tolist()):
        raise RuntimeError(f"w2a4.append_kv4: starts={starts.tolist()}, expected 0 to start={start}")
    for b, first in enumerate(starts.tolist()):
        places = slice(first, first + x.shape[2])
        codes[b, :, places], params[b, :, places] = quantize_kv4(x[b], clip)


def _append_to_slots(x, codes, params, start, clip, starts, slots) -> None:
    if start or starts is not None:
        raise RuntimeError(f"w2a4.append_kv4: slots say where tokens go, and so does start={start} or starts")
    (blocks, _, size), slots = codes.shape[:3], slots.view(x.shape[0], x.shape[2])
    written = slots >= 0
    slots = slots[written]
    if bool((slots >= blocks * size).any()):
        raise RuntimeError(f"w2a4.append_kv4: slots up to {slots.max()}, expected less than {blocks * size}")
    for cache, new in zip((codes, params), quantize_kv4(x, clip), strict=True):
        cache[slots // size, :, slots % size] = new.transpose(1, 2)[written]


def _contiguous(cache: Tensor, block_table: Tensor, keys: Tensor, length: int) -> Tensor:
    """Codes or params `[batch, kv_heads, length, …]` of a paged cache, 0 behind the `keys` of a sequence."""
    size, position = cache.shape[2], torch.arange(length, device=cache.device)
    exists = position < keys[:, None]
    blocks = block_table[:, position // size].long()
    bad = exists & ((blocks < 0) | (blocks >= len(cache)))
    if bool(bad.any()):
        raise RuntimeError(
            f"w2a4.attention_kv4: block_table holds {int(blocks[bad][0])}, expected 0 to {len(cache) - 1}"
        )
    found = cache[blocks.masked_fill(~exists, 0), :, position % size]
    return torch.where(exists[..., None, None], found, 0).transpose(1, 2)


@fake_of(append_kv4)
def _(x, codes, params, start, clip, starts=None, slots=None):
    one_device(x=x, codes=codes, params=params, starts=starts, slots=slots)


@op(
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor? had_k, int block_size, Tensor(a!) k_codes, Tensor(b!) "
    "k_params, Tensor(c!) v_codes, Tensor(d!) v_params, SymInt start, float clip, Tensor? starts=None, "
    "Tensor? slots=None) -> Tensor",
    kernels="cpu cuda",
)
def rope_append_kv4(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    had_k: Tensor | None,
    block_size: int,
    k_codes: Tensor,
    k_params: Tensor,
    v_codes: Tensor,
    v_params: Tensor,
    start: int,
    clip: float,
    starts: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """RoPE on queries and keys, R3 on both, and the new keys and values into their caches, in place.

    Args:
        qkv: floating `[batch, tokens, (q_heads + 2 * kv_heads) * head_dim]`, queries, keys, values.
        cos, sin: floating `[batch or 1, tokens, head_dim]`, as transformers' rotary embedding gives them.
        had_k, block_size: R3, as in `hadamard`; block_size 1 is no rotation.
        k_codes, k_params, v_codes, v_params, start, clip, starts, slots: as in `append_kv4`, of kv_heads.

    Returns:
        queries `[batch, q_heads, tokens, head_dim]` in qkv's dtype; float32 in between.
    """
    kv_heads = k_codes.shape[1]
    heads = qkv.float().unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)
    x, v = heads[:, :-kv_heads], heads[:, -kv_heads:]
    first, second = x.chunk(2, -1)
    x = x * cos.float()[:, None] + torch.cat([-second, first], -1) * sin.float()[:, None]
    x = hadamard(x, had_k, block_size, False)
    append_kv4(x[:, -kv_heads:], k_codes, k_params, start, clip, starts, slots)
    append_kv4(v, v_codes, v_params, start, clip, starts, slots)
    return x[:, :-kv_heads].to(qkv.dtype).contiguous()


@fake_of(rope_append_kv4)
def _(
    qkv, cos, sin, had_k, block_size, k_codes, k_params, v_codes, v_params, start, clip, starts=None,
    slots=None,
):  # fmt: skip
    one_device(qkv=qkv, cos=cos, sin=sin, had_k=had_k, k_codes=k_codes, k_params=k_params,
                v_codes=v_codes, v_params=v_params, starts=starts, slots=slots)  # fmt: skip
    batch, tokens, width = qkv.shape
    head_dim = cos.shape[-1]
    return qkv.new_empty((batch, width // head_dim - 2 * k_codes.shape[1], tokens, head_dim))


@op(
    "(Tensor q, Tensor k_codes, Tensor k_params, Tensor v_codes, Tensor v_params, SymInt length, Tensor? "
    "mask, bool causal, float scaling, Tensor? k_sink=None, Tensor? v_sink=None, Tensor? starts=None, "
    "Tensor? block_table=None) -> Tensor",
    kernels="cpu cuda",
)
def attention_kv4(
    q: Tensor,
    k_codes: Tensor,
    k_params: Tensor,
    v_codes: Tensor,
    v_params: Tensor,
    length: int,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    k_sink: Tensor | None = None,
    v_sink: Tensor | None = None,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Softmax attention over a packed 4-bit cache, with grouped query heads.

    Args:
        q: floating `[batch, q_heads, q_tokens, head_dim]`, already rotated by R3.
        k_codes, k_params, v_codes, v_params: caches as in `append_kv4`, `kv_heads` of them;
            query head h reads cache head `h // (q_heads / kv_heads)`.
        length: tokens of the cache in use.
        mask: bool `[batch or 1, q_heads or 1, q_tokens, length]`, True where a key may be seen, or None.
        causal: query i sees keys `<= length - q_tokens + i` only.
        scaling: factor on the scores.
        k_sink, v_sink: floating `[batch, kv_heads, s, head_dim]`: the first s keys and values. They replace
            the first s cache entries, and stand before those of a paged cache.
        starts: int64 `[batch]`: sequence b has `starts[b] + q_tokens` keys, `length` at most; or None.
        block_table: int32 `[batch, most blocks]`; caches are then paged, `[blocks, kv_heads, block_size, …]`,
            and key j, counted from behind the sinks, is at position `j % block_size` of block
            `block_table[b, j // block_size]`; or None.

    Returns:
        `[batch, q_tokens, q_heads, head_dim]` in q's dtype; zeros for a query that sees no key.
    """
    if starts is None:
        starts = torch.full((len(q),), length - q.shape[2], device=q.device)
    if block_table is not None:
        sinks = 0 if k_sink is None else min(length, k_sink.shape[2])
        keys = starts + q.shape[2] - sinks
        k_codes, k_params, v_codes, v_params = (
            F.pad(_contiguous(t, block_table, keys, length - sinks), (0, 0, sinks, 0))
            for t in (k_codes, k_params, v_codes, v_params)
        )
    k = dequantize_kv4(k_codes[:, :, :length], k_params[:, :, :length])
    v = dequantize_kv4(v_codes[:, :, :length], v_params[:, :, :length])
    if k_sink is not None:
        sinks = min(length, k_sink.shape[2])
        k[:, :, :sinks], v[:, :, :sinks] = k_sink[:, :, :sinks].float(), v_sink[:, :, :sinks].float()
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    key, query = (torch.arange(n, device=q.device) for n in (length, q.shape[2]))
    last = starts[:, None, None, None] + (query[:, None] if causal else q.shape[2] - 1)
    seen = (key <= last).expand(-1, -1, q.shape[2], -1)
    if mask is not None:
        seen = seen & mask
    scores = (q.float() @ k.mT * scaling).masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~seen, 0.0)
    return (weights @ v).transpose(1, 2).to(q.dtype).contiguous()


@fake_of(attention_kv4)
def _(
    q,
    k_codes,
    k_params,
    v_codes,
    v_params,
    length,
    mask,
    causal,
    scaling,
    k_sink=None,
    v_sink=None,
    starts=None,
    block_table=None,
):
    one_device(q=q, k_codes=k_codes, k_params=k_params, v_codes=v_codes, v_params=v_params, mask=mask,
                k_sink=k_sink, v_sink=v_sink, starts=starts, block_table=block_table)  # fmt: skip
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty((batch, tokens, heads, head_dim))


@op(
    OPS["attention_kv4"].schema.replace(", Tensor? block_table=None", ""),
    kernels="triton",
)
def attention_kv4_prefill(
    q: Tensor,
    k_codes: Tensor,
    k_params: Tensor,
    v_codes: Tensor,
    v_params: Tensor,
    length: int,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    k_sink: Tensor | None = None,
    v_sink: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """As `attention_kv4`; the kernel rounds weights and values to 11 bits."""
    return attention_kv4(
        q, k_codes, k_params, v_codes, v_params, length, mask, causal, scaling, k_sink, v_sink, starts
    )
