"""`w2a4 eval` and `--eval`: several texts, full precision beside them, and what warns of flattery."""

import json
import shutil
import warnings

import pytest

import w2a4
from support.commands import FEW_STEPS, SMALL, fail, run, succeed
from support.tiny_models import tiny_tokenizer
from w2a4.cli.evaluation import chosen_texts
from w2a4.evaluate import quality
from w2a4.evaluate.perplexity import EVALUATION_TEXTS

SHORT = ("--seqlen", 32, "--windows", 3)


@pytest.fixture
def texts(tmp_path):
    """Two files of words that neither has in common with the built-in text."""
    paths = []
    for name, word in (("fox.txt", "fox"), ("tree.txt", "tree")):
        paths.append(tmp_path / name)
        paths[-1].write_text(" ".join(f"{word} {number}" for number in range(900)))
    return paths


def evaluated(tmp_path, *arguments):
    shown = succeed("eval", *arguments, "--json", tmp_path / "e.json").stdout
    return json.loads((tmp_path / "e.json").read_text()), shown


def test_texts_are_measured_beside_full_precision(plain, quantized, texts, tmp_path):
    found, shown = evaluated(
        tmp_path, quantized[0], "--text", texts[0], "--text", "builtin", "--reference", plain, *SHORT
    )
    assert (found["model"], found["reference"]["model"]) == ("q", "tiny")
    assert [quality.origin(text["text"]) for text in found["texts"]] == ["fox.txt", "builtin"]
    # A model alone gives the same figures as one that is another's reference.
    alone, _ = evaluated(tmp_path, plain, "--text", texts[0], "--text", "builtin", *SHORT)
    for index, (made, full, ratio) in enumerate(
        zip(found["texts"], found["reference"]["texts"], found["ratios"], strict=True)
    ):
        assert len(made["losses"]) == made["windows"] == 3 and made["low"] < made["perplexity"] < made["high"]
        assert full["losses"] == alone["texts"][index]["losses"] != made["losses"]
        assert ratio["text"] == made["text"] == full["text"]
        assert ratio["ratio"] == pytest.approx(made["perplexity"] / full["perplexity"])
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
        for part in (made["perplexity"], full["perplexity"], ratio["ratio"]):
            assert quality.number(part) in shown
    assert [text["in_domain"] for text in found["texts"]] == [False, True]  # calibrated on builtin
    assert "builtin, in domain" in shown and "fox.txt, in domain" not in shown
    assert quality.ONE_TEXT not in shown and "--reference" not in shown


def test_a_checkpoint_with_a_report_of_one_text_as_dicts_is_read_and_saved_again(quantized, tmp_path):
    """As an earlier version wrote it."""
    old = shutil.copytree(quantized[0], tmp_path / "old")
    stored = json.loads((old / "report.json").read_text())
    keep = ("perplexity", "seqlen", "windows", "tokens", "bos", "text")
    stored["evaluation"] = {
        key: {name: stored["evaluation"][key][0][name] for name in keep} for key in ("before", "after")
    }
    (old / "report.json").write_text(json.dumps(stored))
    shown = succeed("info", old).stdout
    for result in stored["evaluation"].values():
        assert quality.number(result["perplexity"]) in shown
    w2a4.save(*w2a4.load_model(old), tmp_path / "again")
    evaluation = json.loads((tmp_path / "again" / "report.json").read_text())["evaluation"]
    assert evaluation["before"] == [stored["evaluation"]["before"]]
    assert evaluation["after"] == [stored["evaluation"]["after"] | {"in_domain": True}]
    assert evaluation["ratios"][0]["ratio"] > 0
    assert "| builtin, in domain" in (tmp_path / "again" / "README.md").read_text()


def test_one_text_is_measured_and_said_to_be_one(quantized, texts, tmp_path):
    found, shown = evaluated(tmp_path, quantized[0], "--text", texts[0], *SHORT)
    assert len(found["texts"]) == 1 and found["reference"] is found["ratios"] is None
    assert quality.ONE_TEXT in shown and "give --reference MODEL" in shown


