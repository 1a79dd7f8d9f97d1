"""Packed layers against the float layers they stand for."""

import copy

import pytest
import torch
from torch import nn

import w2a4
from w2a4.errors import CheckpointError, RecipeError, W2A4Error
from w2a4.format.grid import grid_of
from w2a4.format.linear import PACKED_LINEARS
from w2a4.format.rtn import fit_rtn
from w2a4.ops import reference


def linear(inputs: int, outputs: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "inputs, group_size", [(128, 128), (192, 64), (96, 32), (30, -1), (91, -1), (256, 128)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_fake_quantised_linear(bits, inputs, group_size, bias):
    layer = PACKED_LINEARS[bits].from_linear(linear(inputs, 17, bias), group_size)
    x = torch.randn(2, 5, inputs)
    codes, scale = reference.quantize_a4(x, layer.act_clip, -1)
    seen = reference.dequantize_a4(codes, scale, inputs).double()
    expected = seen @ layer.dequantize().double().T
    if bias:
        expected = expected + layer.bias.double()
    # fp32 accumulation over the groups: a few rounding errors of the sum of magnitudes.
    bound = 4e-7 * (seen.abs() @ layer.dequantize().double().abs().T).max() + 1e-6
    assert layer(x).dtype == x.dtype and (layer(x).double() - expected).abs().max() < bound


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_activation_groups_and_16_bit_activations(bits):
    source = linear(192, 8)
    x = torch.randn(3, 192) * torch.tensor([1.0, 30.0, 0.1]).repeat_interleave(64)
    exact = PACKED_LINEARS[bits].from_linear(source, 64, act_bits=16)
    torch.testing.assert_close(exact(x), x @ exact.dequantize().T + source.bias)
    grouped = PACKED_LINEARS[bits].from_linear(source, 64, act_group_size=64)
    whole = PACKED_LINEARS[bits].from_linear(source, 64)
    error = [(layer(x) - exact(x)).square().mean() for layer in (grouped, whole)]
    assert error[0] < error[1]


@pytest.mark.parametrize("kind", ["codebook", "uniform"])
def test_bits_a_weight_of_three_bits(kind):
    """A uniform grid is stored as a codebook of its steps: as large, and the same weight."""
    source = linear(256, 8, bias=False)
    fitted = fit_rtn(source.weight.detach(), grid_of(3, kind), 128)
    layer = w2a4.W3A4Linear.from_linear(source, fitted=fitted)
    tensors = {name: p for name, p in layer.named_parameters() if name != "act_clip"}
    assert {name: p.dtype for name, p in tensors.items()} == {
        "weight": torch.uint8, "levels": torch.int8, "scale": torch.float16
    }  # fmt: skip
    assert sum(p.nbytes for p in tensors.values()) * 8 / (256 * 8) == 3 + 80 / 128
    assert torch.equal(layer.dequantize(), fitted.dequantize())
    again = layer.fitted().on(fitted.grid)
    assert torch.equal(again.codes, fitted.codes) and again.levels.shape == fitted.levels.shape


def test_bits_a_weight():
    layer = w2a4.W2A4Linear.from_linear(linear(256, 8, bias=False), 128)
    tensors = {name: p for name, p in layer.named_parameters() if name != "act_clip"}
    assert {name: p.dtype for name, p in tensors.items()} == {
        "weight": torch.uint8, "levels": torch.int8, "scale": torch.float16
    }  # fmt: skip
    assert sum(p.nbytes for p in tensors.values()) * 8 / (256 * 8) == 2 + 48 / 128


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casting_never_touches_codes_levels_or_scales(cast):
    layer = w2a4.W2A4Linear.from_linear(linear(64, 8), 32)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    cast(layer)
    for key in ("weight", "levels", "scale", "act_clip"):
        assert layer.state_dict()[key].dtype == before[key].dtype
        assert torch.equal(layer.state_dict()[key], before[key])
    assert layer.bias.dtype != torch.float32
    layer.validate("layer")


def test_no_gradient_and_state_dict_round_trip():
    layer = w2a4.W4A4Linear.from_linear(linear(64, 8), 32)
    assert not any(p.requires_grad for p in layer.parameters())
    other = w2a4.W4A4Linear(64, 8, group_size=32)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_w8_rows():
    source = linear(48, 33, bias=False)
    layer = w2a4.W8Linear.from_linear(source)
    x = torch.randn(2, 48)
    dequantized = layer.weight.float() * layer.scale.float()[:, None]
    assert ((dequantized - source.weight).abs() <= layer.scale.float()[:, None] * 0.51).all()
    torch.testing.assert_close(layer(x), x @ dequantized.T, rtol=1e-5, atol=1e-5)
    embedding = nn.Embedding(21, 8, padding_idx=0)
    packed = w2a4.W8Embedding.from_embedding(embedding)
    ids = torch.tensor([[0, 3], [20, 7]])
    assert (packed(ids) - embedding(ids)).abs().max() <= packed.scale.float().max() * 0.51
    assert (packed(torch.tensor([0])) == 0).all()


def test_replace_linears_serves_any_model():
    model = nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.ModuleDict({"lm_head": nn.Linear(96, 5), "x": nn.Linear(96, 5)})
    )
    w2a4.replace_linears(model, bits=4, group_size="auto")
    assert isinstance(model[0], w2a4.W4A4Linear) and isinstance(model[2]["x"], w2a4.W4A4Linear)
    assert type(model[2]["lm_head"]) is nn.Linear
    assert model[2]["x"](model[1](model[0](torch.randn(2, 64)))).shape == (2, 5)
    with pytest.raises(ValueError, match="no nn.Linear"):
        w2a4.replace_linears(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"bits=5: give one of \[2, 3, 4\]"):
        w2a4.replace_linears(nn.Sequential(nn.Linear(4, 4)), bits=5)


@pytest.mark.parametrize("kind", ["auto", "uniform"])
def test_replace_linears_by_three_bits(kind):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 5))
    errors = []
    for bits in (2, 3, 4):
        packed = w2a4.replace_linears(copy.deepcopy(model), bits=bits, weight_grid=kind)
        errors.append(float((packed[0].dequantize() - model[0].weight).square().mean()))
        assert packed(torch.randn(4, 64)).shape == (4, 5)
    assert errors[0] > errors[1] > errors[2]
    assert isinstance(w2a4.replace_linears(model, bits=3)[0], w2a4.W3A4Linear)


