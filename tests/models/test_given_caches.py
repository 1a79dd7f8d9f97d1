"""Caches that the caller made: filled and used, or refused with what to use; and sinks beside padding."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import w2a4
from support.packed import SHAPE, packed_model, prompt
from support.tiny_models import tiny_llama
from w2a4.runtime.arguments import CACHE

pytestmark = [pytest.mark.doors, pytest.mark.usefixtures("one_thread")]

GREEDY = dict(do_sample=False, pad_token_id=0)
CACHES = {
    "DynamicCache": lambda model: DynamicCache(),
    "DynamicCache of a config": lambda model: DynamicCache(config=model.config),
    "StaticCache": lambda model: StaticCache(model.config, max_cache_len=40),
    "KV4Cache": w2a4.KV4Cache.for_model,
    "KV4StaticCache": lambda model: w2a4.KV4StaticCache.for_model(model, 40),
}


def whole(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def check_close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=4e-6 * float(want.abs().max()))


@torch.no_grad()
def by_steps(model, ids, cache, first=6, start=0):
    """Logits of a loop that keeps its own cache and takes nothing else out of the results."""
    steps = [model(ids[:, start : start + first], **{CACHE: cache}).logits]
    for i in range(start + first, ids.shape[1]):
        steps.append(model(ids[:, i : i + 1], **{CACHE: cache}, position_ids=torch.tensor([[i]])).logits)
    return torch.cat(steps, 1)


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES.keys())
@pytest.mark.parametrize(
    "recipe", [{}, {"sink_tokens": 3}, {"kv_bits": 16}, {"weight_bits": 16, "act_bits": 16}], ids=str
)
def test_a_loop_of_ones_own_fills_the_cache_it_gives(make, recipe):
    model, ids = packed_model(**recipe), prompt(1, 14)
    if recipe.get("kv_bits") == 16 and make in (CACHES["KV4Cache"], CACHES["KV4StaticCache"]):
        with pytest.raises(w2a4.W2A4Error, match="kv_bits=16.*DynamicCache"):
            make(model)
        return
    cache = make(model)
    check_close(by_steps(model, ids, cache), whole(model, ids))
    assert int(cache.get_seq_length()) == 14
    if recipe.get("kv_bits") != 16:
        assert isinstance(cache, w2a4.KV4Cache)


def test_a_cache_given_by_place():
    model, ids, cache = packed_model(), prompt(1, 9), DynamicCache()
    with torch.no_grad():
        model(ids[:, :5], None, None, cache)
        check_close(model(ids[:, 5:], None, None, cache).logits, whole(model, ids)[:, 5:])
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_that_was_filled_in_16_bits_goes_on(kind):
    """The bare decoder fills the cache as it is; the model then reads it in 4 bits."""
    model, ids = packed_model(), prompt(1, 12)
    cache = DynamicCache() if kind is DynamicCache else StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        model.model(ids[:, :7], **{CACHE: cache})
    assert type(cache) is kind
    check_close(by_steps(model, ids, cache, 1, start=7), whole(model, ids)[:, 7:])
    assert int(cache.get_seq_length()) == 12


@pytest.mark.parametrize("make", list(CACHES.values())[:4], ids=list(CACHES)[:4])
def test_chat_turns_go_on_in_one_cache(make):
    model, ids = packed_model(), prompt(1, 6)
    cache, text = make(model), ids
    for turn in range(3):
        text = torch.cat([text, prompt(1, 3, seed=turn)], 1)
        alone = model.generate(text, max_new_tokens=4, use_cache=False, **GREEDY)
        text = model.generate(text, max_new_tokens=4, **{CACHE: cache}, **GREEDY)
        assert torch.equal(text, alone), turn
        assert int(cache.get_seq_length()) == text.shape[1] - 1


def test_a_prefix_is_computed_once_and_copied():
    model, prefix = packed_model(sink_tokens=2), prompt(1, 10)
    cache = DynamicCache()
    with torch.inference_mode():
        model(prefix, **{CACHE: cache})
    for seed in (1, 2):
        text = torch.cat([prefix, prompt(1, 4, seed=seed)], 1)
        got = model.generate(text, max_new_tokens=5, **{CACHE: copy.deepcopy(cache)}, **GREEDY)
        assert torch.equal(got, model.generate(text, max_new_tokens=5, use_cache=False, **GREEDY))
    assert cache.get_seq_length() == 10


def test_a_cropped_cache_goes_on():
    model, ids, cache = packed_model(), prompt(1, 12), DynamicCache()
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        cache.crop(-5)
        check_close(model(ids[:, 7:], **{CACHE: cache}).logits, whole(model, ids)[:, 7:])


@pytest.mark.parametrize("recipe", [{}, {"sink_tokens": 3}], ids=str)
def test_beams_and_an_assistant_give_what_they_give_without_a_cache(recipe):
    model, ids = packed_model(**recipe), prompt(1, 8)
    beams = dict(max_new_tokens=6, num_beams=3, **GREEDY)
    want = model.generate(ids, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, **beams), want)
    assert torch.equal(model.generate(ids, **{CACHE: DynamicCache()}, **beams), want)
    greedy = model.generate(ids, max_new_tokens=10, use_cache=False, **GREEDY)
    helper = packed_model(weight_bits=4)
    assert torch.equal(model.generate(ids, max_new_tokens=10, assistant_model=helper, **GREEDY), greedy)


def test_caches_that_do_not_serve_are_refused():
    model, ids = packed_model(), prompt()
    refused = {
        "EncoderDecoderCache": EncoderDecoderCache(DynamicCache(), DynamicCache()),
        "type tuple": ((torch.zeros(1, 1, 2, 32),) * 2,) * 2,
        "sink_tokens=5": w2a4.KV4Cache.for_model(packed_model(sink_tokens=5)),
        "1 layers": w2a4.KV4Cache([model.model.layers[0].self_attn.kv_settings]),
    }
    offloading = DynamicCache()
    offloading.offloading = True
    refused["offloading"] = offloading
    for what, cache in refused.items():
        with torch.no_grad(), pytest.raises(w2a4.W2A4Error, match=f"(?s){what}.*for_model"):
            model(ids, **{CACHE: cache})
    with pytest.raises(w2a4.W2A4Error, match="kv_bits=16"):
        packed_model(kv_bits=16)(ids, **{CACHE: w2a4.KV4Cache.for_model(model)})


@pytest.mark.parametrize("recipe", [{}, {"sink_tokens": 3}, {"rotation.r3": "random"}], ids=str)
@pytest.mark.parametrize("kind", ["StaticCache", "KV4StaticCache"])
def test_a_cache_of_fixed_size_that_is_too_small_is_refused(kind, recipe):
    """By generate before the first token; in a loop of one's own at the token that does not fit."""
    model, ids = packed_model(**recipe), prompt(1, 9)

    def make(room):
        if kind == "StaticCache":
            return StaticCache(model.config, max_cache_len=room)
        return w2a4.KV4StaticCache.for_model(model, room)

    for room, new in ((12, 8), (5, 1)):
        cache, needs = make(room), 8 + new
        with pytest.raises(w2a4.W2A4Error, match=rf"this {kind} has room for {room} .*[=,] ?{needs}\b"):
            model.generate(ids, max_new_tokens=new, **{CACHE: cache}, **GREEDY)
        assert not int(cache.get_seq_length())
    # The last token is never read again, so it needs no room.
    made = model.generate(ids, max_new_tokens=8, disable_compile=True, **{CACHE: make(16)}, **GREEDY)
    assert made.shape == (1, 17)
    with pytest.raises(w2a4.W2A4Error, match="KV4StaticCache has room for 12 tokens, and 13 were asked"):
        by_steps(model, prompt(1, 14), make(12))
    with pytest.raises(w2a4.W2A4Error, match="KV4StaticCache has room for 5 tokens, and 6 were asked"):
        by_steps(model, prompt(1, 14), make(5))


