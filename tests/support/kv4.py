"""The 4-bit KV cache: packed keys and values, and attention in float64 with its error bound."""

import torch

from support.numerics import UNIT
from support.op_arguments import HAD12
from w2a4.ops import reference
from w2a4.ops.packing import unpack

HALF, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")

#: Keys that a thread block works on at a time, and how many of these are merged with one another first.
CHUNK, GROUP = 256, 16

#: Rounding to these, relatively, and the step of subnormal numbers.
ROUNDING = {F32: (0, 1e-44), HALF: (2.0**-11, 2.0**-25), BF16: (2.0**-8, 1e-40), F64: (0, 0)}


def special_heads(head_dim):
    x = torch.randn(2, 3, 5, head_dim) * 5
    x[0, 0, 0] = 3.0  # constant
    x[0, 0, 1] = 0.0
    x[0, 1, 2] += 100  # of one sign
    x[0, 1, 3] *= 1e-8  # scale underflows float16
    x[1, 1, 4] *= 1e-4  # scale is subnormal in float16
    x[1, 2, 0, -1] = NAN
    x[1, 2, 1, 0], x[1, 2, 2, -1], x[1, 2, 3] = INF, -INF, 1e7
    x[1, 0, 0] = torch.randint(0, 31, (head_dim,)) / 2  # ties
    return x


def turned(qkv, cos, sin, had_k, block):
    """Queries, keys and values in float64 `[batch, heads, tokens, head_dim]`, values as they are."""
    heads = qkv.double().unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)
    first, second = heads.chunk(2, -1)
    x = heads * cos.double()[:, None] + torch.cat([-second, first], -1) * sin.double()[:, None]
    return reference.hadamard(x, had_k, block, False), heads


ROPE = [(1, 1, 4, 1, 64, None, 64), (2, 3, 2, 2, 128, None, 1), (1, 2, 3, 3, 80, None, 16),
        (2, 2, 2, 1, 96, HAD12, 96), (1, 1, 2, 1, 96, HAD12, 12), (1, 2, 1, 1, 256, None, 256),
        (1, 1, 1, 1, 1024, None, 512), (2, 1, 2, 1, 2, -torch.ones(1, 1, dtype=torch.int8), 1),
        (1, 3, 2, 1, 30, None, 2)]  # fmt: skip


def assert_quantized_keys(got, exact, error, places):
    """Params of values known to `error` are off by as much and a rounding, codes by half a step more."""
    codes, params = (t[:, :, places] for t in got)
    want = torch.stack([(exact.amax(-1) - exact.amin(-1)) * 0.95 / 15, torch.zeros_like(error)], -1)
    want[..., 1] = (exact.amax(-1) + exact.amin(-1)) / 2 - want[..., 0] * 7.5
    off = 2 * error[..., None] + 2.0**-11 * want.abs() + 4 * UNIT * exact.abs().amax(-1)[..., None] + 2.0**-25
    assert ((params.double() - want).abs() <= off).all()
    scale, zero = params.double()[..., :1], params.double()[..., 1:]
    divisor = torch.where(scale == 0, 1.0, scale)
    steps = (exact - zero) / divisor
    found = unpack(codes, 4, exact.shape[-1], signed=False).double()
    allowed = 0.5 + (error[..., None] + 2 * UNIT * exact.abs()) / divisor + 16 * UNIT
    assert ((found - steps.clamp(0, 15)).abs() <= torch.where(scale == 0, INF, allowed)).all()


