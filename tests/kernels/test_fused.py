"""The ops that end in `quantize_a4`: scales within rounding of float64, codes equal except next to a tie."""

import pytest
import torch
import torch.nn.functional as F

from support.numerics import UNIT, assert_close, assert_quantized
from w2a4 import ops
from w2a4.format.hadamard import had_k_matrix
from w2a4.ops import reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CLIP, ALL_CODES = torch.tensor([0.9]), torch.tensor([-0.9])
EPS = 1e-5

#: features, K of had_k, block_size, group_size
SHAPES = [
    (64, 1, 64, -1), (96, 12, 96, -1), (96, 12, 48, 32), (224, 28, 112, -1), (576, 36, 576, 64),
    (1536, 12, 1536, -1), (688, 172, 344, -1), (2048, 1, 512, 1024), (20, 1, 4, 5), (12, 12, 12, -1),
    (7, 1, 1, -1), (1, 1, 1, -1), (90, 1, 2, 15), (4096, 1, 4096, -1), (11008, 172, 11008, -1),
]  # fmt: skip


def hadamard_error(x, had_k, block):
    """Of float32 sums of `block` signed numbers, pairwise over the power of two, in order over K."""
    k = 1 if had_k is None else had_k.shape[0]
    depth = (block // k).bit_length() + k + 3
    sums = x.abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True) / block**0.5
    return (depth * UNIT * sums).expand(*sums.shape[:-1], block).flatten(-2)