def test_default_texts():
    assert chosen_texts(()) == chosen_texts(("",)) == list(EVALUATION_TEXTS)
    assert len(set(EVALUATION_TEXTS)) >= 2
    assert chosen_texts(("a.txt", "a.txt", "b.txt")) == ["a.txt", "b.txt"]
    assert chosen_texts(("a.txt", "")) == ["a.txt", *EVALUATION_TEXTS]


def test_eval_takes_the_default_texts(plain, tmp_path):
    found, shown = evaluated(tmp_path, plain, *SHORT)
    assert [quality.origin(text["text"]) for text in found["texts"]] == list(EVALUATION_TEXTS)
    assert quality.ONE_TEXT not in shown


def test_windows_are_limited_to_eight_of_each_text(plain, texts, tmp_path):
    given = ("--text", texts[0], "--text", texts[1], "--seqlen", 32)
    assert [text["windows"] for text in evaluated(tmp_path, plain, *given)[0]["texts"]] == [8, 8]
    more, _ = evaluated(tmp_path, plain, *given, "--windows", 10)
    assert [text["windows"] for text in more["texts"]] == [10, 10]


def test_a_reference_with_another_tokenizer_is_refused_before_anything_is_measured(plain, texts, tmp_path):
    other = shutil.copytree(plain, tmp_path / "other")
    tiny_tokenizer(bos=False).save_pretrained(other)
    message = fail("eval", plain, "--reference", other, "--text", texts[0], *SHORT)
    assert "cut the text 'fox.txt' into other tokens" in message
    assert "perplexity on" not in run("eval", plain, "--reference", other, "--text", texts[0], *SHORT).stderr
    (other / "tokenizer.json").write_text("{")
    assert "cannot load the tokenizer of" in fail(
        "eval", plain, "--reference", other, *SHORT, "--text", texts[0]
    )
    assert "does not exist" in fail("eval", plain, "--reference", "./nowhere", *SHORT)
    assert "'none.txt' does not exist" in fail("eval", plain, "--text", texts[0], "--text", "none.txt")


def test_a_text_too_short_is_told_before_another_is_measured(plain, texts, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    result = run("eval", plain, "--text", texts[0], "--text", tmp_path / "short.txt", *SHORT)
    assert result.exit_code == 1 and "one window needs seqlen=32" in result.stderr
    assert "perplexity on" not in result.stderr


@pytest.mark.parametrize("command", [("quantize",), ("train", *FEW_STEPS, "--data", "{other}")])
def test_calibrating_on_what_is_evaluated_is_told_before_the_work(plain, texts, tmp_path, command):
    """Calibrated on the evaluation text itself, or trained on half of it."""
    arguments = [str(part).format(other=texts[0]) for part in command]
    calib = texts[0] if command == ("quantize",) else "builtin"
    given = ("--out", tmp_path / "out", *SMALL, "--calib", calib, "--eval", texts[0], "--eval", texts[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The window of 2048 tokens is more than the second text has: the warning comes before that error.
        texts[1].write_text("too short")
        assert "one window needs seqlen=2048" in fail(arguments[0], plain, *arguments[1:], *given)
    told = [str(warning.message) for warning in caught if "evaluation text" in str(warning.message)]
    use = "calibration" if command == ("quantize",) else "training"
    assert len(told) == 1
    assert f"100.0% of the evaluation text 'fox.txt' stand in the {use} text 'fox.txt' too" in told[0]


def test_eval_without_a_value_is_the_default_texts(plain, tmp_path):
    """In quantize and train alike; here the bare option stands before another one."""
    result = tmp_path / "q.json"
    command = ("quantize", plain, "--eval", "--out", tmp_path / "out", *SMALL, "--set", "weight_method=rtn")
    shown = succeed(*command, "--eval-windows", 1, "--json", result).stdout
    found = json.loads(result.read_text())["evaluation"]
    assert [quality.origin(text["text"]) for text in found["after"]] == list(EVALUATION_TEXTS)
    for key in ("before", "after", "ratios"):
        assert len(found[key]) == len(EVALUATION_TEXTS)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in EVALUATION_TEXTS:
        assert f"| {text}" in card and f"\n{text}" in shown
