"""A checkpoint loads where nobody imports w2a4, for who trusts the code in it, and for nobody else."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import w2a4
from support.packed import SHAPE, packed_model, prompt
from support.tiny_models import tiny_llama
from w2a4.hub.portable import AUTO_MAP, CODE

pytestmark = pytest.mark.doors

#: What the command lines of lm-eval and transformers do, in a process of their own.
SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM
assert "w2a4" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code={trust})
torch.set_num_threads(1)
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
assert not hasattr(model.config, "auto_map")  # else its own save would name a file that it does not write
model.save_pretrained(sys.argv[4])
"""


def run(tmp_path, directory, trust):
    """(exit code, stderr, the modules that transformers copied to run them)."""
    torch.save(prompt(), tmp_path / "prompt.pt")
    modules = tmp_path / "modules"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(trust=trust), directory]
        + [tmp_path / "prompt.pt", tmp_path / "logits.pt", tmp_path / "again"],
        env=os.environ | {"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stderr, list(modules.rglob(CODE.name))


@pytest.mark.parametrize("kind", ["packed", "replaced"])
def test_with_the_flag(kind, tmp_path, one_thread):
    if kind == "packed":
        model = packed_model()
    else:
        model = tiny_llama(dtype=torch.float32, **SHAPE)
        w2a4.replace_linears(model, bits=2)
    model.save_pretrained(tmp_path / "m")
    status, said, copied = run(tmp_path, tmp_path / "m", True)
    assert status == 0, said
    assert copied
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(prompt()).logits)
    # What was loaded by the code is saved as it came: the same code, and none of transformers' own.
    for directory in (tmp_path / "m", tmp_path / "again"):
        assert [path.name for path in directory.glob("*.py")] == [CODE.name]
        assert (directory / CODE.name).read_bytes() == CODE.read_bytes()
        assert json.loads((directory / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert w2a4.verify(tmp_path / "again")["compared"]


def test_without_the_flag_nothing_of_it_runs(tmp_path):
    packed_model().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / CODE.name).write_text("raise SystemExit('it ran')")
    status, said, copied = run(tmp_path, tmp_path / "m", None)
    assert status == 1 and "w2a4" in said and "it ran" not in said
    assert not copied


def test_code_of_the_original_is_not_asked_for(tmp_path):
    """Phi-3's configurations name files that a checkpoint of w2a4 does not have."""
    model = packed_model()
    model.config.auto_map = {"AutoConfig": "somebody/phi--configuration_phi3.Phi3Config"}
    model.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["auto_map"] == AUTO_MAP
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")
