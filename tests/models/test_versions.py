"""Checkpoints that one version of transformers saved, under another: the same logits, tokens and text.

`tools/doors.sh` has every version save its own first; without it this version reads what it saved itself.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import w2a4
from support.packed import packed_model
from support.version_checkpoints import KINDS, TEXT, main, outputs, tokenizer
from w2a4.errors import CheckpointError
from w2a4.hub.portable import check_rope

pytestmark = pytest.mark.doors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    given = os.environ.get("W2A4_DOORS_CHECKPOINTS")
    if given:
        return Path(given)
    own = tmp_path_factory.mktemp("checkpoints")
    main(own)
    return own


@pytest.mark.parametrize("kind", KINDS)
def test_what_every_version_saved_loads_here(kind, folder, one_thread):
    saved = sorted(folder.iterdir())
    assert any(path.name == transformers.__version__ for path in saved)
    for path in saved:
        model = AutoModelForCausalLM.from_pretrained(path / kind)
        for name, value in load_file(path / kind / "outputs.bin").items():
            got = outputs(model)[name]
            # Two versions may order a product of RoPE otherwise: one rounding, no other code.
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5, msg=lambda m: f"{path}: {m}")  # noqa: B023
        text = AutoTokenizer.from_pretrained(path / kind)
        assert text(TEXT)["input_ids"] == tokenizer()(TEXT)["input_ids"], path
        assert text.eos_token == "</s>" and "<|end|>" in text.all_special_tokens


def test_a_config_says_rope_in_both_ways(folder):
    for path in sorted(folder.glob("*/w2a4-llama3/config.json")):
        config = json.loads(path.read_text())
        assert config["rope_theta"] == 10000.0 and config["rope_scaling"]["rope_type"] == "llama3", path
    for path in sorted(folder.glob("*/w4a4-theta/config.json")):
        assert json.loads(path.read_text())["rope_theta"] == 500.0


def test_rope_that_this_version_would_drop_is_refused(tmp_path):
    """A checkpoint that another program saved by version 5 has nothing but `rope_parameters`."""
    packed_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("rope_theta", "rope_scaling"):
        config.pop(name, None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1234.0}
    path.write_text(json.dumps(config))
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 1234.0
        AutoModelForCausalLM.from_pretrained(tmp_path)
        return
    with pytest.raises(CheckpointError, match="rope_parameters=.*1234.*does not read.*transformers 5"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_check_rope_knows_what_an_older_version_reads():
    class Old:
        rope_theta, rope_scaling = 10000.0, None
        rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}

    check_rope(Old)
    Old.rope_scaling = {"rope_type": "llama3", "factor": 8.0}
    with pytest.raises(CheckpointError, match="rope_parameters"):
        check_rope(Old)
    Old.rope_parameters = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0}
    check_rope(Old)
    Old.rope_parameters = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5.0}
    with pytest.raises(CheckpointError, match="'rope_theta': 5.0"):
        check_rope(Old)
    check_rope(LlamaConfig())


def test_a_tokenizer_under_the_name_that_all_versions_know(tmp_path):
    w2a4.save(packed_model(), tokenizer(), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(config.get("extra_special_tokens"), list)
