"""Every op against `w2a4.ops.reference`: exact where the op is, else within twice torch's own error.

The ops of the KV cache are in `test_kv_ops.py`.
"""

import os
import subprocess
import sys

import pytest
import torch

from support.numerics import assert_close
from support.op_arguments import (
    FLOATS,
    HAD12,
    assert_refused,
    bad_arguments,
    linear_inputs,
    opcheck,
    replaced,
)
from support.paths import ROOT
from w2a4 import ops
from w2a4.ops import reference
from w2a4.ops.packing import packed_width, unpack

CLIP = torch.tensor([0.9])


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


@pytest.mark.parametrize("had_k,block", [(None, 1), (None, 64), (HAD12, 12), (HAD12, 96)])
@pytest.mark.parametrize("shape", [(0,), (3,), (2, 5)])
def test_hadamard_by_doublings(had_k, block, shape):
    """For float64 where kernels hold 32 bits, differentiable."""
    x = torch.randn(*shape, 2 * block, dtype=torch.float64)
    for transpose in (False, True):
        args = x, had_k, block, transpose
        assert_close(reference.hadamard_by_doublings(*args), reference.hadamard(*args), atol=1e-14)


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
    x[1, 6, 0], x[1, 6, -1] = -50, 50
    for clip in (CLIP, -CLIP):
        want = reference.quantize_a4(x, clip, group)
        for got, wanted in zip(ops.quantize_a4(x, clip, group), want, strict=True):
            assert_close(got, wanted)


def test_all_sixteen_codes_of_a_negative_clip():
    """The number furthest from 0 has code -8, of two opposite ones the negative; its scale has its sign."""
    x = torch.tensor([[4.0, -1.0, 0.5, 3.5], [-4.0, 4.0, 1.0, -3.5], [0.0, 0.0, -0.0, 0.0]])
    codes, scale = ops.quantize_a4(x, -torch.ones(1))
    assert_close(scale, torch.tensor([[-0.5], [0.5], [1.0]]))
    wanted = torch.tensor([[-8, 2, -1, -7], [-8, 7, 2, -7], [0, 0, 0, 0]], dtype=torch.int8)
    assert_close(unpack(codes, 4, 4, signed=True), wanted)


def test_quantize_a4_ties_go_to_even():
    # Scale 1 exactly: halves are ties.
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]])
    codes, scale = ops.quantize_a4(x, torch.ones(1))
    assert scale.item() == 1
    assert_close(reference.dequantize_a4(codes, scale, 8), torch.tensor([[7.0, 0, 2, 2, 0, -2, -2, 4]]))


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-20, 1e30])
@pytest.mark.parametrize("clip", [CLIP, -CLIP])
def test_quantize_a4_of_extreme_sizes(scale, clip):
    x = torch.randn(5, 64, dtype=torch.float64).mul(scale).float()
    for got, want in zip(ops.quantize_a4(x, clip), reference.quantize_a4(x, clip), strict=True):
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


# linear_w2a4, linear_w3a4, linear_w4a4


def both(bits, args, dtype=torch.float32):
    name = f"linear_w{bits}a4"
    return getattr(ops, name)(*args, dtype), getattr(reference, name)(*args, dtype)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 17, 33, (2, 3), (2, 0), ()])
@pytest.mark.parametrize("group,act_group", [(64, -1), (32, 64), (64, 32), (128, 384), (384, 128)])
def test_linear(bits, tokens, group, act_group):
    assert_close(*both(bits, linear_inputs(bits, tokens, 70, 384, group, act_group)))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [0, 1, 40, (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_residual_is_added_as_by_an_addition_after_it(bits, tokens, dtype):
    args = linear_inputs(bits, tokens, 70, 384, 64, bias=torch.float32)
    op = getattr(ops, f"linear_w{bits}a4")
    y = op(*args, dtype)
    residual = torch.randn(y.shape).to(dtype)
    assert torch.equal(op(*args, dtype, residual), y + residual)
    strided = torch.randn(*y.shape[:-1], 2 * y.shape[-1]).to(dtype)[..., ::2]
    assert torch.equal(op(*args, dtype, strided), y + strided)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize(
    "out,features,group,act_group",
    [(1, 30, -1, -1), (65, 90, -1, -1), (7, 30, 15, -1), (9, 90, 10, 30), (3, 33, 11, -1), (5, 1, -1, -1),
     (64, 32, 32, -1), (130, 576, 64, -1), (66, 512, 256, -1), (3, 1536, 128, -1), (4, 2304, -1, 1152)],
)  # fmt: skip
def test_linear_of_odd_shapes(bits, tokens, out, features, group, act_group):
    assert_close(*both(bits, linear_inputs(bits, tokens, out, features, group, act_group)))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [2, 11])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16, torch.bfloat16])
def test_linear_dtypes_and_bias(bits, tokens, dtype, bias):
    assert_close(*both(bits, linear_inputs(bits, tokens, 37, 64, 32, bias=bias), dtype))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 7])
