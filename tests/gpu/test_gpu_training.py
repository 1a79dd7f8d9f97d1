"""Quantising, training and writing text on a CUDA device: the same code as on a CPU, elsewhere.

All need a GPU; `python -m benchmarks.gpu_run run` runs them.
"""

import dataclasses

import pytest
import torch

import w2a4
from support.packed import calibration
from support.training_runs import TRAINING, Letters, Writer, llama, small_recipe, stream
from support.watch import LONG, SLOW
from w2a4.format import fake_quant as quantizers
from w2a4.train import generations, run
from w2a4.train.data import Windows
from w2a4.train.prepare import prepare
from w2a4.train.trainer import QATTrainer, training_arguments

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def likeness(got, want):
    return float(torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0))


def assert_as_good(gpu, cpu, alike):
    """Two models come as near to the float one, and each other.

    Fitting codes is chaotic: weights of this model that differ by 1e-7 get codes half of which differ, and
    with 2 bits logits of a likeness of 0.96, while theirs to the float model's stays the same to 0.002. One
    device sums in another order than the other, which is such a difference.
    """
    ids = calibration()[:2]
    exact, one, other = (logits(model, ids) for model in (llama(), gpu, cpu))
    assert likeness(one, exact) == pytest.approx(likeness(other, exact), abs=0.02)
    assert likeness(one, other) > alike


@pytest.mark.parametrize("recipe,alike", [pytest.param("w4a4kv4", 0.98, marks=SLOW), ("w2a4kv4", 0.93)])
def test_layers_visit_the_gpu(recipe, alike):
    ids = calibration()
    models = []
    for device in (None, CUDA):
        model = llama()
        w2a4.quantize(model, None, recipe, ids, progress=False, device=device)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
        models.append(model)
    assert_as_good(models[1], models[0], alike)
    # The same codes: what is left is the arithmetic, which flips no more than a code here and there.
    for model in models:
        here, kept = logits(model, ids[:2]), {k: v.clone() for k, v in model.state_dict().items()}
        assert likeness(logits(model.to(CUDA), ids[:2]), here) > 0.99
        assert torch.equal(logits(model.to("cpu"), ids[:2]), here), "something stayed on the device"
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@LONG
@pytest.mark.parametrize("route", ["end_to_end", pytest.param("block", marks=SLOW)])
def test_training(route, tmp_path):
    recipe = small_recipe(route=route, steps=20, init="lloyd")
    models = [
        run.train(llama(), Letters(), recipe, tmp_path / device.type, progress=False, device=device)
        for device in (torch.device("cpu"), CUDA)
    ]
    assert models[1].device.type == ("cpu" if route == "block" else "cuda")
    assert_as_good(models[1], models[0], alike=0.96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ldp(dtype):
    """As on a CPU but for the last bits of sums and exponentials, which now and then move a level a step."""
    w, parameters = torch.randn(96, 576) * 0.05, [torch.randn(96, 9) for _ in range(4)]
    grad, ran = torch.randn(96, 576), []
    for device in ("cpu", "cuda"):
        leaves = [t.detach().to(device).requires_grad_() for t in (w.to(dtype), *parameters)]
        y = quantizers.ldp_fake_quant(leaves[0], leaves[1:], 64)
        y.backward(grad.to(device, dtype))
        ran.append([y.detach().float().cpu(), *(leaf.grad.float().cpu() for leaf in leaves)])
        levels, scale = quantizers.ldp_to_codebook(leaves[0], leaves[1:], 64)
        codes = quantizers.nearest_codes(
            leaves[0].detach().unflatten(1, (-1, 64)).float(), levels, scale
        ).long()
        packed = (levels.float() * scale.float()[..., None]).gather(-1, codes).flatten(1)
        assert torch.equal(packed.to(dtype), y.detach())
    for got, want in zip(ran[1], ran[0], strict=True):
        apart = (got - want).abs() > 0.01 * want.abs() + 1e-3 * want.abs().mean()
        assert apart.float().mean() < 0.01


@pytest.mark.parametrize("micro", [4, 2])
def test_steps_as_graphs_are_the_same(micro, tmp_path):
    """Losses of a captured run are those of one that launches every kernel; so far as atomic sums agree."""
    training, losses = dataclasses.replace(TRAINING, micro_batch=micro, steps=20), []
    for captured in (False, True):
        student = prepare(llama(), None, "w2a4kv4", calibration(), progress=False).to(CUDA)
        args = training_arguments(training, tmp_path / str(captured), 1, 0, False, CUDA)
        teacher = llama().eval().to(CUDA, torch.bfloat16)
        made = QATTrainer(student, teacher, training, args, train_dataset=Windows(stream(), 24, 80))
        made._graphs = captured
        made.train()
        assert (made._graph is not None) == captured
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert len(losses[0]) == len(losses[1]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


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
