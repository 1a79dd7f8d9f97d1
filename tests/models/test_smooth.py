"""Smoothing moves channel maxima as the formula says and changes no output; switches, errors, a use."""

import copy

import pytest
import torch

import w2a4
from benchmarks.experiments.outliers import four_bit_inputs, plant_outliers
from support.packed import SHAPE, calibration, prompt
from support.tiny_models import MODELS, tiny_llama, tokens
from w2a4 import arch
from w2a4.errors import CalibrationError, RotationError
from w2a4.evaluate.data import builtin_text
from w2a4.quantization.rotation import fold as fuse
from w2a4.quantization.rotation.learn import learn_rotation
from w2a4.quantization.smooth import SCALES, input_maxima, smooth
from w2a4.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
#: Everything in 16 bits and nothing turned: a quantised model is the smoothed one.
KEPT = Recipe(weight_bits=16, act_bits=16, kv_bits=16, head_bits=16, embed_bits=16).override(
    **{f"rotation.{name}": "none" for name in ("r1", "r2", "r3", "r4")}
)


@pytest.fixture(params=MODELS, ids=lambda name: name.replace(" ", "-"))
def model(request):
    return tiny_llama(**MODELS[request.param])


@torch.no_grad()
def logits(model, ids=None):
    return model(tokens(model) if ids is None else ids, use_cache=False).logits


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def maxima(model, ids):
    """By layer and first reader: max|x| and max|W| of the channels that get one scale each."""
    found = []
    for layer, seen in zip(model.model.layers, input_maxima(model, ids), strict=True):
        for site in reversed(arch.of_config(model.config).sites):
            readers = site.paths
            weights = torch.stack([layer.get_submodule(name).weight.abs().amax(0) for name in readers])
            pair = seen[readers[0]], weights.amax(0).detach()
            if readers == ("self_attn.o_proj",):  # the heads of a KV head together
                heads = layer.self_attn.v_proj.out_features // layer.self_attn.head_dim
                pair = tuple(x.view(heads, -1, layer.self_attn.head_dim).amax(1).flatten() for x in pair)
            found.append(pair)
    return found


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1])
def test_output_unchanged(model, alpha):
    ids = tokens(model, 3, 17)
    before, weights = logits(model, ids), state(model)
    assert smooth(model, ids, alpha) is model
    # Some 30 float64 roundings and two layers on each way: far from a weight's own size.
    assert (logits(model, ids) - before).abs().max() <= 1e-12 * before.abs().max()
    for name in ("self_attn.v_proj", "mlp.up_proj", "input_layernorm", "mlp.down_proj"):
        name = f"model.layers.1.{name}.weight"
        assert (model.state_dict()[name] - weights[name]).abs().max() > 1e-2


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1])
def test_maxima_are_as_the_formula_says(model, alpha):
    """X**(1-alpha) W**(1-alpha) of activations stays, X**alpha W**alpha goes to the weights."""
    ids = tokens(model, 3, 17)
    before = maxima(model, ids)
    smooth(model, ids, alpha)
    for i, ((x, w), (x_after, w_after)) in enumerate(zip(before, maxima(model, ids), strict=True)):
        if alpha == 0.5:
            torch.testing.assert_close(x_after, w_after, rtol=1e-9, atol=0)
        if alpha == 1:
            torch.testing.assert_close(x_after, torch.ones_like(x), rtol=1e-9, atol=0)
        torch.testing.assert_close(x_after**alpha, w_after ** (1 - alpha), rtol=1e-9, atol=0)
        if i % 4 in (0, 2):  # no later step touches what down_proj and o_proj read with
            s = x**alpha / w ** (1 - alpha)
            torch.testing.assert_close(x_after, x / s, rtol=1e-9, atol=0)
            torch.testing.assert_close(w_after, w * s, rtol=1e-9, atol=0)


def test_smoothing_again_changes_nothing():
    model = tiny_llama(**MODELS["odd heads"])
    ids = tokens(model)
    smooth(model, ids, 0.5)
    before = state(model)
    smooth(model, ids, 0.5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-10, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1])
