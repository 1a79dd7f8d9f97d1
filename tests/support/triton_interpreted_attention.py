"""Run by test_triton_interpreter.py with TRITON_INTERPRET=1: attention on packed keys for many queries."""

import pytest
import torch
from w2a4.triton_kernels import attention, language  # noqa: F401  (registers its op)

from support.kv4 import NAN, ROUNDING, exact_attention, packed, parts
from support.numerics import UNIT, assert_close
from support.op_arguments import replaced
from support.triton_interpreted import run_asm, words
from w2a4 import ops
from w2a4.ops import dispatch, reference

HALF, BF16 = torch.float16, torch.bfloat16


def prefill(q, kv, length, mask=None, causal=True, scaling=0.125, sinks=None, starts=None):
    return torch.ops.w2a4.attention_kv4_prefill(
        q, *kv, length, mask, causal, scaling, *(sinks or (None, None)), starts
    )


def allowed(q, kv, length, mask=None, causal=True, scaling=0.125, sinks=None, starts=None):
    """Attention in float64, and what the kernel may be off by before it rounds to q's dtype.

    A score is a sum of head_dim products in float32 and some ten roundings more, relative to the largest it
    could be; its weight and the sum of weights are off by that. A weight is rounded to 11 bits, at
    least to 2**-35 of the largest, and a value to 11 bits; weights and products are added up in float32.
    """
    arguments = length, mask, causal, scaling
    exact, _ = exact_attention(q, kv, *arguments, sinks, starts)
    (_, k_most), (_, v_most) = parts(*kv[:2], length), parts(*kv[2:], length)
    k_most, v_most = k_most.nan_to_num(), v_most.nan_to_num()
    # What the magnitudes of values, rather than values, come to.
    magnitudes = torch.stack([torch.zeros_like(v_most), v_most * 1.001], -1).half()
    if sinks is not None:
        k_most = torch.maximum(k_most.amax(), sinks[0].double().abs().amax())
        sinks = sinks[0], sinks[1].abs().amax(-1, keepdim=True).expand_as(sinks[1])
    size, _ = exact_attention(
        q, [*kv[:2], torch.zeros_like(kv[2][:, :, :length]), magnitudes], *arguments, sinks, starts
    )
    score = (q.shape[-1] + 12) * UNIT * scaling * q.double().abs().sum(-1).amax() * k_most.amax()
    relative = 2 * 2.0**-11 * 1.001 + 3 * score + (length + 24) * UNIT
    return exact, size * relative + 2.0**-35 * length * v_most.amax()


def assert_attention(q, kv, *arguments, **keywords):
    got = prefill(q, kv, *arguments, **keywords)
    exact, error = allowed(q, kv, *arguments, **keywords)
    last, step = ROUNDING[q.dtype]
    last *= 2  # the interpreter cuts off what bfloat16 does not hold, GPUs round
    assert ((got.double() - exact).abs() <= error * (1 + last) + last * exact.abs() + step).all()
    return got


@pytest.mark.parametrize(
    "head_dim,dtype", [(2, HALF), (30, BF16), (64, HALF), (64, BF16), (80, BF16), (128, HALF), (256, BF16)]
)
@pytest.mark.parametrize("tokens,length", [(1, 1), (5, 70), (70, 70), (130, 200)])
def test_attention(head_dim, tokens, length, dtype):
    q, kv = torch.randn(2, 2, tokens, head_dim).to(dtype), packed(2, 1, length, head_dim, length + 3)
    assert_attention(q, kv, length, scaling=head_dim**-0.5)


@pytest.mark.parametrize("repeat", [1, 3, 8])
@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_attention_of_grouped_heads_and_other_spreads(repeat, spread):
    q, kv = torch.randn(1, 2 * repeat, 40, 64).half(), packed(1, 2, 90, 64, spread=spread)
    assert_attention(q, kv, 90, scaling=0.125 / spread)
    assert_attention(q, kv, 90, causal=False, scaling=0.125 / spread)


