"""What people do to any PyTorch module or any model of transformers: right here too, or refused."""

import copy
import io
import pickle

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import w2a4
from support.packed import packed_model, prompt
from support.tiny_models import tiny_llama
from w2a4.runtime.capturing import is_capturing
from w2a4.runtime.layer import packed_layers

pytestmark = [pytest.mark.doors, pytest.mark.usefixtures("one_thread")]


def logits(model, ids=None, **options):
    with torch.no_grad():
        return model(prompt(2, 8) if ids is None else ids, **options).logits


def rotated(**kinds):
    return w2a4.rotate(tiny_llama(dtype=torch.float32, intermediate_size=176), w2a4.RotationConfig(**kinds))


# Copies


@pytest.mark.parametrize("make", [packed_model, lambda: packed_model(weight_bits=4), rotated])
@pytest.mark.parametrize("used", [False, True])
def test_pickle_torch_save_and_deepcopy(make, used):
    model = make()
    ids = prompt(2, 8) % 60
    want = logits(make(), ids)
    if used:
        logits(model, ids, output_hidden_states=True)
        model.generate(ids, max_new_tokens=2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (
        pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False), copy.deepcopy(model), model
    ):  # fmt: skip
        assert type(again) is type(model) and torch.equal(logits(again, ids), want)
        assert (packed_layers(again) is None) == (packed_layers(model) is None)
        out = again.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, w2a4.KV4Cache) == (make is not rotated)


def _in_a_child(model, ids, queue):
    torch.set_num_threads(1)
    queue.put(logits(model, ids).tolist())


def test_a_spawned_process_takes_the_model():
    model, ids = packed_model(), prompt(1, 6)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(model, ids, queue))
    child.start()
    child.join(100)
    assert child.exitcode == 0
    assert torch.equal(torch.tensor(queue.get()), logits(model, ids))


def test_the_class_of_a_model_loads_and_makes_models(tmp_path):
    model = packed_model()
    model.save_pretrained(tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    cache = loaded(prompt()).past_key_values
    assert isinstance(cache, w2a4.KV4Cache) and cache.get_seq_length() == 9
    float_model = tiny_llama(dtype=torch.float32)
    float_model.save_pretrained(tmp_path / "float")
    assert type(type(model).from_pretrained(tmp_path / "float")) is LlamaForCausalLM
    assert type(type(model)(float_model.config)) is LlamaForCausalLM


def test_a_checkpoint_loads_as_a_language_model_only(tmp_path):
    packed_model().save_pretrained(tmp_path)
    with pytest.raises(w2a4.W2A4Error, match="not as LlamaModel; use AutoModelForCausalLM"):
        AutoModel.from_pretrained(tmp_path)
    for run in (
        w2a4.rotate,
        lambda model: w2a4.quantize(model, None, "w4a4kv4", prompt(8, 32), progress=False),
    ):
        with pytest.raises(w2a4.W2A4Error, match="LlamaModel is not a LlamaForCausalLM"):
            run(tiny_llama(dtype=torch.float32).model)
        model = tiny_llama(dtype=torch.float32)
        model.lm_head = torch.nn.Linear(32, 67)
        with pytest.raises(w2a4.W2A4Error, match=r"lm_head has a bias of shape \[67\]"):
            run(model)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [False, True])
