"""Quantising end to end on tiny models: packed against fake-quantised, shapes, switches, bad input."""

import copy

import pytest
import torch

import w2a4
from support.packed import SHAPE, calibration, logits, packed_model, prompt
from support.tiny_models import LLAMA3_ROPE, tiny_llama
from w2a4 import arch
from w2a4.errors import CalibrationError, RecipeError, RotationError, W2A4Error
from w2a4.format.linear import W8Embedding, W8Linear, _PackedLinear
from w2a4.ops import reference
from w2a4.quantization.layer import LayerQuantizer, Streams
from w2a4.runtime.attention import KVSettings

UNUSUAL = {
    "gqa": dict(num_attention_heads=6, num_key_value_heads=2, head_dim=16),
    "explicit head_dim": dict(head_dim=64),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "llama3 rope": dict(rope_scaling=LLAMA3_ROPE),
    "ffn 12 * 4": dict(intermediate_size=48),
    "odd groups": dict(hidden_size=90, head_dim=30),
}


class FakeLinear(torch.nn.Module):
    """What a packed linear computes, in float64 from unpacked weights and the reference's activations."""

    def __init__(self, packed: _PackedLinear, codes: list):
        super().__init__()
        self.packed, self.codes = packed, codes

    def forward(self, x):
        packed = self.packed
        x = x if packed.rotation is None else packed.rotation.apply(x)
        codes, scale = reference.quantize_a4(x, packed.act_clip, packed.act_group_size)
        self.codes.append(codes)
        seen = reference.dequantize_a4(codes, scale, packed.in_features).double()
        y = seen @ packed.dequantize().double().T
        return (y if packed.bias is None else y + packed.bias.double()).to(x.dtype)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_packed_model_is_the_fake_quantised_model(bits, shape):
    # A scale a token and the fit of full precision: in groups, codes of later layers flip in more places, and
    # all of a token's where its two ends are equally far from 0 and its scale takes the sign of the other.
    recipe = dict(weight_bits=bits, act_group_size=-1, gptq_target="full", act_codes="symmetric")
    packed, fake = packed_model(shape, **recipe), packed_model(shape, **recipe)
    codes: dict[str, list] = {"packed": [], "fake": []}
    for module in packed.modules():
        if isinstance(module, _PackedLinear):
            module.register_forward_pre_hook(
                lambda m, args: codes["packed"].append(
                    reference.quantize_a4(
                        args[0] if m.rotation is None else m.rotation.apply(args[0]),
                        m.act_clip,
                        m.act_group_size,
                    )[0]
                )
            )
    for name, module in list(fake.named_modules()):
        if isinstance(module, _PackedLinear):
            fake.set_submodule(name, FakeLinear(module, codes["fake"]))
    ids = prompt(2, 10)
    a, b = logits(packed, ids), logits(fake, ids)
    same = [float((x == y).float().mean()) for x, y in zip(codes["packed"], codes["fake"], strict=True)]
    # The first linears see identical inputs. Further in, fp32 rounding may move a value over a threshold.
    assert same[0] == 1.0 and min(same) > 0.99
    if min(same) == 1.0:
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [2, 4])
def test_report_and_layers(method, bits):
    model = packed_model(weight_bits=bits, weight_method=method)
    assert isinstance(model.lm_head, W8Linear) and isinstance(model.model.embed_tokens, W8Embedding)
    packed = {
        f"model.layers.{i}.{path}": linear
        for i, layer in enumerate(model.model.layers)
        for path, linear in layer.linears().items()
    }
    report = model.w2a4_report
    assert [entry["name"] for entry in report.layers] == list(packed) and len(packed) == 14
    assert all(m.bits == bits for m in packed.values())
    assert packed["model.layers.0.mlp.down_proj"].rotation.size == 176
    assert packed["model.layers.0.self_attn.o_proj"].act_group_size == SHAPE["head_dim"]
    assert report.seconds > 0 and report.calibration == "8 x 32 tokens"