def test_a_tensor_is_cast_once(alpha):
    """In bfloat16 weights are the float64 products rounded: v_proj gets two factors."""
    half = tiny_llama(dtype=torch.bfloat16)
    exact = copy.deepcopy(half).double().model.layers[0].self_attn
    ids = tokens(half)
    seen = input_maxima(half, ids)[0]
    smooth(half, ids, alpha)

    def scale(x, *weights):
        return x**alpha / torch.stack([w.abs().amax(0) for w in weights]).amax(0) ** (1 - alpha)

    most = seen["self_attn.o_proj"].view(2, 2, 8).amax(1)  # two KV heads of two query heads each
    rows = scale(most, exact.o_proj.weight.view(-1, 2, 2, 8).abs().amax(2))
    v = exact.v_proj.weight / rows.view(-1, 1)
    columns = scale(seen["self_attn.q_proj"], exact.q_proj.weight, exact.k_proj.weight, v)
    attention = half.model.layers[0].self_attn
    assert torch.equal(attention.v_proj.weight, (v * columns).bfloat16())
    wide = rows[:, None].expand(2, 2, 8).flatten()
    assert torch.equal(attention.o_proj.weight, (exact.o_proj.weight * wide).bfloat16())


@pytest.mark.parametrize("alpha", [0.5, 1])
def test_channels_that_are_never_used(alpha):
    model = tiny_llama(**MODELS["biases"])
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight[3] = 0  # no activation
        layer.mlp.down_proj.weight[:, 5] = 0  # no weight
        layer.mlp.up_proj.weight[7], layer.mlp.up_proj.bias[7] = 0, 0  # neither
        layer.mlp.down_proj.weight[:, 7] = 0
        layer.post_attention_layernorm.weight[9] = 1e-30  # hardly any
    q, up = layer.self_attn.q_proj.weight[:, 3].clone(), layer.mlp.up_proj.bias[[5, 7]].clone()
    gate = layer.mlp.gate_proj.weight[:, 9].clone()
    before = logits(model)
    smooth(model, tokens(model), alpha)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert (logits(model) - before).abs().max() <= 1e-12 * before.abs().max()
    assert torch.equal(layer.self_attn.q_proj.weight[:, 3], q)
    assert torch.equal(layer.mlp.up_proj.bias[[5, 7]], up)
    assert torch.equal(layer.mlp.gate_proj.weight[:, 9], gate * SCALES[0])


def test_maxima_are_over_all_windows():
    model = tiny_llama()
    ids = tokens(model, 5, 7)
    each = [input_maxima(model, part) for part in ids.split(2)]
    for i, whole in enumerate(input_maxima(model, ids)):
        for name, most in whole.items():
            assert most.dtype == torch.float64
            torch.testing.assert_close(torch.stack([part[i][name] for part in each]).amax(0), most)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_zero_is_off():
    model = tiny_llama()
    before = state(model)
    smooth(model, tokens(model), 0)
    assert_unchanged(model, before)
    states = []
    for recipe in (Recipe(), Recipe(smooth=0)):
        model = tiny_llama(dtype=torch.float32, **SHAPE)
        w2a4.quantize(model, None, recipe, calibration(), progress=False)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_quantize_and_prepare_smooth_first_and_say_so():
    recipe, ids = KEPT.override(smooth=0.5), calibration()
    want = smooth(tiny_llama(dtype=torch.float32, **SHAPE), ids, 0.5)
    fuse.rotate(want, recipe.rotation)
    model = tiny_llama(dtype=torch.float32, **SHAPE)
    report = w2a4.quantize(model, None, recipe, ids, progress=False)
    assert_unchanged(model, state(want))
    assert report.recipe["smooth"] == model.config.quantization_config.recipe["smooth"] == 0.5
    recipe = recipe.override(**{"weight_bits": 2, "training.init": "minmax"})  # latents stay as they are
    model = w2a4.prepare(tiny_llama(dtype=torch.float32, **SHAPE), None, recipe, ids, progress=False)
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        latent = model.model.layers[1].get_submodule(name).weight
        assert torch.equal(latent, want.model.layers[1].get_submodule(name).weight)
    assert model.config.quantization_config.recipe["smooth"] == 0.5


