"""Every op against `w2a4.reference`: exact where the op is, else within twice torch's own error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_close

from w2a4 import ops, reference
from w2a4.packing import pack, packed_width, unpack

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CLIP = torch.tensor([0.9])


def paley(q: int) -> torch.Tensor:
    """Hadamard matrix of order q + 1, int8, not symmetric, from the squares modulo a prime q = 3 mod 4."""
    squares = {i * i % q for i in range(1, q)}
    h = torch.ones(q + 1, q + 1, dtype=torch.int8)
    for i in range(q):
        h[i + 1, 0] = -1
        for j in range(q):
            h[i + 1, j + 1] = 1 if i == j else (1 if (j - i) % q in squares else -1)
    assert torch.equal(h.int() @ h.int().T, (q + 1) * torch.eye(q + 1, dtype=torch.int32))
    return h


HAD12 = paley(11)


# hadamard


@pytest.mark.parametrize(
    "had_k,block", [(None, 1), (None, 2), (None, 16), (None, 256), (HAD12, 12), (HAD12, 96)]
)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_hadamard(had_k, block, transpose, dtype):
    x = torch.randn(3, 5, 2 * block, dtype=torch.float64).to(dtype)
    exact = reference.hadamard(x.double(), had_k, block, transpose)
    # torch's own error: the result rounded to dtype, and a float32 product where that is finer.
    torch_error = (exact.to(dtype).double() - exact).abs().max() + 1e-7 * (dtype != torch.float64)
    y = ops.hadamard(x, had_k, block, transpose)
    assert y.dtype == dtype
    assert_close(y.double(), exact, atol=2 * float(torch_error) + 1e-6 * (dtype != torch.float64) + 1e-14)


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (32,)])
def test_hadamard_of_few(shape):
    x = torch.randn(shape)
    assert_close(ops.hadamard(x, None, 16), reference.hadamard(x, None, 16), atol=1e-6)


def test_hadamard_inverse_is_transpose():
    x = torch.randn(4, 96, dtype=torch.float64)
    back = ops.hadamard(ops.hadamard(x, HAD12, 48), HAD12, 48, transpose=True)
    assert_close(back, x, atol=1e-14)
    assert not torch.allclose(ops.hadamard(ops.hadamard(x, HAD12, 48), HAD12, 48), x)


def test_hadamard_gradient():
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    for transpose in (False, True):
        assert torch.autograd.gradcheck(lambda x, t=transpose: ops.hadamard(x, HAD12, 24, t), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.hadamard(x, None, 8), x)


# quantize_a4


@pytest.mark.parametrize(
    "features,group", [(1, -1), (7, -1), (30, 15), (90, -1), (128, 32), (576, 64), (576, -1)]
)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_quantize_a4(features, group, dtype):
    x = torch.randn(2, 17, features).to(dtype)
    x[0, 3] = 0
    x[1, 5, 0] = 1e4
    for got, want in zip(ops.quantize_a4(x, CLIP, group), reference.quantize_a4(x, CLIP, group), strict=True):
        assert_close(got, want)


def test_quantize_a4_ties_go_to_even():
    # Scale 1 exactly: halves are ties.
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]])
    codes, scale = ops.quantize_a4(x, torch.ones(1))
    assert scale.item() == 1
    assert_close(reference.dequantize_a4(codes, scale, 8), torch.tensor([[7.0, 0, 2, 2, 0, -2, -2, 4]]))


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-20, 1e30])
def test_quantize_a4_of_extreme_sizes(scale):
    x = torch.randn(5, 64, dtype=torch.float64).mul(scale).float()
    for got, want in zip(ops.quantize_a4(x, CLIP), reference.quantize_a4(x, CLIP), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantize_a4_shows_non_finite_input_in_the_scale(bad):
    x = torch.randn(2, 64)
    x[1, 40] = bad
    codes, scale = ops.quantize_a4(x, CLIP, 32)
    good_codes, good_scale = ops.quantize_a4(x[:1], CLIP, 32)
    assert_close(codes[:1], good_codes)
    assert_close(scale[:1], good_scale)
    assert not scale[1, 1].isfinite() and not codes[1, 16:].any()
    assert scale[1, 0].isfinite() and codes[1, :16].any()


# linear_w2a4, linear_w4a4


def linear_inputs(bits, tokens, out, features, group, act_group=-1, bias=None):
    """Arguments of the op up to `group_size`; every code occurs, and levels and codes reach their bounds."""
    x = torch.randn(*tokens, features) if isinstance(tokens, tuple) else torch.randn(tokens, features)
    a_codes, a_scale = reference.quantize_a4(x, torch.tensor([0.6]), act_group)
    group = features if group == -1 else group
    scale = (torch.rand(out, features // group) + 0.1).half()
    bias = None if bias is None else torch.randn(out).to(bias)
    if bits == 4:
        weight = pack(torch.randint(-8, 8, (out, features), dtype=torch.int8), 4)
        return a_codes, a_scale, weight, scale, bias, group
    weight = pack(torch.randint(0, 4, (out, features), dtype=torch.int8), 2)
    levels = torch.randint(-128, 128, (out, features // group, 4), dtype=torch.int8)
    levels[:, :, 0], levels[:, :, 3] = -128, 127
    return a_codes, a_scale, weight, levels, scale, bias, group


def both(bits, args, dtype=torch.float32):
    name = f"linear_w{bits}a4"
    return getattr(ops, name)(*args, dtype), getattr(reference, name)(*args, dtype)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 17, 33, (2, 3), (2, 0), ()])
@pytest.mark.parametrize("group,act_group", [(64, -1), (32, 64), (64, 32), (128, 384), (384, 128)])
def test_linear(bits, tokens, group, act_group):
    assert_close(*both(bits, linear_inputs(bits, tokens, 70, 384, group, act_group)))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize(
    "out,features,group,act_group",
    [(1, 30, -1, -1), (65, 90, -1, -1), (7, 30, 15, -1), (9, 90, 10, 30), (3, 33, 11, -1), (5, 1, -1, -1),
     (64, 32, 32, -1), (130, 576, 64, -1), (66, 512, 256, -1), (3, 1536, 128, -1), (4, 2304, -1, 1152)],
)  # fmt: skip
def test_linear_of_odd_shapes(bits, tokens, out, features, group, act_group):
    assert_close(*both(bits, linear_inputs(bits, tokens, out, features, group, act_group)))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [2, 11])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16, torch.bfloat16])
def test_linear_dtypes_and_bias(bits, tokens, dtype, bias):
    assert_close(*both(bits, linear_inputs(bits, tokens, 37, 64, 32, bias=bias), dtype))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [1, 7])
def test_linear_of_every_code_pair_at_the_extremes(bits, tokens):
    # The largest sum of one block: 40000 products of -128 * -8 pass 2**24, where float stops being exact.
    features = 40000
    a_codes = torch.full((tokens, features // 2), 0x88, dtype=torch.uint8)
    a_codes[:, -1] = 0x87
    a_scale, scale = torch.ones(tokens, 1), torch.ones(2, 1).half()
    weight = (
        torch.zeros(2, packed_width(features, bits), dtype=torch.uint8) if bits == 2 else a_codes[:2].clone()
    )
    weight = weight[:1].expand(2, -1).contiguous()
    levels = (
        [torch.tensor([-128, 1, 2, 3], dtype=torch.int8).expand(2, 1, 4).contiguous()] if bits == 2 else []
    )
    got, want = both(bits, (a_codes, a_scale, weight, *levels, scale, None, features))
    assert got.abs().max() > (2**24 if bits == 2 else 2**21)
    assert_close(got, want)


@pytest.mark.parametrize("bits", [2, 4])
def test_linear_token_does_not_depend_on_the_others(bits):
    args = linear_inputs(bits, 40, 70, 384, 64)
    op = getattr(ops, f"linear_w{bits}a4")
    whole = op(*args, torch.float32)
    for tokens in (slice(0, 1), slice(3, 8), slice(0, 39)):
        assert_close(op(args[0][tokens], args[1][tokens], *args[2:], torch.float32), whole[tokens])
    torch.set_num_threads(1)
    assert_close(op(*args, torch.float32), whole)


@pytest.mark.parametrize("tokens", [2, 9])
def test_linear_shows_nan_in_its_token_only(tokens):
    a_codes, a_scale, *rest = linear_inputs(2, tokens, 5, 64, 32)
    a_scale[1] = float("nan")
    got, want = both(2, (a_codes, a_scale, *rest))
    assert_close(got, want)
    assert got[1].isnan().all() and not got[0].isnan().any()


# linear_w8


@pytest.mark.parametrize("tokens", [(0,), (1,), (3,), (5,), (2, 17)])
@pytest.mark.parametrize("out,features", [(1, 1), (7, 30), (130, 64), (33, 577)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_linear_w8(tokens, out, features, dtype):
    x = torch.randn(*tokens, features).to(dtype)
    weight = torch.randint(-128, 128, (out, features), dtype=torch.int8)
    scale = (torch.rand(out) * 0.01).half()
    bias = torch.randn(out).to(dtype)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T + bias.double()
    want = reference.linear_w8(x, weight, scale, bias)
    assert want.dtype == dtype
    error = float((want.double() - exact).abs().max()) if want.numel() else 0.0
    assert_close(ops.linear_w8(x, weight, scale, bias).double(), exact, atol=2 * error + 1e-6)


def test_linear_w8_token_does_not_depend_on_the_others():
    x, weight = torch.randn(45, 100), torch.randint(-128, 128, (70, 100), dtype=torch.int8)
    scale = torch.rand(70).half()
    whole = ops.linear_w8(x, weight, scale)
    assert_close(ops.linear_w8(x[:1], weight, scale), whole[:1])
    assert_close(ops.linear_w8(x[7:10], weight, scale), whole[7:10])
    torch.set_num_threads(1)
    assert_close(ops.linear_w8(x, weight, scale), whole)


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


# all instruction sets give the same bits

FINGERPRINT = """
import sys, types, zlib
sys.modules["w2a4"] = package = types.ModuleType("w2a4")  # ops only: the whole package imports transformers
package.__path__ = ["w2a4"]
import torch
from w2a4 import ops, reference
torch.manual_seed(0)
out = []
x = torch.randn(9, 576)
out += [ops.hadamard(x, None, 64), *ops.quantize_a4(x, torch.tensor([0.9]), 64)]
clip = torch.tensor([0.9])
for k, m in ((1, 2), (1, 8), (1, 64), (1, 1024), (1, 8192), (12, 8), (28, 64), (36, 16), (172, 64)):
    had_k = None if k == 1 else 1 - 2 * torch.randint(0, 2, (k, k), dtype=torch.int8)
    wide = torch.randn(3, 2 * k * m)
    out += [ops.hadamard(wide, had_k, k * m), ops.hadamard(wide.half(), had_k, k * m, True)]
    out += [ops.hadamard(wide.double(), had_k, k * m), *ops.hadamard_a4(wide, had_k, k * m, clip)]
    out += ops.silu_mul_hadamard_a4(wide, wide.flip(0), had_k, k * m, clip)
    out += ops.rmsnorm_a4(wide, wide[0].clone(), 1e-5, clip, m)
