"""The Triton kernels and the dispatch on a CUDA device, against the reference on the CPU.

All need a GPU; `python -m benchmarks.gpu_run run` runs them. What is compiled takes seconds a variant: those
that try every one are marked slow.
"""

import pytest
import torch

from support import gemm_oracle
from support.distillation import assert_as_defined, with_gradient
from support.gemv import assert_rounding, cuda, expected, linear, matrix
from support.gradients import with_gradients
from support.numerics import UNIT, assert_close
from support.op_arguments import FLOATS, linear_inputs
from support.watch import LONG, SLOW
from w2a4 import ops
from w2a4.errors import BackendError
from w2a4.format import fake_quant as quantizers
from w2a4.ops import dispatch
from w2a4.train import losses

pytestmark = pytest.mark.gpu

MANY = dispatch.GEMV_TOKENS + 1


@pytest.fixture(autouse=True)
def _needs_triton():
    if why := dispatch.why_no_triton(torch.cuda.current_device()):
        pytest.fail(f"no Triton kernels: {why}")


def both(bits, args, dtype=torch.float32):
    """The Triton GEMM on the device, and what it should be."""
    on_device = [arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in args]
    got = getattr(torch.ops.w2a4, f"gemm_w{bits}a4")(*on_device, dtype)
    return got.cpu(), gemm_oracle.gemm(bits, args, dtype)


# Compilers are known to get some tiles wrong on some GPUs, so each is tried, also where tiles are cut off.


@pytest.mark.parametrize("bits", [2, 4])
def test_a_tile(bits):
    assert_tile(4, 128, -1, bits)


@SLOW
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group,act_group", [(128, -1), (32, 384), (-1, -1), (64, 32), (96, -1)])
@pytest.mark.parametrize("tile", range(6))
def test_every_tile(tile, group, act_group, bits):
    assert_tile(tile, group, act_group, bits)


def assert_tile(tile, group, act_group, bits):
    from w2a4.triton_kernels import tiles

    assert len(tiles.TILES) == 6
    with tiles.only(tiles.TILES[tile]):
        for tokens, out in ((1, 64), (130, 257), (300, 128)):
            bias = torch.float32 if tokens == 130 else None
            assert_close(*both(bits, linear_inputs(bits, tokens, out, 1152, group, act_group, bias)))


needs_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="tiles of sm_90"
)


@needs_hopper
@pytest.mark.parametrize("bits", [2, 4])
def test_the_tile_of_long_prompts(bits):
    assert_int8_tile(-1, 128, -1, bits)
    assert_int8_tile(-1, 128, 128, bits)


@SLOW
@needs_hopper
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group,act_group", [(128, -1), (-1, -1), (128, 128), (128, 384), (-1, 128)])
@pytest.mark.parametrize("tile", range(4))
def test_every_tile_of_long_prompts(tile, group, act_group, bits):
    assert_int8_tile(tile, group, act_group, bits)


def assert_int8_tile(tile, group, act_group, bits):
    """Twice each, since copies that run ahead may be right by chance."""
    from w2a4.triton_kernels import tiles

    assert len(tiles.INT8_TILES) == 4
    with tiles.only(tiles.INT8_TILES[tile]):
        for tokens, out, bias in ((512, 256, None), (515, 264, torch.float32), (2048, 136, torch.float16)):
            args = linear_inputs(bits, tokens, out, 1152, group, act_group, bias)
            for _ in range(2):
                assert_close(*both(bits, args))


@pytest.mark.parametrize("bits", [pytest.param(2, marks=SLOW), 4])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=SLOW), torch.float16, torch.bfloat16])
def test_output_dtypes(bits, dtype):
    assert_close(*both(bits, linear_inputs(bits, 70, 130, 256, 64, bias=dtype), dtype))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("out,features", [(4096, 4096), pytest.param(1024, 14336, marks=SLOW)])
def test_large_gemms(bits, out, features):
    assert_close(*both(bits, linear_inputs(bits, 65, out, features, 128), torch.bfloat16))


# dispatch


def count(monkeypatch):
    """Names of the GEMMs that run from now on."""
    from w2a4.triton_kernels import gemm

    calls, run = [], gemm._gemm
    monkeypatch.setattr(gemm, "_gemm", lambda *args: calls.append(args[0]) or run(*args))
    return calls


def of_triton(case):
    levels = () if case["levels"] is None else (case["levels"],)
    args = case["a_codes"], case["a_scale"], case["weight"], *levels, case["scale"], case["bias"]
    return gemm_oracle.gemm(2 if levels else 4, (*args, case["group_size"]))


@pytest.mark.parametrize("bits", [2, 4])
def test_few_tokens_run_on_the_gemv_and_many_on_the_gemm(bits, monkeypatch):
    if not ops.has_cuda_kernels(torch.device("cuda")):
        pytest.fail(f"w2a4._cuda is not loaded: {ops.build_info()}")
    calls = count(monkeypatch)
    for tokens in (1, MANY - 1, MANY, 100):
        case = matrix(bits, 50, 1024, 128, tokens)
        assert_rounding(linear(cuda(case)).cpu(), expected(case), case)
        assert calls == [f"gemm_w{bits}a4"] * (tokens >= MANY)
        calls.clear()


