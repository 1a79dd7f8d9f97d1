"""prepare and convert: what trains is what is packed."""

import copy
import functools
import json

import pytest
import torch

import w2a4
from support.packed import SHAPE, calibration, prompt
from support.tiny_models import decoder_linears, tiny_llama
from w2a4.runtime.layer import packed_layers
from w2a4.train.linear import FakeQuantLinear, fake_quant_linears
from w2a4.train.prepare import convert, prepare


@functools.cache
def _prepared(overrides):
    model, recipe = tiny_llama(dtype=torch.float32, **SHAPE), w2a4.Recipe.load("w2a4kv4")
    return prepare(model, None, recipe.override(**json.loads(overrides)), calibration(), progress=False)


def prepared(**recipe):
    """A fresh copy of a prepared tiny LLaMA; keywords override the recipe `w2a4kv4`."""
    return copy.deepcopy(_prepared(json.dumps(recipe)))


RECIPES = [
    dict(),
    dict(weight_bits=4),
    dict(weight_bits=3),
    dict(weight_bits=3, weight_grid="uniform"),
    {"training.grid": "uniform"},
    {"training.grid": "uniform", "weight_bits": 3},
    {"training.init": "minmax"},
    {"training.init": "lloyd"},
    {"rotation.r4": "none", "rotation.r3": "none"},
    dict(act_bits=16),
    dict(sink_tokens=2, kv_clip=0.9),
]


def shaken(model, seed=0):
    """Trainable parameters moved a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.02 * noise * parameter.data.abs().mean()
    return model


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_converted_computes_what_the_prepared_model_did(recipe):
    model, ids = shaken(prepared(**recipe)), prompt(2, 20)
    model.eval()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    packed = convert(model)
    assert not fake_quant_linears(packed)
    with torch.no_grad():
        got = packed(ids, use_cache=False).logits
    # The fused norm sums in another order: a code next to a tie may differ by one step.
    assert (got - want).norm() < 0.05 * want.norm()
    assert (got - want).abs().median() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_training_mode_computes_what_eval_mode_does(recipe):
    model = shaken(prepared(**recipe))
    for linear in fake_quant_linears(model).values():
        inputs = torch.randn(3, 5, linear.in_features)
        with torch.no_grad():
            want = linear.eval()(inputs)
        got = linear.train()(inputs)
        assert got.requires_grad
        assert (got - want).abs().max() < 1e-5 * want.abs().max() + 1e-6
        with torch.no_grad():
            assert torch.equal(linear.to_packed()(inputs), want)


@pytest.mark.parametrize(
    "bits, grid", [(2, "auto"), (2, "uniform"), (3, "codebook"), (3, "uniform"), (4, "auto")]
)
def test_training_begins_with_the_codes_of_the_fit(bits, grid):
    model = tiny_llama(dtype=torch.float32, **SHAPE)
    recipe = w2a4.Recipe.load("w2a4kv4").override(weight_bits=bits, weight_grid=grid)
    packed = copy.deepcopy(model)
    w2a4.quantize(packed, None, recipe, calibration(), progress=False)
    prepare(model, None, recipe, calibration(), progress=False)
    fits = {f"model.layers.{i}.{path}": linear for i, layer in enumerate(packed.model.layers)
            for path, linear in layer.linears().items()}  # fmt: skip
    for name, linear in fake_quant_linears(model).items():
        want, got = fits[name].fitted().on(recipe.grid), linear.fitted()
        assert got.grid == recipe.grid
        # Groups of one sign, or with levels that coincide, LDP cannot quite represent.
        assert (got.codes != want.codes).float().mean() < 0.01, name
        error = (got.dequantize() - want.dequantize()).norm() / want.dequantize().norm()
        assert error < 0.02, (name, error)


@pytest.mark.parametrize(
    "recipe, quantizer",
    [
        ({}, ("beta", "gamma", "s1", "s2")),
        ({"weight_bits": 3}, ("beta", "gamma", "s1", "s2", "s3", "s4", "s5", "s6")),
        ({"weight_bits": 3, "weight_grid": "uniform"}, ("step",)),
    ],
    ids=str,
)
def test_what_is_trained(recipe, quantizer):
    model = prepared(**recipe)
    trained = {
        name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad
    }
    names = ("weight", *quantizer, "act_clip")
    assert trained == {f"{linear}.{name}" for linear in fake_quant_linears(model) for name in names}
    loss = model(prompt(2, 16), labels=prompt(2, 16), use_cache=False).loss
    loss.backward()
    for name in trained:
        grad = model.get_parameter(name).grad
        assert grad is not None and bool(torch.isfinite(grad).all()) and bool(grad.any()), name


@pytest.mark.parametrize("bits", [2, 3])
def test_fixed_quantizer_parameters(bits):
    model = prepared(**{"training.grid": "uniform", "training.learn_act_clip": False, "weight_bits": bits})
    for linear in fake_quant_linears(model).values():
        assert not linear.s1.requires_grad and not linear.act_clip.requires_grad
        levels = linear.fitted().levels.float()
        steps = levels.diff(dim=-1)
        assert (steps.amax(-1) - steps.amin(-1)).max() <= 2  # equal but for rounding


@pytest.mark.parametrize("recipe", [{}, {"weight_bits": 3}], ids=str)
def test_a_step_of_training_lowers_the_loss(recipe):
    model, ids = prepared(**recipe), prompt(4, 24)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    losses = []
    for _ in range(16):  # the first ones take weights to the borders of their cells
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0], losses


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = prepared(), prompt(2, 16)

    def grads():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    got = grads()
    assert want.keys() == got.keys()
    for name in want:
        assert torch.allclose(want[name], got[name], rtol=1e-4, atol=1e-7), name


def test_saved_after_training(tmp_path):
    model, ids = convert(shaken(prepared()), {"steps": 3}), prompt()
    model.save_pretrained(tmp_path / "out")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.w2a4_report.training == {"steps": 3}


@pytest.mark.parametrize(
    "codes, value",
    [("symmetric", -1e6), ("symmetric", -0.5), ("symmetric", 0.0), ("all", 0.0), ("all", 0.5), ("all", 1e6)],
)
@pytest.mark.parametrize("bits, name", [(2, "act_clip"), (3, "act_clip"), (4, "act_clip"), (4, "step")])
def test_a_clip_or_step_that_went_across_0_is_packed_and_loaded(codes, bits, name, value, tmp_path):
    """Training may overstep: what it computes with then has its sign, and is what is packed."""
    model, ids = prepared(weight_bits=bits, act_codes=codes), prompt()
    down = model.model.layers[0].mlp.down_proj
    getattr(down, name).data.fill_(value)
    inputs = torch.randn(3, down.in_features, generator=torch.Generator().manual_seed(0))
    out = down(inputs)
    out.square().sum().backward()
    assert bool(torch.isfinite(out).all()) and bool(torch.isfinite(getattr(down, name).grad).all())
    if name == "act_clip":
        assert bool(down.act_clip.grad.any())  # it can come back
    with torch.no_grad():
        want = down.to_packed()(inputs)
    assert (out - want).abs().max() < 1e-5 * want.abs().max() + 1e-6
    convert(model).save_pretrained(tmp_path / "out")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_clip_far_from_0_is_used_as_it_is():
    linear = prepared().model.layers[0].mlp.down_proj
    for value in (-0.9, -0.013, -1.7):
        linear.act_clip.data.fill_(value)
        assert torch.equal(linear.bounded_clip(), linear.act_clip)
    (gradient,) = torch.autograd.grad(3 * linear.bounded_clip().sum(), [linear.act_clip])
    assert float(gradient) == 3


def test_errors():
    model = tiny_llama(dtype=torch.float32, **SHAPE)
    with pytest.raises(w2a4.W2A4Error, match="weight_bits=16: there is nothing to train"):
        prepare(model, None, w2a4.Recipe(weight_bits=16, act_bits=16), calibration())
    with pytest.raises(w2a4.W2A4Error, match="no FakeQuantLinear"):
        convert(model)
    ready = prepared()
    linear = next(m for m in ready.modules() if isinstance(m, FakeQuantLinear))
    linear.s1.data[0, 0] = float("nan")
    with pytest.raises(w2a4.W2A4Error, match=r"layers.0.self_attn.q_proj.s1 holds NaN"):
        convert(ready)


def test_linears_of_one_input_share_their_clip():
    """So that a trained model's q, k and v, and gate and up, run as one linear each."""
    model = prepared()
    layer = model.model.layers[0]
    clips = {name: linear.act_clip for name, linear in decoder_linears(layer).items()}
    assert clips["q_proj"] is clips["k_proj"] is clips["v_proj"] is not clips["o_proj"]
    assert clips["gate_proj"] is clips["up_proj"] is not clips["down_proj"]
    with torch.no_grad():
        clips["q_proj"].mul_(0.9)
    packed = w2a4.convert(model)
    assert packed_layers(packed) is not None