@pytest.mark.parametrize("mask_shape", [(2, 6), (1, 1), (2, 1), (1, 6)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [0, 3])
def test_attention_masks(mask_shape, causal, sinks):
    mask = torch.rand(*mask_shape, 5, 70) > 0.5
    mask[:, :, 2] = False  # a query that sees nothing
    mask = mask.transpose(2, 3).contiguous().transpose(2, 3)  # any strides
    q, kv = torch.randn(2, 6, 5, 32).half(), packed(2, 3, 70, 32)
    sinks = tuple(torch.randn(2, 2, 3, sinks, 32)) if sinks else None
    got = assert_attention(q, kv, 70, mask, causal, sinks=sinks)
    assert not got[:, 2].any()


@pytest.mark.parametrize("tokens,sinks,dtype", [
    (1, 1, torch.float32), (1, 64, HALF), (1, 130, torch.float32), (100, 1, HALF), (100, 66, torch.float32),
])  # fmt: skip
def test_attention_sinks(tokens, sinks, dtype):
    q, kv = torch.randn(2, 4, tokens, 32).half(), packed(2, 2, 140, 32)
    sinks = torch.randn(2, sinks, 2, 2, 32).to(dtype).transpose(1, 3).unbind(2)  # any strides
    for floats in sinks:
        floats[:, :, 0] *= 20
    assert_attention(q, kv, 140, sinks=sinks)


@pytest.mark.parametrize("tokens,starts", [(1, [0, 69, 30]), (5, [65, 0, 1]), (65, [5, 4, 0])])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_sequences_of_different_lengths(tokens, starts, causal):
    q, kv, starts = torch.randn(3, 4, tokens, 32).half(), packed(3, 2, 70, 32), torch.tensor(starts)
    want = assert_attention(q, kv, 70, causal=causal, starts=starts)
    for b, start in enumerate(starts.tolist()):  # what lies beyond is poison
        kv[1][b, :, start + tokens :] = kv[3][b, :, start + tokens :] = NAN
    assert_close(prefill(q, kv, 70, causal=causal, starts=starts), want)
    for b, start in enumerate(starts.tolist()):
        alone = prefill(q[b : b + 1], [t[b : b + 1] for t in kv], start + tokens, causal=causal)
        assert_close(alone, want[b : b + 1])


@pytest.mark.parametrize("sinks", [0, 2])
def test_attention_has_the_same_bits_whatever_the_other_queries_are(sinks):
    q, kv = torch.randn(2, 150, 4, 64).half().transpose(1, 2), packed(2, 2, 150, 64)
    sinks = tuple(torch.randn(2, 2, 2, sinks, 64)) if sinks else None
    whole = prefill(q, kv, 150, sinks=sinks)
    for first, last in ((0, 1), (63, 65), (90, 150), (128, 129)):
        part = prefill(q[:, :, first:last], kv, last, sinks=sinks)
        # But numpy's products, which interpret, add up a row in an order that depends on its place.
        assert_close(part, whole[:, first:last], atol=2.0**-12, rtol=2.0**-10)


def test_attention_shows_nan_only_where_it_is_seen():
    q, kv = torch.randn(1, 2, 9, 32).half(), packed(1, 2, 9, 32)
    clean = prefill(q, kv, 9)
    for param, bad in ((1, NAN), (3, NAN), (3, float("inf"))):
        dirty = [t.clone() for t in kv]
        dirty[param][:, :, 5] = bad
        got = prefill(q, dirty, 9)
        assert_close(got[:, :5], clean[:, :5])
        assert got[:, 5:].isnan().all()
    floats = [torch.randn(1, 2, 7, 32) for _ in "kv"]
    clean = prefill(q, kv, 9, sinks=floats)
    for poisoned in (0, 1):
        dirty = [t.clone() for t in floats]
        dirty[poisoned][:, :, 5] = NAN
        got = prefill(q, kv, 9, sinks=dirty)
        assert_close(got[:, :5], clean[:, :5])
        assert got[:, 5:].isnan().all()


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attention_decodes_a_few_heads_at_a_time_where_memory_is_short(heads, monkeypatch):
    q, kv = torch.randn(3, 4, 9, 32).half(), packed(3, 2, 140, 32)
    mask, starts = torch.rand(3, 1, 9, 140) > 0.3, torch.tensor([131, 0, 70])
    sinks = tuple(torch.randn(2, 3, 2, 3, 32))
    want = prefill(q, kv, 140, mask, sinks=sinks, starts=starts)
    monkeypatch.setattr(attention, "MOST_DECODED", 256 * 32 * 4 * heads + 1)
    assert_close(assert_attention(q, kv, 140, mask, sinks=sinks, starts=starts), want)


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("head_dim,tokens,length", [(64, 70, 270), (80, 130, 130), (256, 65, 100)])
def test_attention_with_the_tiles_of_other_devices(arch, head_dim, tokens, length, monkeypatch):
    monkeypatch.setattr(attention, "arch_of", lambda device: arch)
    q, kv = torch.randn(1, 2, tokens, head_dim).half(), packed(1, 1, length, head_dim)
    whole = assert_attention(q, kv, length)
    sinks = tuple(torch.randn(2, 1, 1, 66, head_dim))
    assert_attention(q, kv, length, sinks=sinks)
    mask = torch.ones(1, 1, tokens, length, dtype=torch.bool)
    assert_close(assert_attention(q, kv, length, mask), whole, atol=2.0**-12, rtol=2.0**-10)


def test_decoding():
    (k_codes, k_params, v_codes, v_params), starts = packed(2, 2, 70, 30), torch.tensor([50, 3])
    wide, rows, sinks, tokens = 32, 128, 4, 5
    k, v = (torch.full((3, rows, wide), NAN, dtype=HALF) for _ in "kv")
    factors = torch.full((3, rows, 2), NAN)
    v_params[1, 0, 6, 1] = float("inf")
    attention.decode_kv4_kernel[(rows // 32, 3)](
        k_codes, k_params, v_codes, v_params, starts, k, v, factors, 1, 2, tokens, 65, 70, rows, sinks, 0.5,
        DIM=30, WIDE=wide, HAS_STARTS=True, KEYS=32,
    )  # fmt: skip
    for slot, (batch, head, end) in enumerate([(0, 1, 55), (1, 0, 8), (1, 1, 8)]):
        there = slice(sinks, end)
        codes = reference.unpack(k_codes[batch, head, there], 4, 30)
        assert torch.equal(k[slot, there, :30].float(), codes.float())
        values = reference.dequantize_kv4(v_codes, v_params)[batch, head, there].half()
        taint = torch.zeros(end - sinks)
        if slot == 1:
            values[2], taint[2] = 0, NAN
        assert torch.equal(v[slot, there, :30], values)
        want = k_params[batch, head, there].float() * 0.5
        want[:, 1] += taint
        assert torch.equal(factors[slot, there].nan_to_num(7), want.nan_to_num(7))
        for written in (k, v, factors):
            assert not written[slot, :sinks].any() and not written[slot, end:].any()
    assert not k[:, :, 30:].any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 16), (1, 2, 0, 16)])
