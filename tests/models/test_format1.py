"""A checkpoint of format 1, as w2a4 0.1.0 wrote it, loads with the bits that it had then.

`data/format1` is a LLaMA of two layers with random weights, quantised by `w2a4kv4` with seed 3, random R3
and R4, groups of 16, two sink tokens and kv_clip 0.9. `outputs.bin` holds token ids, the logits and the
greedy continuation of them, and in its metadata the torch and the instruction set that computed them.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import w2a4
from w2a4.errors import CheckpointError
from w2a4.format.manifest import read_manifest
from w2a4.hub.transformers import W2A4Config

FORMAT1 = Path(__file__).parents[1] / "data" / "format1"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def format1(tmp_path):
    return Path(shutil.copytree(FORMAT1, tmp_path / "format1"))


@torch.inference_mode()
def outputs(model, ids):
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return {"ids": ids, "logits": model(ids).logits, "tokens": tokens}


def check_outputs(model):
    """Bit for bit where torch and the instruction set are those of the record, else nearly."""
    want = load_file(FORMAT1 / "outputs.bin")
    found = outputs(model, want["ids"])
    with safe_open(FORMAT1 / "outputs.bin", framework="pt") as file:
        made_by = file.metadata()
    here = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    if made_by == here:
        assert torch.equal(found["logits"], want["logits"])
    else:  # another order of sums in float32 may move an activation to the next of 16 codes
        torch.testing.assert_close(found["logits"], want["logits"], rtol=0.05, atol=0.05)
    assert torch.equal(found["tokens"], want["tokens"])


def change(directory, edit):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_it_loads_with_the_bits_it_had(format1):
    w2a4.verify(format1)
    model = AutoModelForCausalLM.from_pretrained(format1)
    tensors, state = load_file(format1 / "model.safetensors"), model.state_dict()
    assert set(tensors) == set(state) and all(torch.equal(state[name], tensors[name]) for name in tensors)
    check_outputs(model)


def test_a_changed_rotation_is_refused(format1):
    change(format1, lambda part: part["rotation"]["online"]["r4"].update(seed=4))
    with pytest.raises(CheckpointError, match="r4"):
        AutoModelForCausalLM.from_pretrained(format1)


def test_saved_again_it_is_of_format_2_with_the_same_bits(format1, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(format1)
    model.save_pretrained(tmp_path / "again")
    w2a4.verify(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2 and "rotation" not in config
    was = json.loads((format1 / "config.json").read_text())["quantization_config"]
    assert config["recipe"] == was["recipe"] and config["provenance"] == was["provenance"]
    manifest = config["manifest"]
    assert manifest["r4"] == was["rotation"]["online"]["r4"] and manifest["kv_clip"] == 0.9
    recipes = (directory / "recipe.yaml" for directory in (format1, tmp_path / "again"))
    assert len({recipe.read_text() for recipe in recipes}) == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = load_file(FORMAT1 / "outputs.bin")["ids"]
    first, second = outputs(model, ids), outputs(again, ids)
    assert all(torch.equal(first[key], second[key]) for key in first)


def without_digests(directory):
    """As if the checkpoint had been written with the config.json that it has now."""
    file = directory / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})


def test_what_loading_does_not_need_may_have_any_name(format1):
    without_digests(format1)

    def rename(part):
        recipe = part["recipe"]
        recipe["training"]["learning_rate"] = recipe["training"].pop("lr")
        recipe["training"]["steps"] = "many"
        recipe["rotation_learning"] = {"by": "another version"}
        recipe["damping"] = recipe.pop("gptq_damp")

    change(format1, rename)
    w2a4.verify(format1)
    model = AutoModelForCausalLM.from_pretrained(format1)
    check_outputs(model)
    model.save_pretrained(format1.parent / "again")
    assert "learning_rate: 5.0e-05" in (format1.parent / "again" / "recipe.yaml").read_text()
    AutoModelForCausalLM.from_pretrained(format1.parent / "again")


def test_what_loading_needs_is_checked(format1):
    without_digests(format1)
    change(format1, lambda part: part["recipe"].update(weight_bits=5))
    with pytest.raises(
        CheckpointError, match="format 1: weight_bits=5: give one of 2, 3, 4, 16; config.json"
    ):
        AutoModelForCausalLM.from_pretrained(format1)


def test_fields_that_the_first_recipes_lacked():
    config = json.loads((FORMAT1 / "config.json").read_text())["quantization_config"]
    manifest = read_manifest(config)
    for key in ("act_group_size", "o_proj_act", "head_bits", "embed_bits"):
        del config["recipe"][key]
    del config["format_version"]
    assert read_manifest(config) == manifest


def test_a_newer_format_names_the_version_that_reads_it(format1):
    change(format1, lambda part: part.update(format_version=3, w2a4_version="0.9.1", needs_w2a4="0.9.0"))
    message = "format 3 is newer than 2.*written by w2a4 0.9.1 and needs w2a4 >= 0.9.0; upgrade w2a4"
    for read in (w2a4.verify, w2a4.load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            read(format1)


@pytest.mark.parametrize("version", [0, -1, 1.0, "2", True, None])
def test_formats_that_are_none(version):
    with pytest.raises(CheckpointError, match="format_version=.*give a number from 1 on"):
        read_manifest({"format_version": version})


def test_a_manifest_is_plain_data():
    config = json.loads((FORMAT1 / "config.json").read_text())["quantization_config"]
    manifest = read_manifest(config)
    data = json.loads(json.dumps(manifest.to_dict()))
    assert read_manifest({"format_version": 2, "manifest": data}) == manifest
    again = W2A4Config.from_dict(json.loads(W2A4Config.from_dict(config).to_json_string()))
    assert again.manifest == manifest and dict(again) == again.to_dict()
    assert pickle.loads(pickle.dumps(again)).to_dict() == again.to_dict()


VALUES = ("zz", 7, -1, 10**40, 1.5, float("nan"), True, None, [1], {"a": 1}, "\ud800", "x" * 5000)


def places(data):
    for key, value in data.items():
        yield data, key
        if isinstance(value, dict):
            yield from places(value)


@pytest.mark.parametrize("version", [1, 2])
def test_any_value_anywhere_loads_or_is_refused_in_a_few_words(version):
    config = json.loads((FORMAT1 / "config.json").read_text())["quantization_config"]
    if version == 2:
        config = W2A4Config.from_dict(config).to_dict()
    text = json.dumps(config)
    for i in range(len(list(places(config)))):
        for value in VALUES:
            changed = json.loads(text)
            part, key = list(places(changed))[i]
            part[key] = value
            try:
                W2A4Config.from_dict(changed).to_json_string()
            except CheckpointError as error:
                assert len(str(error)) < 1000
