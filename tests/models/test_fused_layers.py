"""Packed decoder layers: few ops change speed, not results, names in a state dict, or files."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import w2a4
from support.packed import logits, packed_model, prompt
from w2a4.runtime.layer import PackedDecoderLayer, packed_layers


def is_fused(layer):
    joint = "qkv_proj" in layer.self_attn._modules and "gate_up_proj" in layer.mlp._modules
    return isinstance(layer, PackedDecoderLayer) and joint and layer.untouched()


def plain(model):
    """The same model through its modules one by one: something watches them."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: None)
    return model


RECIPES = [
    dict(),
    dict(weight_bits=4),
    {"rotation.r3": "none"},
    {"rotation.r4": "none"},
    {"rotation.r4": "random_hadamard"},
    {"rotation.r4": "random"},
    dict(kv_bits=16),
    dict(sink_tokens=2),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_results_are_those_of_the_modules(recipe):
    model, ids = packed_model(**recipe), prompt(2, 20)
    assert all(is_fused(layer) for layer in model.model.layers)
    # The norm sums in another order: codes next to a tie may differ by one step.
    want, got = logits(plain(model), ids), logits(model, ids)
    assert (got - want).norm() < 0.05 * want.norm()
    assert (got - want).abs().median() < 1e-4 * want.abs().max()


def test_bias():
    model = packed_model(dict(attention_bias=True, mlp_bias=True))
    want, got = logits(plain(model), prompt()), logits(model, prompt())
    assert all(is_fused(layer) for layer in model.model.layers)
    assert (got - want).norm() < 0.05 * want.norm()


def test_hooks_see_every_module():
    model, seen = packed_model(), []
    for module in model.model.layers[0].modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    logits(model, prompt())
    assert seen.count("W2A4Linear") == 4 and seen.count("LlamaRMSNorm") == 2


def test_the_class_keeps_its_name():
    layer = packed_model().model.layers[0]
    assert type(layer).__name__ == "LlamaDecoderLayer" and isinstance(layer, PackedDecoderLayer)


def test_a_state_dict_has_the_names_of_a_checkpoint():
    model = packed_model()
    layer, state = model.model.layers[0], model.state_dict()
    names = {name for name, _ in layer.named_parameters()}
    assert "self_attn.qkv_proj.weight" in names and not any("q_proj" in name for name in names)
    parts = [state[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(parts), layer.self_attn.qkv_proj.weight)
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in state)
    clips = [state[f"model.layers.0.mlp.{name}_proj.act_clip"] for name in ("gate", "up")]
    assert torch.equal(*clips) and clips[0].data_ptr() != clips[1].data_ptr()


def test_new_weights_are_seen():
    model, other, ids = packed_model(), packed_model(), prompt()
    before = logits(model, ids)
    with torch.no_grad():
        other.model.layers[0].self_attn.qkv_proj.weight[-3:].zero_()
        other.model.layers[1].mlp.gate_up_proj.scale.mul_(2)
    want = logits(other, ids)
    assert not torch.equal(want, before)
    for assign in (False, True):
        copied = copy.deepcopy(model)
        copied.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(logits(copied, ids), want)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_part_alone_can_be_loaded(assign):
    """Rows of the other parts stay."""
    model, ids = packed_model(), prompt()
    before, name = logits(model, ids), "model.layers.1.mlp.up_proj.scale"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict({name: 3 * state[name]}, strict=False, assign=assign)
    assert not torch.equal(logits(model, ids), before)
    whole = packed_model()
    whole.load_state_dict(state | {name: 3 * state[name]})
    assert torch.equal(logits(model, ids), logits(whole, ids))


def test_parts_with_clips_of_their_own(tmp_path):
    """A joint linear has one clip: such a state dict is refused, and such a checkpoint is not joined."""
    model, ids = packed_model(), prompt()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["model.layers.0.self_attn.k_proj.act_clip"] *= 0.5
    with pytest.raises(RuntimeError, match="k_proj.act_clip.* differ.*from_pretrained"):
        model.load_state_dict(state)
    packed_model().save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    attention = loaded.model.layers[0].self_attn
    assert set(attention._modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "qkv_proj" in loaded.model.layers[1].self_attn._modules
    got = logits(loaded, ids)
    attention.k_proj.act_clip.mul_(2)
    assert torch.equal(logits(loaded, ids), logits(packed_model(), ids))
    assert not torch.equal(got, logits(loaded, ids))
    assert packed_layers(loaded) is not None
    tokens = w2a4.Engine(loaded).generate([ids[0]], 4)[0]
    assert torch.equal(tokens, loaded.generate(ids[:1], max_new_tokens=4, do_sample=False)[0, ids.shape[1] :])


def test_a_replaced_module_is_seen():
    model, ids = packed_model(), prompt()
    logits(model, ids)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features)
    got = logits(model, ids)
    mlp.down_proj.weight.data.mul_(2)
    assert torch.isfinite(got).all() and not torch.equal(logits(model, ids), got)


def test_a_checkpoint_after_use_is_the_same_file(tmp_path):
    model, ids = packed_model(), prompt()
    fresh = copy.deepcopy(model)
    fresh.save_pretrained(tmp_path / "fresh")
    logits(model, ids)
    model.save_pretrained(tmp_path / "used")
    with (
        safe_open(tmp_path / "fresh/model.safetensors", "pt") as a,
        safe_open(tmp_path / "used/model.safetensors", "pt") as b,
    ):
        assert sorted(a.keys()) == sorted(b.keys())
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())


def test_other_attention_is_left_to_the_modules():
    model, ids = packed_model(kv_bits=16), prompt()
    want = logits(model, ids)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, ids), want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_joint_made_in_inference_mode_is_of_use_outside():
    model, ids = packed_model(), prompt()
    want = logits(model, ids)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, want)
    assert isinstance(w2a4.KV4Cache.for_model(model), w2a4.KV4Cache)