def test_replace_linears_keeps_what_is_shared():
    model = nn.ModuleDict({"a": nn.Linear(64, 64)})
    model["b"] = model["a"]
    w2a4.replace_linears(model)
    assert isinstance(model["b"], w2a4.W2A4Linear) and model["a"] is model["b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(group_size=0), "group_size=0: give a number >= 1"),
        (dict(group_size="foo"), "group_size='foo'"),
        (dict(group_size=64), "group_size=64 does not divide in_features=96"),
        (dict(act_clip=float("nan")), "act_clip=nan"),
        (dict(act_clip=0.0), r"act_clip=0.0: give a number in \(0, 1\]"),
    ],
)
def test_replace_linears_replaces_all_or_nothing(arguments, message):
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 90))
    with pytest.raises(RecipeError, match=message):
        w2a4.replace_linears(model, **arguments)
    model[1].weight.data[3, 4] = float("nan")
    with pytest.raises(W2A4Error, match="1.weight holds NaN"):
        w2a4.replace_linears(model)
    assert {type(module) for module in model} == {nn.Linear}


def test_bad_arguments_are_named():
    with pytest.raises(RecipeError, match="group_size=128 does not divide in_features=192"):
        w2a4.W2A4Linear.from_linear(linear(192, 4), 128)
    with pytest.raises(TypeError, match="takes an nn.Linear, not Conv1d"):
        w2a4.W2A4Linear.from_linear(nn.Conv1d(1, 1, 1))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("scale", torch.full((8, 2), float("nan"), dtype=torch.float16), r"layer.scale\[0, 0\] is nan"),
        (
            "scale",
            torch.full((8, 2), -1.0, dtype=torch.float16),
            r"is -1.0, but scales are finite and positive",
        ),
        ("scale", torch.ones(8, 2), r"layer.scale is torch.float32 \(8, 2\), expected torch.float16"),
        (
            "levels",
            torch.zeros(8, 1, 4, dtype=torch.int8),
            r"layer.levels is torch.int8 \(8, 1, 4\), expected .*\(8, 2, 4\)",
        ),
        ("weight", torch.zeros(8, 16, dtype=torch.int8), r"layer.weight is torch.int8"),
        ("act_clip", torch.zeros(1), r"layer.act_clip\[0\] is 0.0, but scales are finite and not 0"),
        ("weight", torch.zeros(8, 16, dtype=torch.uint8, device="meta"), "layer.weight is missing"),
    ],
)
def test_validate_names_what_is_damaged(key, value, message):
    layer = w2a4.W2A4Linear.from_linear(linear(64, 8), 32)
    layer.validate("layer")
    layer._parameters[key] = nn.Parameter(value, requires_grad=False)
    with pytest.raises(CheckpointError, match=message):
        layer.validate("layer")