def test_linear_of_every_code_pair_at_the_extremes(bits, tokens):
    # The largest sum of one block: 40000 products of -128 * -8 pass 2**24, where float stops being exact.
    features = 40000
    a_codes = torch.full((tokens, features // 2), 0x88, dtype=torch.uint8)
    a_codes[:, -1] = 0x87
    a_scale, scale = torch.ones(tokens, 1), torch.ones(2, 1).half()
    weight, levels = a_codes[:2].clone(), []
    if bits < 4:
        weight = torch.zeros(2, packed_width(features, bits), dtype=torch.uint8)
        levels = [torch.arange(2**bits, dtype=torch.int8).expand(2, 1, -1).contiguous()]
        levels[0][..., 0] = -128
    weight = weight[:1].expand(2, -1).contiguous()
    got, want = both(bits, (a_codes, a_scale, weight, *levels, scale, None, features))
    assert got.abs().max() > (2**24 if bits < 4 else 2**21)
    assert_close(got, want)


@pytest.mark.parametrize("bits", [2, 3, 4])
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


# all instruction sets give the same bits

FINGERPRINT = """
import sys, types, zlib
sys.modules["w2a4"] = package = types.ModuleType("w2a4")  # ops only: the whole package imports transformers
package.__path__ = ["w2a4"]
import torch
from w2a4 import ops
from w2a4.ops import reference
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
codes, scale = ops.quantize_a4(x, torch.tensor([-0.9]))
weight = torch.randint(0, 256, (70, 144), dtype=torch.uint8)
levels = torch.randint(-128, 128, (70, 9, 4), dtype=torch.int8)
w_scale = torch.rand(70, 9).half()
for tokens in (1, 5, 9):
    args = codes[:tokens], scale[:tokens]
    out.append(ops.linear_w2a4(*args, weight, levels, w_scale, None, 64, torch.bfloat16))
    out.append(ops.linear_w4a4(*args, weight.repeat(1, 2), w_scale, None, 64, torch.float16))
wide, bias = torch.randn(17, 577), torch.randn(70)
int8 = torch.randint(-128, 128, (70, 577), dtype=torch.int8)
for tokens in (1, 2, 3, 4, 5, 6, 7, 12, 16, 17):
    out.append(ops.linear_w8(wide[:tokens], int8, w_scale[:, 0].contiguous(), bias))
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
    runs = [
        subprocess.Popen(
            run, cwd=ROOT, env=os.environ | {"W2A4_CPU_ISA": isa}, stdout=subprocess.PIPE, text=True
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
    yield "linear_w2a4", [*good, torch.ones(3, 7)], r"residual has shape \[3, 7\], expected \[3, 8\]"
    yield "linear_w2a4", [*good, torch.ones(3, 8).half()], "residual has dtype float16, expected float32"
    mixed = [*linear_inputs(2, 3, 8, 96, 32, 48), torch.float32]
    yield "linear_w2a4", mixed, "group_size=32 and the activation group 48"
    four = [*linear_inputs(4, 3, 8, 64, 32), torch.float32]
    yield "linear_w4a4", replaced(four, 2, good[2]), r"weight has shape \[8, 16\], expected \[8, 32\]"

    w8, s8 = torch.zeros(5, 64, dtype=torch.int8), torch.ones(5).half()
    yield "linear_w8", (x, w8.float(), s8, None), "weight has dtype"
    yield "linear_w8", (x[:, :32].contiguous(), w8, s8, None), r"x has shape \[3, 32\], expected \[..., 64\]"
    yield "linear_w8", (x, w8, s8[:4], None), r"scale has shape \[4\]"


@pytest.mark.parametrize("name,args,message", bad_arguments(bad_calls()))
def test_bad_argument(name, args, message):
    assert_refused(name, args, message)


def test_devices_must_agree():
    with pytest.raises(RuntimeError, match="x on meta, clip on cpu"):
        ops.quantize_a4(torch.randn(2, 8, device="meta"), CLIP)
    args = linear_inputs(2, 3, 8, 64, 32)
    with pytest.raises(RuntimeError, match="levels on meta"):
        ops.linear_w2a4(*replaced(args, 3, args[3].to("meta")), torch.float32)


# registration


def opcheck_calls():
    yield "hadamard", (torch.randn(2, 24, requires_grad=True), HAD12, 24, True)
    yield "hadamard", (torch.randn(2, 3, 16), None, 8)
    yield "quantize_a4", (torch.randn(2, 3, 33), CLIP, 11)
    yield "linear_w2a4", (*linear_inputs(2, (2, 3), 8, 64, 32, bias=torch.float32), torch.bfloat16)
    yield "linear_w4a4", (*linear_inputs(4, 3, 8, 64, 32), torch.float32)
    yield "linear_w8", (torch.randn(2, 64), torch.zeros(5, 64, dtype=torch.int8), torch.ones(5).half(), None)


@pytest.mark.parametrize("name,args", list(opcheck_calls()))
def test_opcheck(name, args):
    opcheck(name, args)