def test_attention_of_none(shape):
    got = prefill(torch.randn(shape).half(), packed(shape[0], 2, 5, 16), 5)
    assert got.shape == (shape[0], shape[2], 2, 16)


def test_attention_opcheck():
    kv, starts = packed(2, 2, 9, 16), torch.tensor([1, 2])
    mask, sinks = torch.ones(1, 1, 3, 9, dtype=torch.bool), torch.randn(2, 2, 2, 4, 16).unbind()
    for args in (
        (torch.randn(2, 4, 3, 16).half(), *kv, 9, None, True, 0.25),
        (torch.randn(2, 4, 3, 16).half(), *kv, 9, mask, True, 0.25, *sinks, starts),
    ):
        tests = "test_schema", "test_faketensor"
        torch.library.opcheck(torch.ops.w2a4.attention_kv4_prefill.default, args, test_utils=tests)


def test_ops_choose_it_and_compile_into_one_graph(monkeypatch):
    q, kv = torch.randn(1, 4, 70, 32).half(), packed(1, 2, 70, 32)
    args = (q, *kv, 70, None, True, 0.2)
    few = ops.attention_kv4(*args)
    monkeypatch.setattr(dispatch, "backend", "triton")
    got = ops.attention_kv4(*args)
    assert not torch.equal(got, few)
    assert_close(got, prefill(q, kv, 70, scaling=0.2))
    wide = replaced(args, 0, q.float())  # which it does not take
    assert_close(ops.attention_kv4(*wide), reference.attention_kv4(*wide), atol=3e-6)
    torch._dynamo.reset()
    compiled = torch.compile(ops.attention_kv4, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*args), got)


