"""The ops of the 4-bit KV cache against `w2a4.ops.reference`, as `test_ops.py` has the others."""

import pytest
import torch

from support.numerics import assert_close
from support.op_arguments import FLOATS, HAD12, assert_refused, bad_arguments, opcheck, replaced
from w2a4 import ops
from w2a4.ops import reference
from w2a4.ops.packing import unpack

# quantize_kv4, append_kv4


@pytest.mark.parametrize("head_dim", [2, 30, 64, 128])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_quantize_kv4(head_dim, dtype):
    x = torch.randn(2, 3, 17, head_dim) * 5
    x[0, 0, 0] = 3.0  # constant
    x[0, 0, 1] = 0.0
    x[0, 1, 2] += 100  # of one sign
    x[0, 1, 3] *= 1e-8  # scale underflows float16
    x[1, 1, 4] *= 1e-4  # scale is subnormal in float16
    x = x.to(dtype)
    for got, want in zip(ops.quantize_kv4(x, 0.95), reference.quantize_kv4(x, 0.95), strict=True):
        assert_close(got, want)


def test_quantize_kv4_shows_non_finite_input_in_the_params():
    for bad in (float("nan"), float("inf"), 1e7):
        x = torch.randn(1, 1, 3, 16)
        x[0, 0, 1, 7] = bad
        codes, params = ops.quantize_kv4(x, 0.95)
        assert not params[0, 0, 1].isfinite().all()
        assert params[0, 0, 0].isfinite().all() and params[0, 0, 2].isfinite().all()


@pytest.mark.parametrize("tokens,start", [(0, 0), (0, 9), (1, 0), (4, 5), (9, 0), (1, 8)])
def test_append_kv4(tokens, start):
    x = torch.randn(2, tokens, 3, 32).transpose(1, 2)  # a strided view, as a projection gives it
    codes = torch.randint(0, 256, (2, 3, 9, 16), dtype=torch.uint8)
    params = torch.full((2, 3, 9, 2), float("nan"), dtype=torch.float16)
    want_codes, want_params = codes.clone(), params.clone()
    reference.append_kv4(x, want_codes, want_params, start, 0.95)
    ops.append_kv4(x, codes, params, start, 0.95)
    assert_close(codes, want_codes)
    assert_close(params, want_params)


def test_append_kv4_at_places_of_each_sequence():
    x, starts = torch.randn(3, 2, 2, 16), torch.tensor([4, 0, 7])
    codes = torch.full((3, 2, 9, 8), 9, dtype=torch.uint8)
    params = torch.full((3, 2, 9, 2), 7.0, dtype=torch.float16)
    want = codes.clone(), params.clone()
    for b, start in enumerate(starts.tolist()):
        ops.append_kv4(x[b : b + 1], *[t[b : b + 1] for t in want], start, 0.9)
    ops.append_kv4(x, codes, params, 7, 0.9, starts)
    assert torch.equal(codes, want[0]) and torch.equal(params, want[1])


def test_append_kv4_into_a_view():
    big, big_params = (
        torch.zeros(2, 9, 4, 16, dtype=torch.uint8),
        torch.zeros(2, 9, 4, 2, dtype=torch.float16),
    )
    x = torch.randn(2, 3, 5, 32)
    ops.append_kv4(x, big.transpose(1, 2)[:, 1:], big_params.transpose(1, 2)[:, 1:], 2, 0.9)
    codes, params = reference.quantize_kv4(x, 0.9)
    assert_close(big.transpose(1, 2)[:, 1:, 2:7].contiguous(), codes)
    assert_close(big_params.transpose(1, 2)[:, 1:, 2:7].contiguous(), params)
    assert not big[:, :, 0].any() and not big[:, :2].any() and not big[:, 7:].any()


# rope_append_kv4


