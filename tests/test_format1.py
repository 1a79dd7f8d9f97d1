"""A checkpoint of format 1, as w2a4 0.1.0 wrote it, loads with the bits that it had then.

`data/format1` is a LLaMA of two layers with random weights, quantised by `w2a4kv4` with seed 3, random R3
and R4, groups of 16, two sink tokens and kv_clip 0.9. `outputs.bin` holds token ids, the logits and the
greedy continuation of them, and in its metadata the torch and the instruction set that computed them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import w2a4
from w2a4.errors import CheckpointError

FORMAT1 = Path(__file__).parent / "data" / "format1"

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
