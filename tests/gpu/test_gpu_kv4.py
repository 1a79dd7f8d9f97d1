"""The ops of the 4-bit KV cache on a CUDA device: against the reference.

As test_gpu.py, of which they are a part: all need a GPU.
"""

import pytest
import torch

from support.kv4 import (
    CHUNK,
    GROUP,
    ROPE,
    ROUNDING,
    assert_quantized_keys,
    exact_attention,
    packed,
    special_heads,
    turned,
)
from support.numerics import assert_close
from support.op_arguments import FLOATS, HAD12
from support.watch import SLOW
from w2a4 import ops
from w2a4.ops import dispatch, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_kernels")]


def on_gpu(*tensors):
    return [None if t is None else t.cuda() for t in tensors]


@pytest.mark.parametrize("head_dim", [2, 30, 64, 80, 96, 128, 256, 258, 1024])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clip", [0.95, 1.0, 0.01])
def test_quantize_kv4(head_dim, dtype, clip):
    x = special_heads(head_dim).to(dtype)
    for got, want in zip(ops.quantize_kv4(x.cuda(), clip), reference.quantize_kv4(x, clip), strict=True):
        assert_close(got.cpu(), want)


def test_quantize_kv4_rounds_as_the_reference_everywhere():
    x = torch.rand(1, 8, 50000, 128, device="cuda") * 10.0 ** torch.randint(-4, 5, (50000, 1), device="cuda")
    for i in range(15):
        low, high = x[..., 0], x[..., 1]
        x[..., 2 * i + 2] = low + (high - low) * (i + 0.5) / 15
    # The reference divides, adds and rounds on the device as on a CPU: operations that IEEE 754 defines.
    for got, want in zip(ops.quantize_kv4(x, 1.0), reference.quantize_kv4(x, 1.0), strict=True):
        assert torch.equal(got, want)


def test_append_kv4_kernel_at_places_of_each_sequence():
    x, starts = torch.randn(3, 4, 2, 16).transpose(1, 2)[:, :, 1:], torch.tensor([4, 0, 7])
    codes = torch.full((3, 9, 2, 8), 9, dtype=torch.uint8).transpose(1, 2)
    params = torch.full((3, 2, 9, 2), 7.0, dtype=torch.float16)
    want = codes.clone(), params.clone()
    reference.append_kv4(x, *want, 6, 0.9, starts.clamp(max=6))
    got = on_gpu(codes, params)
    ops.append_kv4(x.cuda(), *got, 6, 0.9, starts.clamp(max=6).cuda())
    assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])
    before = [t.clone() for t in got]
    ops.append_kv4(x.cuda(), *got, 6, 0.9, torch.tensor([-9, 100, 2**62]).cuda())  # nothing is written
    assert all(torch.equal(a, b) for a, b in zip(got, before, strict=True))