def test_rotations_are_learned_for_the_smoothed_model(tmp_path):
    recipe = Recipe(weight_bits=4, weight_method="rtn", smooth=0.5).override(
        **{"rotation.r1": "learned", "rotation_learning.steps": 2, "rotation_learning.batch_size": 2}
    )
    model, ids = tiny_llama(dtype=torch.float32, **SHAPE), calibration()
    before = state(model)

    def learn(model, recipe, name):
        return learn_rotation(model, None, recipe, ids, tmp_path / name, progress=False)

    report = learn(model, recipe, "a.safetensors")
    assert_unchanged(model, before)
    plain = recipe.override(smooth=0)
    assert learn(smooth(copy.deepcopy(model), ids, 0.5), plain, "b.safetensors").losses == report.losses
    assert learn(model, plain, "c.safetensors").losses != report.losses
    assert {"smooth", "calib_samples"} <= set(report.recipe)
    with pytest.raises(RotationError, match="other rotations"):
        learn(model, recipe.override(smooth=0.25), "a.safetensors")
    learn(model, recipe, "a.safetensors")  # there already
    w2a4.quantize(model, None, recipe, ids, progress=False)
    assert logits(model, prompt()).isfinite().all()


class TestFailsUntouched:
    def test_rotated_already(self):
        model = w2a4.rotate(tiny_llama(dtype=torch.float32, **SHAPE))
        before = state(model)
        with pytest.raises(RotationError, match="rotated or quantised by w2a4 already"):
            smooth(model, calibration(), 0.5)
        with pytest.raises(RotationError, match=r"smooth=0.5: .*rotated already.*set smooth=0"):
            w2a4.quantize(model, None, Recipe(smooth=0.5), calibration(), progress=False)
        with pytest.raises(RotationError, match="smooth=0.5"):
            w2a4.prepare(model, None, Recipe(smooth=0.5), calibration(), progress=False)
        assert_unchanged(model, before)
        w2a4.quantize(model, None, Recipe(weight_method="rtn"), calibration(), progress=False)
        model = fuse.rotate(tiny_llama(), KEPT.rotation)
        with pytest.raises(RotationError, match="rotated already"):
            smooth(model, tokens(model), 0.5)

    def test_a_part_that_no_rotation_covers(self):
        model = tiny_llama(dtype=torch.float32, **SHAPE)
        model.value_head = torch.nn.Linear(96, 1)
        before = state(model)
        with pytest.raises(RotationError, match="value_head.weight is not part of a plain LlamaForCausalLM"):
            w2a4.quantize(model, None, Recipe(smooth=0.5), calibration(), progress=False)
        assert_unchanged(model, before)

    def test_an_activation_that_overflows(self):
        model = tiny_llama(dtype=torch.float16)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.fill_(6e4)
        before = state(model)
        with pytest.raises(CalibrationError, match=r"layers.1.mlp.down_proj .*infinity.*torch.float16"):
            smooth(model, tokens(model), 0.5)
        assert_unchanged(model, before)


@pytest.mark.parametrize("alpha", [0.5, 0.75])
def test_four_bits_cost_less_where_outliers_were(alpha):
    """Weights as they are: what activations in 4 bits change the output by, without any rotation."""
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = plant_outliers(tiny_llama(dtype=torch.float32, **sizes), factor=32)
    calibrated, unseen = (
        torch.tensor(list(text.encode()[:512])).view(4, 128) for text in builtin_text()
    )  # fmt: skip
    exact = logits(model, unseen)

    def error() -> float:
        with four_bit_inputs(model):
            return float((logits(model, unseen) - exact).norm() / exact.norm())

    before = error()
    smooth(model, calibrated, alpha)
    torch.testing.assert_close(logits(model, unseen), exact, rtol=0, atol=1e-4 * float(exact.abs().max()))
    assert error() < 0.5 * before
