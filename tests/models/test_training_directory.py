"""What `train` refuses before it claims its directory, and what it makes of one that is damaged."""

import json
import shutil

import pytest
import torch

import w2a4
from support.packed import calibration
from support.training_runs import Writer, llama, small_recipe
from w2a4.errors import CalibrationError, TrainingError
from w2a4.quantization.resume import Progress
from w2a4.quantization.rotation import descent
from w2a4.train import checkpoints, generations, run
from w2a4.train.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

#: Groups that divide neither the hidden size (96) nor the FFN (176), or nothing to train.
BAD = [
    ({"act_group_size": 36}, "act_group_size=36"),
    ({"group_size": 36}, "group_size=36"),
    ({"weight_bits": 16, "act_bits": 16}, "nothing to train"),
]


def learning(**changes):
    """A recipe whose text and rotations cost something."""
    learned = {"rotation.r1": "learned", "rotation_learning.steps": 2, "rotation_learning.seqlen": 16}
    return small_recipe(data="self").override(**learned, **changes)


@pytest.fixture
def short_texts(monkeypatch):
    """The teacher writes no more than a few tokens at once."""
    for name, value in {"LENGTH": 24, "PROMPT_TOKENS": 4, "BATCH": 3}.items():
        monkeypatch.setattr(generations, name, value)


def assert_same_weights(model):
    want = llama().state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("changes, message", BAD)
@pytest.mark.parametrize("route", ["end_to_end", "block"])
def test_a_bad_recipe_is_refused_before_any_work(changes, message, route, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "write_generations", lambda *args: pytest.fail("the teacher wrote"))
    monkeypatch.setattr(descent.Descent, "run", lambda *args: pytest.fail("learned"))
    model = llama()
    with pytest.raises(w2a4.W2A4Error, match=message):
        run.train(
            model,
            Writer(),
            learning(**changes, **{"training.route": route}),
            tmp_path / "work",
            progress=False,
        )
    assert not list(tmp_path.iterdir())
    assert_same_weights(model)


def test_the_corrected_recipe_trains_in_the_same_directory(tmp_path, short_texts):
    with pytest.raises(w2a4.W2A4Error, match="act_group_size=36"):
        run.train(llama(), Writer(), learning(act_group_size=36), tmp_path, progress=False)
    model = run.train(llama(), Writer(), learning(act_group_size=16), tmp_path, progress=False)
    assert model.w2a4_report.training["steps"] == 3


