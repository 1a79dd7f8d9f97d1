"""Quantising, training and writing text on a CUDA device: the same code as on a CPU, elsewhere.

All need a GPU; `python -m benchmarks.gpu_run run` runs them.
"""

import pytest
import torch
from packed import calibration
from test_training import Letters, Writer, llama, small_recipe, stream
from watch import LONG, SLOW

import w2a4
from w2a4.training import generations, run

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def close(got, want):
    """Codes may differ where a sum is rounded differently; the function must not."""
    return torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("recipe", [pytest.param("w4a4kv4", marks=SLOW), "w2a4kv4"])
def test_layers_visit_the_gpu(recipe):
    ids = calibration()
    models = []
    for device in (None, CUDA):
        model = llama()
        w2a4.quantize(model, None, recipe, ids, progress=False, device=device)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
        models.append(model)
    assert close(logits(models[1], ids[:2]), logits(models[0], ids[:2]))
    assert close(logits(models[1].to(CUDA), ids[:2]), logits(models[0], ids[:2]))


@LONG
@pytest.mark.parametrize("route", ["end_to_end", pytest.param("block", marks=SLOW)])
def test_training(route, tmp_path):
    recipe = small_recipe(route=route, steps=20, init="lloyd")
    models = [
        run.train(llama(), Letters(), recipe, tmp_path / device.type, progress=False, device=device)
        for device in (torch.device("cpu"), CUDA)
    ]
    assert models[1].device.type == ("cpu" if route == "block" else "cuda")
    ids = calibration()[:2]
    assert close(logits(models[1], ids), logits(models[0], ids))


def test_the_teacher_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(generations, "LENGTH", 40)
    monkeypatch.setattr(generations, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(generations, "GPU_BATCH", 8)
    teacher = llama().to(CUDA, torch.bfloat16)
    path = tmp_path / "text.jsonl"
    whole = generations.write_generations(teacher, Writer(), stream(), 700, path, progress=False)
    assert len(path.read_text().splitlines()) == 24  # three batches
    path.unlink()
    again = generations.write_generations(teacher, Writer(), stream(), 700, path, progress=False)
    assert again == whole