def test_a_cast_model_is_one_loaded_in_that_dtype(dtype, used, tmp_path):
    for name, model in {"packed": packed_model(), "rotated": rotated()}.items():
        ids = prompt(2, 70) % 60
        model.save_pretrained(tmp_path / name)
        want = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype)
        if used:
            logits(model, ids)
        assert model.to(dtype).dtype == dtype
        assert torch.equal(logits(model, ids), logits(want, ids))
        assert logits(model, ids).dtype == dtype
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        engine = w2a4.Engine(model).generate([ids[0]], 4)[0]
        assert torch.equal(engine, model.generate(ids[:1], max_new_tokens=4, do_sample=False)[0, 70:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype):
    ids = prompt(8, 32)
    model, recipes = tiny_llama(dtype=torch.float32, vocab_size=131), ("w4a4kv4", "w2a4kv4")
    made = {}
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            for recipe in recipes:
                made[recipe, default] = packed = copy.deepcopy(model)
                w2a4.quantize(packed, None, recipe, ids, progress=False)
                tokens = packed.generate(ids[:1], max_new_tokens=4, do_sample=False)[0, 32:]
                assert torch.equal(w2a4.Engine(packed).generate([ids[0]], 4)[0], tokens)
        finally:
            torch.set_default_dtype(torch.float32)
    for recipe in recipes:
        pairs = zip(made[recipe, torch.float32].parameters(), made[recipe, dtype].parameters(), strict=True)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("recipe", [{}, {"rotation.r3": "random"}, {"kv_bits": 16, "act_bits": 16}], ids=str)
def test_autocast_leaves_packed_arithmetic_alone(recipe):
    model = packed_model(**recipe)
    want = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model)
    error = (got.float() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert float(error) < (0.02 if recipe else 1e-6)


# Inference mode, and training


@pytest.mark.parametrize(
    "kinds", [{}, {"r3": "random"}, {"r4": "random_hadamard"}, {"r4": "random"}], ids=str
)
def test_training_after_inference_mode(kinds):
    model, ids = rotated(**kinds, seed=4321 + len(str(kinds))), prompt(2, 8) % 60
    with torch.inference_mode():
        model(ids)
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    grad = model.model.layers[0].mlp.up_proj.weight.grad
    assert bool(grad.isfinite().all()) and bool(grad.any())


def test_what_was_made_in_inference_mode_is_saved_and_goes_on(tmp_path):
    with torch.inference_mode():
        model = copy.deepcopy(packed_model())
        cache = w2a4.KV4Cache.for_model(model)
        model(prompt(1, 6), past_key_values=cache)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    ids = torch.cat([prompt(1, 6), prompt(1, 3)], 1)
    with torch.no_grad():
        rest = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(rest, logits(model, ids, use_cache=False)[:, 6:], rtol=0, atol=1e-4)


# Gradients


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    "recipe", [{}, {"head_bits": 16}, {"act_bits": 16}, {"act_bits": 16, "kv_bits": 16}], ids=str
)
def test_gradients_to_inputs_are_refused_when_they_are_asked_for(recipe, use_cache):
    model, ids = packed_model(**recipe), prompt(1, 6)
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=inputs, labels=ids, use_cache=use_cache)  # by itself no mistake
    want = logits(model, ids, use_cache=use_cache)
    torch.testing.assert_close(out.logits.detach(), want, rtol=0, atol=1e-4 * float(want.abs().max()))
    with pytest.raises(w2a4.W2A4Error, match="gradient"):
        out.loss.backward()


@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients_to_inputs_are_right_where_nothing_is_rounded(use_cache):
    model, ids = packed_model(act_bits=16, kv_bits=16, head_bits=16), prompt(1, 6)
    inputs = model.get_input_embeddings()(ids).detach().double()

    def last(x):
        return model(inputs_embeds=x.float(), use_cache=use_cache).logits[0, -1, :5].sum()

    probe = inputs.clone().requires_grad_()
    last(probe).backward()
    direction = torch.zeros_like(inputs)
    direction[0, 0] = 1  # the first token reaches the last by attention alone
    with torch.no_grad():
        slope = (last(inputs + 0.01 * direction) - last(inputs - 0.01 * direction)) / 0.02
    torch.testing.assert_close((probe.grad * direction).sum().float(), slope, rtol=0.02, atol=1e-3)


def test_a_rotated_model_with_a_4_bit_cache_trains_without_it_and_says_so_with_it():
    model, ids = packed_model(weight_bits=16, act_bits=16, head_bits=16), prompt(1, 6)
    model(ids, labels=ids, use_cache=False).loss.backward()
    with pytest.raises(w2a4.W2A4Error, match="use_cache=False"):
        model(ids, labels=ids).loss.backward()