def rope_arguments(
    batch, tokens, q_heads, kv_heads, head_dim, capacity, rope_batch=None, dtype=torch.float32
):
    qkv = torch.randn(batch, tokens, (q_heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.randn(rope_batch or batch, tokens, head_dim // 2).repeat(1, 1, 2)
    caches = [
        torch.full((batch, kv_heads, capacity, head_dim // 2), 9, dtype=torch.uint8),
        torch.full((batch, kv_heads, capacity, 2), 7.0, dtype=torch.float16),
    ]
    return qkv, angles.cos().to(dtype), angles.sin().to(dtype), [t.clone() for t in caches + caches]


@pytest.mark.parametrize(
    "batch,tokens,q_heads,kv_heads,head_dim,had_k,block",
    [
        (1, 1, 9, 3, 64, None, 64),
        (2, 5, 4, 1, 16, None, 16),
        (3, 33, 2, 2, 128, None, 1),
        (1, 3, 3, 3, 80, None, 16),
        (2, 2, 2, 1, 96, HAD12, 96),
        (2, 2, 2, 1, 2, -torch.ones(1, 1, dtype=torch.int8), 1),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rope_append_kv4(batch, tokens, q_heads, kv_heads, head_dim, had_k, block, dtype):
    start, capacity = 3, tokens + 5
    qkv, cos, sin, caches = rope_arguments(batch, tokens, q_heads, kv_heads, head_dim, capacity, None, dtype)
    want = [t.clone() for t in caches]
    q = ops.rope_append_kv4(qkv, cos, sin, had_k, block, *caches, start, 0.95)
    exact = reference.rope_append_kv4(qkv, cos, sin, had_k, block, *want, start, 0.95)
    assert q.dtype == dtype and q.is_contiguous()
    rounding = 4 * torch.finfo(dtype).eps * float(exact.abs().max()) if dtype != torch.float32 else 0
    assert_close(q.float(), exact.float(), atol=3e-6 + rounding)
    # Values go into the cache as they are; keys pass a transform that may sum in another order, so a
    # code next to a tie may differ by one step, and a parameter by one rounding of float16.
    for got, expected in zip(caches[2:], want[2:], strict=True):
        assert torch.equal(got, expected)
    assert_close(caches[1].float(), want[1].float(), atol=2e-3 * float(want[1].abs().max()))
    steps = [(unpack(t, 4, head_dim, signed=False).int()) for t in (caches[0], want[0])]
    assert (steps[0] - steps[1]).abs().max() <= 1 and (steps[0] != steps[1]).float().mean() < 0.01
    for t in caches:  # nothing else is written
        assert len(t[:, :, :start].unique()) == 1 and len(t[:, :, start + tokens :].unique()) == 1


@pytest.mark.parametrize("had_k,block", [(None, 64), (None, 1)])
def test_rope_append_kv4_has_the_bits_of_the_single_ops(had_k, block):
    qkv, cos, sin, caches = rope_arguments(2, 7, 3, 1, 64, 9, rope_batch=1)
    want = [t.clone() for t in caches]
    q = ops.rope_append_kv4(qkv, cos, sin, had_k, block, *caches, 2, 0.95)
    heads = qkv.unflatten(-1, (-1, 64)).transpose(1, 2)
    first, second = heads[:, :4].chunk(2, -1)
    x = heads[:, :4] * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    x = ops.hadamard(x, had_k, block)
    ops.append_kv4(x[:, 3:], *want[:2], 2, 0.95)
    ops.append_kv4(heads[:, 4:], *want[2:], 2, 0.95)
    assert torch.equal(q, x[:, :3])
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))


def test_rope_append_kv4_at_places_of_each_sequence():
    qkv, cos, sin, caches = rope_arguments(3, 2, 4, 2, 16, 9)
    want, starts = [t.clone() for t in caches], torch.tensor([4, 0, 7])
    alone = [
        ops.rope_append_kv4(
            qkv[b : b + 1],
            cos[b : b + 1],
            sin[b : b + 1],
            None,
            16,
            *[t[b : b + 1] for t in want],
            start,
            0.9,
        )
        for b, start in enumerate(starts.tolist())
    ]
    q = ops.rope_append_kv4(qkv, cos, sin, None, 16, *caches, 7, 0.9, starts)
    assert torch.equal(q, torch.cat(alone))
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))


def test_rope_append_kv4_of_no_token():
    qkv, cos, sin, caches = rope_arguments(2, 0, 2, 1, 16, 4)
    assert ops.rope_append_kv4(qkv, cos, sin, None, 16, *caches, 4, 0.9).shape == (2, 2, 0, 16)
    assert caches[0].unique().tolist() == [9]


# attention_kv4


def cache(batch, kv_heads, length, head_dim, capacity=None):
    """k_codes, k_params, v_codes, v_params; what lies beyond `length` is poison."""
    out = []
    for shift in (0.0, 0.5):
        codes, params = reference.quantize_kv4(torch.randn(batch, kv_heads, length, head_dim) + shift, 0.95)
        full = torch.full((batch, kv_heads, capacity or length, head_dim // 2), 255, dtype=torch.uint8)
        full_params = torch.full((*full.shape[:3], 2), float("nan"), dtype=torch.float16)
        full[:, :, :length], full_params[:, :, :length] = codes, params
        out += [full, full_params]
    return out


@pytest.mark.parametrize(
    "batch,q_heads,kv_heads,tokens,length,head_dim",
    [(1, 9, 3, 1, 1, 64), (1, 9, 3, 7, 7, 64), (2, 4, 4, 5, 70, 30), (2, 6, 2, 1, 129, 128),
     (1, 2, 1, 33, 64, 96), (1, 4, 2, 65, 130, 16), (3, 2, 2, 0, 5, 8), (0, 2, 2, 3, 5, 8),
     (1, 2, 1, 3, 0, 8), (1, 1, 1, 5, 3, 2)],
)  # fmt: skip
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_attention_kv4(batch, q_heads, kv_heads, tokens, length, head_dim, causal, dtype):
    q = torch.randn(batch, tokens, q_heads, head_dim).to(dtype).transpose(1, 2)
    kv = cache(batch, kv_heads, length, head_dim, capacity=length + 5)
    got = ops.attention_kv4(q, *kv, length, None, causal, head_dim**-0.5)
    want = reference.attention_kv4(q, *kv, length, None, causal, head_dim**-0.5)
    assert got.is_contiguous()
    # Both round once to dtype: they differ by one step of it, or by float32 sums in another order.
    step = {torch.float16: 2**-10, torch.bfloat16: 2**-7}.get(dtype, 0.0)
    assert_close(got, want, atol=3e-6, rtol=step)


@pytest.mark.parametrize("mask_shape", [(2, 6), (1, 1), (2, 1), (1, 6)])
def test_attention_kv4_masks(mask_shape):
    mask = torch.rand(*mask_shape, 5, 70) > 0.5
    mask[:, :, 2] = False  # a query that sees nothing
    mask = mask.transpose(2, 3).contiguous().transpose(2, 3)  # any strides
    q, kv = torch.randn(2, 6, 5, 32), cache(2, 3, 70, 32)
    for causal in (True, False):
        got = ops.attention_kv4(q, *kv, 70, mask, causal, 0.2)
        assert_close(got, reference.attention_kv4(q, *kv, 70, mask, causal, 0.2), atol=3e-6)
        assert not got[:, 2].any()


@pytest.mark.parametrize("sinks", [0, 1, 4, 100])
@pytest.mark.parametrize("tokens", [1, 65])
@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_kv4_sinks(sinks, tokens, dtype):
    q, kv = torch.randn(2, 4, tokens, 32), cache(2, 2, 70, 32)
    k_sink, v_sink = torch.randn(2, sinks, 2, 2, 32).to(dtype).transpose(1, 3).unbind(2)
    args = (q, *kv, 70, None, True, 0.2, k_sink, v_sink)
    assert_close(ops.attention_kv4(*args), reference.attention_kv4(*args), atol=3e-6)


@pytest.mark.parametrize("tokens,starts", [(1, [0, 69, 30]), (5, [65, 0, 1]), (65, [5, 4, 0])])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [0, 3])
def test_attention_kv4_of_sequences_of_different_lengths(tokens, starts, causal, sinks):
    q, kv, starts = torch.randn(3, 4, tokens, 32), cache(3, 2, 70, 32), torch.tensor(starts)
    for b, start in enumerate(starts.tolist()):  # what lies beyond is poison
        kv[1][b, :, start + tokens :] = kv[3][b, :, start + tokens :] = float("nan")
    sink = (torch.randn(3, 2, sinks, 32),) * 2 if sinks else (None, None)
    got = ops.attention_kv4(q, *kv, 70, None, causal, 0.2, *sink, starts)
    assert_close(got, reference.attention_kv4(q, *[t.nan_to_num() for t in kv], 70, None, causal, 0.2, *sink,
                                              starts), atol=3e-6)  # fmt: skip
    for b, start in enumerate(starts.tolist()):
        one = [None if t is None else t[b : b + 1] for t in (q, *kv, *sink)]
        alone = ops.attention_kv4(*one[:5], start + tokens, None, causal, 0.2, *one[5:])
        assert torch.equal(got[b : b + 1], alone)


def test_attention_kv4_of_large_scores():
    q, kv = torch.randn(1, 2, 5, 32) * 1000, cache(1, 2, 40, 32)
    args = (q, *kv, 40, None, True, 1.0)
    assert_close(ops.attention_kv4(*args), reference.attention_kv4(*args), atol=1e-3)


def test_attention_kv4_decode_is_a_row_of_the_prefill():
    q, kv = torch.randn(2, 6, 150, 64), cache(2, 2, 150, 64)
    whole = ops.attention_kv4(q, *kv, 150, None, True, 0.125)
    for token in (0, 1, 63, 64, 100, 149):
        one = ops.attention_kv4(q[:, :, token : token + 1], *kv, token + 1, None, True, 0.125)
        assert_close(one, whole[:, token : token + 1])
    part = ops.attention_kv4(q[:, :, 90:100], *kv, 100, None, True, 0.125)
    assert_close(part, whole[:, 90:100])


def test_attention_kv4_does_not_depend_on_batch_heads_or_threads():
    q, kv = torch.randn(3, 6, 70, 32), cache(3, 2, 70, 32)
    whole = ops.attention_kv4(q, *kv, 70, None, True, 0.2)
    assert_close(ops.attention_kv4(q[1:2], *[t[1:2] for t in kv], 70, None, True, 0.2), whole[1:2])
    assert_close(ops.attention_kv4(q[:, 3:], *[t[:, 1:] for t in kv], 70, None, True, 0.2), whole[:, :, 3:])
    torch.set_num_threads(1)
    assert_close(ops.attention_kv4(q, *kv, 70, None, True, 0.2), whole)


@pytest.mark.parametrize("pad", [1, 13, 64, 100])
def test_attention_kv4_left_padding_changes_no_bit(pad):
    length, head_dim = 67, 32
    q, kv = torch.randn(1, 4, length, head_dim), cache(1, 2, length, head_dim)
    plain = ops.attention_kv4(q, *kv, length, None, True, 0.2)
    padded = cache(1, 2, pad, head_dim)
    padded[1][:] = float("nan")  # hidden keys and values may be anything
    padded[3][:] = float("inf")
    padded = [torch.cat([p, t], 2) for p, t in zip(padded, kv, strict=True)]
    q_padded = torch.cat([torch.randn(1, 4, pad, head_dim), q], 2)
    mask = (torch.arange(pad + length) >= pad).expand(1, 1, pad + length, -1)
    got = ops.attention_kv4(q_padded, *padded, pad + length, mask, True, 0.2)
    assert_close(got[:, pad:], plain)
    assert not got[:, :pad].any()
    one = ops.attention_kv4(q[:, :, -1:], *padded, pad + length, mask[:, :, -1:], True, 0.2)
    assert_close(one, plain[:, -1:])


def test_attention_kv4_shows_nan_only_where_it_is_seen():
    q, kv = torch.randn(1, 2, 9, 32), cache(1, 2, 9, 32)
    clean = ops.attention_kv4(q, *kv, 9, None, True, 0.2)
    for param in (1, 3):
        dirty = [t.clone() for t in kv]
        dirty[param][:, :, 5] = float("nan")
        got = ops.attention_kv4(q, *dirty, 9, None, True, 0.2)
        assert_close(got[:, :5], clean[:, :5])
        assert got[:, 5:].isnan().all()


# errors name the argument, quote the value and say what is expected


def bad_calls():
    kv, codes = torch.randn(1, 2, 3, 16), torch.zeros(1, 2, 9, 8, dtype=torch.uint8)
    params = torch.zeros(1, 2, 9, 2, dtype=torch.float16)
    yield "quantize_kv4", (torch.randn(1, 2, 3, 15), 0.9), r"x has shape \[1, 2, 3, 15\].*even head_dim"
    yield "quantize_kv4", (torch.randn(3, 64), 0.9), "x has shape.*four dimensions"
    yield "quantize_kv4", (kv.transpose(2, 3), 0.9), "x has stride.*last dimension"
    yield "append_kv4", (kv, codes, params, 7, 0.9), "start=7 with 3 tokens.*capacity 9"
    yield "append_kv4", (kv, codes, params, -1, 0.9), "start=-1"
    yield "append_kv4", (kv, codes, params, 2**62, 0.9), "start="
    yield (
        "append_kv4",
        (kv, codes[:, :1], params, 0, 0.9),
        r"codes has shape \[1, 1, 9, 8\], expected \[1, 2, .*8\]",
    )
    yield "append_kv4", (kv, codes, params.float(), 0, 0.9), "params has dtype float32"

    attention = [torch.randn(1, 4, 3, 16), codes, params, codes, params, 5, None, True, 0.25, None, None]
    qkv, cos, sin, caches = rope_arguments(2, 3, 4, 2, 16, 9)
    rope = (qkv, cos, sin, None, 16, *caches, 0, 0.9)
    yield "rope_append_kv4", replaced(rope, 0, qkv[0]), r"qkv has shape \[3, 128\], expected \[batch, tokens"
    yield "rope_append_kv4", replaced(rope, 0, qkv[..., :120].contiguous()), "qkv has shape.*2 [*] 2"
    yield "rope_append_kv4", replaced(rope, 0, qkv[..., :64].contiguous()), "at least one query head"
    yield "rope_append_kv4", replaced(rope, 1, cos[:, :2].contiguous()), r"cos has shape \[2, 2, 16\]"
    yield "rope_append_kv4", replaced(rope, 2, sin.half()), "sin has dtype float16, expected float32"
    yield "rope_append_kv4", replaced(rope, 2, sin[:1]), r"sin has shape \[1, 3, 16\], expected \[2, 3, 16\]"
    yield "rope_append_kv4", replaced(rope, 4, 32), "block_size=32 does not divide.*cos"
    yield "rope_append_kv4", replaced(rope, 5, caches[0][..., :4]), "k_codes has shape"
    yield "rope_append_kv4", replaced(rope, 8, caches[3].float()), "v_params has dtype float32"
    yield (
        "rope_append_kv4",
        replaced(rope, 7, caches[2][:, :, :2]),
        "start=0 with 3 tokens.*v_codes of capacity 2",
    )
    yield "rope_append_kv4", replaced(rope, 9, 7), "start=7 with 3 tokens of qkv does not fit k_codes"
    yield "attention_kv4", replaced(attention, 0, attention[0][:, :3]), "q has 3 heads and k_codes 2"
    yield "attention_kv4", replaced(attention, 0, torch.randn(1, 4, 3, 18)), "k_codes has shape"
    yield "attention_kv4", replaced(attention, 3, codes[:, :, :4]), r"v_codes has shape \[1, 2, 4, 8\].*>= 5"
    yield "attention_kv4", replaced(attention, 2, params[..., :1]), "k_params has shape"
    yield "attention_kv4", replaced(attention, 5, 10), "k_codes has shape.*>= 10"
    yield "attention_kv4", replaced(attention, 5, -1), "length=-1"
    yield "attention_kv4", replaced(attention, 6, torch.ones(1, 1, 3, 4, dtype=torch.bool)), "mask has shape"
    yield "attention_kv4", replaced(attention, 6, torch.ones(1, 1, 3, 5)), "mask has dtype float32"
    starts = torch.tensor([3])
    yield "append_kv4", (kv, codes, params, 2, 0.9, starts), r"starts\[0\]=3, expected 0 to 2 of start"
    yield "append_kv4", (kv, codes, params, 6, 0.9, -starts), r"starts\[0\]=-3, expected 0 to 6"
    yield "append_kv4", (kv, codes, params, 6, 0.9, starts.int()), "starts has dtype int32, expected int64"
    yield "append_kv4", (kv, codes, params, 6, 0.9, starts[:0]), r"starts has shape \[0\], expected \[1\]"
    yield "attention_kv4", (*attention, starts), r"starts\[0\]=3, expected 0 to 2 of length - q_tokens"
    yield "attention_kv4", replaced(attention, 9, torch.randn(1, 2, 1, 16)), "v_sink is missing"


@pytest.mark.parametrize("name,args,message", bad_arguments(bad_calls()))
def test_bad_argument(name, args, message):
    assert_refused(name, args, message)


# registration


def opcheck_calls():
    kv, q = cache(1, 2, 9, 16), torch.randn(1, 4, 3, 16)
    sink = torch.randn(1, 2, 2, 16)
    yield "quantize_kv4", (q.transpose(1, 2), 0.9)
    yield "append_kv4", (sink, kv[0].clone(), kv[1].clone(), 3, 0.9)
    rope_qkv, cos, sin, caches = rope_arguments(2, 3, 4, 2, 16, 9)
    yield "rope_append_kv4", (rope_qkv, cos, sin, None, 16, *caches, 2, 0.9)
    yield "attention_kv4", (q, *kv, 7, torch.ones(1, 1, 3, 7, dtype=torch.bool), True, 0.25, sink, sink)
    starts = torch.tensor([2])
    yield "append_kv4", (sink, kv[0].clone(), kv[1].clone(), 3, 0.9, starts)
    yield "attention_kv4", (q, *kv, 7, None, True, 0.25, None, None, starts)


@pytest.mark.parametrize("name,args", list(opcheck_calls()))
def test_opcheck(name, args):
    opcheck(name, args)


def test_compiles_without_recompiling_as_the_cache_grows():
    q, kv, x = torch.randn(1, 4, 1, 16), cache(1, 2, 20, 16), torch.randn(1, 2, 1, 16)

    def step(q, x, codes, params, start: int):
        ops.append_kv4(x, codes, params, start, 0.95)
        return ops.attention_kv4(q, codes, params, *kv[2:], start + 1, None, True, 0.25)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for start in range(5, 12):
        mine, theirs = [t.clone() for t in kv[:2]], [t.clone() for t in kv[:2]]
        assert_close(compiled(q, x, *mine, start), step(q, x, *theirs, start))
        assert_close(mine[0], theirs[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
