"""The CUDA kernels of the 4-bit KV cache, run on a CPU lane by lane."""

import numpy as np
import pytest
import torch

from support.kv4 import (
    BF16,
    CHUNK,
    F32,
    F64,
    GROUP,
    HALF,
    INF,
    NAN,
    ROPE,
    ROUNDING,
    assert_quantized_keys,
    exact_attention,
    packed,
    special_heads,
    turned,
)
from support.numerics import UNIT, assert_close
from support.op_arguments import FLOATS
from support.simt_arrays import NEEDS_PYBIND11, aligned, numpy_of
from support.simt_kv4 import ALWAYS, NEVER, append, attend, caches, poisoned, rope_append
from w2a4.ops import reference

pytestmark = NEEDS_PYBIND11


# quantize_kv4, append_kv4


@pytest.mark.parametrize("head_dim", [2, 30, 64, 66, 80, 96, 128, 256, 258, 1024])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clip", [0.95, 1.0, 0.01])
def test_quantize_kv4(head_dim, dtype, clip):
    x = special_heads(head_dim).to(dtype)
    codes, params, intact = caches(2, 3, 5, head_dim)
    append(x, codes, params, clip=clip)
    want = reference.quantize_kv4(x, clip)
    assert intact()
    assert_close(codes, want[0])
    assert_close(params, want[1])


def test_quantize_kv4_rounds_as_the_reference_everywhere():
    """Quotients next to every tie, of scales all over float16."""
    x = torch.rand(1, 1, 400, 128) * 10.0 ** torch.randint(-4, 5, (400, 1))
    for i in range(15):
        low, high = x[..., 0], x[..., 1]
        x[..., 2 * i + 2] = low + (high - low) * (i + 0.5) / 15
    codes, params, _ = caches(1, 1, 400, 128)
    append(x, codes, params, clip=1.0)
    want = reference.quantize_kv4(x, 1.0)
    assert_close(codes, want[0])
    assert_close(params, want[1])


@pytest.mark.parametrize("seed", [1, 2])
def test_append_kv4_through_strides_and_at_places_of_each_sequence(seed):
    x = torch.randn(3, 2, 4, 30).transpose(1, 2)[:, 1:, :, 1:25]  # unaligned, as a slice gives it
    codes, params, intact = caches(3, 9, 4, 24)
    views = codes.transpose(1, 2)[:, 1:], params.transpose(1, 2)[:, 1:]
    starts = torch.tensor([4, 0, 7])
    append(x, *views, start=7, starts=starts, seed=seed)
    want = reference.quantize_kv4(x, 0.95)
    assert intact() and poisoned(codes[:, :, 0])
    for b, start in enumerate(starts.tolist()):
        assert_close(views[0][b, :, start : start + 2], want[0][b])
        assert_close(views[1][b, :, start : start + 2], want[1][b])
        assert poisoned(views[0][b, :, :start]) and poisoned(views[0][b, :, start + 2 :])


def test_places_out_of_bounds_are_not_written():
    x, starts = torch.randn(4, 1, 2, 16), torch.tensor([-1, 3, 2**62, -(2**62)])
    codes, params, intact = caches(4, 1, 4, 16)
    append(x, codes, params, start=2, starts=starts)
    want, _ = reference.quantize_kv4(x, 0.95)
    assert intact()
    assert_close(codes[0, :, 0], want[0, :, 1])
    assert_close(codes[1, :, 3], want[1, :, 0])
    assert poisoned(codes[0, :, 1:]) and poisoned(codes[1, :, :3]) and poisoned(codes[2:])


# rope_append_kv4