# Attention, and what is looked at


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_another_attention_is_refused_or_gives_the_same(kind):
    model = packed_model()
    want = logits(model)
    with pytest.raises(w2a4.W2A4Error, match=f"{kind}.*4-bit KV cache.*kv_bits=16"):
        model.set_attn_implementation(kind)
    assert torch.equal(logits(model), want)
    model.config._attn_implementation = kind
    for use_cache in (False, True):
        with pytest.raises(w2a4.W2A4Error, match=f"{kind}.*4-bit KV cache"):
            logits(model, use_cache=use_cache)
    for other in (packed_model(kv_bits=16), packed_model(kv_bits=16, act_bits=16)):
        want = logits(other)
        other.set_attn_implementation(kind)
        for use_cache in (False, True):
            error = (logits(other, use_cache=use_cache) - want).abs().max() / want.abs().max()
            assert float(error) < 0.02  # a code of an activation may be the next one


def test_attention_weights_are_refused_or_there():
    model = packed_model()
    want = logits(model)
    for run in (model, model.model):
        with torch.no_grad(), pytest.raises(w2a4.W2A4Error, match="output_attentions=True"):
            run(prompt(2, 8), output_attentions=True)
    with pytest.raises(w2a4.W2A4Error, match="output_attentions=True"):
        model.generate(prompt(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(logits(model), want) and packed_layers(model) is not None
    other = packed_model(kv_bits=16)
    other.set_attn_implementation("eager")
    with torch.no_grad():
        weights = other(prompt(2, 8), output_attentions=True).attentions
    assert len(weights) == 2 and torch.allclose(weights[0].sum(-1), torch.ones(2, 3, 8), atol=1e-5)


def test_hidden_states_once_leave_the_model_as_it_was():
    model = packed_model()
    want = logits(model)
    with torch.no_grad():
        out = model(prompt(2, 8), output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(out.logits, want)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), want)
    assert torch.equal(logits(model), want) and packed_layers(model) is not None
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert packed_layers(model) is None  # somebody else's does count
    hook = next(iter(model.model.layers[0].mlp._forward_hooks.values()))
    assert not is_capturing(hook)


# Vocabularies


def test_embeddings_that_are_packed_are_not_resized():
    model, ids = packed_model(), prompt()
    assert model.resize_token_embeddings(131) is model.get_input_embeddings()
    for wanted in (140, 100):
        with pytest.raises(w2a4.W2A4Error, match=rf"resize_token_embeddings\({wanted}\).*131 rows"):
            model.resize_token_embeddings(wanted)
    for token in (131, -1):
        ids[0, 3] = token
        with pytest.raises(w2a4.W2A4Error, match=f"token ids from .*{token}.*rows 0 to 130"):
            logits(model, ids)


def test_embeddings_in_16_bits_are_resized_saved_and_loaded(tmp_path):
    model = packed_model(embed_bits=16, head_bits=16)
    want = logits(model)
    model.resize_token_embeddings(140)
    torch.testing.assert_close(logits(model)[..., :131], want)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded, torch.tensor([[139, 5]])).shape[-1] == 140
    assert torch.equal(logits(loaded), logits(model))


# Generation settings


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.9, "top_p": 0.6}, {"top_k": 3, "pad_token_id": 2}], ids=str
)
def test_generation_settings_that_transformers_does_not_save(settings, tmp_path):
    model = packed_model()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    w2a4.save(model, None, tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for name, value in settings.items():
        assert getattr(loaded.generation_config, name) == value == getattr(model.generation_config, name)
    assert not loaded.generation_config.do_sample


def test_stop_strings_and_the_tokenizer_that_they_need():
    """`transformers serve` gives `generate` a tokenizer at every call; it comes through to the layers."""
    vocabulary = {"abcdef": 0} | {f"<{i}>": i for i in range(1, 131)}  # transformers tokenises that word
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="abcdef"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="abcdef")
    model, ids = packed_model(), prompt(1, 8)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, tokenizer=tokenizer), plain)
    third = f"<{int(plain[0, 10])}>"
    stopped = model.generate(
        ids, max_new_tokens=6, do_sample=False, tokenizer=tokenizer, stop_strings=[third]
    )
    first = (plain[0, 8:] == plain[0, 10]).nonzero()[0, 0]
    assert torch.equal(stopped, plain[:, : 8 + int(first) + 1])
