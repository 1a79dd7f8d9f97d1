"""Calls of the CUDA kernels of the 4-bit KV cache, run on a CPU lane by lane, on guarded memory."""

import numpy as np
import torch

from support import simt
from support.kv4 import CHUNK, F32, HALF
from support.simt_arrays import NAMES, SMALL, guarded, numpy_of, signs_of

#: Heads of tokens from which on the kernel for many tokens serves: never, and always where it can.
NEVER, ALWAYS = 2**31, 0


def caches(batch, heads, capacity, head_dim):
    """Poisoned codes and params with guards around them, and their checks."""
    codes, first = guarded((batch, heads, capacity, head_dim // 2), torch.uint8)
    params, second = guarded((batch, heads, capacity, 2), HALF)
    return codes, params, lambda: first() and second()


def poisoned(t):
    return (numpy_of(t.contiguous()).view(np.uint8) == 0xA5).all()


def append(x, codes, params, start=0, starts=None, clip=0.95, seed=0, slots=None):
    arrays = [numpy_of(t) for t in (x, codes, params)]
    simt.load().quantize_kv4(
        *arrays,
        NAMES[x.dtype],
        start,
        None if starts is None else starts.numpy(),
        clip,
        seed,
        None if slots is None else slots.numpy(),
    )


def rope_append(qkv, cos, sin, had_k, block, kv, start, starts=None, q_heads=1, seed=0, wide=NEVER,
                slots=None):  # fmt: skip
    batch, tokens, head_dim = len(qkv), qkv.shape[1], cos.shape[-1]
    q, intact = guarded((batch, q_heads, tokens, head_dim), qkv.dtype)
    served = simt.load().rope_append_kv4(
        numpy_of(qkv), NAMES[qkv.dtype], numpy_of(cos), numpy_of(sin), NAMES[cos.dtype],
        signs_of(had_k), block, *[numpy_of(t) for t in kv], start,
        None if starts is None else starts.numpy(), 0.95, numpy_of(q), seed, wide,
        None if slots is None else slots.numpy(),
    )  # fmt: skip
    assert intact()
    assert served == (wide == ALWAYS), f"the kernel for many tokens served: {served}"
    return q


def attend(q, kv, length, mask=None, causal=True, scaling=0.125, sinks=None, starts=None, split=True,
           processors=132, shared=SMALL, seed=0, table=None):  # fmt: skip
    """What the kernels make of it; `split`: chunks may be done by different thread blocks."""
    batch, heads, tokens, head_dim = q.shape
    y, intact = guarded((batch, tokens, heads, head_dim), q.dtype)
    chunks = -(-length // CHUNK)
    workspace, inside = guarded((batch * heads * tokens * chunks * (head_dim + 2),), F32)
    k_sink, v_sink = sinks or (None, None)
    used = simt.load().attention_kv4(
        numpy_of(q), NAMES[q.dtype], *[numpy_of(t) for t in kv], length,
        None if mask is None else mask.numpy(), causal, scaling,
        None if sinks is None else numpy_of(k_sink), None if sinks is None else numpy_of(v_sink),
        NAMES[F32 if sinks is None else k_sink.dtype], None if starts is None else starts.numpy(),
        numpy_of(y), workspace.numpy() if split else None, processors, shared, seed,
        None if table is None else table.numpy(),
    )  # fmt: skip
    assert intact() and inside()
    assert used == (split and chunks > 1)
    return y
