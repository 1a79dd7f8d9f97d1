"""A rotated model that other packages read: plain, and the same function."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import w2a4
from support.families import ALL, tiny_family
from support.tiny_models import tiny_llama, tokens
from w2a4.errors import CheckpointError, RotationError
from w2a4.quantization.export import export_rotated

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = w2a4.Recipe.load("w4a4kv4").override(**{"rotation.r3": "none", "rotation.r4": "none"})

#: In a process that never imports w2a4.
SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
assert "w2a4" not in sys.modules
"""


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("family,case", ALL)
def test_computes_what_the_original_does(family, case, tmp_path):
    model = tiny_family(family, case)
    ids, before = tokens(model), logits(model, tokens(model))
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    export_rotated(model, None, PLAIN, tmp_path / "m", progress=False)
    assert not any(path.suffix == ".py" for path in (tmp_path / "m").iterdir())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert (again.model.layers[0].mlp.down_proj.weight - weight).abs().max() > 0.01
    assert (logits(again, ids) - before).abs().max() < 1e-4 * before.abs().max()


def test_loads_without_w2a4(tmp_path):
    model = tiny_llama(dtype=torch.float32, tie_word_embeddings=True)
    torch.save(tokens(model), tmp_path / "ids.pt")
    before = logits(model, tokens(model))
    export_rotated(model, None, PLAIN, tmp_path / "m", progress=False)
    arguments = [tmp_path / "m", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True)
    assert (torch.load(tmp_path / "logits.pt") - before).abs().max() < 1e-4 * before.abs().max()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config and config["w2a4_rotation"]["r1"] == "random_hadamard"
    with pytest.raises(RotationError, match="rotated already"):
        w2a4.rotate(AutoModelForCausalLM.from_pretrained(tmp_path / "m"))


def test_sixteen_bits_are_rounded_once(tmp_path):
    model = tiny_llama(dtype=torch.float32)
    half = tiny_llama(dtype=torch.float32).bfloat16()
    for made, name in ((model, "full"), (half, "half")):
        export_rotated(made, None, PLAIN, tmp_path / name, progress=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full").lm_head.weight
    assert (again.lm_head.weight - full).abs().max() < 2**-6 * full.abs().max()


def test_what_is_refused(tmp_path):
    with pytest.raises(RotationError, match="rotation.r4='hadamard'.*give rotation.r4=none"):
        export_rotated(tiny_llama(), None, w2a4.Recipe.load("w4a4kv4"), tmp_path / "m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError):
        export_rotated(tiny_llama(), None, PLAIN, tmp_path / "full")