codes, scale = ops.quantize_a4(x, torch.tensor([0.9]))
weight = torch.randint(0, 256, (70, 144), dtype=torch.uint8)
levels = torch.randint(-128, 128, (70, 9, 4), dtype=torch.int8)
w_scale, int8 = torch.rand(70, 9).half(), torch.randint(-128, 128, (70, 576), dtype=torch.int8)
for tokens in (1, 5, 9):
    args = codes[:tokens], scale[:tokens]
    out.append(ops.linear_w2a4(*args, weight, levels, w_scale, None, 64, torch.bfloat16))
    out.append(ops.linear_w4a4(*args, weight.repeat(1, 2), w_scale, None, 64, torch.float16))
    out.append(ops.linear_w8(x[:tokens], int8, w_scale[:, 0].contiguous()))
keys, values = torch.randn(2, 1, 2, 150, 64)
cache = [*ops.quantize_kv4(keys, 0.95), *ops.quantize_kv4(values, 0.95)]
out += cache
for tokens in (1, 7, 100):
    out.append(ops.attention_kv4(torch.randn(1, 4, tokens, 64), *cache, 150, None, True, 0.125))
for head_dim in (64, 80):
    turns = torch.randn(2, 1, 7, head_dim)
    kv = [t[:, :, :7].clone() for t in ops.quantize_kv4(torch.randn(2, 3, 7, head_dim), 0.9) * 2]
    out.append(ops.rope_append_kv4(torch.randn(2, 7, 8 * head_dim), *turns, None, 16, *kv, 0, 0.95))
    out += kv
