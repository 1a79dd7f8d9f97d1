"""Training end to end on tiny models: the trainer, resuming, blocks, and what goes wrong."""

import copy
import dataclasses
import errno
import functools
import json
import math
import resource
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

import w2a4
from support.capture_lint import CaptureLint
from support.packed import SHAPE, calibration
from support.tiny_models import tiny_llama
from support.training_runs import TRAINING, Letters, Writer, llama, small_recipe, stream
from w2a4.errors import CalibrationError, TrainingError
from w2a4.evaluate.data import load_text
from w2a4.recipe import Training
from w2a4.train import budget, checkpoints, generations, graphs, run, trainer
from w2a4.train.block import BlockTrainer
from w2a4.train.data import Windows
from w2a4.train.linear import fake_quant_linears
from w2a4.train.losses import distillation_loss
from w2a4.train.optimizer import parameter_groups, rate
from w2a4.train.prepare import prepare, start_recipe
from w2a4.train.teacher import write_top_k
from w2a4.train.trainer import QATTrainer, training_arguments

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def _prepared(weight_bits=2):
    recipe = w2a4.Recipe.load("w2a4kv4").override(gptq_refine=0, weight_bits=weight_bits)
    return prepare(llama(), None, recipe, calibration(), progress=False)


def make_trainer(folder, training=TRAINING, text=None):
    text = stream() if text is None else text
    windows = Windows(text, training.seqlen, training.steps * training.batch_size)
    args = training_arguments(training, folder, world=1, seed=0, progress=False, device=torch.device("cpu"))
    return QATTrainer(copy.deepcopy(_prepared()), llama().eval(), training, args, train_dataset=windows)


def test_windows_are_the_same_whatever_was_drawn_before():
    text = torch.arange(100)
    windows = Windows(text, 8, 40, seed=1)
    again = Windows(text, 8, 40, seed=1)
    assert len(windows) == 40
    for index in (39, 0, 17):
        assert torch.equal(windows[index]["input_ids"], again[index]["input_ids"])
    for index in range(40):
        window = windows[index]["input_ids"]
        assert len(window) == 8 and bool((window.diff() == 1).all())
    first_pass = torch.cat([windows[i]["input_ids"] for i in range(windows.in_pass)])
    assert len(first_pass.unique()) == len(first_pass)  # nothing twice within a pass
    other = Windows(text, 8, 40, seed=2)
    assert any(not torch.equal(windows[i]["input_ids"], other[i]["input_ids"]) for i in range(5))
    with pytest.raises(CalibrationError, match="15 tokens; windows of seqlen=8 need at least 16"):
        Windows(text[:15], 8, 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rate(schedule):
    training = Training(schedule=schedule, warmup=0.2)
    assert 0 < rate(training, 0.0) <= 0.05
    assert rate(training, 0.1) == pytest.approx(0.5)
    assert rate(training, 0.2) == pytest.approx(1.0)
    end = rate(training, 1.0)
    assert end == (1.0 if schedule == "constant" else pytest.approx(0.0, abs=1e-9))
    assert rate(training, 1.5) == pytest.approx(end, abs=1e-9)


def divergence(trainer_, ids):
    with torch.no_grad():
        logits = (trainer_.model.eval()(ids, use_cache=False).logits, trainer_.teacher(ids).logits)
    return float(distillation_loss(*logits))


def test_training_brings_the_student_nearer(tmp_path):
    training = dataclasses.replace(TRAINING, steps=40, lr=2e-3)
    long, ids = make_trainer(tmp_path, training, text=stream(120)), stream(120).view(-1, 24)
    before = divergence(long, ids)
    long.train()
    assert divergence(long, ids) < 0.8 * before


def test_accumulation_does_not_matter(tmp_path):
    losses = []
    for micro in (4, 1):
        # CAKLD weighs by the confidence in each forward pass, so its parts would differ a little.
        training = dataclasses.replace(TRAINING, micro_batch=micro, loss="kl")
        short = make_trainer(tmp_path / str(micro), training)
        short.train()
        losses.append([entry["loss"] for entry in short.state.log_history if "loss" in entry])
    assert len(losses[0]) == TRAINING.steps
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


class Emulated(graphs.GradientGraph):
    """Computes anew at every replay, into the places of the first time, as a CUDA graph does."""

    def _capture(self):
        self.value = self._pass()
        self.grads = [parameter.grad for parameter in self.parameters]
        self.graph = SimpleNamespace(replay=self._replay)

    def _replay(self):
        held, before = self.grads, [parameter.grad for parameter in self.parameters]
        self.value.copy_(self._pass())
        for parameter, grad, kept in zip(self.parameters, held, before, strict=True):
            if grad is not None:
                grad.copy_(parameter.grad)
            parameter.grad = kept


@pytest.mark.parametrize("micro", [4, 1])
def test_steps_that_are_replayed_are_the_same(micro, tmp_path, monkeypatch):
    """Also where gradients of several replays are added up."""
    monkeypatch.setattr(trainer, "GradientGraph", Emulated)
    training, ran = dataclasses.replace(TRAINING, micro_batch=micro, steps=5), []
    for replayed in (False, True):
        each = make_trainer(tmp_path / str(replayed), training)
        each._graphs = replayed
        each.train()
        assert (each._graph is not None) == replayed
        losses = [entry["loss"] for entry in each.state.log_history if "loss" in entry]
        ran.append((losses, [parameter.detach() for parameter in each.model.parameters()]))
    assert ran[0][0] == ran[1][0]
    assert all(map(torch.equal, ran[0][1], ran[1][1]))


def test_a_step_that_cannot_be_captured_is_run(tmp_path, monkeypatch):
    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs.GradientGraph, "_capture", refuse)
    short = make_trainer(tmp_path, dataclasses.replace(TRAINING, steps=2))
    short._graphs = True
    with pytest.warns(UserWarning, match="without a CUDA graph, and slower: operation not permitted when"):
        short.train()
    assert short.state.global_step == 2 and not short._graphs


