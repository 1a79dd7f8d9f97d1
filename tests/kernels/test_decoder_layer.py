"""`decoder_layer`, one op for a packed layer: the bits of the ops it is made of, in every kind of step."""

import pytest
import torch

import w2a4
from support.kv4 import packed, paged
from support.layer_arguments import arguments, several
from support.op_arguments import FLOATS, assert_refused, bad_arguments, opcheck, replaced
from support.packed import packed_model
from w2a4 import ops

compiled = pytest.mark.skipif(not ops.has_layer_kernel(torch.zeros(1)), reason="no compiled kernels")

MODELS = {
    "w2": ({}, {}),
    "w3": ({}, {"weight_bits": 3}),
    "w4": ({}, {"weight_bits": 4}),
    "row": ({}, {"weight_bits": 4, "group_size": -1, "weight_method": "rtn"}),
    "no r3, r4": ({}, {"rotation.r3": "none", "rotation.r4": "none"}),
    "sinks": ({}, {"sink_tokens": 2}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
}


def steps(model: torch.nn.Module, dtype: torch.dtype, batch: int, mask: torch.Tensor | None):
    """A prompt of nine tokens, one token, and two more through layer 0: results and what is in the cache."""
    model.to(dtype)
    part, decoder = model.model.layers[0], model.model
    cache = w2a4.KV4Cache.for_model(model)
    generator = torch.Generator().manual_seed(1)
    found, start = [], 0
    with torch.inference_mode():
        for tokens in (9, 1, 2):
            hidden = torch.randn(batch, tokens, 96, generator=generator).to(dtype)
            rotary = decoder.rotary_emb(hidden, torch.arange(start, start + tokens)[None])
            start += tokens
            seen = None if mask is None else mask[:, :, start - tokens : start, :]
            out = part.forward(hidden, seen, position_embeddings=rotary, past_key_values=cache)
            found.append(out)
    layer = cache.layers[0]
    assert [layer.store.bound, *(side.bound for side in layer.store.view())] == [12] * 3
    sides = [(side.codes[:, :, :12], side.params[:, :, :12]) for side in (layer.keys, layer.values)]
    return [*found, *(t for side in sides for t in side)]


@compiled
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_bits_are_those_of_its_ops(settings, batch, dtype, monkeypatch):
    shape, recipe = settings
    calls = []
    whole = ops.decoder_layer
    monkeypatch.setattr(ops, "decoder_layer", lambda *args: calls.append(args) or whole(*args))
    got = steps(packed_model(shape, **recipe), dtype, batch, None)
    # The first step of a cache that keeps tokens in 16 bits is not the op's.
    assert len(calls) == (2 if "sink_tokens" in recipe else 3)
    monkeypatch.setattr(ops, "has_layer_kernel", lambda x: False)
    want = steps(packed_model(shape, **recipe), dtype, batch, None)
    assert len(calls) <= 3
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@compiled
def test_a_mask_is_seen(monkeypatch):
    mask = torch.ones(12, 64, dtype=torch.bool).tril().repeat(3, 1, 1, 1)
    mask[1, :, 4:, :4] = False
    got = steps(packed_model(), torch.float32, 3, mask)
    causal = steps(packed_model(), torch.float32, 3, None)
    monkeypatch.setattr(ops, "has_layer_kernel", lambda x: False)
    want = steps(packed_model(), torch.float32, 3, mask)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(got[1][1], causal[1][1]) and torch.equal(got[1][0], causal[1][0])


@pytest.mark.parametrize("r4", ["random", "random_hadamard"])
def test_rotations_that_it_does_not_compute(r4, monkeypatch):
    monkeypatch.setattr(ops, "decoder_layer", None)
    out = steps(packed_model(**{"rotation.r4": r4}), torch.float32, 1, None)[0]
    assert torch.isfinite(out).all()


@compiled
def test_opcheck():
    opcheck("decoder_layer", tuple(arguments()))
    slots, table = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.int32)
    opcheck("decoder_layer", (*arguments(), None, slots, table))


