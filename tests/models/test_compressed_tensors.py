"""What w2a4 writes as compressed-tensors: read by that package and transformers, it is the same model."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import w2a4
from support.families import ALL, tiny_family
from support.tiny_models import tiny_llama, tokens
from w2a4.errors import CheckpointError
from w2a4.format.online import OnlineRotation
from w2a4.hub.compressed_tensors import check_expressible, export_compressed_tensors, pack_int32

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = w2a4.Recipe.load("w4a4kv4").override(
    **{"rotation.r4": "none", "prefix_tokens": 0, "kv_bits": 16, "calib_samples": 2, "calib_seqlen": 16}
)

#: In a process that never imports w2a4.
SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
assert "w2a4" not in sys.modules
"""


def quantized(model, **changes):
    ids = torch.randint(3, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    w2a4.quantize(model, None, PLAIN.override(**changes), ids, progress=False)
    return model


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def loaded(path):
    pytest.importorskip("compressed_tensors")
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("family,case", ALL)
def test_transformers_computes_what_w2a4_does_without_activations(family, case, tmp_path):
    model = quantized(tiny_family(family, case), act_bits=16)
    export_compressed_tensors(model, None, tmp_path / "m", torch.float32)
    ids = tokens(model)
    expected = logits(model, ids)
    assert (logits(loaded(tmp_path / "m"), ids) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("changes", [{}, {"act_group_size": -1, "o_proj_act": "token"}, {"group_size": -1}])
def test_activations_are_those_of_the_format(changes, tmp_path):
    model = quantized(tiny_family("qwen2"), **changes)
    ids = tokens(model)
    groups = {
        name.rpartition(".")[2]: linear.act_group_size
        for name, linear in model.model.layers[0].named_modules() if hasattr(linear, "act_group_size")
    }  # fmt: skip
    export_compressed_tensors(model, None, tmp_path / "m", torch.float32)
    made = loaded(tmp_path / "m")
    result = logits(made, ids)  # the first pass unpacks its weights
    plain = tiny_family("qwen2", tie_word_embeddings=False)
    state = {k: v for k, v in made.state_dict().items() if not k.endswith(("_scale", "_shape"))}
    plain.load_state_dict(state)
    groups |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), groups.get("qkv_proj"))
    groups |= dict.fromkeys(("gate_proj", "up_proj"), groups.get("gate_up_proj"))
    for name, module in plain.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(rounding(groups[name.rpartition(".")[2]]))
    assert (result - logits(plain, ids)).abs().max() < 1e-5 * result.abs().max()


def rounding(group):
    def hook(module, arguments):
        x = arguments[0]
        parts = x.unflatten(-1, (-1, x.shape[-1] if group == -1 else group))
        scale = parts.abs().amax(-1, keepdim=True) / 7.5
        return ((parts / scale).round().clamp(-8, 7) * scale).reshape(x.shape)

    return hook