@pytest.mark.parametrize("features,k,block,group", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_hadamard_a4(features, k, block, group, dtype):
    had_k = had_k_matrix(k)
    x = torch.randn(2, 3, features).to(dtype)
    exact = reference.hadamard(x.double(), had_k, block)
    error = hadamard_error(x.double(), had_k, block)
    for clip in (CLIP, ALL_CODES):
        assert_quantized(ops.hadamard_a4(x, had_k, block, clip, group), exact, error, clip, group)


@pytest.mark.parametrize("features,k,block,group", SHAPES)
def test_hadamard_a4_of_float32_is_hadamard_then_quantize_a4(features, k, block, group):
    had_k, x = had_k_matrix(k), torch.randn(5, features)
    fused = ops.hadamard_a4(x, had_k, block, CLIP, group)
    composed = ops.quantize_a4(ops.hadamard(x, had_k, block), CLIP, group)
    for got, want in zip(fused, composed, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("features,group", [(1, -1), (7, -1), (90, 15), (576, -1), (4096, 128)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", [None, *FLOATS])
def test_rmsnorm_a4(features, group, dtype, weight_dtype):
    x = torch.randn(2, 3, features).to(dtype)
    weight = None if weight_dtype is None else (torch.rand(features) + 0.5).to(weight_dtype)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    exact = exact if weight is None else exact * weight.double()
    # The mean square adds features / 16 numbers in a lane and then 16 lanes; its root halves the error.
    error = (features / 32 + 16) * UNIT * exact.abs()
    for clip in (CLIP, ALL_CODES):
        assert_quantized(ops.rmsnorm_a4(x, weight, EPS, clip, group), exact, error, clip, group)


@pytest.mark.parametrize("features,k,block,group", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_mul_hadamard_a4(features, k, block, group, dtype):
    had_k = had_k_matrix(k)
    gate, up = (torch.randn(2, 3, features) * 4).to(dtype), torch.randn(2, 3, features).to(dtype)
    inner = F.silu(gate.double()) * up.double()
    exact = reference.hadamard(inner, had_k, block)
    # Ten roundings of one number before the sums: the exponential is within 2 units, the rest within 1.
    error = hadamard_error(inner, had_k, block) if block > 1 else 0.0
    error = error + 10 * UNIT * reference_abs_hadamard(inner, block)
    assert_quantized(ops.silu_mul_hadamard_a4(gate, up, had_k, block, CLIP, group), exact, error, CLIP, group)


def reference_abs_hadamard(x, block):
    """What a relative error of every input can add up to."""
    sums = x.abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True) / block**0.5
    return sums.expand(*sums.shape[:-1], block).flatten(-2)


def calls(x):
    """Every fused op on one input."""
    had_k, ones = had_k_matrix(12), torch.ones_like(x)
    yield "hadamard_a4", (x, had_k, 24, CLIP, 24)
    yield "rmsnorm_a4", (x, None, EPS, CLIP, 24)
    yield "silu_mul_hadamard_a4", (x, ones, had_k, 24, CLIP, 24)
    yield "silu_mul_hadamard_a4", (ones, x, None, 1, CLIP, 24)


@pytest.mark.parametrize("index", range(4))
def test_reference_and_op_agree_on_special_values(index):
    x = torch.randn(6, 48)
    x[1] = 0
    x[2, 3], x[3, 3], x[4, 3] = float("nan"), float("inf"), -float("inf")
    x[5] *= 1e-20
    name, args = list(calls(x))[index]
    (codes, scale), (_, want) = getattr(ops, name)(*args), getattr(reference, name)(*args)
    assert_close(scale.isfinite(), want.isfinite())
    assert scale[1].tolist() == [1.0, 1.0] and not codes[1].any()
    finite = scale.isfinite() & want.isfinite()
    torch.testing.assert_close(scale[finite], want[finite], rtol=1e-5, atol=0)
    assert not codes.unflatten(-1, (2, 12))[~scale.isfinite()].any()
    assert not scale[2, 0].isfinite() and not scale[3, 0].isfinite() and not scale[4, 0].isfinite()


def test_silu_of_large_inputs():
    """Each in a token of its own; where silu leaves the normal range of float32 it may be zero."""
    gate = torch.tensor([-87.0, -20.0, 0.0, 20.0, 100.0, 1e30, -87.5, -100.0, -1e30])[:, None].repeat(1, 2)
    exact = F.silu(gate.double())
    codes, scale = ops.silu_mul_hadamard_a4(gate, torch.ones_like(gate), None, 1, CLIP)
    assert_quantized((codes[:6], scale[:6]), exact[:6], 10 * UNIT * exact[:6].abs(), CLIP)
    assert reference.dequantize_a4(codes[6:], scale[6:], 2).abs().max() < 1e-35


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (48,), (1, 48)])
def test_few_tokens(shape):
    for name, args in calls(torch.randn(shape)):
        for got, want in zip(getattr(ops, name)(*args), getattr(reference, name)(*args), strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype


@pytest.mark.parametrize("index", range(4))
def test_a_token_does_not_depend_on_the_others(index):
    x = torch.randn(700, 48)
    name, (*args,) = list(calls(x))[index]
    whole = getattr(ops, name)(*args)
    parts = [a[331:332] if torch.is_tensor(a) and a.shape == x.shape else a for a in args]
    torch.set_num_threads(1)
    for got, one, want in zip(getattr(ops, name)(*args), getattr(ops, name)(*parts), whole, strict=True):
        assert_close(got, want)
        assert_close(one, want[331:332])


def bad_calls():
    x, had_k = torch.randn(3, 48), had_k_matrix(12)
    for name, middle in (("hadamard_a4", ()), ("silu_mul_hadamard_a4", (x,))):
        first = "gate" if middle else "x"
        yield name, (x, *middle, had_k, 18, CLIP), "block_size=18.*K=12"
        yield name, (x, *middle, had_k, 96, CLIP), rf"block_size=96 does not divide.* {first}, .*\[3, 48\]"
        yield name, (x, *middle, had_k[:1, :1].contiguous(), 1, CLIP), "block_size=1 is no transform"
        yield name, (x, *middle, had_k.float(), 24, CLIP), "had_k has dtype float32, expected int8"
        yield name, (x.int(), *middle, had_k, 24, CLIP), f"{first} has dtype"
        yield name, (x, *middle, had_k, 24, CLIP.double()), "clip has dtype float64"
        yield name, (x, *middle, had_k, 24, CLIP, 7), "group_size=7 does not divide"
        yield name, (x[:, ::2], *middle, None, 8, CLIP), f"{first} of shape.*not contiguous"
        yield name, (x[:, :0].contiguous(), *middle, None, 1, CLIP), "at least one feature"
    yield "silu_mul_hadamard_a4", (x, x[:2], None, 1, CLIP), r"up has shape \[2, 48\], .*\[3, 48\]"
    yield "silu_mul_hadamard_a4", (x, x.half(), None, 1, CLIP), "up has dtype float16, expected float32"
    yield "silu_mul_hadamard_a4", (x, x.T.contiguous().T, None, 1, CLIP), "up of shape.*not contiguous"
    yield "rmsnorm_a4", (x, x[0, :7], EPS, CLIP), r"weight has shape \[7\], expected \[48\]"
    yield "rmsnorm_a4", (x, x[0].int(), EPS, CLIP), "weight has dtype int32, expected float32"
    yield "rmsnorm_a4", (x, None, -1.0, CLIP), "eps=-1"
    yield "rmsnorm_a4", (x, None, float("nan"), CLIP), "eps=nan"
    yield "rmsnorm_a4", (x.T, None, EPS, CLIP), "x of shape.*not contiguous"


BAD_CALLS = list(bad_calls()) if ops.build_info().startswith("w2a4._C: CPU") else []


@pytest.mark.parametrize("name,args,message", BAD_CALLS)
def test_bad_argument(name, args, message):
    with pytest.raises(RuntimeError, match=message) as error:
        getattr(torch.ops.w2a4, name)(*args)
    assert f"w2a4.{name}:" in str(error.value)


def test_devices_must_agree():
    x = torch.randn(2, 24, device="meta")
    for name, args in calls(x):
        with pytest.raises(RuntimeError, match="on meta, clip on cpu|had_k on cpu"):
            getattr(ops, name)(*args)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("shape", [(3, 48), (2, 3, 48)])
def test_opcheck(index, shape):
    name, args = list(calls(torch.randn(shape)))[index]
    torch.library.opcheck(getattr(torch.ops.w2a4, name).default, args)
