"""Progress is taken up by the same model, recipe and text only, whichever tensor or key differs."""

import pytest
import torch

import w2a4
from support.packed import SHAPE, calibration
from support.tiny_models import tiny_llama
from w2a4.errors import CheckpointError
from w2a4.quantization.layer import Streams
from w2a4.quantization.resume import Progress, fingerprint

RECIPE = w2a4.Recipe.load("w2a4kv4").to_dict()


def key(change=None, recipe=RECIPE, ids=None, dtype=torch.float32):
    model = tiny_llama(dtype=dtype, **SHAPE)
    if change is not None:
        with torch.no_grad():
            change(model)
    return fingerprint(recipe, {}, calibration() if ids is None else ids, model)


@pytest.mark.parametrize("name", list(tiny_llama(**SHAPE).state_dict()))
def test_every_tensor_counts(name):
    def change(model):
        model.get_parameter(name).view(-1)[-1] += 1e-3

    assert key() == key() and key(change) != key()


def test_config_dtype_text_and_recipe_count(tmp_path):
    keys = [
        key(), key(dtype=torch.bfloat16), key(ids=calibration() * 0), key(ids=calibration()[:, :-1]),
        key(lambda model: setattr(model.config, "rms_norm_eps", 1e-3)),
        key(recipe=w2a4.Recipe.load("w2a4kv4").override(kv_clip=0.9).to_dict()),
    ]  # fmt: skip
    file = tmp_path / "r.safetensors"
    for content in (b"one", b"two"):
        file.write_bytes(content)
        learned = {"rotation.r1": "learned", "rotation.learned": str(file)}
        keys.append(key(recipe=w2a4.Recipe.load("w2a4kv4").override(**learned).to_dict()))
    assert len(set(keys)) == len(keys)
    assert key(lambda model: setattr(model.config, "_name_or_path", "elsewhere")) == key()


def test_another_fine_tune_is_refused(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(self, *args):
        store(self, *args)
        raise Killed

    store = Progress.store
    arguments = dict(calibration=calibration(), progress=False, resume=tmp_path)
    monkeypatch.setattr(Progress, "store", killed)
    with pytest.raises(Killed):
        w2a4.quantize(tiny_llama(dtype=torch.float32, **SHAPE), None, "w2a4kv4", **arguments)
    tuned = tiny_llama(dtype=torch.float32, **SHAPE)
    tuned.model.layers[0].self_attn.q_proj.weight.data[1, 1] += 0.1
    with pytest.raises(CheckpointError, match="another quantisation"):
        w2a4.quantize(tuned, None, "w2a4kv4", **arguments)


@pytest.mark.parametrize("damage", ["progress.json", "layer-0.safetensors", "streams-0.safetensors"])
def test_damaged_progress_is_named(tmp_path, damage):
    hidden = [torch.ones(1, 4, 8)]
    Progress(tmp_path, "key").store(torch.nn.Linear(2, 2), Streams(hidden, hidden), [])
    progress = Progress(tmp_path, "key")
    assert progress.done == 1 and progress.layer(0)["weight"].shape == (2, 2)
    progress.streams()
    (tmp_path / damage).write_text("{")
    with pytest.raises(CheckpointError, match=f"{damage}.*cannot be read.*remove"):
        progress = Progress(tmp_path, "key")
        progress.layer(0)
        progress.streams()