def test_latent_weights_begin_with_the_codes_or_at_their_values():
    kept, free = (prepared(**{"training.keep_codes": keep}) for keep in (True, False))
    full = tiny_llama(dtype=torch.float32, **SHAPE)
    w2a4.rotate(full, w2a4.Recipe.load("w2a4kv4").rotation)
    original = decoder_linears(full.model.layers[0])
    for name, linear in decoder_linears(free.model.layers[0]).items():
        assert torch.equal(linear.weight, original[name].weight)
        same = decoder_linears(kept.model.layers[0])[name]
        assert (same.fitted().codes != linear.fitted().codes).float().mean() > 0.01


def test_a_bfloat16_model_takes_steps_that_bfloat16_would_round_away():
    model = prepare(tiny_llama(dtype=torch.bfloat16, **SHAPE), None, "w2a4kv4", calibration(), progress=False)
    linear = next(iter(fake_quant_linears(model).values()))
    before, optimizer = linear.weight.detach().clone(), torch.optim.SGD([linear.weight], lr=1.0)
    linear.weight.grad = before * 2.0**-10
    optimizer.step()
    assert bool((linear.weight != before)[before != 0].all())
    kept = linear.weight.bfloat16() == before.bfloat16()
    assert float(kept.float().mean()) > 0.5  # so many steps were lost
    ids = prompt(2, 16)
    model(ids, labels=ids, use_cache=False).loss.backward()
    out = convert(model)(ids).logits
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())