print([zlib.crc32(t.contiguous().view(torch.uint8).numpy().tobytes()) for t in out])
"""


def test_every_instruction_set_gives_the_same_bits():
    run = [sys.executable, "-c", FINGERPRINT]
    root = Path(__file__).resolve().parent.parent
    runs = [
        subprocess.Popen(
            run, cwd=root, env=os.environ | {"W2A4_CPU_ISA": isa}, stdout=subprocess.PIPE, text=True
        )
        for isa in ("avx512", "avx2", "base")
    ]
    prints = [run.communicate()[0] for run in runs]
    assert len(prints[0]) > 100 and len(set(prints)) == 1, prints


# errors name the argument, quote the value and say what is expected


def bad_calls():
    x, clip = torch.randn(3, 64), torch.tensor([0.9])
    yield "hadamard", (x, None, 48), "block_size=48.*power of two"
    yield "hadamard", (x, None, 0), "block_size=0"
    yield "hadamard", (x, None, -64), "block_size=-64"
    yield "hadamard", (x, None, 128), r"block_size=128 does not divide.*\[3, 64\]"
    yield "hadamard", (x.int(), None, 64), "x has dtype.*expected float32"
    yield "hadamard", (x[:, ::2], None, 32), r"x of shape \[3, 32\] is not contiguous"
    yield "hadamard", (torch.tensor(1.0), None, 1), "x has no dimension"
    yield "hadamard", (torch.randn(3, 24), HAD12.float(), 24), "had_k has dtype float32, expected int8"
    yield "hadamard", (torch.randn(3, 24), HAD12[:2], 24), r"had_k has shape \[2, 12\].*square"
    yield "hadamard", (torch.randn(3, 24), HAD12, 18), "block_size=18.*K=12"
    yield "quantize_a4", (x, clip, 33), "group_size=33 does not divide"
    yield "quantize_a4", (x, clip, 0), "group_size=0"
    yield "quantize_a4", (x, clip.double(), -1), "clip has dtype float64, expected float32"
    yield "quantize_a4", (x, torch.rand(2), -1), r"clip has shape \[2\], expected \[1\]"
    yield "quantize_a4", (x.T, clip, -1), "x of shape.*not contiguous"
    yield "quantize_a4", (x[:, :0].contiguous(), clip, -1), "at least one feature"

    good = [*linear_inputs(2, 3, 8, 64, 32), torch.float32]
    names = ["a_codes", "a_scale", "weight", "levels", "scale", "bias", "group_size"]
    for i, wrong in enumerate([torch.int8, torch.float16, torch.int8, torch.uint8, torch.float32]):
        yield "linear_w2a4", replaced(good, i, good[i].to(wrong)), f"{names[i]} has dtype"
        message = "weight has shape.*in = groups of scale" if i == 4 else f"{names[i]} has shape"
        yield "linear_w2a4", replaced(good, i, good[i][:, :-1]), message
    for i in (0, 2, 4):
        strided = torch.stack([good[i], good[i]], -1)[..., 0]
        yield "linear_w2a4", replaced(good, i, strided), f"{names[i]} of shape.*not contiguous"
    yield "linear_w2a4", replaced(good, 1, good[1][:2]), r"a_scale has shape \[2, 1\].*a_codes.*\[3, 32\]"
    yield "linear_w2a4", replaced(good, 5, torch.randn(7)), r"bias has shape \[7\], expected \[8\]"
    yield "linear_w2a4", replaced(good, 6, 0), "group_size=0"
    yield "linear_w2a4", replaced(good, 6, 2**40), "group_size=1099511627776"
    yield "linear_w2a4", replaced(good, 7, torch.int8), "out_dtype is int8"
    mixed = [*linear_inputs(2, 3, 8, 96, 32, 48), torch.float32]
    yield "linear_w2a4", mixed, "group_size=32 and the activation group 48"
    four = [*linear_inputs(4, 3, 8, 64, 32), torch.float32]
    yield "linear_w4a4", replaced(four, 2, good[2]), r"weight has shape \[8, 16\], expected \[8, 32\]"

    w8, s8 = torch.zeros(5, 64, dtype=torch.int8), torch.ones(5).half()
    yield "linear_w8", (x, w8.float(), s8, None), "weight has dtype"
    yield "linear_w8", (x[:, :32].contiguous(), w8, s8, None), r"x has shape \[3, 32\], expected \[..., 64\]"
    yield "linear_w8", (x, w8, s8[:4], None), r"scale has shape \[4\]"

    kv, codes = torch.randn(1, 2, 3, 16), torch.zeros(1, 2, 9, 8, dtype=torch.uint8)
    params = torch.zeros(1, 2, 9, 2, dtype=torch.float16)
    yield "quantize_kv4", (torch.randn(1, 2, 3, 15), 0.9), r"x has shape \[1, 2, 3, 15\].*even head_dim"
    yield "quantize_kv4", (x, 0.9), "x has shape.*four dimensions"
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
    yield "attention_kv4", replaced(attention, 9, torch.randn(1, 2, 1, 16)), "v_sink is missing"


def replaced(args, index, value):
    return [*args[:index], value, *args[index + 1 :]]


BAD_CALLS = list(bad_calls()) if ops.build_info().startswith("w2a4._C: CPU") else []


@pytest.mark.parametrize(
    "name,args,message", BAD_CALLS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(BAD_CALLS)]
)
def test_bad_argument(name, args, message):
    with pytest.raises(RuntimeError, match=message) as error:
        getattr(torch.ops.w2a4, name)(*args)
    assert name in str(error.value)


def test_devices_must_agree():
    with pytest.raises(RuntimeError, match="x on meta, clip on cpu"):
        ops.quantize_a4(torch.randn(2, 8, device="meta"), CLIP)
    args = linear_inputs(2, 3, 8, 64, 32)
    with pytest.raises(RuntimeError, match="levels on meta"):
        ops.linear_w2a4(*replaced(args, 3, args[3].to("meta")), torch.float32)


# registration


def opcheck_calls():
    kv, q = cache(1, 2, 9, 16), torch.randn(1, 4, 3, 16)
    sink = torch.randn(1, 2, 2, 16)
    yield "hadamard", (torch.randn(2, 24, requires_grad=True), HAD12, 24, True)
    yield "hadamard", (torch.randn(2, 3, 16), None, 8)
    yield "quantize_a4", (torch.randn(2, 3, 33), CLIP, 11)
    yield "linear_w2a4", (*linear_inputs(2, (2, 3), 8, 64, 32, bias=torch.float32), torch.bfloat16)
    yield "linear_w4a4", (*linear_inputs(4, 3, 8, 64, 32), torch.float32)
    yield "linear_w8", (torch.randn(2, 64), torch.zeros(5, 64, dtype=torch.int8), torch.ones(5).half(), None)
    yield "quantize_kv4", (q.transpose(1, 2), 0.9)
    yield "append_kv4", (sink, kv[0].clone(), kv[1].clone(), 3, 0.9)
    rope_qkv, cos, sin, caches = rope_arguments(2, 3, 4, 2, 16, 9)
    yield "rope_append_kv4", (rope_qkv, cos, sin, None, 16, *caches, 2, 0.9)
    yield "attention_kv4", (q, *kv, 7, torch.ones(1, 1, 3, 7, dtype=torch.bool), True, 0.25, sink, sink)


@pytest.mark.parametrize("name,args", list(opcheck_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.w2a4, name).default, args)


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