def hidden_error(**recipe):
    model = tiny_llama(dtype=torch.float32, **SHAPE)
    ids = calibration(32, 32)
    with torch.inference_mode():
        full = model(ids).logits
    w2a4.quantize(model, None, w2a4.Recipe(name="test", **recipe), ids, progress=False)
    return float((logits(model, ids) - full).square().mean() / full.square().mean())


def test_gptq_beats_rtn_and_more_bits_beat_fewer():
    methods, bits = ("rtn", "gptq"), (2, 3, 4)
    errors = {(m, b): hidden_error(weight_method=m, weight_bits=b) for m in methods for b in bits}
    assert all(errors["gptq", b] < errors["rtn", b] for b in bits)
    assert errors["gptq", 4] < errors["gptq", 3] < errors["gptq", 2]


def test_sixteen_bits_everywhere_changes_nothing():
    model = tiny_llama(dtype=torch.float32, **SHAPE)
    before = logits(model, prompt())
    kept = dict(weight_bits=16, act_bits=16, kv_bits=16, head_bits=16, embed_bits=16)
    w2a4.quantize(model, None, w2a4.Recipe(**kept), calibration(), progress=False)
    torch.testing.assert_close(
        logits(model, prompt()), before, rtol=1e-4, atol=1e-4 * float(before.abs().max())
    )


def test_quantising_is_reproducible_and_leaves_the_global_generator_alone():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        model = tiny_llama(dtype=torch.float32, **SHAPE)
        w2a4.quantize(model, None, "w2a4kv4", calibration(), progress=False)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_quantising_twice_and_rotating_twice():
    model = packed_model()
    with pytest.raises(W2A4Error, match="quantised already"):
        w2a4.quantize(model, None, "w2a4kv4", calibration(), progress=False)
    with pytest.raises(RotationError, match="already"):
        w2a4.rotate(model)
    with pytest.raises(RotationError, match="already"):
        w2a4.rotate(w2a4.rotate(tiny_llama(**SHAPE)))


def test_bad_input_leaves_the_model_untouched():
    model = tiny_llama(dtype=torch.float32, **SHAPE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RecipeError, match="group_size=64 does not divide in_features=(96|176)"):
        w2a4.quantize(model, None, w2a4.Recipe(group_size=64), calibration(), progress=False)
    with pytest.raises(RecipeError, match="unknown recipe 'w3'"):
        w2a4.quantize(model, None, "w3", calibration(), progress=False)
    with pytest.raises(CalibrationError, match="the model knows 0..130"):
        w2a4.quantize(model, None, "w2a4kv4", calibration() + 131, progress=False)
    with pytest.raises(CalibrationError, match="shape"):
        w2a4.quantize(model, None, "w2a4kv4", calibration()[0], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_not_a_llama():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=40))
    with pytest.raises(W2A4Error, match="'gpt2'"):
        w2a4.quantize(model, None, "w2a4kv4", calibration(), progress=False)


def test_gguf_of_another_architecture_and_no_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(W2A4Error, match="'falcon'.*llama.*qwen3"):
        w2a4.load_model(tmp_path / "falcon.gguf")
    (tmp_path / "noise.gguf").write_bytes(b"not a model at all, not even close to one" * 10)
    with pytest.raises(W2A4Error, match="noise.gguf is not a GGUF file"):
        w2a4.load_model(tmp_path / "noise.gguf")
    with pytest.raises(W2A4Error, match="does not exist"):
        w2a4.load_model(tmp_path / "absent.gguf")


