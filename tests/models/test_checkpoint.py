"""Saving and loading through transformers: bit for bit, whole or not at all, and loud when damaged."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import w2a4
from support.packed import SHAPE, packed_model, prompt
from support.tiny_models import tiny_llama
from w2a4.errors import CheckpointError, W2A4Error
from w2a4.format.directories import atomic_directory
from w2a4.format.manifest import FORMAT_VERSION
from w2a4.format.online import OnlineRotation
from w2a4.hub.transformers import install, prepare_skeleton


def logits(model):
    with torch.inference_mode():
        return model(prompt(2, 12)).logits


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


CASES = {
    "w2": dict(),
    "w3": dict(weight_bits=3),
    "uniform w3": dict(weight_bits=3, weight_grid="uniform"),
    "uniform w2": dict(weight_grid="uniform"),
    "w4": dict(weight_bits=4),
    "kept head and embeddings": dict(head_bits=16, embed_bits=16),
    "no rotation": {
        "rotation.r1": "none",
        "rotation.r2": "none",
        "rotation.r3": "none",
        "rotation.r4": "none",
    },
    "random online": {"rotation.r3": "random", "rotation.r4": "random"},
    "A16 KV16": dict(act_bits=16, kv_bits=16),
    "sinks": dict(sink_tokens=2),
    "biases": dict(shape=dict(attention_bias=True, mlp_bias=True)),
    "tied": dict(shape=dict(tie_word_embeddings=True)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loaded_model_gives_the_same_logits(case, tmp_path):
    model = packed_model(**case)
    model.save_pretrained(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert type(loaded).__name__ == "LlamaForCausalLM" and isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(logits(loaded), logits(model))
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize(
    "kwargs", [dict(device_map="cpu"), dict(device_map="auto"), dict(low_cpu_mem_usage=True)], ids=str
)
def test_loading_with_a_device_map(kwargs, tmp_path):
    model = packed_model()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, **kwargs)), logits(model))


def test_saved_again_and_sharded(tmp_path):
    model = packed_model()
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b")
    assert torch.equal(logits(again), logits(model))
    for name in ("report.json", "recipe.yaml"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    # Saving over an older checkpoint leaves no stale shards behind.
    again.save_pretrained(tmp_path / "a")
    assert not list((tmp_path / "a").glob("model-*.safetensors"))
    assert torch.equal(logits(load(tmp_path / "a")), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_keep_their_scales(dtype, tmp_path):
    model = tiny_llama(dtype=dtype, **SHAPE, attention_bias=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(
        model.config
    )  # `.to(dtype)` rounded its frequencies
    w2a4.quantize(model, None, "w2a4kv4", prompt(8, 32), progress=False)
    assert model.dtype == dtype and logits(model).dtype == dtype
    model.save_pretrained(tmp_path)
    for kwargs in (dict(), dict(dtype="auto"), dict(dtype=dtype)):
        loaded = load(tmp_path, **kwargs)
        if kwargs:
            assert torch.equal(logits(loaded), logits(model))
        for name, value in loaded.state_dict().items():
            if name.endswith(("levels", "scale", "act_clip")) or value.dtype == torch.uint8:
                assert (
                    torch.equal(value, model.state_dict()[name])
                    and value.dtype == model.state_dict()[name].dtype
                )


def test_what_is_on_disk(tmp_path):
    packed_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj"
    assert tensors[f"{layer}.weight"].dtype == torch.uint8 and tensors[f"{layer}.weight"].shape == (
        96,
        176 // 4,
    )
    assert tensors[f"{layer}.levels"].dtype == torch.int8 and tensors[f"{layer}.scale"].dtype == torch.float16
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is False
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "w2a4" and quantization["format_version"] == FORMAT_VERSION
    assert quantization["manifest"]["r4"]["size"] == 176
    recipe = w2a4.Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.to_dict() == quantization["recipe"] and recipe.weight_bits == 2
    report = w2a4.Report.from_json(tmp_path / "report.json")
    assert len(report.layers) == 14 and all(0 <= entry["relative_error"] < 1 for entry in report.layers)
    assert "w2a4" in (tmp_path / "README.md").read_text()
    code = [p.name for p in tmp_path.iterdir() if p.suffix in (".bin", ".pkl", ".pt", ".py")]
    assert code == ["configuration_w2a4.py"]


def test_rotated_only_model_saves_and_loads(tmp_path):
    model = tiny_llama(dtype=torch.float32, **SHAPE)
    before = logits(model)
    w2a4.rotate(model, w2a4.RotationConfig(seed=3))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    w2a4.quantize(model, None, "w4a4kv4", prompt(4, 16), progress=False)
    assert model.config.quantization_config.recipe["rotation"]["seed"] == 3


def test_without_the_import_loading_fails_instead_of_giving_noise(tmp_path):
    packed_model().save_pretrained(tmp_path)
    load_it = f"A.from_pretrained({str(tmp_path)!r}); print('LOADED')"
    code = f"from transformers import AutoModelForCausalLM as A; {load_it}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "LOADED" not in done.stdout and "size" in done.stderr.lower()


# Damage


@pytest.fixture
def checkpoint(tmp_path):
    packed_model().save_pretrained(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def edit(checkpoint, change):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


NAME = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[f"{NAME}.scale"].fill_(float("nan")), rf"{NAME}.scale\[0, 0\] is nan"),
        (lambda t: t[f"{NAME}.scale"].fill_(-1), rf"{NAME}.scale\[0, 0\] is -1"),
        (lambda t: t["lm_head.scale"].fill_(float("inf")), r"lm_head.scale\[0\] is inf"),
        (lambda t: t.pop(f"{NAME}.levels"), f"{NAME}.levels is missing"),
        (lambda t: t.pop(f"{NAME}.weight"), f"{NAME}.weight is missing"),
        (lambda t: t.update({f"{NAME}.levels": t[f"{NAME}.levels"].float()}), f"{NAME}.levels is .*expected"),
        (
            lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].to(torch.int32)}),
            f"{NAME}.weight is .*expected",
        ),
    ],
)
def test_damaged_tensors_are_named(checkpoint, change, message):
    edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_a_tensor_of_another_shape(checkpoint):
    edit(checkpoint, lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"][:, :5].contiguous()}))
    with pytest.raises((CheckpointError, RuntimeError), match="o_proj|mismatch"):
        load(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 3000])
def test_truncated_safetensors(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        w2a4.load_model(checkpoint)


def test_missing_safetensors_and_config(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors"):
        w2a4.load_model(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json"):
        w2a4.load_model(checkpoint)


def test_newer_format_version(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=f"format {FORMAT_VERSION + 1} is newer than {FORMAT_VERSION}.*upgrade"
    ):
        load(checkpoint)


# Writing


def test_an_error_while_saving_leaves_nothing_behind(tmp_path, monkeypatch):
    model = packed_model()
    model.save_pretrained(tmp_path / "good")
    before = {p.name: p.read_bytes() for p in (tmp_path / "good").iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("w2a4.hub.model.model_card", full_disk)
    for target in ("new", "good"):
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / target)
    assert [p.name for p in tmp_path.iterdir()] == ["good"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "good").iterdir()} == before


def test_a_kill_while_saving_leaves_no_checkpoint(tmp_path):
    code = (
        "import sys, time\nfrom w2a4.format.directories import atomic_directory\n"
        f"with atomic_directory({str(tmp_path / 'out')!r}) as d:\n"
        "    (d / 'config.json').write_text('{}'); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.05)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "config.json").write_text("{}")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_save_refuses_a_directory_in_use_and_a_file(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="used.*exists already"):
        w2a4.save(packed_model(), None, tmp_path / "used")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        packed_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_other_processes_than_the_main_one_write_nothing(tmp_path):
    packed_model().save_pretrained(tmp_path / "a", is_main_process=False)
    packed_model().save_pretrained(tmp_path / "a", False)
    assert not any(tmp_path.iterdir())
    packed_model().save_pretrained(tmp_path / "a", is_main_process=True)
    assert torch.equal(logits(load(tmp_path / "a")), logits(packed_model()))


def test_variants_are_refused(tmp_path):
    with pytest.raises(W2A4Error, match="variant='x' is not supported"):
        packed_model().save_pretrained(tmp_path / "a", variant="x")
    assert not any(tmp_path.iterdir())


def test_half_and_float_are_refused():
    with pytest.raises(ValueError, match="half"):
        packed_model().half()


LOAD = """
import re, sys, torch, w2a4
from transformers import AutoModelForCausalLM, LlamaForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])  # everything imported, allocator warm
def anonymous(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = anonymous("RssAnon")
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
print(anonymous("VmHWM") - anonymous("VmRSS") + anonymous("RssAnon") - before)
"""


def random_checkpoint(path):
    """A packed model of 100 million weights with random contents, without quantising one."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
        vocab_size=32000, num_hidden_layers=4,
    )  # fmt: skip
    quantization = packed_model().config.quantization_config
    r3, r4 = OnlineRotation("hadamard", 64, name="r3"), OnlineRotation("hadamard", 4096)
    quantization.manifest = dataclasses.replace(quantization.manifest, r3=r3, r4=r4)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    prepare_skeleton(model, quantization)
    model.to_empty(device="cpu")
    for value in model.parameters():
        value.data.fill_(1)
    install(model, quantization)
    model.save_pretrained(path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_needs_little_more_memory_than_the_checkpoint(tmp_path):
    random_checkpoint(tmp_path / "big")
    packed_model().save_pretrained(tmp_path / "small")
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert size > 60e6
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "big")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.3 * size, (int(done.stdout) / size, size)


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard", "random"])
@pytest.mark.parametrize("seed", [2**32, -(2**40), 2**63 + 5])
def test_a_checkpoint_of_a_seed_that_is_too_large_by_now(tmp_path, monkeypatch, kind, seed):
    """Recipes once took any; R3 and R4 are drawn from it whenever the model is loaded."""
    monkeypatch.setattr("w2a4.recipe.limits.SCHEMA.largest", 2**70)
    chosen = {"rotation.r3": kind, "rotation.r4": kind, "rotation.seed": seed}
    made = packed_model(**chosen, calib_samples=2, calib_seqlen=16)
    w2a4.save(made, None, tmp_path / "old")
    monkeypatch.undo()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    w2a4.verify(tmp_path / "old")
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.inference_mode():
        want = made(prompt()).logits
        assert all(torch.equal(model(prompt()).logits, want) for model in (loaded, again))
    assert again.config.quantization_config.manifest.rotation.seed == seed
    with pytest.raises(w2a4.errors.RecipeError, match="seed is"):
        w2a4.Recipe.from_dict(again.config.quantization_config.recipe)
    if kind != "hadamard":  # another seed is another model
        other = packed_model(**chosen | {"rotation.seed": 1}, calib_samples=2, calib_seqlen=16)
        assert again.config.quantization_config.online("r4") != other.config.quantization_config.online("r4")
