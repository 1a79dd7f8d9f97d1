"""Every family of `arch`, on tiny random models of unusual shapes: the same tests for each."""

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

import w2a4
from support.families import ALL, CASES, SHAPE, tiny_family
from support.packed import logits
from w2a4 import arch
from w2a4.format.linear import _PackedLinear
from w2a4.quantization.rotation.learn import learn_rotation
from w2a4.quantization.smooth import smooth
from w2a4.runtime import sequences
from w2a4.runtime.heads import window_mask
from w2a4.runtime.layer import PackedDecoderLayer, packed_layers
from w2a4.train.linear import fake_quant_linears

pytestmark = pytest.mark.doors

#: One case a family, for what takes longer.
PLAIN = [(family, next(iter(CASES.get(family, {"plain": {}})))) for family in arch.names()]
WINDOWS = [pair for pair in ALL if pair[1] == "window"]


def tokens(batch: int = 2, length: int = 40, seed: int = 3) -> torch.Tensor:
    return torch.randint(
        3, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def quantized(family, case="plain", recipe="w4a4kv4", **changes):
    model = tiny_family(family, case)
    recipe = w2a4.Recipe.load(recipe).override(gptq_refine=1, **changes)
    w2a4.quantize(model, None, recipe, tokens(4, 40, 5), progress=False)
    return model


def exact_norms(model):
    """RMSNorms in the model's own dtype: those of transformers round to float32 even in float64."""

    def forward(module, x):
        return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)
    return model


def test_cases_are_of_families():
    assert set(CASES) <= set(arch.names()) and len(arch.names()) >= 6


def test_a_family_is_found_by_its_file_alone():
    for name in arch.names():
        family = arch.of_model_type(name)
        assert family.model_type == name and AutoConfig.for_model(name).model_type == name
        assert [site.rotation for site in family.sites] == ["r1", "r2", "r1", "r4"]


@pytest.mark.parametrize(("family", "case"), ALL)
@pytest.mark.parametrize("kinds", [{}, {"r1": "random", "r2": "random", "r3": "random", "r4": "random"}])
def test_rotations_leave_the_output_as_it_is(family, case, kinds):
    model, ids = exact_norms(tiny_family(family, case, dtype=torch.float64)), tokens()
    want, before = logits(model, ids), copy.deepcopy(model.state_dict())
    w2a4.rotate(model, w2a4.RotationConfig(**kinds))
    got = logits(model, ids)
    # RoPE's angles are float32 in either; some 100 float64 roundings lie on each way.
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()
    path = arch.of_model_type(family).attention_in.paths[0]
    name = f"model.layers.1.{path}.weight"
    assert (model.state_dict()[name] - before[name]).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "case"), PLAIN)
def test_smoothing_leaves_the_output_as_it_is(family, case):
    model, ids = exact_norms(tiny_family(family, case, dtype=torch.float64)), tokens()
    want, before = logits(model, ids), copy.deepcopy(model.state_dict())
    smooth(model, ids, 0.5)
    assert (logits(model, ids) - want).abs().max() <= 1e-11 * want.abs().max()
    for path in arch.of_model_type(family).paths:
        name = f"model.layers.1.{path}.weight"
        assert not torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize(("family", "case"), ALL)