def test_an_interrupted_quantisation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = packed_model()
    layers_run = []
    run = LayerQuantizer.run

    def stop_at_the_second(self, *args):
        if len(layers_run) == 1:
            raise KeyboardInterrupt
        layers_run.append(1)
        return run(self, *args)

    arguments = dict(calibration=calibration(), progress=False, resume=tmp_path / "partial")
    monkeypatch.setattr(LayerQuantizer, "run", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        w2a4.quantize(tiny_llama(dtype=torch.float32, **SHAPE), None, "w2a4kv4", **arguments)
    monkeypatch.setattr(LayerQuantizer, "run", run)
    with pytest.raises(W2A4Error, match="another quantisation"):
        w2a4.quantize(tiny_llama(dtype=torch.float32, **SHAPE), None, "w4a4kv4", **arguments)
    model = tiny_llama(dtype=torch.float32, **SHAPE)
    monkeypatch.setattr(LayerQuantizer, "run", lambda self, *args: layers_run.append(1) or run(self, *args))
    report = w2a4.quantize(model, None, "w2a4kv4", **arguments)
    assert len(layers_run) == 2 and len(report.layers) == 14
    assert report.layers == whole.w2a4_report.layers
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    assert torch.equal(logits(model, prompt()), logits(whole, prompt()))


def model_with_massive_token(**changes):
    """Token 5, which nothing resembles, makes neuron 0 of layer 0 fire far harder than anything else does."""
    model = tiny_llama(dtype=torch.float32, hidden_size=64, intermediate_size=128, **changes)
    layer, embedding = model.model.layers[0], model.model.embed_tokens.weight.detach()
    alone = embedding[5] / embedding[5].norm()
    embedding[:5] -= embedding[:5] @ alone[:, None] * alone
    embedding[6:] -= embedding[6:] @ alone[:, None] * alone
    layer.post_attention_layernorm.weight.data.fill_(1)
    layer.self_attn.o_proj.weight.data *= 0.1
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight.data[0] += 6 * alone
    return model


def streams_behind(model, layer, ids, recipe):
    """Hidden states behind a layer that is quantised on these tokens: full precision and quantised."""
    x = model.model.embed_tokens(ids)
    streams = Streams([x], [x])
    cos_sin = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    LayerQuantizer(layer, recipe, KVSettings(4), cos_sin, arch.of_config(model.config)).run(streams)
    return streams.full[0], streams.quantized[0]


@torch.no_grad()
def test_a_token_with_a_massive_activation_does_not_decide_the_fit(monkeypatch):
    model = model_with_massive_token()
    ids = torch.randint(6, 67, (16, 32))
    ids[:, 0] = 5
    recipe = w2a4.Recipe.load("w4a4kv4").override(first_token=0, gptq_target="full")

    def others_error(layer):
        full, quantized = streams_behind(model, layer, ids, recipe)
        norms = full.norm(dim=-1)
        assert norms[:, 0].min() > 30 * norms[:, 1:].median()
        return float(((quantized - full).norm(dim=-1) / norms)[:, 1:].mean())

    weighted = others_error(copy.deepcopy(model.model.layers[0]))
    fit = LayerQuantizer._fit
    monkeypatch.setattr(LayerQuantizer, "_fit", lambda self, *args: fit(self, *args[:2]))
    assert weighted < 0.8 * others_error(model.model.layers[0])


def test_the_first_token_keeps_its_massive_activation():
    """Though the 4-bit noise of all other tokens goes through the same weights."""
    ids = torch.randint(6, 67, (4, 512))
    ids[:, 0] = 5
    kept = {}

    def measure(index, quantizer, inputs, streams):
        if index == 0:
            full, quantized = (torch.cat(stream)[:, 0] for stream in (streams.full, streams.quantized))
            kept[share] = float(((full * quantized).sum(-1) / full.square().sum(-1)).min())

    for share in (0.0, 0.125):
        recipe = w2a4.Recipe.load("w4a4kv4").override(
            first_token=share, gptq_refine=0, gptq_target="full", prefix_tokens=0
        )
        model = model_with_massive_token(max_position_embeddings=512)
        w2a4.quantize(model, None, recipe, ids, progress=False, refine=measure)
    assert kept[0.0] < 0.5 and 0.8 < kept[0.125] < 1.1
