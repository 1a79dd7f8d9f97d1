"""Decoder layers in few ops: what `fuse` changes is speed, not results, parameters or files."""

import copy

import pytest
import torch
from safetensors import safe_open

import w2a4
from support.packed import packed_model, prompt
from w2a4.runtime import layer as fused


def logits(model, ids):
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def is_fused(layer):
    return isinstance(layer, fused.FusedLayer) and fused._parts(layer).fit


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
    assert seen.count("W2A4Linear") == 7 and seen.count("LlamaRMSNorm") == 2


def test_the_class_keeps_its_name():
    layer = packed_model().model.layers[0]
    assert type(layer).__name__ == "LlamaDecoderLayer" and isinstance(layer, fused.FusedLayer)


def test_parameters_share_the_memory_of_the_joint():
    layer = packed_model().model.layers[0]
    qkv = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    want = [linear.weight.clone() for linear in qkv]
    joint = fused._parts(layer).joint_qkv.current()
    assert torch.equal(joint.weight, torch.cat(want))
    storages = {linear.weight.untyped_storage().data_ptr() for linear in (*qkv, joint)}
    assert len(storages) == 1
    assert not {name for name, _ in layer.named_parameters() if "joint" in name}


def test_new_weights_are_seen():
    model, other, ids = packed_model(), packed_model(), prompt()
    before = logits(model, ids)
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight.zero_()
        other.model.layers[1].mlp.up_proj.scale.mul_(2)
    want = logits(other, ids)
    assert not torch.equal(want, before)
    for assign in (False, True):
        copied = copy.deepcopy(model)
        copied.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(logits(copied, ids), want)
    assert torch.equal(logits(model, ids), before)


def other_scale(model):
    linear = model.model.layers[0].self_attn.k_proj
    linear.scale = torch.nn.Parameter(2 * linear.scale, requires_grad=False)


def other_levels(model):
    levels = model.model.layers[0].mlp.gate_proj.levels
    levels.data = levels.flip(-1).contiguous()


def other_clips(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["model.layers.0.self_attn.k_proj.act_clip"] *= 0.5
    model.load_state_dict(state)


def some_scales(model):
    name = "model.layers.1.mlp.up_proj.scale"
    model.load_state_dict({name: 3 * model.get_parameter(name)}, strict=False, assign=True)


@pytest.mark.parametrize("change", [other_scale, other_levels, other_clips, some_scales])
def test_parts_of_a_joint_that_change_are_seen(change):
    """A copy that was never run has made no joint yet."""
    model, ids = packed_model(), prompt()
    before = logits(model, ids)
    fresh = copy.deepcopy(model)
    change(model)
    change(fresh)
    want = logits(fresh, ids)
    assert not torch.equal(want, before)
    assert torch.equal(logits(model, ids), want)


def test_a_replaced_module_is_seen():
    model, ids = packed_model(), prompt()
    logits(model, ids)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features)
    assert not is_fused(model.model.layers[0])
    assert torch.isfinite(logits(model, ids)).all()


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