@pytest.mark.parametrize("batch,tokens,q_heads,kv_heads,head_dim,had_k,block", ROPE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rope_append_kv4(batch, tokens, q_heads, kv_heads, head_dim, had_k, block, dtype):
    start, capacity = 3, tokens + 5
    qkv = torch.randn(batch, tokens, (q_heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.randn(1 if tokens == 3 else batch, tokens, head_dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    k_codes, k_params, k_intact = caches(batch, kv_heads, capacity, head_dim)
    v_codes, v_params, v_intact = caches(batch, kv_heads, capacity, head_dim)
    kv = k_codes, k_params, v_codes, v_params
    q = rope_append(qkv, cos, sin, had_k, block, kv, start, q_heads=q_heads)
    assert k_intact() and v_intact()
    exact, heads = turned(qkv, cos, sin, had_k, block)
    # RoPE rounds three times; then a sum of block_size numbers, by halves and by rows of had_k, and a factor.
    k = 1 if had_k is None else len(had_k)
    roundings = 3 + (block // k).bit_length() + k + 2
    size = (heads.abs() + heads.abs().roll(head_dim // 2, -1)).unflatten(-1, (-1, block))
    error = (roundings * UNIT * size.sum(-1, keepdim=True) / block**0.5).expand_as(size).flatten(-2)
    last, step = ROUNDING[dtype]
    want = exact[:, :q_heads]
    assert ((q.double() - want).abs() <= error[:, :q_heads] * (1 + last) + last * want.abs() + step).all()
    # Values go into the cache as they are.
    places = slice(start, start + tokens)
    for got, expected in zip(kv[2:], reference.quantize_kv4(heads[:, -kv_heads:], 0.95), strict=True):
        assert_close(got[:, :, places], expected)
    assert_quantized_keys(kv[:2], exact[:, q_heads:-kv_heads], error[:, q_heads:-kv_heads].amax(-1), places)
    for t in kv:
        assert poisoned(t[:, :, :start]) and poisoned(t[:, :, start + tokens :])


@pytest.mark.parametrize("seed,wide", [(1, NEVER), (2, NEVER), (1, ALWAYS), (2, ALWAYS)])
def test_rope_append_kv4_without_r3_has_the_bits_of_the_reference(seed, wide):
    qkv, angles = torch.randn(2, 3, 5 * 64), torch.randn(2, 3, 32).repeat(1, 1, 2)
    kv = [t for _ in range(2) for t in caches(2, 1, 9, 64)[:2]]
    want = [t.clone() for t in kv]
    args = qkv, angles.cos(), angles.sin(), None, 1
    q = rope_append(*args, kv, 6, torch.tensor([2, 6]), q_heads=3, seed=seed, wide=wide)
    assert_close(q, reference.rope_append_kv4(*args, *want, 6, 0.95, torch.tensor([2, 6])))
    for got, expected in zip(kv, want, strict=True):
        assert (numpy_of(got) == numpy_of(expected)).all()


@pytest.mark.parametrize(
    "batch,tokens,q_heads,kv_heads,head_dim,block",
    [(1, 3, 8, 4, 128, 128), (2, 2, 5, 1, 128, 16), (1, 2, 9, 3, 64, 64), (1, 3, 3, 2, 256, 256),
     (2, 1, 4, 4, 128, 1), (1, 1, 1, 1, 64, 2), (1, 2, 1, 5, 256, 8), (1, 2, 16, 16, 128, 64)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_kernel_for_many_tokens_gives_the_same_bits(
    batch, tokens, q_heads, kv_heads, head_dim, block, dtype
):
    qkv = torch.randn(batch, tokens, (q_heads + 2 * kv_heads) * head_dim)
    heads = qkv.unflatten(-1, (-1, head_dim))
    heads[0, 0, -1] = torch.randint(0, 31, (head_dim,)) / 2  # a value with ties
    heads[0, -1, -1] = 3.0
    heads[-1, -1, -1, 5] *= 1e4
    qkv = qkv.to(dtype)
    # Any numbers serve as cos and sin; halves of them differ here.
    cos, sin = (torch.randn(1 if tokens == 3 else batch, tokens, head_dim) for _ in range(2))
    rope_dtype = {HALF: F32, BF16: BF16, F32: HALF}[dtype] if tokens == 2 else dtype
    starts = torch.tensor([1, 4][:batch])
    found = []
    for wide in (NEVER, ALWAYS):
        (k_codes, k_params, k_intact), (v_codes, v_params, v_intact) = (
            caches(batch, kv_heads, tokens + 5, head_dim) for _ in "kv"
        )
        kv = k_codes, k_params, v_codes, v_params
        args = qkv, cos.to(rope_dtype), sin.to(rope_dtype), None, block, kv, 4, starts
        found.append((rope_append(*args, q_heads=q_heads, wide=wide, seed=batch), *kv))
        assert k_intact() and v_intact()
    for got, want in zip(*reversed(found), strict=True):
        assert (numpy_of(got).view(np.uint8) == numpy_of(want).view(np.uint8)).all()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e30, -1e4])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_kernel_for_many_tokens_takes_values_as_the_reference(scale, seed):
    """Heads that `special_heads` makes, constant, subnormal and not finite ones among them, as values."""
    values = (special_heads(128) * scale).transpose(1, 2).flatten(2)
    qkv = torch.cat([torch.randn(2, 5, 4 * 128), values], -1).contiguous()
    angles = torch.ones(1, 5, 128)
    (k_codes, k_params, _), (v_codes, v_params, intact) = (caches(2, 3, 8, 128) for _ in "kv")
    starts = torch.tensor([-2, 3])  # the first two tokens of the first sequence are not written
    kv = k_codes, k_params, v_codes, v_params
    rope_append(qkv, angles, angles, None, 1, kv, 3, starts, 1, seed, ALWAYS)
    codes, params = reference.quantize_kv4(values.unflatten(-1, (3, 128)).transpose(1, 2), 0.95)
    assert intact()
    assert_close(v_codes[1, :, 3:], codes[1])
    assert_close(v_params[1, :, 3:], params[1])
    assert_close(v_codes[0, :, :3], codes[0, :, 2:])
    assert_close(v_params[0, :, :3], params[0, :, 2:])
    assert poisoned(v_codes[0, :, 3:]) and poisoned(v_codes[1, :, :3])


@pytest.mark.parametrize("change", ["had_k", "head_dim", "qkv", "cos", "codes"])
def test_what_the_kernel_for_many_tokens_does_not_take_goes_to_the_other(change):
    head_dim = 96 if change == "head_dim" else 64

    def shifted(x, name):
        return aligned(x, 2) if change == name else aligned(x)

    qkv, angles = torch.randn(1, 2, 3 * head_dim), torch.randn(1, 2, head_dim)
    qkv, cos = shifted(qkv, "qkv"), shifted(angles.cos(), "cos")
    had_k = -torch.ones(1, 1, dtype=torch.int8) if change == "had_k" else None
    kv = [t for _ in "kv" for t in caches(1, 1, 3, head_dim + 4 * (change == "codes"))[:2]]
    if change == "codes":
        kv = [kv[0][..., 2:], kv[1], kv[2][..., 2:], kv[3]]
    with pytest.raises(AssertionError, match="many tokens served: False"):
        rope_append(qkv, cos, aligned(angles.sin()), had_k, 1, kv, 1, wide=ALWAYS)


def test_what_no_kernel_takes_is_refused():
    codes, params, _ = caches(1, 1, 1, 2048)
    with pytest.raises(RuntimeError, match="quantize_kv4: the CUDA kernels.*not float64; convert"):
        append(torch.randn(1, 1, 1, 2048, dtype=F64)[..., :64], codes[..., :32], params)
    with pytest.raises(RuntimeError, match="quantize_kv4: head_dim=2048; the CUDA kernels take up to 1024"):
        append(torch.randn(1, 1, 1, 2048), codes, params)
    with pytest.raises(RuntimeError, match="attention_kv4: head_dim=258; .* up to 256"):
        attend(torch.randn(1, 1, 1, 258), packed(1, 1, 1, 258), 1)
    with pytest.raises(RuntimeError, match="head_dim=128 needs .* this device has 1000 a block"):
        attend(torch.randn(1, 1, 1, 128), packed(1, 1, 1, 128), 1, shared=1000)


# attention_kv4


def assert_attention(q, kv, length, mask=None, causal=True, scaling=0.125, sinks=None, starts=None, **kwargs):
    y = attend(q, kv, length, mask, causal, scaling, sinks, starts, **kwargs)
    exact, error = exact_attention(q, kv, length, mask, causal, scaling, sinks, starts)
    last, step = ROUNDING[q.dtype]
    allowed = error * (1 + last) + last * exact.abs() + step
    worst = ((y.double() - exact).abs() / allowed).nan_to_num(INF).amax() if y.numel() else 0
    assert worst <= 1, f"off by {float(worst):.3g} times the bound"
    return y


@pytest.mark.parametrize("head_dim", [2, 30, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("dtype", [*FLOATS, F64])
def test_attention_kv4(head_dim, dtype):
    q = torch.randn(1, 1, 2, head_dim).to(dtype).transpose(1, 2)
    y = assert_attention(q, packed(1, 1, 300, head_dim, capacity=303), 300, scaling=head_dim**-0.5)
    assert y.dtype == dtype and y.shape == (1, 1, 2, head_dim)


@pytest.mark.parametrize("length", [1, 31, 33, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
@pytest.mark.parametrize("repeat", [1, 3])
def test_lengths(length, repeat):
    q, kv = torch.randn(1, repeat, 1, 64).half(), packed(1, 1, length, 64, capacity=length + 40)
    y = assert_attention(q, kv, length)
    assert_close(attend(q, kv, length, split=False, seed=5), y)
    want = reference.attention_kv4(q, *kv, length, None, True, 0.125)
    assert_close(y, want, atol=3e-6, rtol=2.0**-10)


def test_no_keys_and_no_queries():
    assert not attend(torch.randn(1, 2, 3, 16), packed(1, 2, 0, 16, capacity=4), 0).any()
    assert attend(torch.randn(1, 2, 0, 16), packed(1, 2, 4, 16), 4).shape == (1, 0, 2, 16)


@pytest.mark.parametrize("repeat", [1, 2, 4, 5, 8, 12])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads(repeat, tokens, causal):
    q, kv = torch.randn(2, 2 * repeat, tokens, 32).half(), packed(2, 2, 70, 32)
    assert_attention(q, kv, 70, causal=causal, scaling=0.2)


def test_more_than_a_group_of_chunks():
    length = (GROUP + 2) * CHUNK + 3
    q, kv = 3 * torch.randn(1, 2, 1, 64), packed(1, 1, length, 64)
    y = assert_attention(q, kv, length)
    assert_close(attend(q, kv, length, split=False), y)
    assert_close(attend(q, kv, length, processors=1, seed=2), y)  # blocks do several chunks each


@pytest.mark.parametrize("mask_shape", [(2, 6), (1, 1), (1, 6)])
@pytest.mark.parametrize("causal", [True, False])
def test_masks(mask_shape, causal):
    mask = torch.rand(*mask_shape, 3, 270) > 0.5
    mask[:, :, 1] = False  # a query that sees nothing
    mask = mask.transpose(2, 3).contiguous().transpose(2, 3)  # any strides
    y = assert_attention(torch.randn(2, 6, 3, 32), packed(2, 3, 270, 32), 270, mask, causal, 0.2)
    assert not y[:, 1].any()


@pytest.mark.parametrize("count", [1, 4, 260, 300])
@pytest.mark.parametrize("dtype", [*FLOATS, F64])
def test_sinks(count, dtype):
    q, kv = torch.randn(1, 4, 2, 32), packed(1, 2, 270, 32)
    k_sink, v_sink = torch.randn(1, count, 2, 2, 32).to(dtype).transpose(1, 3).unbind(2)
    for t in (kv[1], kv[3]):
        t[:, :, :count] = NAN  # they are not looked at
    for split in (True, False):
        assert_attention(q, kv, 270, scaling=0.2, sinks=(k_sink, v_sink), split=split)


@pytest.mark.parametrize("tokens,starts", [(1, [0, 299, 256]), (3, [297, 0, 254])])
@pytest.mark.parametrize("causal", [True, False])
def test_sequences_of_different_lengths(tokens, starts, causal):
    q, kv, starts = torch.randn(3, 2, tokens, 32), packed(3, 1, 300, 32), torch.tensor(starts)
    for b, start in enumerate(starts.tolist()):
        kv[1][b, :, start + tokens :] = kv[3][b, :, start + tokens :] = NAN
    got = assert_attention(q, kv, 300, None, causal, starts=starts)
    for b, start in enumerate(starts.tolist()):
        one = [t[b : b + 1] for t in (q, *kv)]
        assert_close(attend(one[0], one[1:], start + tokens, None, causal, seed=b), got[b : b + 1])


def test_starts_out_of_bounds_read_nothing_beyond_length():
    q, kv = torch.randn(4, 1, 2, 16), packed(4, 1, 20, 16, capacity=30)
    got = attend(q, kv, 20, starts=torch.tensor([-9, 2**62, -(2**62), -1]))
    assert not got[0].any() and not got[2].any() and got.isfinite().all()
    assert_close(got[1:2], attend(q[1:2], [t[1:2] for t in kv], 20, None, False))
    assert not got[3, 0].any() and got[3, 1].any()


def test_a_query_does_not_depend_on_what_it_does_not_see():
    """Nor on other queries, the batch, how chunks are divided, or the order of lanes."""
    q, kv = torch.randn(2, 4, 6, 64).half(), packed(2, 2, 530, 64)
    want = attend(q, kv, 530, seed=1)
    assert_close(attend(q, kv, 530, split=False, processors=1, seed=2), want)
    for token in (0, 5):
        length = 530 - 5 + token
        one = q[1:, 2:3, token : token + 1]
        dirty = [t[1:, 1:].clone() for t in kv]
        dirty[0][:, :, length:], dirty[2][:, :, length:] = 77, 78
        dirty[1][:, :, length:], dirty[3][:, :, length:] = NAN, INF
        assert_close(attend(one, dirty, length, seed=3), want[1:, token : token + 1, 2:3])
        assert_close(
            attend(one, dirty, 530, starts=torch.tensor([length - 1])), want[1:, token : token + 1, 2:3]
        )
        mask = (torch.arange(530) < length).view(1, 1, 1, -1)
        assert_close(attend(one, dirty, 530, mask, False), want[1:, token : token + 1, 2:3])


@pytest.mark.parametrize("causal", [True, False])
def test_nan_shows_only_where_it_is_seen(causal):
    q, kv = torch.randn(1, 2, 3, 32), packed(1, 2, 260, 32)
    clean = attend(q, kv, 260, None, causal)
    for param in (1, 3):
        for part in (0, 1):
            dirty = [t.clone() for t in kv]
            dirty[param][:, :, 258, part] = NAN
            got = attend(q, dirty, 260, None, causal)
            blind = 1 if causal else 0
            assert_close(got[:, :blind], clean[:, :blind])
            assert got[:, blind:].isnan().all()
    for bad in (NAN, INF):
        q[0, 1, 2, 5] = bad
        got = attend(q, kv, 260, None, causal)
        assert got[0, 2, 1].isnan().all()
        got[0, 2, 1] = clean[0, 2, 1]
        assert_close(got, clean)


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e3, 1e30])
def test_queries_of_any_size(size):
    q, kv = torch.randn(1, 2, 1, 64) * size, packed(1, 1, 300, 64)
    assert_attention(q, kv, 300, scaling=0.125 / size)
    assert_attention(
        torch.cat([q, q[..., :32] * 0, q[..., :32] * 1e-6], -1),
        packed(1, 1, 30, 128),
        30,
        scaling=0.125 / size,
    )


def test_scores_of_any_size_and_values_of_different_sizes():
    q, kv = torch.randn(1, 2, 2, 64) * 50, packed(1, 1, 600, 64, spread=3)
    assert_attention(q, kv, 600)
    kv[3][:, :, ::7] *= 100
    kv[3][:, :, 1::7] *= 1e-3
    assert_attention(q / 50, kv, 600)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_strided_and_unaligned_caches(head_dim):
    length = 70
    q, kv = torch.randn(1, 4, 1, head_dim), packed(1, 2, length, head_dim)
    want = assert_attention(q, kv, length)
    heads_last = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in kv]
    assert_close(attend(q, heads_last, length), want)
    for offset in (1, 8, 24):
        moved = []
        for t in kv:
            room = torch.zeros(*t.shape[:3], t.shape[3] + 2 * offset, dtype=t.dtype)
            moved.append(room[..., offset : offset + t.shape[3]].copy_(t))
        assert_close(attend(q, moved, length), want)
