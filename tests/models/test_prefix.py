"""The exact prefix: what the full-precision model computes for tokens in front, in every route and cache."""

import copy
import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

import w2a4
from support.families import ALL, tiny_family
from support.packed import logits
from support.tiny_models import tiny_model, tiny_tokenizer, tokens
from w2a4.cli.main import main
from w2a4.errors import CheckpointError, RecipeError, W2A4Error
from w2a4.evaluate import perplexity
from w2a4.quantization import prefix
from w2a4.runtime.prefix import KVPrefix
from w2a4.train.run import train

#: Kinds of RoPE without fixed angles, which take no prefix.
FIXED = [(family, case) for family, case in ALL if case not in ("dynamic", "longrope")]
#: Every family with a cache of 4 bits, some with one of 16. Other versions of transformers see few.
ROUTES = [
    pytest.param(family, case, bits, marks=[pytest.mark.doors] if case == "plain" else [])
    for bits, pairs in ((4, FIXED), (16, [("llama", "plain"), ("qwen3", "plain")]))
    for family, case in pairs
]
RECIPE = w2a4.Recipe.load("w4a4kv4").override(gptq_refine=0, prefix_tokens=2)


class NoText:
    """Ids are given, only the BOS is asked for."""

    bos_token_id = 1


def quantized(model, **changes):
    ids = tokens(model, 4, 24, 5)
    w2a4.quantize(model, NoText(), RECIPE.override(**changes), ids, progress=False)
    return model


def with_prefix(model, ids):
    """A rotated full-precision model behind a prefix."""
    prefix.add_prefix(model, ids)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.kv_settings = dataclasses.replace(attention.kv_settings, prefix=attention.prefix)
    return model


@pytest.mark.parametrize(("family", "case"), [pair for pair in FIXED if pair[1] != "window"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_it_stands_for_the_tokens_themselves(family, case, use_cache):
    model = tiny_family(family, case)
    ids = tokens(model, 2, 30)
    front = torch.tensor([[7, 9, 11]])
    want = logits(model, torch.cat([front.expand(2, -1), ids], 1))[:, 3:]
    with torch.no_grad():
        got = with_prefix(w2a4.rotate(model), front[0].tolist())(ids, use_cache=use_cache).logits
        bare = logits(tiny_family(family, case), ids)
    # Keys and values are rounded to float16, 2**-11 of each; a few layers pass that on to all positions.
    assert (got - want).abs().max() <= 2e-2 * want.abs().max()
    assert (got - want).square().mean() < 1e-4 * (bare - want).square().mean()


@pytest.mark.parametrize(("family", "case", "kv_bits"), ROUTES)
def test_every_route_and_cache(family, case, kv_bits, tmp_path):
    model = quantized(tiny_family(family, case), kv_bits=kv_bits)
    ids = tokens(model, 2, 40)
    want = logits(model, ids)
    chosen = model.config.quantization_config.manifest.prefix
    assert len(chosen) == 2
    w2a4.save(model, None, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert loaded.config.quantization_config.manifest.prefix == chosen
    assert torch.equal(logits(loaded, ids), want)
    plain = copy.deepcopy(loaded)
    for layer in plain.model.layers:
        layer.self_attn.kv_settings = dataclasses.replace(layer.self_attn.kv_settings, prefix=None)
    assert not torch.equal(logits(plain, ids), want)

    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    both = loaded.generate(ids, **options)[:, 40:]
    engine = w2a4.Engine(loaded, max_length=64).generate([ids[0], ids[1, :17]], 8, stop_tokens=[])
    assert torch.equal(engine[0], both[0])
    short = loaded.generate(ids[1:, :17], **options)[0, 17:]
    assert torch.equal(engine[1], short)
    # Padding on the left hides a text's own columns, never the prefix.
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :23] = 0
    padded = torch.cat([torch.zeros(1, 23, dtype=torch.long), ids[1:, :17]], 1)
    padded = loaded.generate(torch.cat([ids[:1], padded]), attention_mask=mask, **options)[:, 40:]
    assert torch.equal(padded[0], both[0]) and torch.equal(padded[1], short)
    if case != "window":
        static = loaded.generate(ids, cache_implementation="static", **options)[:, 40:]
        assert torch.equal(static, both)
    beams = [m.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*beams)


@pytest.mark.doors
@pytest.mark.parametrize("make", [
    w2a4.KV4Cache.for_model, lambda model: DynamicCache(),
    lambda model: w2a4.KV4StaticCache.for_model(model, 32),
    lambda model: StaticCache(model.config, max_cache_len=32),
])  # fmt: skip
@torch.no_grad()
def test_a_cache_counts_the_text_alone(make):
    model = quantized(tiny_model())
    ids, cache = tokens(model, 1, 20), make(model)
    want = logits(model, ids)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 10], 1)]
    assert torch.equal(torch.cat(parts, 1), want)
    assert int(cache.get_seq_length()) == 20
    if type(cache) is w2a4.KV4Cache:
        cache.crop(12)
        assert cache.get_seq_length() == 12
        assert torch.equal(model(ids[:, 12:], past_key_values=cache).logits, want[:, 12:])


@torch.no_grad()
def test_a_cache_of_another_prefix_is_refused():
    model, other = quantized(tiny_model()), quantized(tiny_model(seed=1))
    cache = w2a4.KV4Cache.for_model(other)
    with pytest.raises(W2A4Error, match="begins with 2 prefix tokens of another model.*KV4Cache.for_model"):
        model(tokens(model), past_key_values=cache)
    twin = copy.deepcopy(model)
    assert torch.equal(
        twin(tokens(model), past_key_values=w2a4.KV4Cache.for_model(model)).logits,
        model(tokens(model)).logits,
    )