@pytest.mark.parametrize("bits", [2, 4])
def test_a_step_can_be_captured(bits, tmp_path):
    """Nothing in it waits for the GPU, or copies to it; see `capture_lint`."""
    recipe = w2a4.Recipe.load("w2a4kv4").override(weight_bits=bits, **{"training.init": "lloyd"})
    args = training_arguments(TRAINING, tmp_path, 1, 0, False, torch.device("cpu"))
    student = prepare(llama(), None, recipe, calibration(), progress=False)
    short = QATTrainer(student, llama().eval(), TRAINING, args, train_dataset=Windows(stream(), 24, 8))
    ids = stream(48).view(-1, 24)

    def step():
        short._causal_loss(short.model, ids).backward()

    short.model.train()
    step()
    with CaptureLint() as lint:
        step()
    (only_here,) = lint.found
    assert "losses.py" in only_here, "on a CPU it is asked whether the loss was scaled"


@pytest.mark.parametrize("bits", [2, 4])
def test_rates_are_in_proportion_to_what_they_move(bits):
    """Every trained parameter once; that of a matrix 64 times as large moves 64 times as fast."""
    model = copy.deepcopy(_prepared(weight_bits=bits))
    linears = fake_quant_linears(model)
    groups = parameter_groups(model, TRAINING)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(trained)
    shares, root = [], math.sqrt(2)
    for linear in linears.values():
        size = float(linear.weight.square().mean().sqrt())
        shares.append(rates[id(linear.weight)] / size)
        assert 1 / root - 1e-6 <= shares[-1] / (16 * TRAINING.lr) <= root + 1e-6
        assert rates[id(linear.act_clip)] == TRAINING.quantizer_lr
        for name in linear.grid.parameters:
            parameter = linear.get_parameter(name)
            unit = float(parameter.abs().mean()) if name == "step" else 1.0
            assert 1 / root - 1e-6 <= rates[id(parameter)] / unit / TRAINING.quantizer_lr <= root + 1e-6
    wide = next(iter(linears.values()))
    before = rates[id(wide.weight)]
    wide.sizes["weight"] *= 64
    found = {id(p): group["lr"] for group in parameter_groups(model, TRAINING) for p in group["params"]}
    assert found[id(wide.weight)] == 64 * before


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    folder = tmp_path / "part"
    part = make_trainer(folder)
    part.args.save_steps = part.state.save_steps = 3

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    part.add_callback(Stop())
    part.train()
    assert checkpoints.last_checkpoint(folder).name == "checkpoint-3"
    again = make_trainer(folder)
    again.train(resume_from_checkpoint=str(checkpoints.last_checkpoint(folder)))
    assert again.state.global_step == 6 and again.budget.before > 0
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_budget_of_time_ends_the_run(tmp_path):
    training = Training(steps=10_000, batch_size=1, seqlen=24, minutes=0.05, lr=1e-4)
    timed = make_trainer(tmp_path, training)
    timed.train()
    assert 0 < timed.state.global_step < 10_000
    assert 0.05 <= timed.budget.minutes < 0.5
    assert timed.state.log_history[-2]["learning_rate"] < 0.5e-4  # the schedule follows the clock