def test_a_text_that_is_too_short_does_not_claim_the_directory(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a few words " * 8)
    with pytest.raises(CalibrationError, match="windows of seqlen=64 need at least 128"):
        run.train(
            llama(), Writer(), small_recipe(data=str(text), seqlen=64), tmp_path / "work", progress=False
        )
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("changes, message", BAD)
def test_prepare_refuses_before_it_rotates(changes, message):
    model = llama()
    with pytest.raises(w2a4.W2A4Error, match=message):
        prepare(model, None, w2a4.Recipe.load("w2a4kv4").override(**changes), calibration(), progress=False)
    assert_same_weights(model)
    assert getattr(model.config, "quantization_config", None) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of six steps, which has checkpoints of the fifth and the last."""
    folder = tmp_path_factory.mktemp("run")
    run.train(llama(), Writer(), small_recipe(steps=6), folder, progress=False)
    return folder


def copied(finished, tmp_path):
    """A directory to damage, and its newest checkpoint."""
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work", checkpoints.last_checkpoint(tmp_path / "work" / "checkpoints")


def assert_refused(work, pattern, **changes):
    with pytest.raises(TrainingError, match=pattern):
        run.train(llama(), Writer(), small_recipe(steps=6, **changes), work, progress=False)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"key": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_mark_of_the_run_is_named(content, finished, tmp_path):
    work, _ = copied(finished, tmp_path)
    (work / "run.json").write_bytes(content)
    assert_refused(work, "run.json in .*work.* cannot be read .*remove that file")
    (work / "run.json").unlink()
    run.train(llama(), Writer(), small_recipe(steps=6), work, progress=False)


#: Bytes that are turned around; safetensors has no checksum that one would not fit.
ALL, ONE = slice(None), slice(100, 101)
SAVED_BY_TORCH = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize(
    "name, where",
    [(checkpoints.WEIGHTS, ALL), *((name, where) for name in SAVED_BY_TORCH for where in (ALL, ONE))],
)
def test_a_damaged_file_of_a_checkpoint_is_named(name, where, finished, tmp_path):
    """All files have their sizes, so that the checkpoint counts as whole."""
    work, checkpoint = copied(finished, tmp_path)
    content = bytearray((checkpoint / name).read_bytes())
    content[where] = bytes(255 - byte for byte in content[where])
    (checkpoint / name).write_bytes(content)
    assert_refused(work, f"{name} in .*{checkpoint.name}.* cannot be read .*remove that directory")
    shutil.rmtree(checkpoint)
    run.train(llama(), Writer(), small_recipe(steps=6), work, progress=False)


@pytest.mark.parametrize("content", ["", "x", "[]", "null", '{"strange": 1}', "[" * 100_000])
def test_a_damaged_state_of_the_trainer_is_named(content, finished, tmp_path):
    work, checkpoint = copied(finished, tmp_path)
    (checkpoint / "trainer_state.json").write_text(content)
    marker = json.loads((checkpoint / checkpoints.WHOLE).read_text())
    marker["sizes"]["trainer_state.json"] = len(content)
    (checkpoint / checkpoints.WHOLE).write_text(json.dumps(marker))
    assert_refused(
        work, f"trainer_state.json in .*{checkpoint.name}.* cannot be read .*remove that directory"
    )


@pytest.mark.parametrize(
    "content", ["[]", "null", '{"sizes": null}', '{"sizes": {}}', '{"processes": 1}', "5"]
)
def test_a_damaged_list_of_files_makes_a_checkpoint_a_part(content, finished, tmp_path):
    work, checkpoint = copied(finished, tmp_path)
    (checkpoint / checkpoints.WHOLE).write_text(content)
    before = checkpoints.last_checkpoint(work / "checkpoints")
    assert before is not None and before != checkpoint


@pytest.mark.parametrize("line", ['{"x": 1}', "[]", "null", "{", '{"text": 5}', "5"])
def test_a_damaged_text_of_the_teacher_is_named(line, tmp_path, short_texts):
    file, recipe = tmp_path / "generations.jsonl", small_recipe(data="self")
    run.train(llama(), Writer(), recipe, tmp_path, progress=False)
    whole = file.read_text()
    file.write_text(f"{line}\n{whole}")
    with pytest.raises(TrainingError, match="generations.jsonl in .*cannot be read .*line 1.*remove it"):
        run.train(llama(), Writer(), recipe, tmp_path, progress=False)
    file.unlink()
    run.train(llama(), Writer(), recipe, tmp_path, progress=False)
    assert file.read_text() == whole


class Killed(BaseException):
    """What ends a run at once."""


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_resumed_run_of_blocks_reports_all_errors(layer, stored, tmp_path, monkeypatch):
    """Killed before or after a layer counts as done."""

    def trained(name):
        recipe = small_recipe(route="block", steps=4, init="lloyd")
        return run.train(llama(), Writer(), recipe, tmp_path / name, progress=False).w2a4_report

    store = Progress.store

    def kill(self, *args):
        if stored:
            store(self, *args)
        elif self.done < layer:
            return store(self, *args)
        if self.done > layer or not stored:
            raise Killed

    monkeypatch.setattr(Progress, "store", kill)
    with pytest.raises(Killed):
        trained("killed")
    monkeypatch.setattr(Progress, "store", store)
    again, whole = trained("killed"), trained("whole")
    assert again.training["errors"] == whole.training["errors"]
    assert list(whole.training["errors"]) == ["0", "1"] and again.layers == whole.layers


@pytest.mark.parametrize("content", ["", "[]", "null", '{"errors": [1]}', '{"errors": {"0": 1}}'])
def test_damaged_errors_of_blocks_are_named(content, tmp_path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "errors.json").write_text(content)
    assert_refused(tmp_path, "errors.json in .*start.* cannot be read .*remove that file", route="block")