def test_saved_loaded_and_generated_alike(family, case, tmp_path):
    model, ids = quantized(family, case), tokens()
    want = logits(model, ids)
    w2a4.save(model, None, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert all(isinstance(layer, PackedDecoderLayer) for layer in loaded.model.layers)
    assert torch.equal(logits(loaded, ids), want)
    checked = w2a4.verify(tmp_path / "packed")
    assert checked["packed"] and checked["compared"] == checked["tensors"]
    # Two prompts of 40 tokens pass any window; each sequence alone, in the engine, and with padding.
    cache = w2a4.KV4Cache.for_model(loaded)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    both = loaded.generate(ids, past_key_values=cache, **options)[:, 40:]
    assert cache.get_seq_length() == 47 and cache.nbytes() > 0
    engine = w2a4.Engine(loaded, max_length=64).generate(list(ids), 8, stop_tokens=[])
    for row, whole, own in zip(ids, both, engine, strict=True):
        alone = loaded.generate(row[None], **options)[0, 40:]
        assert torch.equal(own, alone) and torch.equal(whole, alone)


@pytest.mark.parametrize(("family", "case"), ALL)
def test_a_step_sees_what_a_whole_pass_sees(family, case):
    """Logits of every position are those of a pass over all tokens, whatever the cache."""
    model, ids = quantized(family, case), tokens(1, 40)
    want = logits(model, ids)
    caches = [w2a4.KV4Cache.for_model(model), DynamicCache(), w2a4.KV4StaticCache.for_model(model, 48)]
    if case != "window":
        caches.append(StaticCache(model.config, max_cache_len=48))
    for cache in caches:
        found = []
        with torch.inference_mode():
            for part in ids.split([17, 1, 1, 21], 1):
                found.append(model(part, past_key_values=cache, use_cache=True).logits)
        error = (torch.cat(found, 1) - want).abs().max() / want.abs().max()
        # Sums over keys are in another order: a code of an activation may be the next one.
        assert error < 0.05, type(cache)


@pytest.mark.parametrize(("family", "case"), WINDOWS)
def test_a_window_hides_old_tokens(family, case):
    model = quantized(family, case)
    ids = tokens(1, 60)
    changed = ids.clone()
    changed[0, :4] = (changed[0, :4] + 7) % 100 + 3
    layers = sum(window_mask(layer.self_attn, 60, ids.device) is not None for layer in model.model.layers)
    assert layers > 0
    same = torch.equal(logits(model, ids)[:, -1], logits(model, changed)[:, -1])
    # Three layers of 16 tokens look back 46: token 59 sees 14 and later if every layer has a window.
    assert same == (layers == 3)
    assert packed_layers(model, 16) is not None and packed_layers(model, 17) is None
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(ids, **options))
    if layers == 3:
        with torch.no_grad(), pytest.raises(w2a4.W2A4Error, match=r"KV4StaticCache.for_model\(model, tokens"):
            model(ids, past_key_values=StaticCache(model.config, max_cache_len=80))


