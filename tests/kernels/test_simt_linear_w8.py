"""The CUDA kernel of `linear_w8`, run on a CPU lane by lane."""

import pytest
import torch

from support import simt
from support.numerics import UNIT, assert_close
from support.simt_arrays import BF16, F32, HALF, LARGE, NAMES, SMALL, aligned, guarded, numpy_of

pytest.importorskip("pybind11")


def linear_w8(x, weight, scale, bias=None, processors=1, shared=SMALL, seed=0):
    """What the kernel makes of x [tokens, in], and how many tokens a block took."""
    y, intact = guarded((len(x), len(weight)), x.dtype)
    tokens = simt.load().linear_w8(
        numpy_of(x), weight.numpy(), numpy_of(scale), None if bias is None else bias.numpy(), numpy_of(y),
        NAMES[x.dtype], processors, shared, seed,
    )  # fmt: skip
    assert intact()
    return y, tokens


def matrix(out, features):
    weight = torch.randint(-128, 128, (out, features), dtype=torch.int8)
    weight[:, -1] = -128
    return aligned(weight), (torch.rand(out) * 0.01).half()


def check(x, weight, scale, bias=None, **kwargs):
    y, tokens = linear_w8(x, weight, scale, bias, **kwargs)
    wide, w = x.double(), weight.double() * scale.double()[:, None]
    exact, size = wide @ w.T, wide.abs() @ w.abs().T
    # A lane's sum, six of a butterfly, the scale; the bias; y itself.
    error = (x.shape[1] / 32 + 16 + 7) * UNIT * size
    if bias is not None:
        exact = exact + bias.double()
        error = error + UNIT * exact.abs()
    last, step = {F32: (0, 0), HALF: (2.0**-11, 2.0**-25), BF16: (2.0**-8, 0)}[x.dtype]
    assert ((y.double() - exact).abs() <= error + last * (exact.abs() + error) + step).all()
    return y, tokens


@pytest.mark.parametrize(
    "tokens,out,features",
    [
        (1, 1, 16),
        (1, 17, 576),
        (1, 33, 1),
        (2, 5, 7),
        (1, 40, 1024),
        (3, 16, 1040),
        (4, 31, 512),
        (5, 3, 2000),
    ],
)
@pytest.mark.parametrize("dtype", [F32, HALF, BF16])
def test_linear_w8(tokens, out, features, dtype):
    x, (weight, scale) = torch.randn(tokens, features).to(dtype), matrix(out, features)
    bias = torch.randn(out) if out % 2 else None
    _, at_once = check(x, weight, scale, bias, processors=1 + tokens % 2)
    assert at_once == (1 if tokens == 1 or features % 16 else 4)


def test_one_token_a_block_where_no_more_fit():
    x, (weight, scale) = torch.randn(3, 9008), matrix(3, 9008)
    wide, at_once = check(x, weight, scale, shared=LARGE)
    assert at_once == 4
    narrow, at_once = check(x, weight, scale, shared=SMALL)
    assert at_once == 1
    assert_close(wide, narrow)
    with pytest.raises(RuntimeError, match="x of 9008 features needs 36864 bytes.*device has 9999"):
        linear_w8(x, weight, scale, shared=9999)


def test_a_token_does_not_depend_on_the_others_nor_on_how_rows_are_shared():
    x, (weight, scale) = torch.randn(6, 600), matrix(50, 600)
    want, _ = linear_w8(x, weight, scale)
    for seed, processors in ((1, 1), (2, 2), (3, 132)):
        assert_close(linear_w8(x, weight, scale, processors=processors, seed=seed)[0], want)
    assert_close(linear_w8(x[2:3], weight, scale)[0], want[2:3])
    x[3] = float("nan")
    assert_close(linear_w8(x, weight, scale)[0][:3], want[:3])


def test_unaligned_rows_give_the_same_bits():
    x, (weight, scale) = torch.randn(2, 512), matrix(9, 512)
    assert_close(linear_w8(x, aligned(weight, 1), scale)[0], linear_w8(x, weight, scale)[0])


def test_float64_is_refused():
    weight, scale = matrix(2, 16)
    with pytest.raises(RuntimeError, match="not float64; convert"):
        linear_w8(torch.randn(1, 16, dtype=torch.float64), weight, scale)