@pytest.mark.parametrize("bits", [2, 4])
def test_forced_back_ends_agree(bits, monkeypatch):
    case = matrix(bits, 50, 1024, 128, 20)
    for name in ("cuda", "triton"):
        monkeypatch.setattr(dispatch, "backend", name)
        y = linear(cuda(case)).cpu()
        assert_rounding(y, expected(case), case)
    assert torch.equal(y, of_triton(case))
    with pytest.raises(BackendError, match="groups of 48 inputs"):
        linear(cuda(matrix(bits, 9, 96, 48, 3)))


def test_without_the_extension_triton_serves_every_number_of_tokens(monkeypatch):
    monkeypatch.setattr(ops, "_cuda", None)
    calls = count(monkeypatch)
    for tokens in (1, 50):
        case = matrix(2, 50, 1024, 128, tokens)
        assert torch.equal(linear(cuda(case)).cpu(), of_triton(case))
    assert len(calls) == 2


@LONG
@pytest.mark.parametrize("bits", [2, pytest.param(4, marks=SLOW)])
def test_compiled_with_inductor(bits):
    args = (*[a.cuda() if isinstance(a, torch.Tensor) else a for a in linear_inputs(bits, 40, 64, 256, 64)],)
    op = getattr(ops, f"linear_w{bits}a4")
    compiled = torch.compile(lambda *args: op(*args, torch.float32) * 2, fullgraph=True, dynamic=True)
    for tokens in (40, 50, 3):
        few = args[0][:tokens].repeat(2, 1)[:tokens], args[1][:tokens].repeat(2, 1)[:tokens], *args[2:]
        assert_close(compiled(*few), op(*few, torch.float32) * 2)


@pytest.mark.parametrize("tokens", [1, 40])
def test_in_a_cuda_graph(tokens):
    case = cuda(matrix(2, 64, 1024, 128, tokens))
    want = linear(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(case)
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)


# fake quantisation


QUANTIZERS = {
    "a4": (quantizers.fake_quant_a4, (3, 50, 288), [torch.tensor([0.8])]),
    "a4 long": (quantizers.fake_quant_a4, (70, 14336), [torch.tensor([0.9])]),
    "kv4": (quantizers.fake_quant_kv4, (3, 50, 128), [torch.tensor([0.9])]),
    "ldp": (
        lambda w, *t: quantizers.ldp_fake_quant(w, t, 96),
        (33, 288),
        [torch.randn(33, 3) for _ in range(4)],
    ),
}


@pytest.mark.parametrize("dtype", [*(pytest.param(d, marks=SLOW) for d in FLOATS[:2]), torch.bfloat16])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_are_those_of_pytorch(name, dtype, monkeypatch):
    function, shape, others = QUANTIZERS[name]
    x, grad = (torch.randn(shape).to("cuda", dtype) for _ in range(2))
    inputs = [x, *(other.cuda() for other in others)]
    assert ops.has_training_kernels(x)
    got = with_gradients(function, inputs, grad)
    monkeypatch.setattr(dispatch, "backend", "reference")
    want = with_gradients(function, inputs, grad)
    assert_close(got[0], want[0])
    total = float(grad.abs().double().sum())
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        size = 4 * total * float(x.abs().max())
        assert_close(ours, theirs, atol=4 * UNIT * size, rtol=torch.finfo(theirs.dtype).eps)


# the distillation loss


@pytest.mark.parametrize("kind", ["cakld", "kl"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=SLOW), torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [131, 49152])
def test_distillation_loss_is_as_defined(vocabulary, dtype, kind):
    student, teacher = (3 * torch.randn(2, 256, vocabulary, device="cuda")).to(dtype)
    teacher[:9, 7], student[:5, 7] = 50, 50
    assert dispatch.has_triton_training(student.device, dtype)
    assert_as_defined(student, teacher, None, kind)
    assert_as_defined(student, teacher, torch.rand(256, device="cuda") < 0.7, kind)


def test_distillation_loss_makes_its_gradient_and_nothing_else_of_that_size():
    student, teacher = (3 * torch.randn(2, 256, 49152, device="cuda")).bfloat16()
    student.requires_grad_()
    for _ in range(2):  # compiled the first time
        student.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses.distillation_loss(student, teacher).backward()
        more = torch.cuda.max_memory_allocated() - before
    assert more < 1.1 * student.nbytes


def test_distillation_loss_in_a_cuda_graph():
    student, teacher = (3 * torch.randn(2, 64, 5000, device="cuda")).bfloat16()
    mask = torch.rand(64, device="cuda") < 0.7
    want = with_gradient(student, teacher, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = with_gradient(student, teacher, mask)
    for tensor in got:
        tensor.zero_()
    graph.replay()
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def test_distillation_loss_of_more_elements_than_32_bits_count():
    rows, vocabulary = 2**31 // 49152 + 2, 49152
    few = (3 * torch.randn(2, 2, vocabulary, device="cuda")).bfloat16()
    student, teacher = few.new_zeros(rows, vocabulary), few.new_zeros(rows, vocabulary)
    student[-2:], teacher[-2:] = few
    mask = torch.arange(rows, device="cuda") >= rows - 2
    loss, grad = with_gradient(student, teacher, mask)
    want, expected = with_gradient(*few)
    assert_close(loss, want)
    assert_close(grad[-2:], expected)
    assert not grad[:-2].any()
