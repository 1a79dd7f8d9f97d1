"""Generation configs as models ship them are saved as they are; what cannot be saved is told at the start."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import w2a4
from support.packed import SHAPE, calibration
from support.tiny_models import tiny_llama
from w2a4.errors import CheckpointError

WARM = dict(temperature=0.9, top_p=0.6, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize("changed", [False, True], ids=["as loaded", "changed since"])
def test_sampling_parameters_without_sampling_travel(tmp_path, changed):
    source = tiny_llama(dtype=torch.float32, **SHAPE)
    source.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(WARM))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    if changed:
        model.generation_config.pad_token_id = 2
    kept = model.generation_config
    w2a4.quantize(model, None, "w4a4kv4", calibration(), progress=False)
    model.save_pretrained(tmp_path / "b")
    assert model.generation_config is kept
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b").generation_config
    expected = WARM | ({"pad_token_id": 2} if changed else {})
    assert {key: getattr(again, key) for key in expected} == expected


def unsavable(model):
    model.generation_config = GenerationConfig()
    model.generation_config.watermark = object()


def misplaced(model):
    model.config.temperature = 0.5


def weights_asked_for(model):
    model.set_attn_implementation("eager")
    model.config.output_attentions = True


@pytest.mark.parametrize(
    "spoil, message",
    [(unsavable, "generation_config cannot be saved"), (misplaced, "temperature.*0.5"),
     (weights_asked_for, "output_attentions=True")],
)  # fmt: skip
def test_what_cannot_be_saved_is_told_before_the_work(spoil, message):
    model = tiny_llama(dtype=torch.float32, **SHAPE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spoil(model)
    with pytest.raises(CheckpointError, match=message):
        w2a4.quantize(model, None, "w4a4kv4", calibration(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