def test_loads_without_w2a4(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = quantized(tiny_llama(dtype=torch.float32), act_bits=16)
    torch.save(tokens(model), tmp_path / "ids.pt")
    export_compressed_tensors(model, None, tmp_path / "m", torch.float32)
    arguments = [tmp_path / "m", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True)
    expected = logits(model, tokens(model))
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("width", [8, 24, 30])
def test_codes_are_packed_as_the_package_packs_them(width):
    codes = torch.randint(-8, 8, (5, width), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack_int32(codes)
    assert packed.shape == (5, -(-width // 8)) and packed.dtype == torch.int32
    nibbles = (packed.long()[..., None] >> 4 * torch.arange(8)) & 15
    assert torch.equal(nibbles.flatten(1)[:, :width] - 8, codes.long())
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    assert torch.equal(helpers.pack_to_int32(codes, 4), packed)


def test_scales_of_either_sign_and_float16_are_kept(tmp_path):
    model = quantized(tiny_llama(dtype=torch.float32))
    export_compressed_tensors(model, None, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    scale = tensors["model.layers.0.mlp.down_proj.weight_scale"]
    assert scale.dtype == torch.float16 and bool((scale < 0).any())
    assert torch.equal(scale, model.model.layers[0].mlp.down_proj.scale)
    assert tensors["lm_head.weight"].dtype == torch.float16
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and not config["tie_word_embeddings"]
    assert not {"auto_map", "_name_or_path"} & set(config) and not list((tmp_path / "m").glob("*.py"))


def test_a_checkpoint_that_was_loaded_leaves_nothing_of_its_own(tmp_path):
    model = quantized(tiny_llama(dtype=torch.float32))
    model.generation_config.temperature = 0.7  # without do_sample, as many models ship it
    model.save_pretrained(tmp_path / "q")
    assert "auto_map" in json.loads((tmp_path / "q" / "config.json").read_text())
    export_compressed_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "q"), None, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert not {"auto_map", "_name_or_path"} & set(config)
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["temperature"] == 0.7


def test_numbers_that_the_dtype_does_not_hold(tmp_path):
    model = quantized(tiny_llama(dtype=torch.float32))
    with pytest.raises(CheckpointError, match="dtype=bfloat16.*float16 or float32"):
        export_compressed_tensors(model, None, tmp_path / "m", torch.bfloat16)
    model.model.norm.weight.data[0] = 1e5
    with pytest.raises(CheckpointError, match="model.norm.weight holds.*--dtype float32"):
        export_compressed_tensors(model, None, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = w2a4.prepare_for_adapters(quantized(tiny_llama(dtype=torch.float32)))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="q_proj has an adapter"):
        export_compressed_tensors(adapted.get_base_model(), None, tmp_path / "m")


@pytest.mark.parametrize("kind, width, blocks", [
    ("hadamard", 112, 2), ("hadamard", 112, 1), ("random_hadamard", 112, 1), ("random", 112, 1),
    ("random_hadamard", 1052, 263),  # blocks of 4, with signs of their own each
])  # fmt: skip
def test_r4_is_a_transform_for_vllm_alone(kind, width, blocks, tmp_path):
    recipe = {"rotation.r4": kind, "rotation.r4_blocks": blocks if kind == "hadamard" else 1}
    model = quantized(tiny_family("llama", intermediate_size=width), group_size="auto", **recipe)
    with pytest.raises(CheckpointError, match=f"rotation.r4='{kind}'.*--set rotation.r4=none.*--for-vllm"):
        export_compressed_tensors(model, None, tmp_path / "m")
    export_compressed_tensors(model, None, tmp_path / "m", torch.float32, for_vllm=True)
    quantization = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    scheme = quantization["transform_config"]["config_groups"]["R4"]
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    (name,) = [name for name in tensors if "R4" in name]
    assert name == "model.layers.0.mlp.down_proj.R4_input.weight"
    r4: OnlineRotation = check_expressible(model, for_vllm=True).r4
    x = torch.randn(3, r4.size)
    parts = x.unflatten(-1, (-1, scheme["head_dim"]))  # as vLLM multiplies them
    turned = (parts @ (tensors[name] / scheme["head_dim"] ** 0.5)).flatten(-2)
    assert (turned - r4.apply(x)).abs().max() < 1e-5
    assert scheme["head_dim"] == (r4.size // blocks if kind == "hadamard" else r4.size)
    assert r4.block_size == r4.size // blocks or kind == "random"


@pytest.mark.parametrize("changes, match", [
    ({"weight_bits": 2}, "weight_bits=2.*--recipe w4a4kv4"),
    ({"prefix_tokens": 1}, r"prefix=\[.*\].*--set prefix_tokens=0"),
])  # fmt: skip
def test_what_the_format_cannot_say_is_refused(changes, match, tmp_path):
    model = quantized(tiny_llama(dtype=torch.float32), **changes)
    with pytest.raises(CheckpointError, match=match):
        export_compressed_tensors(model, None, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_other_models_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="w2a4 quantize"):
        export_compressed_tensors(tiny_llama(), None, tmp_path / "m")
