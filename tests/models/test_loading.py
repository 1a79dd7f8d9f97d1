"""Directories: what is missing, left over or prefixed is mapped or named, pickles are read safely."""

import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import w2a4
from support.packed import SHAPE, packed_model, prompt
from support.tiny_models import tiny_llama
from support.written import fill
from w2a4.errors import CheckpointError
from w2a4.format.directories import COMMIT, NAMES


def logits(model):
    with torch.inference_mode():
        return model(prompt()).logits


def save_tokenizer(path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)


@pytest.fixture
def directory(tmp_path):
    tiny_llama(dtype=torch.float32, **SHAPE).save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    return tmp_path / "m"


def rename(directory, new_name):
    """Tensors under other names; None leaves one out."""
    file = directory / "model.safetensors"
    tensors = {new_name(name): tensor for name, tensor in load_file(file).items()}
    save_file({k: v for k, v in tensors.items() if k}, file, {"format": "pt"})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "some"])
def test_prefixes_of_wrappers_are_taken_off(directory, prefix, kind):
    want = logits(w2a4.load_model(directory)[0])
    rename(directory, lambda name: prefix + name if kind != "some" or "layers.0" in name else name)
    if kind == "bin":
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    assert torch.equal(logits(w2a4.load_model(directory)[0]), want)


@pytest.mark.parametrize(
    "new_name, match",
    [
        (lambda n: None if n == "lm_head.weight" else n, r"lm_head.weight is missing"),
        (lambda n: None if n.startswith("model.layers.1.mlp.up") else n, "layers.1.mlp.up_proj.* is missing"),
        (lambda n: None if n.startswith("model.layers.1.") else n, "num_hidden_layers=2.*holds 1 layers"),
        (lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"), "q_proj.weight.*base_layer"),
        (lambda n: n.replace("model.norm", "model._orig_mod.norm"), "model.norm.weight is missing"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(directory, new_name, match):
    rename(directory, new_name)
    with pytest.raises(CheckpointError, match=match):
        w2a4.load_model(directory)


def test_what_is_left_over_is_named(directory):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.ones(96)}
    save_file(tensors | extra, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds model.layers.0.self_attn.q_proj.bias, which"):
        w2a4.load_model(directory)
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file(tensors | computed, file, {"format": "pt"})
    w2a4.load_model(directory)


def test_packed_checkpoints_have_no_tensor_too_many(tmp_path):
    packed_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.extra.weight": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds model.extra.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_bin_files_are_read_without_running_code(directory, monkeypatch):
    monkeypatch.chdir(directory)
    want = logits(w2a4.load_model(directory)[0])
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(state, directory / "pytorch_model.bin")
    assert torch.equal(logits(w2a4.load_model(directory)[0]), want)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, not model\.safetensors"):
        w2a4.evaluate.report.checkpoint_summary(directory)
    with pytest.raises(CheckpointError, match=r"\.bin, which cannot be verified"):
        w2a4.verify(directory)
    torch.save({"model.norm.weight": Harmful()}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot load"):
        w2a4.load_model(directory)
    assert not (directory / "harmed").exists()
    (directory / "pytorch_model.bin").write_bytes(b"PK truncated")
    with pytest.raises(CheckpointError, match="cannot load"):
        w2a4.load_model(directory)


PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")


@pytest.mark.parametrize(
    "how",
    [
        dict(device_map={**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}),
        dict(device_map={"": "disk"}),
        dict(device_map="auto", max_memory={"cpu": 60_000}),
    ],
    ids=["a layer", "all", "what does not fit"],
)
def test_offloading_is_no_damage(tmp_path, how):
    packed_model().save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"device_map keeps .* on (disk|cpu).*not offloaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", offload_folder=tmp_path / "offload", **how)


@pytest.mark.parametrize(
    "name",
    ["llama-w4", "./llama-w4", "models/llama-w4", "/no/such", "a/b/c", "~/llama", "no.gguf", "N.GGUF"],
)
def test_a_mistyped_path_is_told_at_once(tmp_path, monkeypatch, name):
    (tmp_path / "models" / "llama-w2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("w2a4.quantization.job.load_pretrained", lambda *_: pytest.fail("asked the hub"))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="does not exist") as error:
        w2a4.load_model(name)
    assert time.perf_counter() - started < 1
    assert ("'models/llama-w2'" in str(error.value)) == (name == "models/llama-w4")


def test_a_source_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "x.gguf").symlink_to("nothing")
    for name in ("notes.txt", "dangling", "x.gguf"):
        with pytest.raises(CheckpointError, match="no directory|no regular file"):
            w2a4.load_model(tmp_path / name)
    fill(tmp_path / "m", {"config.json": "{}", "model.safetensors.part": ""})
    with pytest.raises(CheckpointError, match=r"model.safetensors.part' is part of a download"):
        w2a4.load_model(tmp_path / "m")


def test_a_killed_writer_is_finished_for(directory):
    names = [p.name for p in directory.iterdir()]
    (directory / COMMIT).mkdir()
    for name in names:
        (directory / name).rename(directory / COMMIT / name)
    (directory / COMMIT / NAMES).write_text(json.dumps(names))
    assert w2a4.load_model(directory)[0] is not None
    assert sorted(p.name for p in directory.iterdir()) == sorted(names)
