"""Texts that a model cannot predict: who warns, of what, and when."""

import random
import re
import warnings
from types import SimpleNamespace

import pytest
import torch

import w2a4
from support.tiny_models import tiny_model, tiny_tokenizer
from w2a4.errors import CalibrationError
from w2a4.evaluate import data, text_checks
from w2a4.quantization import job
from w2a4.train import run


class Pairs(torch.nn.Module):
    """A language model that has counted the pairs of tokens of a text, or was never trained."""

    device = torch.device("cpu")

    def __init__(self, ids, size):
        super().__init__()
        counts = torch.full((size, size), 1e-3)
        counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
        self.table, self.config = (
            (counts / counts.sum(1, keepdim=True)).log(),
            SimpleNamespace(vocab_size=size),
        )

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer, monkeypatch):
    monkeypatch.setattr(text_checks, "SMALL_VOCABULARY", 0)
    ids, _ = data.token_stream(tokenizer, data.general_text()[0][:200_000])
    return Pairs(ids, len(tokenizer))


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def strange(words=300):
    draw = random.Random(0)
    return " ".join("".join(draw.choices("zqxjvkw", k=5)) for _ in range(words))


def test_an_unknown_text_is_warned_of_with_its_perplexity(model, tokenizer):
    with pytest.warns(UserWarning, match="on the first 256 tokens of '1 documents' is") as caught:
        text_checks.warn_of_unknown_text(model, tokenizer, [strange()])
    figures = re.findall(r"(\d+) \(([\d.]+)(?: bits a byte)?\)", str(caught[0].message))
    (found, bits), (general, few) = [map(float, pair) for pair in figures]
    ids, _ = data.token_stream(tokenizer, strange())
    loss = -model.table[ids[:255], ids[1:256]].mean()
    assert found == pytest.approx(float(loss.exp()), rel=0.01) and found > 10 * general
    length = len(tokenizer.decode(ids[1:256]).encode())
    assert bits == pytest.approx(float(loss) / 0.6931 * 255 / length, rel=0.02) and bits > few
    with pytest.warns(UserWarning, match="256 tokens of the calibration tokens"):
        text_checks.warn_of_unknown_text(model, tokenizer, ids[None])


@pytest.mark.usefixtures("silent")
def test_what_is_not_warned_of(model, tokenizer, monkeypatch):
    warn = text_checks.warn_of_unknown_text
    warn(model, tokenizer, [data.general_text()[1][20_000:30_000]])
    warn(model, tokenizer, [strange(15)])  # less than 128 tokens tell nothing
    warn(model, None, [strange()])
    untrained = Pairs(torch.zeros(1, dtype=torch.long), len(tokenizer))
    warn(untrained, tokenizer, [strange()])
    model.forward = lambda **_: pytest.fail("the model was called")
    warn(model, tokenizer, "general")
    warn(model, tokenizer, "builtin")
    monkeypatch.setattr(text_checks, "SMALL_VOCABULARY", 1000)
    warn(model, tokenizer, [strange()])


def test_tokens_that_the_model_does_not_know_are_refused(model, tokenizer):
    with pytest.raises(CalibrationError, match="holds token 300, and the model knows 0..299"):
        text_checks.warn_of_unknown_text(model, tokenizer, torch.full((1, 200), 300))


class Looked(Exception):
    pass


@pytest.mark.parametrize("name", ["quantize", "prepare"])
def test_quantising_and_training_look_at_the_calibration_text_before_they_rotate(
    name, tokenizer, monkeypatch
):
    def look(model, _, source):
        assert source == ["the text"] and not hasattr(model.config, "quantization_config")
        raise Looked

    monkeypatch.setattr(job, "warn_of_unknown_text", look)
    monkeypatch.setattr(job, "calibration_ids", lambda *_: (torch.zeros(1, 8, dtype=torch.long), "a text"))
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Looked):
        getattr(w2a4, name)(model, tokenizer, "w2a4kv4", ["the text"], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_looks_at_its_own_text_before_it_claims_the_directory(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("one two three four " * 100)
    seen = []

    def look(model, _, source):
        seen.append(source)
        raise Looked

    monkeypatch.setattr(run, "warn_of_unknown_text", look)
    recipe = w2a4.Recipe.load("w2a4kv4").override(
        **{"training.data": str(tmp_path / "text.txt"), "training.seqlen": 16, "training.steps": 1}
    )
    with pytest.raises(Looked):
        run.train(tiny_model(), tokenizer, recipe, tmp_path / "work", progress=False)
    assert seen == [str(tmp_path / "text.txt")] and not (tmp_path / "work").exists()
