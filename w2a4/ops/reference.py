"""Plain PyTorch oracle of every op: short, obviously right, bit-exact where the op is.

Each function has the signature of the op of the same name in `w2a4.ops`. Kernels are tested against
these; nothing here is meant to be fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import pack, unpack


def hadamard(x: Tensor, had_k: Tensor | None, block_size: int, transpose: bool = False) -> Tensor:
    """`x @ H` for a block-diagonal Hadamard matrix H of normalised blocks.

    Args:
        x: floating `[..., n]`, n a multiple of `block_size`.
        had_k: +-1 matrix `[K, K]` (int8) of the part that is not a power of two, or None for K = 1.
        block_size: K * 2**m; a block is `kron(had_k, S) / sqrt(block_size)`, S Sylvester's matrix.
        transpose: multiply by H transposed instead.

    Returns:
        `[..., n]` in x's dtype, computed in float64.
    """
    if x.numel() == 0:
        return x.clone()
    k = 1 if had_k is None else had_k.shape[0]
    h = torch.ones(1, 1, dtype=torch.float64) if had_k is None else had_k.double().cpu()
    for _ in range((block_size // k).bit_length() - 1):
        # Each doubling is the new innermost factor: kron(had_k, S) with S = S2 x S2 x ...
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    h = (h.T if transpose else h).to(x.device) / block_size**0.5
    return (x.double().unflatten(-1, (-1, block_size)) @ h).flatten(-2).to(x.dtype)


def hadamard_by_doublings(
    x: Tensor, had_k: Tensor | None, block_size: int, transpose: bool = False
) -> Tensor:
    """`hadamard` in x's own dtype, without its matrix: float64 on devices whose kernels hold 32 bits."""
    k = 1 if had_k is None else had_k.shape[0]
    y, width = x.unflatten(-1, (-1, k, block_size // k)), 1
    while width < block_size // k:
        a, b = y.unflatten(-1, (-1, 2, width)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        width *= 2
    if had_k is not None:
        signs = had_k.to(x.device, x.dtype)
        y = (signs if transpose else signs.T) @ y
    return y.reshape(x.shape) / block_size**0.5


def quantize_a4(x: Tensor, clip: Tensor, group_size: int = -1) -> tuple[Tensor, Tensor]:
    """Symmetric 4-bit quantisation of activations, one scale a token and group.

    Args:
        x: floating `[..., K]`.
        clip: float32 `[1]`; the scale is `clip * max|x| / 7`.
        group_size: divides K; -1 is the whole token.

    Returns:
        codes uint8 `[..., ceil(K / 2)]` (signed nibbles, see packing), scale float32 `[..., K / group_size]`.
        A group of zeros has scale 1 and codes 0; one with NaN or infinity has that as its scale and codes 0.
    """
    groups = x.float().unflatten(-1, (-1, x.shape[-1] if group_size == -1 else group_size))
    scale = divide(clip * groups.abs().amax(-1), 7)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (groups / scale[..., None]).nan_to_num(0.0).round().clamp(-8, 7).flatten(-2)
    return pack(codes.to(torch.int8), 4), scale


def divide(x: Tensor, divisor: int) -> Tensor:
    """`x / divisor`, rounded once: on CUDA a Python number would be multiplied by its reciprocal."""
    return x / torch.full_like(x, divisor)


def hadamard_a4(
    x: Tensor, had_k: Tensor | None, block_size: int, clip: Tensor, group_size: int = -1
) -> tuple[Tensor, Tensor]:
    """`quantize_a4(hadamard(x))` with the transform rounded to float32 only. Arguments as theirs."""
    return quantize_a4(hadamard(x.double(), had_k, block_size), clip, group_size)


def rmsnorm_a4(
    x: Tensor, weight: Tensor | None, eps: float, clip: Tensor, group_size: int = -1
) -> tuple[Tensor, Tensor]:
    """`quantize_a4(weight * x / sqrt(mean(x**2) + eps))`, the norm computed in float64.

    Args:
        x: floating `[..., K]`.
        weight: floating `[K]`, or None for ones.
        eps: added to the mean square.
        clip, group_size: as in `quantize_a4`.
    """
    x = x.double()
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return quantize_a4(normed if weight is None else weight.double() * normed, clip, group_size)


def silu_mul_hadamard_a4(
    gate: Tensor, up: Tensor, had_k: Tensor | None, block_size: int, clip: Tensor, group_size: int = -1
) -> tuple[Tensor, Tensor]:
    """`quantize_a4(hadamard(silu(gate) * up))`, computed in float64 up to the quantisation.

    Args:
        gate, up: floating `[..., K]`, of one dtype.
        had_k, block_size: as in `hadamard`; block_size 1 is no transform.
        clip, group_size: as in `quantize_a4`.
    """
    return hadamard_a4(F.silu(gate.double()) * up.double(), had_k, block_size, clip, group_size)


def dequantize_a4(codes: Tensor, scale: Tensor, in_features: int) -> Tensor:
    """Float32 `[..., K]` from what `quantize_a4` returns."""
    groups = unpack(codes, 4, in_features, signed=True).float().unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale[..., None]).flatten(-2)


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
    codes = unpack(weight, 2, scale.shape[1] * group_size).long()
    ints = torch.gather(levels, 2, codes.unflatten(1, (-1, group_size))).flatten(1)
    y = _linear(a_codes, a_scale, ints, scale, bias, group_size, out_dtype)
    return y if residual is None else y + residual


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


def linear_w8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
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


def dequantize_kv4(codes: Tensor, params: Tensor) -> Tensor:
    """Float32 `[..., head_dim]` from what `quantize_kv4` returns."""
    ints = unpack(codes, 4, codes.shape[-1] * 2).float()
    return ints * params[..., :1].float() + params[..., 1:].float()


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
        k_sink, v_sink: floating `[batch, kv_heads, s, head_dim]` that replace the first s cache entries.
        starts: int64 `[batch]`: sequence b has `starts[b] + q_tokens` keys, `length` at most; or None.
        block_table: int32 `[batch, most blocks]`; caches are then paged, `[blocks, kv_heads, block_size, …]`,
            and key j is at position `j % block_size` of block `block_table[b, j // block_size]`; or None.

    Returns:
        `[batch, q_tokens, q_heads, head_dim]` in q's dtype; zeros for a query that sees no key.
    """
    if starts is None:
        starts = torch.full((len(q),), length - q.shape[2], device=q.device)
    if block_table is not None:
        keys = starts + q.shape[2]
        k_codes, k_params, v_codes, v_params = (
            _contiguous(t, block_table, keys, length) for t in (k_codes, k_params, v_codes, v_params)
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


def round_columns(
    work: Tensor, coupling: Tensor, current: Tensor | None, grid: Tensor, group: Tensor
) -> tuple[Tensor, Tensor]:
    """See `ops.round_columns`."""
    work = work.clone()
    codes, change = torch.empty_like(work, dtype=torch.int8), torch.empty_like(work)
    for j, index in enumerate(group.tolist()):
        points = grid[index]
        if len(points) == 4:
            codes[j] = (work[j] > (points[1:] + points[:-1]) / 2).sum(0)
            rounded = points.gather(0, codes[j, None].long())[0]
        else:
            rounded = (work[j] / points[0]).round().clamp(-8, 7)
            codes[j] = rounded
            rounded = rounded * points[0]
        change[j] = rounded - (work if current is None else current)[j]
        work[j + 1 :] -= coupling[j, j + 1 :, None] * change[j]
    return codes, change