@compiled
@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_pages_give_the_bits_of_a_whole_cache(size, sinks, masked):
    """Three sequences of different lengths, behind a prefix or not, in blocks that are in no order."""
    starts, tokens, hidden = torch.tensor([5, 2, 9]), 2, 32
    length = int(starts.max()) + tokens
    x, angles = torch.randn(3, tokens, hidden), torch.randn(3, tokens, 32)
    mask = (torch.rand(3, 1, tokens, length) < 0.7) if masked else None
    sink = [*torch.randn(2, 3, 1, sinks, 32)] if sinks else [None, None]
    caches, others = packed(3, 1, length, 32), arguments()
    before = [x, angles.cos(), angles.sin(), mask, *others[4:16]]
    keys = [int(start) + tokens - sinks for start in starts]
    pages, table = paged([t[:, :, sinks:] for t in caches], keys, size)
    places = starts[:, None] + torch.arange(tokens) - sinks
    slots = table.long().gather(1, places // size) * size + places % size
    behind = [*sink, int(starts.max()), 0.95, 32**-0.5, starts]
    want = torch.ops.w2a4.decoder_layer(*before, *caches, *behind)
    got = torch.ops.w2a4.decoder_layer(*before, *pages, *behind, slots, table)
    assert torch.equal(got, want)
    for page, cache in zip(pages, caches, strict=True):
        for b, row in enumerate(slots):
            new = cache[b, :, int(starts[b]) :][:, :tokens]
            assert torch.equal(page[row // size, :, row % size].transpose(0, 1), new)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [{}, {"hidden": 512, "ffn": 2048}])
def test_layers_give_the_bits_of_one_after_another(shape, threads):
    args, before = several(**shape), torch.get_num_threads()
    copies = [[t.clone() for t in each] for each in args[16:20]]
    torch.set_num_threads(threads)
    try:
        got = torch.ops.w2a4.decoder_layers(*args)
    finally:
        torch.set_num_threads(before)
    x = args[0]
    for i in range(3):
        one = [each[len(each) // 3 * i :][: len(each) // 3] for each in args[6:12]]
        caches = [each[i] for each in copies]
        x = torch.ops.w2a4.decoder_layer(
            x, *args[1:4], args[4][2 * i :][:2], args[5], *one, *args[12:16], *caches, None, None, *args[22:]
        )
    assert torch.equal(got, x)
    assert all(torch.equal(a, b) for a, b in zip(sum(args[16:20], []), sum(copies, []), strict=True))


@compiled
def test_opcheck_of_several():
    opcheck("decoder_layers", tuple(several()))


def bad_calls_of_several():
    good = several()
    yield "decoder_layers", replaced(good, 4, good[4][:5]), "norms has 5 tensors, expected 2 for each of 3"
    yield "decoder_layers", replaced(good, 7, good[7][:-1]), "o_proj has 11 tensors, expected as many for"
    yield "decoder_layers", replaced(good, 10, [32] * 4), "group_sizes has 4 numbers, expected 12.*each layer"
    yield (
        "decoder_layers",
        replaced(good, 19, good[19][:2]),
        "v_params has 2 tensors, expected 3 like k_codes",
    )
    yield "decoder_layers", replaced(good, 20, good[19][:1]), "k_sink has 1 tensors, expected none or 3"
    empty = [[] if 16 <= place < 20 else value for place, value in enumerate(good)]
    yield "decoder_layers", empty, "k_codes has no tensor, expected one for each layer"
    wide = [*good[9][:-4], *arguments(64, 64)[9]]
    yield "decoder_layers", replaced(good, 9, wide), "down_proj has 64 outputs, expected 32 like x"


@pytest.mark.parametrize("name,args,message", bad_arguments(bad_calls_of_several()))
def test_bad_arguments_of_several(name, args, message):
    assert_refused(name, args, message)


@compiled
def test_nothing_is_written_if_a_later_layer_is_refused():
    args = several()
    args[9] = [*args[9][:-4], *arguments(64, 64)[9]]
    with pytest.raises(RuntimeError, match="down_proj has 64 outputs"):
        torch.ops.w2a4.decoder_layers(*args)
    assert not any(t.any() for each in args[16:20] for t in each)


def bad_calls():
    good = arguments()
    slots, both = torch.zeros(1, 1, dtype=torch.long), "missing; pass both slots and block_table or neither"
    yield "decoder_layer", [*good, None, slots], f"block_table is {both}"
    yield "decoder_layer", [*good, None, None, slots.int()], f"slots is {both}"

    def linear(index: int, tensors: list) -> list:
        return replaced(good, index, tensors)

    yield "decoder_layer", replaced(good, 0, good[0].double()), "x has dtype float64"
    yield "decoder_layer", replaced(good, 0, good[0][0]), r"x has shape \[1, 32\], expected \[batch"
    yield "decoder_layer", replaced(good, 4, good[4][:1]), "norms has 1 tensors, expected 2"
    yield "decoder_layer", replaced(good, 10, [32] * 3), "group_sizes has 3 numbers, expected 4"
    yield "decoder_layer", replaced(good, 11, [-1] * 5), "act_group_sizes has 5 numbers, expected 4"
    yield "decoder_layer", linear(7, good[7][:2]), "o_proj has 2 tensors, expected weight, scale, act_clip"
    scalar = [*good[9][:3], good[9][3][0, 0, 0]]
    yield "decoder_layer", linear(9, scalar), r"down_proj has levels of shape \[\], expected \[out, groups"
    narrow = [t[:16] if t.dim() > 1 else t for t in good[9]]
    odd = [t[:-1] if t.dim() > 1 else t for t in good[8]]
    yield "decoder_layer", linear(8, odd), "gate_up_proj has 127 outputs, expected as many"
    yield "decoder_layer", linear(9, narrow), "down_proj has 16 outputs, expected 32 like x"


@pytest.mark.parametrize("name,args,message", bad_arguments(bad_calls()))
def test_bad_arguments(name, args, message):
    assert_refused(name, args, message)


def refused_by_an_op():
    good = arguments()
    yield replaced(good, 22, 4), "rope_append_kv4: start=4 with 1 tokens of qkv does not fit"
    yield replaced(good, 15, 48), "silu_mul_hadamard_a4: block_size=48"
    yield replaced(good, 10, [32, 32, 0, 32]), "linear_w2a4: group_size=0"


def shared_with_a_cache():
    """Arguments of which one lies where a cache is written; none of the ops it is made of sees both."""
    good = arguments()
    codes, params = good[16], good[17]
    flat, one = params.view(-1), codes.view(-1)[:8].view(1, 8)
    yield replaced(good, 4, [good[4][0], flat.as_strided((32,), (0,))]), "k_params", "norms"
    yield replaced(good, 9, [good[9][0], flat[:2].view(1, 2), *good[9][2:]]), "k_params", "down_proj"
    yield replaced(good, 8, [one, *good[8][1:]]), "k_codes", "gate_up_proj"
    yield replaced(good, 20, flat.as_strided((1, 1, 1, 32), (0, 0, 0, 0))), "k_params", "k_sink"


@compiled
@pytest.mark.parametrize("args,written,other", list(shared_with_a_cache()))
def test_a_cache_that_shares_memory_with_another_argument(args, written, other):
    message = f"decoder_layer: {written} is written, but shares memory with {other}"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.w2a4.decoder_layer(*args)


@compiled
@pytest.mark.parametrize("args,message", list(refused_by_an_op()))
def test_an_op_refuses_its_arguments(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.w2a4.decoder_layer(*args)
