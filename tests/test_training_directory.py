"""What `train` refuses before it claims its directory, and what it makes of one that is damaged."""

import pytest
import torch
from packed import calibration
from test_training import Writer, llama, small_recipe

import w2a4
from w2a4.errors import CalibrationError
from w2a4.rotation import descent
from w2a4.training import generations, run
from w2a4.training.prepare import prepare

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
