"""Sizes at the ends of what the formats hold: small and large weights, poor Hessians, overflow."""

import pytest
import torch

import w2a4
from support.packed import calibration, prompt
from support.tiny_models import tiny_llama
from w2a4.errors import W2A4Error
from w2a4.format.fake_quant import SMALLEST_SCALE, fp16_scale, lsq_fake_quant
from w2a4.format.grid import Uniform
from w2a4.format.linear import W8Embedding, W8Linear
from w2a4.format.rtn import fit_rtn
from w2a4.quantization.fit.gptq import GPTQOptions, fit_gptq

SHAPE = dict(vocab_size=131, hidden_size=64, intermediate_size=96, head_dim=16, eos_token_id=None)


def matrix(rows=48, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative_error(got, want) -> float:
    return float((got.double() - want.double()).square().sum() / want.double().square().sum())


def quantize(model, recipe="w2a4kv4", **override):
    recipe = w2a4.Recipe.load(recipe).override(**override)
    return w2a4.quantize(model, None, recipe, calibration(8, 32), progress=False)


def model(**shape):
    return tiny_llama(dtype=torch.float32, **{**SHAPE, **shape})


# small weights


@pytest.mark.parametrize("bits,size", [(2, 1e-4), (2, 1e-5), (2, 2e-7), (4, 1e-4), (4, 1e-5), (4, 5e-7)])
def test_small_weights_keep_their_relative_error(bits, size):
    weight, inputs = matrix(), matrix(300)
    hessian = inputs.T @ inputs
    usual = relative_error(fit_rtn(weight, bits, 64).dequantize(), weight)
    assert relative_error(fit_rtn(weight * size, bits, 64).dequantize(), weight * size) < 1.3 * usual
    usual = fit_gptq(weight, hessian, bits, 64)[1]
    assert fit_gptq(weight * size, hessian, bits, 64)[1] < 1.3 * usual


@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5])
def test_small_8_bit_rows(size):
    weight = matrix() * size
    table, linear = torch.nn.Embedding(48, 128), torch.nn.Linear(128, 48, bias=False)
    table.weight.data = linear.weight.data = weight
    assert relative_error(W8Embedding.from_embedding(table)(torch.arange(48)), weight) < 1e-4
    assert relative_error(W8Linear.from_linear(linear).dequantize(), weight) < 1e-4


def test_scales_in_float16_are_never_too_small():
    wanted = torch.cat([torch.logspace(-12, 6, 400), torch.zeros(1), torch.tensor([SMALLEST_SCALE * 3])])
    scale = fp16_scale(wanted).float()
    assert scale.isfinite().all() and (scale >= SMALLEST_SCALE).all()
    small = wanted < 6e-5
    assert (scale[small] >= wanted[small]).all(), "a range that is cut is worse than a coarser step"
    inside = (wanted > SMALLEST_SCALE) & (wanted < 6e4)
    assert (
        (scale - wanted).abs()[inside] <= torch.maximum(wanted[inside] / 2**11, wanted.new_tensor(2**-24))
    ).all()


def test_small_steps_are_trained_as_they_are_stored():
    weight, step = matrix(8, 64) * 1e-5, torch.full((8, 2), 3e-6)
    (scale, levels), groups = Uniform(4).trained(weight, [step], 32), weight.unflatten(1, (-1, 32))
    codes = Uniform(4).nearest(groups, scale, levels)
    stored = (codes * scale.float()[..., None]).flatten(1)
    assert torch.equal(lsq_fake_quant(weight, step, 32), stored)


@pytest.mark.parametrize("recipe", ["w2a4kv4", "w4a4kv4"])
def test_values_scaled_down_and_o_proj_up(recipe):
    """The same function, so as good a model."""
    plain, scaled = model(), model()
    ids = prompt(tokens=20)
    with torch.no_grad():
        want = plain(ids).logits
        for layer in scaled.model.layers:
            layer.self_attn.v_proj.weight.mul_(1e-4)
            layer.self_attn.o_proj.weight.mul_(1e4)
        quantize(plain, recipe)
        quantize(scaled, recipe)
        off, usual = (relative_error(m(ids, use_cache=False).logits, want) for m in (scaled, plain))
    assert off < 1.7 * usual


# weights out of range are told, with the layer


@pytest.mark.parametrize(
    "name,factor,message",
    [
        ("self_attn.v_proj", 1e-9, r"model\.layers\.1: v_proj: weights of .* 2-bit ones begin at 1e-07"),
        ("mlp.gate_proj", 1e12, r"model\.layers\.1: gate_proj: a weight is .* 2-bit weights reach"),
    ],
)
def test_weights_that_scales_do_not_reach(name, factor, message):
    broken = model()
    with torch.no_grad():
        broken.model.layers[1].get_submodule(name).weight.mul_(factor)
    with pytest.raises(W2A4Error, match=message):
        quantize(broken, **{"rotation.r1": "none", "rotation.r2": "none"})


def test_an_embedding_that_scales_do_not_reach():
    broken = model()
    with torch.no_grad():
        broken.model.embed_tokens.weight.mul_(1e-9)
    with pytest.raises(W2A4Error, match="model.embed_tokens: weights of"):
        quantize(broken)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_layer_that_overflows_is_named(method):
    broken = model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight.mul_(30)
        broken.model.layers[1].mlp.down_proj.weight.mul_(3000)
    with pytest.raises(W2A4Error, match=r"model\.layers\.1: .*NaN or Inf"):
        quantize(broken.half(), weight_method=method)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    broken = model()
    broken.model.layers[1].self_attn.k_proj.weight.data[3, 5] = value
    with pytest.raises(W2A4Error, match=r"model\.layers\.1\.self_attn\.k_proj\.weight holds NaN or infinity"):
        quantize(broken)


# Hessians


@pytest.mark.parametrize("tokens", [0, 1, 8])
@pytest.mark.parametrize("damp", [1e-300, 1e-9, 0.01])
@pytest.mark.filterwarnings("ignore:gptq_damp")
def test_hessians_of_few_tokens(tokens, damp):
    inputs = matrix(tokens, 128, 3) if tokens else torch.zeros(1, 128)
    weight, hessian = matrix(), inputs.T @ inputs
    fitted, error = fit_gptq(weight, hessian, 2, 64, GPTQOptions(damp=damp), hessian)
    assert fitted.dequantize().isfinite().all() and 0 <= error < 0.2


@pytest.mark.parametrize("exponent", [-60, -30, 30])
def test_the_size_of_inputs_does_not_matter(exponent):
    inputs, weight = matrix(300), matrix()
    hessian = inputs.T @ inputs
    want = fit_gptq(weight, hessian, 2, 64, cross=hessian)
    got = fit_gptq(weight, hessian * 2.0**exponent, 2, 64, cross=hessian * 2.0**exponent)
    assert torch.equal(got[0].codes, want[0].codes) and got[1] == pytest.approx(want[1])


def test_more_damping_than_asked_for_is_told():
    inputs = matrix(4, 128)
    with pytest.warns(UserWarning, match="gptq_damp=1e-09 is too little"):
        fit_gptq(matrix(), inputs.T @ inputs - 1e-6 * torch.eye(128) * 4, 2, 64, GPTQOptions(damp=1e-9))


def test_hessians_that_are_not_finite():
    hessian = torch.eye(128)
    hessian[0, 0] = float("inf")
    with pytest.raises(W2A4Error, match="NaN or Inf"):
        fit_gptq(matrix(), hessian, 2, 64)
