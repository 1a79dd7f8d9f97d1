"""Every size of a head that a LLaMA has, by the default recipes: quantised, saved, generated, trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import w2a4
from support.packed import calibration, prompt
from support.tiny_models import tiny_llama
from w2a4 import arch
from w2a4.errors import RecipeError
from w2a4.recipe import Recipe

#: Size of a head and heads, so that o_proj has as many inputs as `auto` has groups of 128, 64 or 32 for.
HEADS = [(48, 8), (64, 2), (80, 8), (96, 4), (100, 32), (112, 8), (120, 16), (128, 2), (160, 4), (192, 2)]


def tiny(head_dim, heads):
    return tiny_llama(
        dtype=torch.float32, vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=heads // 2, eos_token_id=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "head_dim,heads,recipe",
    [(*shape, "w2a4kv4") for shape in HEADS] + [(80, 8, "w4a4kv4"), (96, 4, "w4a4kv4")],
)
def test_quantise_save_and_generate(head_dim, heads, recipe, tmp_path):
    model = tiny(head_dim, heads)
    made = w2a4.quantize(model, None, recipe, calibration(4, 16), progress=False)
    assert max(entry["relative_error"] for entry in made.layers) < 0.3
    o_proj = model.model.layers[0].self_attn.o_proj
    scales = o_proj.act_group_size if o_proj.act_group_size != -1 else o_proj.in_features
    block = min(o_proj.group_size, scales)
    assert block % 32 == 0, "CUDA and Triton kernels take no other"
    ids = prompt(tokens=7)
    want = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 7:]
    assert torch.equal(w2a4.Engine(model).generate([ids[0]], 4)[0], want)
    model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("head_dim,heads", [(100, 32), (80, 8), (48, 8)])
def test_train(head_dim, heads):
    recipe = Recipe.load("w2a4kv4-rcp-quick").override(calib_samples=4, calib_seqlen=16)
    model = w2a4.prepare(tiny(head_dim, heads), None, recipe, calibration(4, 16), progress=False)
    ids = prompt(tokens=9)
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads and all(g is not None and g.isfinite().all() for g in grads)
    want = model.eval()(ids).logits.detach()
    got = w2a4.convert(model)(ids).logits.detach()
    assert float((got - want).abs().max()) < 1e-3 * float(want.abs().max())


def act_group_size(recipe, name, head_dim, in_features):
    family = arch.of_model_type("llama")
    return family.act_group_size(recipe, family.site_of(name), head_dim, in_features)


@pytest.mark.parametrize(
    "head_dim,in_features,group,want",
    [
        (128, 4096, "auto", 128),
        (64, 576, "auto", 64),
        (16, 64, "auto", 16),
        (100, 3200, "auto", 3200),
        (96, 3072, "auto", 384),
        (80, 2560, "auto", 640),
        (112, 224, "auto", 224),
        (80, 2560, 16, 80),
        (80, 2560, -1, 80),
        (80, 2720, 32, 160),
        (96, 288, 72, 288),
    ],
)
def test_heads_that_share_a_scale(head_dim, in_features, group, want):
    recipe = Recipe(group_size=group, act_group_size=-1)
    got = act_group_size(recipe, "o_proj", head_dim, in_features)
    assert (in_features if got == -1 else got) == want
    assert act_group_size(recipe, "down_proj", head_dim, in_features) == -1
    assert act_group_size(recipe.override(o_proj_act="token"), "o_proj", head_dim, in_features) == -1


@pytest.mark.parametrize(
    ("asked", "name", "head_dim", "want"),
    [(64, "down_proj", 64, 64), (64, "o_proj", 128, 64), (256, "o_proj", 128, 128), (-1, "q_proj", 128, -1),
     (512, "q_proj", 128, -1)],
)  # fmt: skip
def test_activations_of_a_linear_share_scales_in_groups(asked, name, head_dim, want):
    recipe = Recipe(group_size=128, act_group_size=asked)
    assert act_group_size(recipe, name, head_dim, 512) == want


def test_a_group_of_activations_that_does_not_fit_is_refused_before_the_work():
    with pytest.raises(RecipeError, match=r"act_group_size=96 .*in_features=512.*\[256, 128, 64, 32, -1\]"):
        act_group_size(Recipe(group_size=128, act_group_size=96), "q_proj", 128, 512)
    model = tiny(64, 2)
    with pytest.raises(RecipeError, match="act_group_size=24"):
        w2a4.quantize(model, None, Recipe(act_group_size=24), calibration(4, 16), progress=False)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear, "nothing was touched"


def test_grouped_activations_save_train_and_err_less(tmp_path):
    """`act_group_size` in a checkpoint, in training and in the engine."""
    ids, error = prompt(tokens=7), {}
    for size in (-1, 16):
        model = tiny(64, 2)
        recipe = Recipe(name="grouped", weight_bits=4, act_group_size=size, calib_samples=4, calib_seqlen=16)
        full = model(ids).logits.detach()
        w2a4.quantize(model, None, recipe, calibration(4, 16), progress=False)
        error[size] = float((model(ids).logits.detach() - full).norm() / full.norm())
    assert error[16] < error[-1]
    want = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 7:]
    assert torch.equal(w2a4.Engine(model).generate([ids[0]], 4)[0], want)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.model.layers[0].mlp.down_proj.act_group_size == 16
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    trained = w2a4.prepare(tiny(64, 2), None, recipe, calibration(4, 16), progress=False)
    trained(ids, labels=ids).loss.backward()
    want = trained.eval()(ids).logits.detach()
    got = w2a4.convert(trained)(ids).logits.detach()
    assert float((got - want).abs().max()) < 1e-3 * float(want.abs().max())