@pytest.mark.parametrize(("family", "case"), ALL)
def test_calibration_sees_what_the_model_computes(family, case):
    """At 16 bits for activations and cache and 4 for weights, packed weights are all that differs."""
    model = tiny_family(family, case)
    packed = copy.deepcopy(model)
    recipe = w2a4.Recipe.load("w4a4kv4").override(act_bits=16, kv_bits=16, group_size=-1, head_bits=16,
                                                  embed_bits=16, weight_method="rtn")  # fmt: skip
    w2a4.quantize(packed, None, recipe, tokens(4, 40, 5), progress=False)
    by_hand = w2a4.rotate(copy.deepcopy(model), recipe.rotation)
    for layer, fitted in zip(by_hand.model.layers, packed.model.layers, strict=True):
        for path, linear in fitted.linears().items():
            layer.get_submodule(path).weight.data.copy_(linear.dequantize())
    ids = tokens()
    got, want = logits(packed, ids), logits(by_hand, ids)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    with torch.inference_mode():
        packed.set_attn_implementation("sdpa")
        other = packed(ids, use_cache=False).logits
    assert (other - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize(("family", "case"), PLAIN)
def test_hooks_and_hidden_states(family, case):
    model, ids, seen = quantized(family, case), tokens(), []
    want = logits(model, ids)
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == 4 and torch.equal(logits(model, ids), want)
    for name, module in model.model.layers[1].named_modules():
        if not list(module.children()) and name != "mlp.act_fn" and "activation" not in name:
            module.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    got = logits(model, ids)
    assert {"self_attn.o_proj", "mlp.down_proj", "input_layernorm"} <= set(seen) and len(seen) == len(
        set(seen)
    )
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize(("family", "case"), PLAIN)
def test_trained_packed_and_saved(family, case, tmp_path):
    model, ids = tiny_family(family, case), tokens(4, 24)
    recipe = w2a4.Recipe.load("w2a4kv4").override(gptq_refine=0)
    w2a4.prepare(model, None, recipe, tokens(4, 40, 5), progress=False)
    assert len(fake_quant_linears(model)) == 3 * len(arch.of_model_type(family).paths)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    prepared = logits(model.eval(), ids)
    w2a4.convert(model)
    packed = logits(model, ids)
    assert (packed - prepared).norm() < 0.05 * prepared.norm()
    w2a4.save(model, None, tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(loaded, ids), packed)


@pytest.mark.parametrize(("family", "case"), PLAIN)
def test_learned_rotations_fit_and_leave_the_output_as_it_is(family, case, tmp_path):
    model = exact_norms(tiny_family(family, case, dtype=torch.float64))
    ids, file = tokens(4, 40, 5), tmp_path / "r.safetensors"
    learning = {"steps": 3, "batch_size": 2, "seqlen": 40}
    learning = {f"rotation_learning.{key}": value for key, value in learning.items()}
    recipe = w2a4.Recipe.load("w4a4kv4").override(**learning)
    report = learn_rotation(tiny_family(family, case), None, recipe, ids, file, progress=False)
    assert len(report.losses) == 3 and max(report.final.values()) < 1e-4
    want = logits(model, ids)
    learned = {"r1": "learned", "r2": "learned", "learned": str(file)}
    # Learned on the float32 model, whose mark the file has.
    float_model = tiny_family(family, case)
    rotated = w2a4.rotate(float_model, w2a4.RotationConfig(**learned))
    assert (logits(rotated, ids) - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize(("family", "case"), PLAIN)
def test_an_unknown_module_in_a_layer_is_refused(family, case):
    model = tiny_family(family, case)
    model.model.layers[1].extra_norm = torch.nn.LayerNorm(8)
    with pytest.raises(w2a4.W2A4Error, match=r"layers\.1\.extra_norm"):
        w2a4.rotate(model)
    model = tiny_family(family, case)
    layer = copy.deepcopy(model.model.layers[0])
    layer.extra_norm = torch.nn.LayerNorm(8)
    with pytest.raises(w2a4.W2A4Error, match="extra_norm, a LayerNorm"):
        PackedDecoderLayer.of(layer, arch.of_model_type(family))


@pytest.mark.parametrize(
    ("model_type", "changes", "match"),
    [
        ("gemma2", {"head_dim": 32}, r"'gemma2' is not supported \(its norms behind .*soft cap.*reads llama"),
        ("mixtral", {}, r"'mixtral' is not supported \(its experts"),
        ("qwen3_moe", {}, "'qwen3_moe' is not supported .*experts"),
        ("gpt_neox", {}, "'gpt_neox' is not supported .*LayerNorms"),
        ("granite", {}, "'granite' is not supported .*multipliers"),
    ],
)
def test_other_families_are_refused_by_name_before_any_work(model_type, changes, match, tmp_path):
    sizes = {k: SHAPE[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads")}  # fmt: skip
    config = AutoConfig.for_model(model_type, **sizes, **changes)
    model = AutoModelForCausalLM.from_config(config)
    for run in (
        lambda: w2a4.rotate(model),
        lambda: w2a4.quantize(model, None, "w4a4kv4", tokens(), progress=False),
        lambda: w2a4.prepare(model, None, "w4a4kv4", tokens(), progress=False),
    ):
        with pytest.raises(w2a4.W2A4Error, match=match):
            run()
    config.save_pretrained(tmp_path)
    with pytest.raises(w2a4.W2A4Error, match=match):
        w2a4.load_model(tmp_path)


def test_features_that_are_not_computed_are_refused():
    for name, value in {"attn_logit_softcapping": 50.0, "num_local_experts": 4}.items():
        config = LlamaConfig(
            **{k: v for k, v in SHAPE.items() if k != "tie_word_embeddings"}, **{name: value}
        )
        with pytest.raises(w2a4.W2A4Error, match=f"{name}={value}.*not supported"):
            w2a4.rotate(LlamaForCausalLM(config))


def test_a_name_that_is_nearly_right_is_corrected():
    with pytest.raises(w2a4.W2A4Error, match="'quen2' is not supported; did you mean 'qwen2'"):
        arch.of_model_type("quen2")


def test_joint_linears_keep_their_names():
    """Phi 3 has joint linears of its own; other families get them, and save parts."""
    for family in ("phi3", "qwen2"):
        model = quantized(family)
        layer = model.model.layers[0]
        assert isinstance(layer.self_attn.qkv_proj, _PackedLinear)
        names = {name.split(".")[4] for name in model.state_dict() if ".self_attn." in name}
        assert names == (
            {"qkv_proj", "o_proj"} if family == "phi3" else {"q_proj", "k_proj", "v_proj", "o_proj"}
        )


@pytest.mark.parametrize(
    ("family", "case", "key", "value"),
    [("mistral", "window", "sliding_window", 32), ("smollm3", "plain", "no_rope_layers", [1, 1, 1]),
     ("qwen2", "window", "model_type", "llama"), ("llama", "plain", "model_type", "mistral")],
)  # fmt: skip
def test_a_config_that_was_changed_is_refused(family, case, key, value, tmp_path):
    w2a4.save(quantized(family, case), None, tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {key: value}))
    for load in (AutoModelForCausalLM.from_pretrained, w2a4.verify):
        with pytest.raises(w2a4.W2A4Error, match=key):
            load(tmp_path / "packed")


@pytest.mark.parametrize(("family", "case"), WINDOWS)
def test_sinks_beside_a_window(family, case):
    """What a window hides at the front is no padding."""
    model, ids = quantized(family, case, sink_tokens=4), tokens(1, 40)
    want = logits(model, ids)
    for sizes in ([40], [10, 30]):
        cache = w2a4.KV4Cache.for_model(model)
        with torch.inference_mode():
            calls = [model(part, past_key_values=cache, use_cache=True) for part in ids.split(sizes, 1)]
        assert [store.kept_sinks for store in cache.stores] == [4, 4, 4]
        got = torch.cat([call.logits for call in calls], 1)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize(("family", "case"), PLAIN)
def test_sinks_in_a_static_cache(family, case):
    model, ids = quantized(family, case, sink_tokens=4), tokens(2, 20)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(ids, **options))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_angles_of_a_long_prompt_are_those_of_its_length(kind, monkeypatch):
    """The engine reads prompts in pieces; transformers takes the angles of the whole."""
    monkeypatch.setattr(sequences, "PREFILL_CHUNK", 32)
    model, ids = quantized("llama", kind), tokens(1, 80)
    model.config.max_position_embeddings = 256
    engine = w2a4.Engine(model, max_length=120).generate([ids[0]], 6, stop_tokens=[])[0]
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(engine, model.generate(ids, **options)[0, 80:])


def test_the_engine_refuses_what_phi3_reads_again():
    rope = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [1.5] * 8}
    if transformers.__version__ < "5":
        rope = {"type": "longrope", **{key: rope[key] for key in ("short_factor", "long_factor")}}
    model = tiny_family("phi3", "plain", head_dim=16, rope_scaling=rope, original_max_position_embeddings=64)
    engine, ids = w2a4.Engine(model, max_length=128), tokens(1, 60)
    with pytest.raises(w2a4.W2A4Error, match="60 tokens and would pass 64.*max_new_tokens <= 4"):
        engine.generate([ids[0]], 8)
    assert len(engine.generate([ids[0]], 4, stop_tokens=[])[0]) == 4


def test_a_joint_linear_takes_whole_parts():
    model = quantized("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fewer = {name: value for name, value in state.items() if "q_proj" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.self_attn\.q_proj\.weight"):
        model.load_state_dict(fewer)
    assert len(model.load_state_dict(fewer, strict=False).missing_keys) == len(state) - len(fewer)
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    with pytest.raises(RuntimeError, match="size mismatch for .*q_proj.weight"):
        model.load_state_dict(state | {q: state[k], k: state[q]})
    attention = model.model.layers[0].self_attn
    for put in (
        lambda linear: setattr(attention, "q_proj", linear),
        lambda linear: model.set_submodule("model.layers.0.self_attn.q_proj", linear),
    ):
        with pytest.raises(w2a4.W2A4Error, match="q_proj is a part of qkv_proj"):
            put(torch.nn.Linear(96, 192))
    views = model.model.layers[0].linears()
    model.load_state_dict({k: v for k, v in state.items()}, assign=True)
    assert model.model.layers[0].linears()["mlp.up_proj"] is not views["mlp.up_proj"]
