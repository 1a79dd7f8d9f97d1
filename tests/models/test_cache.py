"""The 4-bit KV cache and its attention: decoding with the cache is the full forward, token for token."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import w2a4
from support.packed import SHAPE, packed_model, prompt
from w2a4.format.online import OnlineRotation
from w2a4.runtime.arguments import CACHE_NAMES
from w2a4.runtime.attention import KVSettings, PackedKV, w2a4_attention
from w2a4.runtime.kv_cache import KV4Layer

RECIPES = [
    dict(),
    dict(weight_bits=4),
    {"rotation.r3": "none"},
    {"rotation.r3": "random_hadamard", "kv_clip": 0.9},
]


def full_logits(model, ids, **kwargs):
    with torch.inference_mode():
        return model(ids, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_decoding_with_the_cache_is_the_full_forward(recipe):
    model, ids = packed_model(**recipe), prompt(2, 70)
    full = full_logits(model, ids)
    cache = w2a4.KV4Cache.for_model(model)
    with torch.inference_mode():
        steps = [model(ids[:, :5], past_key_values=cache).logits]
        steps += [model(ids[:, 5:8], past_key_values=cache).logits]
        steps += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 70)]
    # Codes and integer sums are the same on both ways; only lm_head's matmul may round otherwise.
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=2e-6 * float(full.abs().max()))
    assert cache.get_seq_length() == 70


def test_sink_tokens_are_kept_and_used():
    model, ids = packed_model(sink_tokens=4), prompt(1, 12)
    cache = w2a4.KV4Cache.for_model(model)
    with torch.inference_mode():
        steps = [model(ids[:, :3], past_key_values=cache).logits]
        steps += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3, 12)]
    full = full_logits(model, ids)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=2e-6 * float(full.abs().max()))
    assert cache.layers[0].keys.sink.shape == (1, 1, 4, SHAPE["head_dim"])
    assert (full - full_logits(packed_model(), ids)).abs().max() > 1e-3


def greedy(model, ids, steps):
    """Greedy decoding by whole forwards, without any cache."""
    for _ in range(steps):
        ids = torch.cat([ids, full_logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_generate_greedy_uses_the_packed_cache_by_default():
    model, ids = packed_model(), prompt()
    out = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, w2a4.KV4Cache)
    assert torch.equal(out.sequences, greedy(model, ids, 20))


def test_generate_with_a_cache_of_ones_own():
    model, ids = packed_model(), prompt()
    cache = w2a4.KV4Cache.for_model(model)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert torch.equal(out, greedy(model, ids, 6)) and cache.get_seq_length() == ids.shape[1] + 5


@pytest.mark.parametrize("recipe", [{}, {"sink_tokens": 2}, {"rotation.r3": "random"}], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_generate_with_a_static_cache(recipe, compiled):
    model, ids = packed_model(**recipe), prompt(2)
    options = dict(max_new_tokens=12, do_sample=False)
    want = model.generate(ids, **options)
    if compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = CompileConfig(backend="aot_eager", fullgraph=True)
        config._compile_all_devices = True
        options["compile_config"] = config
    out = model.generate(
        ids, cache_implementation="static", return_dict_in_generate=True, disable_compile=not compiled,
        **options,
    )  # fmt: skip
    assert torch.equal(out.sequences, want)
    assert isinstance(out.past_key_values, w2a4.KV4StaticCache)
    assert int(out.past_key_values.get_seq_length()) == ids.shape[1] + 11
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_every_way_rounds_at_the_same_places(dtype):
    """With a cache and without, of fixed size or not, compiled or not: one wrong bit changes later codes."""
    model, ids = packed_model().to(dtype), prompt(2, 20)
    full = full_logits(model, ids)
    caches = [w2a4.KV4Cache.for_model(model), w2a4.KV4StaticCache.for_model(model, 24)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    fixed = w2a4.KV4StaticCache.for_model(model, 24)
    with torch.inference_mode():
        for run, cache in ((model, caches[0]), (model, caches[1]), (compiled, fixed)):
            steps = [model(ids[:, :9], past_key_values=cache).logits]
            steps += [
                # transformers 4 cannot trace where the tokens stand; 5 does not ask.
                run(ids[:, i : i + 1], past_key_values=cache, cache_position=torch.arange(i, i + 1)).logits
                for i in range(9, 20)
            ]
            assert torch.equal(torch.cat(steps, 1), full)


def test_generate_left_padded_with_a_static_cache():
    model = packed_model()
    ids = torch.cat([torch.nn.functional.pad(prompt(1, n, seed=n), (11 - n, 0)) for n in (4, 11)])
    mask = torch.arange(11) >= torch.tensor([[7], [0]])
    options = dict(attention_mask=mask.long(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(ids, **options))


def test_static_cache_refusals():
    model = packed_model(sink_tokens=4)
    cache = w2a4.KV4StaticCache.for_model(model, 16)
    with pytest.raises(w2a4.W2A4Error, match="first call has 2 tokens, and sink_tokens=4 are kept"):
        model(prompt(tokens=2), past_key_values=cache)
    with pytest.raises(w2a4.W2A4Error, match="cannot be cropped"):
        cache.crop(3)
    cache = w2a4.KV4StaticCache.for_model(packed_model(), 8)
    with pytest.raises(w2a4.W2A4Error, match="room for 8 tokens, and 9 were asked"):
        packed_model()(prompt(tokens=9), past_key_values=cache)


def test_generate_sampling_is_reproducible():
    model, ids = packed_model(), prompt()
    outs = []
    for use_cache in (True, True, False):
        torch.manual_seed(1)
        outs.append(model.generate(ids, max_new_tokens=12, do_sample=True, use_cache=use_cache))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_generate_beam_reorders_the_cache():
    model, ids = packed_model(), prompt(2)
    kwargs = dict(max_new_tokens=10, num_beams=4, do_sample=False)
    assert torch.equal(model.generate(ids, **kwargs), model.generate(ids, use_cache=False, **kwargs))


def test_generate_left_padded_batch_equals_each_alone():
    model = packed_model()
    prompts = [prompt(1, n, seed=n) for n in (4, 11, 7)]
    width = 11
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    kwargs = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    batch = model.generate(ids, attention_mask=mask, **kwargs)
    for row, alone in zip(batch, prompts, strict=True):
        assert torch.equal(row[width:], model.generate(alone, **kwargs)[0, alone.shape[1] :])


def test_right_padded_forward_equals_each_alone():
    model = packed_model()
    ids = torch.cat([prompt(1, 9, seed=1), torch.nn.functional.pad(prompt(1, 5, seed=2), (0, 4))])
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    both = full_logits(model, ids, attention_mask=mask)
    alone = full_logits(model, prompt(1, 5, seed=2))
    torch.testing.assert_close(both[1:, :5], alone, rtol=0, atol=2e-6 * float(alone.abs().max()))


def test_a_filled_16_bit_cache_still_sees_4_bits():
    """A cache another library filled is not replaced; its contents are quantised on the way in."""
    model, ids = packed_model(), prompt(1, 10)
    cache = DynamicCache()
    with torch.inference_mode():
        for layer, attn in enumerate(m.self_attn for m in model.model.layers):
            cache.update(torch.zeros(1, 1, 0, attn.head_dim), torch.zeros(1, 1, 0, attn.head_dim), layer)
        steps = [model.model(ids[:, i : i + 1], past_key_values=cache).last_hidden_state for i in range(10)]
        whole = model.model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_layer_takes_its_cache_by_either_name(name):
    """transformers 5.24 renamed it; a layer that drops it decodes without any context."""
    model = packed_model()
    decoder, x = model.model, torch.randn(1, 6, SHAPE["hidden_size"])
    rotary = decoder.rotary_emb(x, torch.arange(6)[None])
    cache = w2a4.KV4Cache.for_model(model)
    with torch.inference_mode():
        whole = decoder.layers[0](x, position_embeddings=rotary)
        parts = [
            decoder.layers[0](x[:, t], position_embeddings=tuple(r[:, t] for r in rotary), **{name: cache})
            for t in (slice(0, 5), slice(5, 6))
        ]
    assert cache.layers[0].get_seq_length() == 6
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("watched", [False, True])
def test_arguments_that_nobody_knows_are_refused(watched):
    """A cache under a third name, or lengths of packed sequences, must not be dropped."""
    model = packed_model()
    if watched:
        model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with torch.inference_mode():
        unknown = {
            "kv_store": w2a4.KV4Cache.for_model(model),
            "cu_seq_lens_q": torch.tensor([0, 3, 6]),
            "is_causal": False,
        }
        for name, value in unknown.items():
            with pytest.raises(w2a4.W2A4Error, match=name):
                model(prompt(), **{name: value})
        model(prompt(), kv_store=None)


def test_cache_grows_crops_and_counts_its_bytes():
    settings = KVSettings(4, 0.95, 0, OnlineRotation("hadamard", 32, name="r3"))
    layer = KV4Layer(settings)
    x = torch.randn(2, 3, 200, 32)
    for part in x.split([1, 63, 1, 135], 2):
        keys, values = layer.update(part, part)
    assert isinstance(keys, PackedKV) and layer.get_seq_length() == 200
    # head_dim / 2 bytes of codes and 4 of parameters a token, head and side: 4.5 bits at head_dim 64.
    assert layer.nbytes() == 2 * 3 * 200 * 2 * (16 + 4)
    whole = KV4Layer(settings)
    whole.update(x, x)
    assert torch.equal(layer.keys.codes[:, :, :200], whole.keys.codes)
    assert torch.equal(layer.values.params[:, :, :200], whole.values.params)
    layer.crop(-50)
    assert layer.get_seq_length() == 150 and layer.store.view()[0].bound == 150
    layer.crop(100)
    assert layer.get_seq_length() == 100
    layer.batch_repeat_interleave(2)
    assert layer.keys.codes.shape[0] == 4
    layer.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(layer.keys.codes[1, :, :100], whole.keys.codes[1, :, :100])
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(3) == (3, 0)


def test_attention_without_cache_packs_the_same_codes():
    model = packed_model()
    attn = model.model.layers[0].self_attn
    q, k, v = torch.randn(1, 3, 6, 32), torch.randn(1, 1, 6, 32), torch.randn(1, 1, 6, 32)
    layer = KV4Layer(attn.kv_settings)
    packed = w2a4_attention(attn, q, *layer.update(k, v), None)[0]
    assert torch.equal(packed, w2a4_attention(attn, q, k, v, None)[0])


def test_gradients_flow_where_they_are_wanted():
    """Training sees the fake-quantised keys and values; forward is the packed forward."""
    model = packed_model()
    attn = model.model.layers[0].self_attn
    q, k, v = (torch.randn(1, h, 6, 32, requires_grad=True) for h in (3, 1, 1))
    out, _ = w2a4_attention(attn, q, k, v, None)
    out.square().sum().backward()
    assert all(
        x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().max() > 0 for x in (q, k, v)
    )
    with torch.no_grad():
        packed, _ = w2a4_attention(attn, q, k, v, None)
    torch.testing.assert_close(out.detach(), packed, rtol=1e-5, atol=1e-5)


def test_additive_masks_are_translated_or_refused():
    model = packed_model()
    attn = model.model.layers[0].self_attn
    q, k, v = torch.randn(1, 3, 4, 32), torch.randn(1, 1, 4, 32), torch.randn(1, 1, 4, 32)
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    additive = torch.zeros(1, 1, 4, 4).masked_fill(~causal, torch.finfo(torch.float32).min)
    expected = w2a4_attention(attn, q, k, v, None)[0]
    assert torch.equal(w2a4_attention(attn, q, k, v, causal)[0], expected)
    assert torch.equal(w2a4_attention(attn, q, k, v, additive)[0], expected)
    with pytest.raises(ValueError, match="finite biases"):
        w2a4_attention(attn, q, k, v, additive + 0.5)
