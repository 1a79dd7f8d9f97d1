"""Checkpoints defend themselves: digests, config against tensors, values, and hostile directories."""

import json
import os
import resource
import time

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import w2a4
from support.packed import SHAPE, packed_model, prompt
from support.tiny_models import tiny_llama
from w2a4.cli import main as cli
from w2a4.errors import CheckpointError
from w2a4.format.digests import CONFIG, DIGESTS


@pytest.fixture(params=[2, 4], ids=["w2", "w4"])
def checkpoint(tmp_path, request):
    packed_model(weight_bits=request.param).save_pretrained(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def metadata(file):
    with safe_open(file, framework="pt") as shard:
        return shard.metadata()


def change_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def check_refused(directory, match):
    """By `verify`, by `load_model` and by transformers."""
    for read in (w2a4.verify, w2a4.load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=match):
            read(directory)


def test_what_was_written_is_verified(checkpoint, tmp_path):
    result = w2a4.verify(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    assert result["compared"] == result["tensors"] == len(tensors) and result["packed"]
    assert metadata(checkpoint / "model.safetensors")["format"] == "pt"
    done = CliRunner().invoke(cli.main, ["verify", str(checkpoint), "--json", str(tmp_path / "v.json")])
    assert done.exit_code == 0 and "all as they were written" in done.output
    assert json.loads((tmp_path / "v.json").read_text()) == result


def test_shards_have_their_digests(tmp_path):
    packed_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(w2a4.verify(tmp_path)["files"]) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(loaded(prompt()).logits, packed_model()(prompt()).logits)
    next(iter(sorted(tmp_path.glob("model-*")))).unlink()
    refused_by = pytest.raises(CheckpointError, match="missing")
    with refused_by:
        w2a4.verify(tmp_path)


def test_checkpoints_without_digests_load_and_float_ones_are_checked(checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(checkpoint)
    assert w2a4.verify(checkpoint)["compared"] == 0
    done = CliRunner().invoke(cli.main, ["verify", str(checkpoint)])
    assert done.exit_code == 0 and "no digests to compare" in done.output
    tiny_llama(dtype=torch.float32, **SHAPE).save_pretrained(tmp_path / "float")
    assert not w2a4.verify(tmp_path / "float")["packed"]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_flipped_bit_is_found(checkpoint, name):
    file = checkpoint / "model.safetensors"
    with safe_open(file, framework="pt") as shard:
        about = shard.metadata()
    tensors = load_file(file)
    tensors[name].view(torch.uint8).view(-1)[-1] ^= 1
    save_file(tensors, file, about)
    check_refused(checkpoint, f"{name} is not what was written")
    assert CliRunner().invoke(cli.main, ["verify", str(checkpoint)]).exit_code == 1


def test_digests_that_are_damaged_or_of_other_tensors(checkpoint):
    file = checkpoint / "model.safetensors"
    about, tensors = metadata(file), load_file(file)
    save_file(tensors, file, about | {DIGESTS: "[["})
    check_refused(checkpoint, "metadata w2a4.sha256 is damaged")
    save_file(tensors, file, about | {DIGESTS: "{}", CONFIG: "{}"})
    check_refused(checkpoint, "was put in after")


def quantization(*path, **values):
    def change(config):
        part = config["quantization_config"]
        for key in path:
            part = part[key]
        part.update(values)

    return change


CONFIGS = {
    "rotation gone": (lambda c: c["quantization_config"]["manifest"].pop("rotation"), "rotation is missing"),
    "r3 gone": (quantization("manifest", r3=None), "rotation.r3='hadamard'"),
    "r3 of blocks": (quantization("manifest", "r3", block_size=1, k=1), "rebuilds r3 from"),
    "r4 of another size": (quantization("manifest", "r4", size=44, block_size=44), "rebuilds r4"),
    "r4 of another seed": (quantization("manifest", "r4", seed=9), "rebuilds r4"),
    "rotation no mapping": (quantization("manifest", rotation=[1]), "rotation"),
    "r3 no mapping": (quantization("manifest", r3=[1]), "rotation .* is not a mapping"),
    "manifest gone": (lambda c: c["quantization_config"].pop("manifest"), "None is no manifest"),
    "another family": (quantization("manifest", family="mistral"), "family='mistral'"),
    "five bits": (quantization("manifest", weight_bits=5), "weight_bits=5: give one of 2, 3, 4, 16"),
    "another grid": (quantization("manifest", grid="uniform"), "grid='uniform' with weight_bits=2"),
    "a clip above 1": (quantization("manifest", kv_clip=1.5), "kv_clip=1.5"),
    "an unknown fact": (quantization("manifest", kv_bit=4), "unknown manifest key 'kv_bit'.*'kv_bits'"),
    "fewer layers": (lambda c: c.update(num_hidden_layers=1), "num_hidden_layers=1.*holds 2 layers"),
    "a thousand times the layers": (lambda c: c.update(num_hidden_layers=2000), "num_hidden_layers=2000"),
    "layers by name": (lambda c: c.update(num_hidden_layers="2"), "num_hidden_layers=2"),
    "no dtype": (lambda c: c.pop("dtype"), "dtype=None, the norms are F32"),
    "another dtype": (lambda c: c.update(dtype="bfloat16"), "dtype='bfloat16', the norms are F32"),
    "vocabulary": (lambda c: c.update(vocab_size=130), "131 rows.*vocab_size = 130"),
    "heads": (lambda c: c.update(num_attention_heads=1), "rows.*num_attention_heads"),
}


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("change, match", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_that_contradicts_tensors_or_itself(tmp_path, change, match, digests):
    packed_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if not digests:
        save_file(load_file(file), file, {"format": "pt"})
    change_config(tmp_path, change)
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=match):
        w2a4.verify(tmp_path)
    assert time.perf_counter() - started < 1
    with pytest.raises(CheckpointError, match=match):
        w2a4.load_model(tmp_path)


@pytest.mark.parametrize(
    "change, match",
    [
        (quantization("manifest", kv_clip=0.5), "manifest.kv_clip = 0.5.*manifest.kv_clip = 0.95"),
        (lambda c: c.update(rms_norm_eps=0.1), "rms_norm_eps = 0.1"),
    ],
)
def test_a_config_that_was_changed_since(checkpoint, change, match):
    change_config(checkpoint, change)
    check_refused(checkpoint, match)


@pytest.mark.parametrize(
    "name, change, match",
    [
        ("model.norm.weight", lambda t: t.view(torch.int32), "model.norm.weight is I32"),
        ("model.norm.weight", lambda t: t * float("nan"), "model.norm.weight holds nan"),
        ("model.layers.0.mlp.up_proj.scale", lambda t: -t, "up_proj.scale.* -"),
        ("model.layers.0.mlp.up_proj.levels", lambda t: t.flip(-1).contiguous(), "levels does not ascend"),
    ],
)
def test_values_that_cannot_be(tmp_path, name, change, match):
    packed_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check_refused(tmp_path, match)


@pytest.mark.parametrize("size", [{"num_hidden_layers": 10**9}, {"hidden_size": 10**12}, {"head_dim": -1}])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_hostile_sizes_are_refused_at_once(tmp_path, size, weights):
    tiny_llama(dtype=torch.float32, **SHAPE).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / weights)
    change_config(tmp_path, lambda config: config.update(size))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=next(iter(size))):
        w2a4.load_model(tmp_path)
    assert time.perf_counter() - started < 1


#: Sizes that nothing has, and that only the headers of the tensors tell to be wrong.
HOSTILE = [{"num_hidden_layers": 100_000}, {"vocab_size": 10**12}, {"intermediate_size": 10**12}]
WRONG = [{"num_hidden_layers": 900}, {"vocab_size": 10**7}, {"intermediate_size": 1 << 21}]


@pytest.mark.parametrize(
    "loader,size",
    # Where a config is not read by an Auto class it does not say which directory it comes from.
    [*((AutoModelForCausalLM, size) for size in HOSTILE + WRONG), *((LlamaForCausalLM, s) for s in HOSTILE)],
)
def test_transformers_builds_nothing_of_hostile_sizes(tmp_path, loader, size):
    """It builds a skeleton of as many layers as config.json says, unless it is stopped before."""
    packed_model().save_pretrained(tmp_path)
    change_config(tmp_path, lambda config: config.update(size))
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=next(iter(size))):
        loader.from_pretrained(tmp_path)
    assert time.perf_counter() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "extra"])
def test_a_fifo_in_a_directory_does_not_block(checkpoint, name):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    for read in (w2a4.verify, w2a4.load_model):
        with pytest.raises(CheckpointError, match=f"{name}.*FIFO"):
            read(checkpoint)
    if name in ("config.json", "model.safetensors"):
        assert CliRunner().invoke(cli.main, ["info", str(checkpoint)]).exit_code == 1


@pytest.mark.parametrize("text", ["[" * 100_000, "{}" + " " * (2 << 20), '"text"', "\udcff"])
def test_configs_that_are_none(checkpoint, text):
    (checkpoint / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        w2a4.verify(checkpoint)
