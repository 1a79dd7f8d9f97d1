"""The CUDA kernels on a CUDA device: against the reference on the CPU, and against csrc/simt bit for bit.

All need a GPU; `python -m benchmarks.gpu_run run` runs them. Those that compile a lot, here the emulator that
gives the bits, are marked slow, and one of each kind is not.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.checks import reference_hadamard
from support.gemv import SHAPES, assert_rounding, cuda, expected, linear, matrix, simulate
from support.numerics import UNIT, assert_close
from support.op_arguments import FLOATS
from support.watch import SLOW
from w2a4 import ops
from w2a4.format.hadamard import had_k_matrix, hadamard_spec
from w2a4.ops import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_kernels")]

SIZES = [1, 2, 16, 64, 128, 576, 1536, 4096, 5632, 8192, 8960, 11008, 13824, 14336, 27648, 28672]


def had_k_of(size):
    """`had_k` on the device and `block_size` of the transform of a width, and what describes it."""
    spec = hadamard_spec(size)
    return had_k_matrix(spec.k, "cuda"), spec.block_size, spec


# linear_w2a4, linear_w4a4


@pytest.mark.parametrize("bits,out,features,group", SHAPES)
def test_linear_kernel(bits, out, features, group):
    for tokens in (1, 2, 3, 8, 16, 33):
        case = matrix(bits, out, features, group, tokens)
        assert_rounding(linear(cuda(case)).cpu(), expected(case), case)


@SLOW
@pytest.mark.parametrize("gemv", ["bmma", "imma"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("group", [128, 256, 4096])
def test_gemv_kernel_is_the_simulated_one(gemv, tokens, group, monkeypatch):
    pytest.importorskip("pybind11")
    monkeypatch.setenv("W2A4_GEMV", gemv)
    case = matrix(2, 50, 4096, group, tokens)
    assert torch.equal(linear(cuda(case)).cpu(), simulate(case, gemv)[0])


@SLOW
@pytest.mark.parametrize("bits,group", [(2, 64), (2, 32), (4, 128), (4, 64), (4, 32), (4, 1920)])
def test_other_kernels_are_the_simulated_ones(bits, group):
    pytest.importorskip("pybind11")
    case = matrix(bits, 50, 1920, group, 5)
    assert torch.equal(linear(cuda(case)).cpu(), simulate(case)[0])


@pytest.mark.parametrize("out,features", [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 28672)])
def test_large_linear_kernel(out, features):
    """Integer sums, with scales of 1 and small levels, in full."""
    case = cuda(matrix(2, 1, features, 128, 8) | {"bias": None})  # of which the weight is drawn on the device
    case["weight"] = torch.randint(0, 256, (out, features // 4), dtype=torch.uint8, device="cuda")
    case["levels"] = torch.randint(0, 16, (out, features // 128, 4), dtype=torch.int8, device="cuda")
    case["scale"] = torch.ones(out, features // 128, dtype=torch.float16, device="cuda")
    case["a_scale"].fill_(1)
    codes = case["weight"][..., None].int() >> torch.tensor([0, 2, 4, 6], device="cuda") & 3
    ints = case["levels"].gather(2, codes.view(out, -1, 128).long()).view(out, features).double()
    a = reference.dequantize_a4(case["a_codes"], case["a_scale"], features).double()
    for tokens in (1, 2, 8):
        few = case | {name: case[name][:tokens] for name in ("a_codes", "a_scale")}
        assert torch.equal(linear(few).double(), a[:tokens] @ ints.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_dtypes_of_the_kernel(dtype):
    case = cuda(matrix(2, 257, 1024, 128, 3))
    assert torch.equal(linear(case, dtype), linear(case).to(dtype))


def test_a_token_does_not_depend_on_the_others():
    case = cuda(matrix(2, 300, 4096, 128, 16))
    together = linear(case)
    for token in range(16):
        one = {**case, "a_codes": case["a_codes"][token:][:1], "a_scale": case["a_scale"][token:][:1]}
        assert torch.equal(linear(one)[0], together[token])


def test_repeated_runs_are_the_same_bits():
    case = cuda(matrix(2, 4096, 4096, 128, 2))
    first = linear(case)
    assert all(torch.equal(linear(case), first) for _ in range(20))


# hadamard and quantise


def sums_off_by(spec, largest):
    """What the float32 sums of a transform may be off by, for results up to `largest`.

    Rows of had_k, or up to 64 of a power of two, go through tensor cores, 16 a step and each number as three
    of 8 bits. They cut sums off where others round, always towards 0: a step loses up to two units
    of 2**-24 of the sum so far, on average half of what it comes to. Each doubling rounds once.
    """
    steps, doublings = 3 * -(-max(64, spec.k) // 16), (spec.block_size // spec.k).bit_length()
    return (steps + doublings + 2) * UNIT * largest


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_hadamard_kernel(size, dtype):
    signs, block, spec = had_k_of(size)
    x = torch.randn(5, size).to(dtype)
    unit = torch.finfo(dtype).eps
    for transpose in (False, True):
        exact = reference_hadamard(x, spec, transpose)
        y = ops.hadamard(x.cuda(), signs, block, transpose).cpu()
        largest = float(exact.abs().max())
        assert_close(y.double(), exact, atol=sums_off_by(spec, largest) + unit * largest)
    back = ops.hadamard(ops.hadamard(x.cuda(), signs, block), signs, block, True).cpu()
    # What sums are cut off by comes back with the sign of x, what is rounded as noise.
    largest = float(x.abs().max())
    assert_close(back.double(), x.double(), atol=2 * sums_off_by(spec, largest) + 8 * unit * largest)


@pytest.mark.parametrize("size", [64, 576, 11008])
def test_hadamard_of_float64(size):
    """Folding rotations into weights asks for it, and kernels hold 32 bits."""
    signs, block, spec = had_k_of(size)
    x = torch.randn(3, size, dtype=torch.float64)
    for transpose in (False, True):
        y = ops.hadamard(x.cuda(), signs, block, transpose).cpu()
        assert_close(y, reference_hadamard(x, spec, transpose), atol=1e-13)


@pytest.mark.parametrize("features,group", [(1, -1), (7, -1), (576, 64), (4096, -1), (11008, 128), (30, 15)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_kernel(features, group, dtype):
    x = torch.randn(9, features).to(dtype)
    x[3] = 0
    clip = torch.tensor([0.9])
    codes, scale = ops.quantize_a4(x.cuda(), clip.cuda(), group)
    want_codes, want_scale = reference.quantize_a4(x, clip, group)
    assert torch.equal(codes.cpu(), want_codes) and torch.equal(scale.cpu(), want_scale)


def assert_close_codes(got, want):
    """Scales within rounding, and codes of the few values near a tie one apart."""
    (codes, scale), (want_codes, want_scale) = got, want
    assert_close(scale.cpu(), want_scale, rtol=1e-5)
    nibbles = [(t.cpu().int()[..., None] >> torch.tensor([0, 4])) % 16 for t in (codes, want_codes)]
    values = [(n + 8) % 16 - 8 for n in nibbles]
    differ = (values[0] - values[1]).abs()
    assert differ.max() <= 1 and differ.float().mean() < 1e-3


@pytest.mark.parametrize("size", [576, 1536, 4096, 5632, 11008, 14336, 28672])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_kernels(size, dtype):
    signs, block, spec = had_k_of(size)
    x, up, clip = torch.randn(6, size).to(dtype), torch.randn(6, size).to(dtype), torch.tensor([0.9])
    weight = torch.rand(size).to(dtype)
    gated = F.silu(x.double()) * up.double()
    assert_close_codes(
        ops.hadamard_a4(x.cuda(), signs, block, clip.cuda()),
        reference.quantize_a4(reference_hadamard(x, spec), clip),
    )
    assert_close_codes(
        ops.rmsnorm_a4(x.cuda(), weight.cuda(), 1e-5, clip.cuda()),
        reference.rmsnorm_a4(x, weight, 1e-5, clip),
    )
    assert_close_codes(
        ops.silu_mul_hadamard_a4(x.cuda(), up.cuda(), signs, block, clip.cuda()),
        reference.quantize_a4(reference_hadamard(gated, spec), clip),
    )


# streams, graphs, the dispatcher


def chain(x, clip, case):
    """Three ops in a row, as a layer runs them."""
    y = ops.hadamard(x, None, 4096)
    codes, scale = ops.quantize_a4(y, clip)
    return linear({**case, "a_codes": codes, "a_scale": scale})


def test_on_another_stream():
    case, clip = cuda(matrix(2, 64, 4096, 128, 1)), torch.tensor([0.9], device="cuda")
    x = torch.randn(1, 4096, device="cuda")
    want = chain(x, clip, case)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Kernels on the default stream would not wait for this one, and read zeros.
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = chain(late, clip, case)
    stream.synchronize()
    assert torch.equal(got, want)


def test_in_a_cuda_graph():
    case, clip = cuda(matrix(2, 64, 4096, 128, 1)), torch.tensor([0.9], device="cuda")
    x = torch.randn(1, 4096, device="cuda")
    chain(x, clip, case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x, clip, case)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, chain(x, clip, case))


@pytest.mark.parametrize(
    "name", ["linear_w2a4", *(pytest.param(n, marks=SLOW) for n in ("quantize_a4", "hadamard", "rmsnorm_a4"))]
)
def test_opcheck(name):
    case, clip = cuda(matrix(2, 16, 256, 128, 2)), torch.tensor([0.9], device="cuda")
    x = torch.randn(2, 256, device="cuda")
    linear_args = [case[k] for k in ("a_codes", "a_scale", "weight", "levels", "scale", "bias")]
    args = {
        "linear_w2a4": (*linear_args, 128, torch.float16),
        "quantize_a4": (x, clip, 64),
        # Only here x needs a gradient: torch's check of them adds up outputs in place, and the sum of codes,
        # where these come first, is an integer that cannot take the scales.
        "hadamard": (x.clone().requires_grad_(), None, 256),
        "rmsnorm_a4": (x, None, 1e-5, clip),
    }[name]
    torch.library.opcheck(getattr(torch.ops.w2a4, name).default, args)


def test_bad_arguments():
    case = cuda(matrix(2, 16, 256, 128, 2))
    with pytest.raises(RuntimeError, match="weight is on the CPU, a_codes on cuda:0"):
        linear({**case, "weight": case["weight"].cpu()})
    with pytest.raises(RuntimeError, match="group_size=16"):
        linear(cuda(matrix(2, 16, 256, 16, 1)))
    with pytest.raises(RuntimeError, match="weight starts at an address"):
        room = torch.zeros(16 * 64 + 8, dtype=torch.uint8, device="cuda")
        linear({**case, "weight": room[8:].view(16, 64)})


def test_no_tokens():
    assert linear(cuda(matrix(2, 16, 256, 128, 0))).shape == (0, 16)


@pytest.mark.parametrize(
    "tokens,out,features", [(1, 32000, 4096), (3, 49152, 576), (70000, 17, 64), (1, 5, 7)]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_w8_kernel(tokens, out, features, dtype):
    x = torch.randn(tokens, features, device="cuda").to(dtype)
    weight = torch.randint(-128, 128, (out, features), dtype=torch.int8, device="cuda")
    scale, bias = (torch.rand(out, device="cuda") * 0.01).half(), torch.randn(out, device="cuda")
    got = ops.linear_w8(x, weight, scale, bias)
    # In float64 on the device, which takes minutes on a CPU.
    exact_weight = weight.double() * scale.double()[:, None]
    want, size = x.double() @ exact_weight.T + bias.double(), x.double().abs() @ exact_weight.abs().T
    step = {torch.float32: 0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    error = (features + 8) * 2.0**-24 * (size + bias.double().abs()) + step * want.abs() + 1e-6
    assert ((got.double() - want).abs() <= error * (1 + step)).all()