@pytest.mark.parametrize("limit, interval", [(5, 1), (30, 3), (600, 10)])
def test_checkpoints_follow_the_clock(limit, interval, tmp_path):
    """Steps of half a minute: what a kill costs is never more than an interval and a step."""
    assert budget.save_interval(limit) == interval
    timed = make_trainer(tmp_path, dataclasses.replace(TRAINING, steps=1000, batch_size=2, minutes=limit))
    saved = []

    class HalfMinutes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            timed.budget.started -= 30
            control.should_training_stop |= state.global_step == 2 * 2 * interval + 2

        def on_save(self, args, state, control, **kwargs):
            saved.append(timed.budget.minutes)

    timed.add_callback(HalfMinutes())
    timed.train()
    gaps = [after - before for before, after in zip([0.0, *saved], saved, strict=False)]
    assert saved and all(interval <= gap < interval + 0.6 for gap in gaps[:2]), saved
    newest = checkpoints.last_checkpoint(tmp_path)
    assert checkpoints.spent_minutes(newest) == pytest.approx(saved[-1], abs=1e-3)


def full_disk(monkeypatch, step):
    """From `step` on the disk is full."""

    def save(tensors, path, metadata):
        if int(path.parent.name.rpartition("-")[2]) >= step:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoints, "save_file", save)


def test_a_full_disk_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    full_disk(monkeypatch, step=3)
    recipe = small_recipe(steps=4)
    message = r"step 3: cannot write .*checkpoints.*: \[Errno 28\] No space left"
    with pytest.raises(TrainingError, match=message):
        run.train(llama(), Letters(), recipe, tmp_path / "work", progress=False)
    checkpoints = tmp_path / "work" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.undo()
    resumed = run.train(llama(), Letters(), recipe, tmp_path / "work", progress=False)
    whole = run.train(llama(), Letters(), recipe, tmp_path / "whole", progress=False)
    assert resumed.w2a4_report.training["losses"] == whole.w2a4_report.training["losses"]