def test_generate_knows_a_16_bit_cache_that_is_too_small_too():
    model = packed_model(kv_bits=16)
    with pytest.raises(w2a4.W2A4Error, match="max_cache_len=16"):
        cache = StaticCache(model.config, max_cache_len=12)
        model.generate(prompt(1, 9), max_new_tokens=8, **{CACHE: cache}, **GREEDY)


def test_a_float_model_refuses_a_4_bit_cache():
    model = tiny_llama(dtype=torch.float32, **SHAPE)
    cache = w2a4.KV4Cache.for_model(packed_model())
    with torch.no_grad(), pytest.raises(w2a4.W2A4Error, match="KV4Cache serves models.*DynamicCache"):
        model(prompt(), **{CACHE: cache})
    with pytest.raises(w2a4.W2A4Error, match="was not quantised by w2a4"):
        w2a4.KV4Cache.for_model(model)


# Sinks beside padding on the left


def padded_batch(lengths=(5, 11, 8), width=11):
    rows = [prompt(1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.arange(width) >= torch.tensor([[width - n] for n in lengths])
    return rows, ids, mask.long()


@pytest.mark.parametrize(
    "recipe", [{}, {"rotation.r3": "random"}, {"weight_bits": 16, "act_bits": 16}], ids=str
)
@pytest.mark.parametrize("way", ["whole", "cache", "watched", "static"])
def test_sinks_are_a_rows_own_tokens_in_a_padded_batch(recipe, way):
    model = packed_model(sink_tokens=3, **recipe)
    rows, ids, mask = padded_batch()
    alone = [whole(model, row)[0] for row in rows]
    if way == "watched":
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *_: None)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    cache = StaticCache(model.config, max_cache_len=20) if way == "static" else DynamicCache()
    options = {"use_cache": False} if way == "whole" else {CACHE: cache}
    with torch.no_grad():
        both = model(ids, attention_mask=mask, position_ids=places, **options).logits
        for got, want in zip(both, alone, strict=True):
            torch.testing.assert_close(got[-len(want) :], want, rtol=0, atol=1e-4 * float(want.abs().max()))
    options = {"cache_implementation": "static", "disable_compile": True} if way == "static" else {}
    got = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, use_cache=way != "whole", **options, **GREEDY
    )
    for row, new in zip(rows, got, strict=True):
        want = model.generate(row, max_new_tokens=5, use_cache=False, **GREEDY)
        assert torch.equal(new[11:], want[0, row.shape[1] :])