@pytest.mark.parametrize("batch,tokens,q_heads,kv_heads,head_dim,had_k,block", ROPE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rope_append_kv4_kernel(batch, tokens, q_heads, kv_heads, head_dim, had_k, block, dtype):
    qkv = torch.randn(batch, tokens, (q_heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.randn(1 if tokens == 3 else batch, tokens, head_dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    kv = []
    for _ in "kv":
        kv.append(torch.zeros(batch, kv_heads, tokens + 5, head_dim // 2, dtype=torch.uint8, device="cuda"))
        kv.append(torch.zeros(batch, kv_heads, tokens + 5, 2, dtype=torch.float16, device="cuda"))
    signs = None if had_k is None else had_k.cuda()
    q = ops.rope_append_kv4(*on_gpu(qkv, cos, sin), signs, block, *kv, 3, 0.95).cpu()
    exact, heads = turned(qkv, cos, sin, had_k, block)
    # As test_simt_kv4 derives it.
    k = 1 if had_k is None else len(had_k)
    roundings = 3 + (block // k).bit_length() + k + 2
    size = (heads.abs() + heads.abs().roll(head_dim // 2, -1)).unflatten(-1, (-1, block))
    error = (roundings * 2.0**-24 * size.sum(-1, keepdim=True) / block**0.5).expand_as(size).flatten(-2)
    last, step = ROUNDING[dtype]
    want = exact[:, :q_heads]
    assert ((q.double() - want).abs() <= error[:, :q_heads] * (1 + last) + last * want.abs() + step).all()
    kv, places = [t.cpu() for t in kv], slice(3, 3 + tokens)
    for got, expected in zip(kv[2:], reference.quantize_kv4(heads[:, -kv_heads:], 0.95), strict=True):
        assert_close(got[:, :, places], expected)
    assert_quantized_keys(kv[:2], exact[:, q_heads:-kv_heads], error[:, q_heads:-kv_heads].amax(-1), places)


@pytest.mark.parametrize("head_dim,q_heads,kv_heads", [(64, 32, 4), (128, 32, 32), (128, 30, 6), (256, 9, 3)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rope_append_kv4_of_many_tokens_has_the_bits_of_few_at_a_time(head_dim, q_heads, kv_heads, dtype):
    """Two kernels: see kWideRows in kv4_plan.h."""
    tokens, heads = 600, q_heads + 2 * kv_heads
    qkv = torch.randn(2, tokens, heads * head_dim, device="cuda").to(dtype)
    cos, sin = (torch.randn(1, tokens, head_dim, device="cuda").to(dtype) for _ in range(2))
    found = []
    for step in (tokens, 8192 // heads // 2 - 1):
        kv = [torch.zeros(2, kv_heads, tokens + 3, width, dtype=kind, device="cuda") for _ in "kv"
              for width, kind in ((head_dim // 2, torch.uint8), (2, torch.float16))]  # fmt: skip
        q = []
        for first in range(0, tokens, step):
            part = [t[:, first : first + step].contiguous() for t in (qkv, cos, sin)]
            q.append(ops.rope_append_kv4(*part, None, head_dim, *kv, 3 + first, 0.95))
        found.append((torch.cat(q, 2), *kv))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def assert_attention(q, kv, length, mask=None, causal=True, scaling=0.125, sinks=None, starts=None):
    q, mask, starts, *kv = on_gpu(q, mask, starts, *kv)
    sinks = None if sinks is None else on_gpu(*sinks)
    got = ops.attention_kv4(q, *kv, length, mask, causal, scaling, *(sinks or (None, None)), starts)
    allowed = exact_attention
    if dispatch.attention_kernel(q.device, q.shape[2], q.shape[3], q.dtype, True) == "triton":
        allowed = pytest.importorskip("triton_interpreted_attention").allowed  # of 16-bit tensor cores
    with torch.device("cuda"):  # in float64 there too, since a CPU takes seconds
        exact, error = allowed(q, kv, length, mask, causal, scaling, sinks, starts)
    last, step = ROUNDING[q.dtype]
    assert ((got.double() - exact).abs() <= error * (1 + last) + last * exact.abs() + step).all()
    return got


@pytest.mark.parametrize("head_dim", [2, 30, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("repeat,tokens", [(1, 1), (4, 1), (8, 1), (12, 1), (3, 70)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_attention_kv4(head_dim, repeat, tokens, dtype):
    q = torch.randn(2, 2 * repeat, tokens, head_dim).to(dtype)
    for length in (tokens, CHUNK, 3 * CHUNK + 7):
        assert_attention(
            q, packed(2, 2, length, head_dim, capacity=length + 4), length, scaling=head_dim**-0.5
        )


@pytest.mark.parametrize("head_dim", [30, 80, 128, 256])
def test_attention_kv4_kernel(head_dim):
    for tokens, length in ((1, 270), (1, 20), (20, 270)):
        q = torch.randn(1, 8, tokens, head_dim).half()
        assert_attention(q, packed(1, 2, length, head_dim), length, scaling=head_dim**-0.5)


def test_attention_kv4_of_many_keys():
    for length in ((GROUP + 2) * CHUNK + 3, 33000):
        q, kv = 3 * torch.randn(2, 8, 1, 128).half(), packed(2, 2, length, 128)
        starts = torch.tensor([length - 1, length // 3])
        assert_attention(q, kv, length, starts=starts)


@pytest.mark.parametrize("count", [1, 4, 300])
def test_attention_kv4_with_sinks_and_masks(count):
    q, kv = torch.randn(2, 8, 3, 64).half(), packed(2, 2, 270, 64)
    mask = torch.rand(2, 1, 3, 270) > 0.5
    mask[:, :, 1] = False
    sinks = torch.randn(2, count, 2, 2, 64).half().transpose(1, 3).unbind(2)
    assert not assert_attention(q, kv, 270, mask, sinks=sinks)[:, 1].any()


def test_attention_kv4_bits_do_not_depend_on_what_is_not_seen():
    q, kv = torch.randn(2, 4, 6, 128).half(), packed(2, 2, 2000, 128)
    q, *kv = on_gpu(q, *kv)
    want = ops.attention_kv4(q, *kv, 2000, None, True, 0.1)
    many = ops.attention_kv4(*[t.repeat(150, 1, 1, 1) for t in (q, *kv)], 2000, None, True, 0.1)
    assert all(torch.equal(many[2 * i : 2 * i + 2], want) for i in range(150))
    for token in (0, 5):
        length = 1995 + token
        dirty = [t.clone() for t in kv]
        dirty[0][:, :, length:], dirty[2][:, :, length:] = 77, 78
        dirty[1][:, :, length:], dirty[3][:, :, length:] = float("nan"), float("inf")
        one = q[:, :, token : token + 1]
        assert torch.equal(
            ops.attention_kv4(one, *dirty, length, None, True, 0.1), want[:, token : token + 1]
        )
        starts = torch.full((2,), length - 1, device="cuda")
        got = ops.attention_kv4(one, *dirty, 2000, None, True, 0.1, starts=starts)
        assert torch.equal(got, want[:, token : token + 1])


def test_float64_is_refused():
    with pytest.raises(RuntimeError, match="not float64; convert"):
        ops.quantize_kv4(torch.randn(1, 1, 1, 64, device="cuda").double(), 0.9)
    with pytest.raises(RuntimeError, match="head_dim=258; .* up to 256"):
        q, *kv = on_gpu(torch.randn(1, 1, 1, 258), *packed(1, 1, 1, 258))
        ops.attention_kv4(q, *kv, 1, None, True, 0.1)


def test_steps_in_a_cuda_graph():
    """A captured step, replayed with other places in `starts`, is the step."""
    capacity, starts = 700, torch.zeros(2, dtype=torch.int64, device="cuda")
    qkv = torch.randn(2, 1, 8 * 96, dtype=torch.float16, device="cuda")
    angles = torch.randn(2, 1, 48, device="cuda").repeat(1, 1, 2)
    kv = on_gpu(*packed(2, 2, capacity, 96))
    had_k = HAD12.cuda()

    def step(starts, kv):
        q = ops.rope_append_kv4(qkv, angles.cos(), angles.sin(), had_k, 96, *kv, capacity - 1, 0.9, starts)
        return ops.attention_kv4(q, *kv, capacity, None, True, 0.1, starts=starts)

    step(starts, [t.clone() for t in kv])
    torch.cuda.synchronize()
    graph, captured = torch.cuda.CUDAGraph(), [t.clone() for t in kv]
    with torch.cuda.graph(graph):
        y = step(starts, captured)
    for places in ([0, 699], [300, 255], [256, 512], [3, 4]):
        starts.copy_(torch.tensor(places))
        qkv.copy_(torch.randn_like(qkv))
        graph.replay()
        torch.cuda.synchronize()
        want = step(starts, kv)
        assert torch.equal(y, want)
        assert all(torch.equal(a, b) for a, b in zip(captured, kv, strict=True))


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=SLOW) for name in ("quantize_kv4", "append_kv4")), "attention_kv4"]
)
def test_opcheck(name):
    x, (codes, params, *values) = torch.randn(1, 2, 3, 16, device="cuda"), on_gpu(*packed(1, 2, 9, 16))
    args = {
        "quantize_kv4": (x, 0.9),
        "append_kv4": (x, codes, params, 3, 0.9),
        "attention_kv4": (x, codes, params, *values, 7, None, True, 0.25),
    }[name]
    torch.library.opcheck(getattr(torch.ops.w2a4, name).default, args)


# attention for many queries, in Triton


# Few kinds, for each is compiled, which takes seconds.
@pytest.mark.parametrize(
    "head_dim,dtype",
    [
        pytest.param(64, torch.float16, marks=SLOW),
        pytest.param(80, torch.bfloat16, marks=SLOW),
        (128, torch.float16),
        pytest.param(256, torch.bfloat16, marks=SLOW),
    ],
)
@pytest.mark.parametrize("tokens,length", [(1, 1), (70, 70), (65, 300), (200, 1030)])
def test_attention_kv4_prefill(head_dim, dtype, tokens, length):
    prefill = pytest.importorskip("triton_interpreted_attention")
    q, *kv = on_gpu(
        torch.randn(2, 4, tokens, head_dim).to(dtype), *packed(2, 2, length, head_dim, length + 3)
    )
    with torch.device("cuda"):
        mask = (torch.rand(2, 1, tokens, length) > 0.5) & (torch.arange(tokens) != 2)[:, None]
        sinks = torch.randn(2, 5, 2, 2, head_dim).transpose(1, 3).unbind(2)
        starts = torch.tensor([length - tokens, 0])
    for arguments in ({}, {"mask": mask, "sinks": sinks, "starts": starts}):
        arguments["scaling"] = head_dim**-0.5
        got = prefill.prefill(q, kv, length, **arguments)
        with torch.device("cuda"):
            exact, error = prefill.allowed(q, kv, length, **arguments)
        last, step = ROUNDING[dtype]
        assert ((got.double() - exact).abs() <= error * (1 + last) + last * exact.abs() + step).all()


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=SLOW)])
def test_attention_kv4_prefill_has_the_same_bits_whatever_the_other_queries_are(head_dim):
    prefill = pytest.importorskip("triton_interpreted_attention").prefill
    q, kv = torch.randn(2, 8, 700, head_dim).half().cuda(), on_gpu(*packed(2, 2, 700, head_dim))
    whole = prefill(q, kv, 700)
    for first, last in ((0, 1), (63, 65), (90, 450), (650, 700)):
        assert_close(prefill(q[:, :, first:last], kv, last), whole[:, first:last])
    dirty = [t.clone() for t in kv]
    dirty[3][:, :, 500] = float("nan")
    got = prefill(q, dirty, 700)
    assert_close(got[:, :500], whole[:, :500])
    assert got[:, 500:].isnan().all()
    assert torch.equal(ops.attention_kv4(q, *kv, 700, None, True, 0.125), whole)


def test_prompts_do_not_wait_for_the_device():
    pytest.importorskip("triton")
    q, kv = torch.randn(1, 4, 100, 64).half().cuda(), on_gpu(*packed(1, 2, 120, 64))
    starts = torch.tensor([7]).cuda()
    call = (q, *kv, 120, None, True, 0.125, None, None, starts)
    want, graph = ops.attention_kv4(*call), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.attention_kv4(*call)
    graph.replay()
    assert_close(got.cpu(), want.cpu())
    starts.fill_(20)
    graph.replay()
    assert_close(got.cpu(), ops.attention_kv4(*call).cpu())
