"""Run by test_triton_interpreter.py with TRITON_INTERPRET=1: fake_quant and ldp against PyTorch.

Values bit for bit, gradients up to the rounding of sums. Interpreted, the kernels stand in for those of the
CPU, and `quantizers` calls them.
"""

import pytest
import torch
from w2a4.triton_kernels import fake_quant, ldp  # noqa: F401  (registers their ops)

from support.gradients import with_gradients
from support.numerics import UNIT, assert_close
from support.op_arguments import FLOATS
from w2a4 import ops
from w2a4.format import fake_quant as quantizers
from w2a4.ops import dispatch

pytestmark = pytest.mark.usefixtures("on_triton")


def in_pytorch(function, inputs, grad):
    """The same without kernels, and the result before it is rounded to the dtype of the first input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "backend", "reference")
        exact = function(inputs[0].float(), *inputs[1:])
        return exact, with_gradients(function, inputs, grad)[1:]


def assert_same_gradients(got, want, sizes):
    """Each within the rounding of its dtype and, a sum, of terms whose magnitudes add up to its size."""
    for actual, expected, size in zip(got, want, sizes, strict=True):
        # A term is rounded some four times.
        assert_close(actual, expected, atol=4 * UNIT * size, rtol=torch.finfo(actual.dtype).eps)


def sizes(grad, x):
    """For the gradients to x, whose extremes move the scale of their row, and to a clip or a level."""
    return 2 * float(grad.abs().double().sum(-1).max()), float(grad.abs().double().sum() * x.abs().max())


ROWS = [(1, -1), (7, -1), (90, -1), (96, 32), (288, 96), (128, 64), (4200, -1)]  # a program holds 4096


def activations(features, dtype):
    x = torch.randn(3, 5, features).to(dtype)
    x[0, 3] = 0
    x[1, 2, 0] = 100
    x[2, 4, 0], x[2, 4, -1] = -50, 50
    return x


def in_dtype(result, dtype):
    """float32 values as the interpreter stores them: it cuts off what bfloat16 does not hold, GPUs round."""
    if dtype != torch.bfloat16:
        return result.to(dtype)
    return (result.contiguous().view(torch.int32) & -65536).view(torch.float32).bfloat16()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("features,group", ROWS)
@pytest.mark.parametrize("clip", [0.6, 1.0, -0.6, -1.0])
def test_fake_quant_a4(features, group, dtype, clip):
    x, grad = activations(features, dtype), torch.randn(3, 5, features).to(dtype)
    call = (lambda *t: quantizers.fake_quant_a4(*t, group)), (x, torch.tensor([clip])), grad
    got, *gradients = with_gradients(*call)
    exact, wanted = in_pytorch(*call)
    assert_close(got, in_dtype(exact, dtype))
    assert_same_gradients(gradients, wanted, sizes(grad, x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [1, 16, 80, 128, 4200])
@pytest.mark.parametrize("clip", [0.6, 1.0])
def test_fake_quant_kv4(head_dim, dtype, clip):
    x, grad = activations(head_dim, dtype), torch.randn(3, 5, head_dim).to(dtype)
    call = quantizers.fake_quant_kv4, (x, torch.tensor([clip])), grad
    got, *gradients = with_gradients(*call)
    exact, wanted = in_pytorch(*call)
    assert_close(got, in_dtype(exact, dtype))
    assert_close(quantizers.fake_quant_kv4(x, clip), got)
    assert_same_gradients(gradients, wanted, sizes(grad, x))


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fake_quant_shows_what_is_not_finite(bad, kv):
    x = torch.randn(3, 64)
    x[1, 40] = bad
    y = ops.fake_quant_rows(x, torch.tensor([0.9]), kv)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_fake_quant_of_none(shape):
    clip = torch.ones(1, requires_grad=True)
    quantizers.fake_quant_a4(torch.randn(shape), clip).sum().backward()
    assert clip.grad.item() == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "out,features,group",
    [(1, 4, 4), (3, 90, 15), (5, 288, 96), (33, 256, 128), (2, 576, 576), (3, 4200, 4200)],
)
def test_ldp(out, features, group, dtype):
    w = (torch.randn(out, features) * 0.1).to(dtype)
    w[0, :group] = w[0, :group].abs()  # one sign: the levels come out of order
    parameters = [torch.randn(out, features // group) for _ in range(4)]
    grad = torch.randn(out, features).to(dtype)
    call = (lambda w, *t: quantizers.ldp_fake_quant(w, t, group)), (w, *parameters), grad
    got, *gradients = with_gradients(*call)
    exact, wanted = in_pytorch(*call)
    assert_close(got, in_dtype(exact, dtype))
    assert_close(gradients[0], wanted[0])
    assert_same_gradients(gradients[1:], wanted[1:], [sizes(grad, w)[1]] * 4)


@pytest.mark.parametrize("size", [1e-7, 3e-6, 0.1, 1e4])
def test_ldp_is_what_is_packed(size):
    """To the bit, also where float16 holds the scale in a few bits or not at all."""
    w, parameters = torch.randn(6, 128) * size, [torch.randn(6, 4) for _ in range(4)]
    got = quantizers.ldp_fake_quant(w, parameters, 32)
    levels, scale = quantizers.ldp_to_codebook(w, parameters, 32)
    codes = quantizers.nearest_codes(w.unflatten(1, (-1, 32)), levels, scale).long()
    assert_close((levels.float() * scale.float()[..., None]).gather(-1, codes).flatten(1), got)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "backend", "reference")
        wanted = quantizers.ldp_to_codebook(w, parameters, 32)
    assert torch.equal(levels, wanted[0]) and torch.equal(scale, wanted[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_ldp_shows_what_is_not_finite(bad):
    w, parameters = torch.randn(3, 64), [torch.randn(3, 2) for _ in range(4)]
    w[1, 40] = bad
    y = quantizers.ldp_fake_quant(w, parameters, 32).unflatten(1, (2, 32))
    assert y[1, 1].isnan().all() and y[[0, 2]].isfinite().all() and y[1, 0].isfinite().all()


def test_quantizers_with_kernels_compile_into_one_graph():
    x, clip = torch.randn(3, 64, requires_grad=True), torch.tensor([0.9], requires_grad=True)

    def network(x, clip):
        return quantizers.fake_quant_kv4(quantizers.fake_quant_a4(x, clip, 32), clip).sum()

    got = torch.autograd.grad(torch.compile(network, backend="aot_eager", fullgraph=True)(x, clip), (x, clip))
    for ours, eager in zip(got, torch.autograd.grad(network(x, clip), (x, clip)), strict=True):
        assert_close(ours, eager)


def row_op_calls():
    x, clip, w = torch.randn(2, 3, 32), torch.tensor([0.9]), torch.randn(3, 2, 32)
    soft = torch.randn(3, 2, 4).sort(-1).values
    yield "fake_quant_rows", (x.half(), clip, False)
    yield "fake_quant_rows", (x, clip, True)
    yield "fake_quant_rows_backward", (x.bfloat16(), x.bfloat16(), clip, False)
    shares = [torch.randn(3, 2) for _ in range(4)]
    yield "ldp_forward", (w, *shares)
    stored = torch.zeros(3, 2, 4, dtype=torch.int8), torch.ones(3, 2, dtype=torch.float16)
    yield "ldp_backward", (w.half(), w.half(), *shares, soft, *stored)


@pytest.mark.parametrize("name,args", list(row_op_calls()))
def test_row_opcheck(name, args):
    torch.library.opcheck(
        getattr(torch.ops.w2a4, name).default, args, test_utils=("test_schema", "test_faketensor")
    )


def bad_rows():
    x, clip, w = torch.randn(3, 64), torch.tensor([0.9]), torch.randn(3, 2, 32)
    soft = torch.randn(3, 2, 4)
    yield "fake_quant_rows", (x.double(), clip, False), "x has dtype torch.float64"
    yield "fake_quant_rows", (x.T, clip, False), "x of shape .* is not contiguous"
    yield "fake_quant_rows", (x, clip.double(), True), "clip has dtype torch.float64"
    yield "fake_quant_rows", (x, torch.rand(2), True), r"clip has shape \[2\], expected \[1\]"
    yield "fake_quant_rows_backward", (x[:2], x, clip, True), r"grad has shape \[2, 64\], expected \[3, 64\]"
    shares = [torch.randn(3, 2) for _ in range(4)]
    yield "ldp_forward", (w[0], *shares), r"w has shape \[2, 32\], expected \[out, groups, group_size\]"
    yield "ldp_forward", (w, *shares[:3], shares[3][:2]), r"s2 has shape \[2, 2\], expected \[3, 2\]"
    stored = torch.zeros(3, 2, 4, dtype=torch.int8), torch.ones(3, 2, dtype=torch.float16)
    yield "ldp_backward", (w, w, *shares, soft.half(), *stored), "soft has dtype torch.float16"


@pytest.mark.parametrize("name,args,message", list(bad_rows()))
def test_row_op_bad_argument(name, args, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.w2a4, name)(*args)