def test_sinks_of_prompts_shorter_than_the_sinks():
    model = packed_model(sink_tokens=6)
    rows, ids, mask = padded_batch((2, 4), 4)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    for row, new in zip(rows, got, strict=True):
        want = model.generate(row, max_new_tokens=8, use_cache=False, **GREEDY)
        assert torch.equal(new[4:], want[0, row.shape[1] :])
    beams = dict(num_beams=2, max_new_tokens=6, **GREEDY)
    got = model.generate(ids, attention_mask=mask, **beams)
    assert torch.equal(got, model.generate(ids, attention_mask=mask, use_cache=False, **beams))


def test_a_row_without_any_token_is_refused_where_sinks_need_its_first():
    model = packed_model(sink_tokens=2)
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    with torch.no_grad(), pytest.raises(w2a4.W2A4Error, match="hides all 3 tokens.*whole"):
        model(prompt(2, 3), attention_mask=mask)
    cache = w2a4.KV4Cache.for_model(packed_model(sink_tokens=6))
    with torch.no_grad():
        packed_model(sink_tokens=6)(prompt(2, 3), **{CACHE: cache})
        with pytest.raises(w2a4.W2A4Error, match="other positions"):
            mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
            packed_model(sink_tokens=6)(prompt(2, 1), attention_mask=mask, **{CACHE: cache})