def bad_calls():
    kv = packed(1, 2, 9, 16)
    good = [torch.randn(1, 4, 3, 16).half(), *kv, 5, None, True, 0.25, None, None, None]
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    yield replaced(good, 0, good[0].float()), "q has dtype torch.float32"
    yield replaced(good, 0, good[0][0]), r"q has shape \[4, 3, 16\]"
    yield replaced(good, 0, good[0][..., :15]), "q has head_dim 15, expected an even number up to 256"
    yield replaced(good, 0, torch.randn(1, 4, 3, 258).half()), "q has head_dim 258"
    yield replaced(good, 0, good[0][:, :3]), "k_codes has shape .* heads that divide 3"
    yield replaced(good, 1, kv[0][:, :, :8]), "k_codes of shape .* is not contiguous|k_params has shape"
    yield replaced(good, 3, kv[2].char()), "v_codes has dtype torch.int8"
    yield replaced(good, 4, kv[3][..., :1]), "v_params has shape"
    yield replaced(good, 5, 10), r"length=10, expected 3 \(q_tokens\) to 9 \(the capacity\)"
    yield replaced(good, 5, 2), "length=2, expected 3"
    yield replaced(good, 6, mask.float()), "mask is torch.float32"
    yield replaced(good, 6, mask[..., :4]), r"mask is torch.bool \[1, 1, 3, 4\].*expected bool \[1, 4, 3, 5\]"
    yield replaced(good, 9, torch.randn(1, 2, 4, 16)), "k_sink and v_sink must both be given"
    yield [*good[:9], torch.randn(1, 2, 4, 16), torch.randn(1, 2, 3, 16), None], "v_sink has shape"
    yield replaced(good, 11, torch.tensor([1, 2])), r"starts has shape \[2\], expected \[1\]"
    yield replaced(good, 11, torch.tensor([1], dtype=torch.int32)), "starts has dtype torch.int32"


@pytest.mark.parametrize("args,message", list(bad_calls()))
def test_attention_bad_argument(args, message):
    with pytest.raises(RuntimeError, match=message) as error:
        torch.ops.w2a4.attention_kv4_prefill(*args)
    assert "w2a4.attention_kv4_prefill" in str(error.value)


@pytest.mark.parametrize("text,dtype", [("_CODES_FLOAT16", HALF), ("_CODES_BFLOAT16", BF16)])
def test_codes_in_assembly(text, dtype):
    for word in words(50):
        out = run_asm(getattr(language, text).value, 4, int.from_bytes(bytes(word.tolist()), "little"))
        floats = torch.frombuffer(bytearray(b"".join(out)), dtype=dtype).float()
        codes = reference.unpack(word, 4, 8).float()
        assert_close(floats, torch.cat([codes[0::2], codes[1::2]]))