@torch.no_grad()
def test_what_is_massive_decides():
    """A token whose embedding is huge is massive wherever it stands."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = tokens(model, 4, 32) % 100 + 50
    auto = RECIPE.override(prefix_tokens="auto")
    assert prefix.choose_prefix(model, tokenizer, ids, auto) == ()
    assert not bool(prefix.massive(model, ids).any())
    model.model.embed_tokens.weight[77] *= 1000
    ids[ids == 77], ids[:, 5] = 78, 77
    assert prefix.massive(model, ids).nonzero()[:, 1].tolist() == [5] * 4
    # No prefix makes it an ordinary token here, and `auto` keeps none that does not help.
    assert prefix.choose_prefix(model, tokenizer, ids, auto) == ()
    assert len(prefix.choose_prefix(model, tokenizer, ids, auto.override(prefix_tokens=3))) == 3


@torch.no_grad()
def test_auto_takes_the_token_behind_which_none_is_massive(monkeypatch):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = tokens(model, 4, 32)
    good = int(ids.flatten().bincount().argmax())

    def read(model, ids, before):
        found = torch.zeros(ids.shape, dtype=torch.bool)
        found[:, 0] = tuple(before[-1:]) != (good,)
        return found, torch.zeros(*ids.shape, model.config.hidden_size)

    monkeypatch.setattr(prefix, "_read", read)
    auto = RECIPE.override(prefix_tokens="auto")
    assert prefix.choose_prefix(model, tokenizer, ids, auto) == (good,)


def test_training_keeps_it(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    recipe = w2a4.Recipe.load("w2a4kv4-rcp-quick").override(**{
        "prefix_tokens": 2, "calib_samples": 4, "calib_seqlen": 16, "training.steps": 3,
        "training.seqlen": 16, "training.minutes": 0, "training.micro_batch": 1,
    })  # fmt: skip
    train(model, tokenizer, recipe, tmp_path / "work", "builtin", progress=False)
    ids = tokens(model, 2, 20)
    want = logits(model, ids)
    assert len(model.config.quantization_config.manifest.prefix) == 2
    w2a4.save(model, tokenizer, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded, ids), want)
    assert torch.equal(
        loaded.model.layers[0].self_attn.prefix.keys, model.model.layers[0].self_attn.prefix.keys
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_tokens": 5}, "prefix_tokens=5: give 'auto' or 0 to 4"),
        ({"prefix_tokens": -1}, "prefix_tokens=-1: give 'auto' or 0 to 4"),
        ({"prefix_tokens": "all"}, "prefix_tokens='all'"),
        ({"sink_tokens": 1}, "sink_tokens=1 with prefix_tokens=2.*set one of them to 0"),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(RecipeError, match=message):
        RECIPE.override(**changes)


@pytest.mark.parametrize(("family", "case"), sorted(set(ALL) - set(FIXED)))
def test_rope_without_fixed_angles(family, case):
    with pytest.raises(RecipeError, match=r"prefix_tokens=2 with RoPE of kind .*set prefix_tokens=0"):
        quantized(tiny_family(family, case))
    model = quantized(tiny_family(family, case), prefix_tokens="auto")
    assert model.config.quantization_config.manifest.prefix == ()


def test_a_prefix_as_long_as_the_model_reads():
    model = tiny_model(max_position_embeddings=2)
    with pytest.raises(RecipeError, match="prefix_tokens=2 for a model of max_position_embeddings=2"):
        prefix.choose_prefix(model, NoText(), tokens(model), RECIPE)


def test_other_attentions_are_refused():
    model = quantized(tiny_model(), kv_bits=16)
    with pytest.raises(W2A4Error, match="'sdpa' knows no 4-bit KV cache and no prefix.*prefix_tokens=0"):
        model.set_attn_implementation("sdpa")


def test_a_damaged_prefix_is_refused(tmp_path):
    model = quantized(tiny_model())
    model.model.layers[1].self_attn.prefix.keys[0, 0, 0] = float("nan")
    w2a4.save(model, None, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.prefix.keys holds nan"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_a_cast_leaves_it_in_16_bits():
    module = KVPrefix.of(torch.randn(2, 3, 8), torch.randn(2, 3, 8)).to(torch.bfloat16)
    assert module.keys.dtype == module.values.dtype == torch.float16 and module.tokens == 3


def test_full_precision_is_measured_behind_it(tmp_path):
    plain, tokenizer = tiny_model(), tiny_tokenizer()
    options = dict(texts=["builtin"], seqlen=32, windows=3, progress=False)
    bare, behind = (
        perplexity.evaluate(plain, tokenizer, prefix=ids, **options)[0]["losses"] for ids in ((), (7, 9))
    )
    exact = with_prefix(w2a4.rotate(copy.deepcopy(plain)), (7, 9))
    own = perplexity.evaluate(exact, tokenizer, **options)[0]["losses"]
    assert own == pytest.approx(behind, abs=1e-3) and own != pytest.approx(bare, abs=1e-2)

    plain.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    w2a4.save(quantized(plain), tokenizer, tmp_path / "packed")
    found = tmp_path / "found.json"
    arguments = [tmp_path / "packed", "--reference", tmp_path / "plain", "--text", "builtin", "--seqlen", 32,
                 "--windows", 2, "--json", found]  # fmt: skip
    done = CliRunner().invoke(main, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0 and "full precision, with its prefix" in done.output
    reference = json.loads(found.read_text())["reference"]
    assert reference["behind_prefix"][0]["losses"] != reference["texts"][0]["losses"]