def packed(batch, kv_heads, length, head_dim, capacity=None, spread=1.0):
    """k_codes, k_params, v_codes, v_params; what lies beyond `length` is poison."""
    out = []
    for shift in (0.0, 0.5):
        x = torch.randn(batch, kv_heads, length, head_dim) * spread + shift
        codes, params = reference.quantize_kv4(x, 0.95)
        full = torch.full((batch, kv_heads, capacity or length, head_dim // 2), 255, dtype=torch.uint8)
        full_params = torch.full((*full.shape[:3], 2), NAN, dtype=HALF)
        full[:, :, :length], full_params[:, :, :length] = codes, params
        out += [full, full_params]
    return out


def paged(kv, keys, size, spare=3):
    """Caches as blocks of `size` tokens in a random order, `[blocks, kv_heads, size, …]`, and the block table.

    Args:
        kv: `[batch, kv_heads, capacity, …]` each.
        keys: tokens of each sequence. All else is poison: positions, blocks, and entries of the table.
    """
    counts = [-(-n // size) for n in keys]
    blocks = torch.randperm(sum(counts) + spare)
    table = torch.randint(-(2**31), 0, (len(keys), max(counts, default=0) + 1), dtype=torch.int32)
    pages = [
        torch.full((len(blocks), t.shape[1], size, t.shape[3]), 255 if t.dtype == torch.uint8 else NAN).to(t)
        for t in kv
    ]
    free = iter(blocks.tolist())
    for b, count in enumerate(counts):
        for column in range(count):
            table[b, column] = block = next(free)
            first, last = column * size, min(keys[b], (column + 1) * size)
            for page, t in zip(pages, kv, strict=True):
                page[block, :, : last - first] = t[b, :, first:last]
    return pages, table


def exact_attention(q, kv, length, mask=None, causal=True, scaling=0.125, sinks=None, starts=None):
    """Attention in float64 `[batch, q_tokens, q_heads, head_dim]`, and what the kernels may be off by.

    With u = 2**-24 a rounding, and A the sum of |q|:
      score    the integers: head_dim halves of 2**-29 of the largest |q|, times codes up to 15; four
               roundings to put digits together and four after; 18 for the sum of q and what is done with it.
      weight   relatively, the errors of the score and of the top score, of their difference and of those of
               tops of chunks, two units in the last place of every exponential (4 u), and of the sums
               over keys and the merges that a weight goes through.
      output   the weights' errors, times values and times the average; the integers: half of 2**-29 of the
               largest scale, times codes up to 15, for each key.
    """
    (k, ks), (v, vs) = parts(*kv[:2], length), parts(*kv[2:], length)
    if sinks is not None:
        first = min(length, sinks[0].shape[2])
        k, v = k.clone(), v.clone()
        k[:, :, :first], v[:, :, :first] = (t[:, :, :first].double() for t in sinks)
        ks, vs = ks.clone(), vs.clone()
        ks[:, :, :first], vs[:, :, :first] = k[:, :, :first].abs().amax(-1), v[:, :, :first].abs().amax(-1)
    repeat, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, ks, v, vs = (t.repeat_interleave(repeat, 1) for t in (k, ks, v, vs))
    starts = torch.full((len(q),), length - tokens) if starts is None else starts
    last = starts[:, None, None, None] + (torch.arange(tokens)[:, None] if causal else tokens - 1)
    seen = (torch.arange(length) <= last).expand(-1, -1, tokens, -1)
    seen = (seen if mask is None else seen & mask).expand(-1, q.shape[1], -1, -1)
    q = q.double()
    score = (q @ k.mT * scaling).masked_fill(~seen, -INF)
    total, ks = q.abs().sum(-1, keepdim=True) * scaling, ks[:, :, None]
    vs = torch.where(seen, vs[:, :, None], 0.0)
    score_error = torch.where(seen, total * ks * (30 * q.shape[-1] * 2.0**-30 + 26 * UNIT), 0.0)
    top = score.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    below = torch.where(seen, top - score, 0.0)
    merges = min(GROUP, -(-length // CHUNK)) + -(-length // (CHUNK * GROUP))
    weight_error = 2 * score_error.amax(-1, keepdim=True) + 2 * UNIT * below + (30 + 8 * merges) * UNIT
    weight = (score - top).exp()
    total = weight.sum(-1, keepdim=True)
    share = weight / torch.where(total == 0, 1.0, total)
    y = torch.where(share[..., None] == 0, 0.0, share[..., None] * v[:, :, None]).sum(-2)
    relative = (share * weight_error).sum(-1, keepdim=True)
    error = (share * weight_error * vs).sum(-1, keepdim=True) + y.abs() * relative
    error = error + 15 * 2.0**-29 * length * vs.amax(-1, keepdim=True) / torch.where(total == 0, 1.0, total)
    return y.transpose(1, 2), error.transpose(1, 2)


def parts(codes, params, length):
    """Keys or values in float64, and what their magnitude is at most."""
    codes, params = codes[:, :, :length], params[:, :, :length].double()
    x = unpack(codes, 4, codes.shape[-1] * 2).double() * params[..., :1] + params[..., 1:]
    return x, 15 * params[..., 0].abs() + params[..., 1].abs()