@pytest.mark.parametrize("limit", [40_000, 900_000], ids=["weights", "optimizer"])
def test_files_that_cannot_grow_stop_training(limit, tmp_path):
    """A limit on the size of files fails a write as a full disk does, also within torch.save."""
    run_ = make_trainer(tmp_path, dataclasses.replace(TRAINING, steps=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(TrainingError, match="step 1: cannot write a checkpoint in"):
            run_.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [checkpoints.WEIGHTS, "optimizer.pt", "trainer_state.json", checkpoints.WHOLE]
)
def test_a_checkpoint_that_is_cut_off_is_passed_over(name, tmp_path):
    run_ = make_trainer(tmp_path, dataclasses.replace(TRAINING, steps=2, batch_size=2))
    run_.train()
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-2"
    file = tmp_path / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:-10])
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-1"
    file.unlink()
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-1"
    checkpoints.remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_checkpoint_of_more_processes_is_refused(tmp_path):
    run_ = make_trainer(tmp_path, dataclasses.replace(TRAINING, steps=1, batch_size=2))
    run_.train()
    checkpoint = checkpoints.last_checkpoint(tmp_path)
    marker = json.loads((checkpoint / checkpoints.WHOLE).read_text())
    (checkpoint / checkpoints.WHOLE).write_text(json.dumps({**marker, "processes": 4}))
    with pytest.raises(TrainingError, match="WORLD_SIZE=4, and this one has 1; start 4 process"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_explosion_stops_and_keeps_the_checkpoint(tmp_path):
    run_ = make_trainer(tmp_path)
    run_.args.save_steps = run_.state.save_steps = 2

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.model.layers[1].mlp.up_proj.beta.data[0, 0] = float("nan")

    run_.add_callback(Poison())
    with pytest.raises(
        TrainingError, match=r"step 4: the loss is nan, model.layers.1.mlp.up_proj.beta holds NaN"
    ):
        run_.train()
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run_ = make_trainer(tmp_path)
    run_._save(str(tmp_path / "checkpoint-1"))
    shorter = tiny_llama(dtype=torch.float32, **{**SHAPE, "num_hidden_layers": 1})
    recipe = w2a4.Recipe.load("w2a4kv4").override(**{"training.init": "lloyd"})
    other = prepare(shorter, None, recipe, calibration(), progress=False)
    with pytest.raises(TrainingError, match="is of another model or recipe: 'model.layers.1"):
        checkpoints.load_trained(other, tmp_path / "checkpoint-1")


def test_batches_must_divide():
    with pytest.raises(TrainingError, match="batch_size=4 is not a multiple of 3 processes"):
        training_arguments(TRAINING, "x", world=3, seed=0, progress=False, device=torch.device("cpu"))


def test_the_teacher_writes_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(generations, "LENGTH", 20)
    monkeypatch.setattr(generations, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(generations, "BATCH", 3)
    teacher, path, state = llama(), tmp_path / "text.jsonl", torch.get_rng_state()

    def write(tokens, file=path):
        return generations.write_generations(teacher, Writer(), stream(), tokens, file, progress=False)

    whole = write(100, tmp_path / "whole.jsonl")
    assert torch.equal(torch.get_rng_state(), state)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert len(lines) == 6 and [json.loads(line)["text"] for line in lines] == whole.split("\n")
    write(50)
    path.write_text(path.read_text() + '{"text": "cut o')  # killed while it wrote
    assert write(100) == whole and path.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_training_on_the_teachers_own_text(tmp_path, monkeypatch):
    monkeypatch.setattr(generations, "LENGTH", 24)
    monkeypatch.setattr(generations, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(generations, "BATCH", 3)
    model = run.train(llama(), Writer(), small_recipe(data="self"), tmp_path, progress=False)
    assert (tmp_path / "generations.jsonl").is_file()
    assert model.w2a4_report.training["text"] == "the teacher's own, from general"


@pytest.mark.parametrize("route", ["end_to_end", "block"])
def test_train_gives_a_packed_model(route, tmp_path):
    model = run.train(
        llama(),
        Letters(),
        small_recipe(route=route, steps=20, init="lloyd"),
        tmp_path / "work",
        progress=False,
    )
    facts = model.w2a4_report.training
    assert facts["steps"] == (20 if route == "end_to_end" else 40) and facts["minutes"] >= 0
    model.save_pretrained(tmp_path / "out")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = stream(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    if route == "block":
        assert all(after < before for before, after in facts["errors"].values())


def test_layers_may_train_alone_before_the_whole_model(tmp_path):
    """What begins end to end is then what the route `block` ends with, and both phases can be resumed."""
    ids, logits = calibration(), {}
    for steps in (0, 20):
        recipe = small_recipe(block_steps=steps, init="lloyd")
        model = prepare(llama(), None, recipe, ids, progress=False, resume=tmp_path / str(steps)).eval()
        with torch.no_grad():
            logits[steps] = model(ids, use_cache=False).logits
    alone, blocks = small_recipe(init="lloyd"), llama()
    w2a4.quantize(blocks, None, start_recipe(alone), ids, progress=False, refine=BlockTrainer(alone, 20))
    with torch.no_grad():
        want, target = blocks(ids, use_cache=False).logits, llama()(ids).logits
    torch.testing.assert_close(logits[20], want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert (logits[20] - target).norm() < (logits[0] - target).norm()
    again = prepare(llama(), None, small_recipe(block_steps=20, init="lloyd"), ids, False, tmp_path / "20")
    with torch.no_grad():
        assert torch.equal(again.eval()(ids, use_cache=False).logits, logits[20])


@pytest.mark.parametrize("grid,loss", [("uniform", "kl"), ("ldp", "cross_entropy")])
def test_baselines_train(grid, loss, tmp_path):
    model = run.train(llama(), Letters(), small_recipe(grid=grid, loss=loss), tmp_path, progress=False)
    assert all(torch.isfinite(torch.tensor(model.w2a4_report.training["losses"])))


def test_work_of_another_run_is_refused(tmp_path):
    run.train(llama(), Letters(), small_recipe(), tmp_path, progress=False)
    with pytest.raises(TrainingError, match="another model, recipe or text"):
        run.train(llama(), Letters(), small_recipe(lr=5e-4), tmp_path, progress=False)


def test_training_on_the_teachers_top_tokens(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(load_text("builtin", "calibration")[:20_000])

    def trained(top, name):
        recipe = small_recipe(teacher_top=top, steps=4, init="lloyd", data=str(text))
        run.train(llama(), Letters(), recipe, tmp_path / name, progress=False)
        return tmp_path / name / "teacher"

    assert not trained(0, "live").exists()
    folder = trained(5, "cached")
    files = sorted(folder.iterdir())
    assert files and not [file for file in files if file.suffix != ".safetensors"]
    stamps = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()  # as after a kill
    recipe = small_recipe(teacher_top=5, steps=4, init="lloyd", data=str(text))
    run.train(llama(), Letters(), recipe, tmp_path / "cached", progress=False)
    assert [file.stat().st_mtime_ns for file in files][1:] == stamps[1:] and files[0].is_file()


def test_pieces_are_those_that_windows_give():
    windows = Windows(stream(), 24, 100, seed=3, recut=False)
    pieces = windows.pieces()
    for index in (0, 1, windows.in_pass, 99):
        item = windows[index]
        assert torch.equal(item["input_ids"], pieces[item["piece"]])
    assert sorted(int(windows[i]["piece"]) for i in range(windows.in_pass)) == list(range(len(pieces)))


def test_a_cached_teacher_says_what_the_live_one_does(tmp_path):
    model, windows = llama().eval(), Windows(stream(), 24, 8, recut=False)
    teacher = write_top_k(model, windows.pieces(), SHAPE["vocab_size"] + 9, tmp_path, progress=False)
    ids, piece = windows[3]["input_ids"], windows[3]["piece"]
    with torch.no_grad():
        logits = model(ids[None]).logits
    tops = teacher(piece[None])
    want = logits.log_softmax(-1).gather(-1, tops.indices.long())
    torch.testing.assert_close(tops.log_probs.float(), want, rtol=1e-3, atol=1e-4)
    assert tops.indices.shape == (1, 24, SHAPE["vocab_size"])
    (tmp_path / f"{int(piece)}.safetensors").write_bytes(b"cut off")
    with pytest.raises(TrainingError, match="cannot be read"):
        teacher(piece[None])
