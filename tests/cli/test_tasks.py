"""`w2a4 eval --tasks`: lm-eval on models in memory; what needs it is left out where it is not installed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from support.commands import fail, run, succeed
from w2a4.evaluate import zero_shot

TASKS = Path(__file__).parents[1] / "data" / "tasks"

with_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


def test_the_packaged_sets_are_whole():
    for name, fields in {"choice": {"passage", "endings", "answer"}, "cloze": {"passage", "word"}}.items():
        items = [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]
        assert len(items) >= 30 and all(set(item) == fields for item in items)
        config = zero_shot._loaded(str(TASKS / f"{name}.yaml"))
        assert config["task"] == f"w2a4_{name}"
        assert Path(config["dataset_kwargs"]["data_files"]["test"]).is_file()


def test_what_is_refused_before_a_model_is_loaded(plain, tmp_path, monkeypatch):
    for wrong, said in {
        ("--tasks", "a", "--text", "general"): "one at a time",
        ("--limit", 3): "of --tasks",
        ("--tasks", "a", "--windows", 2): "for --tasks give --limit",
        ("--tasks", "a", "--seqlen", 64): "for --tasks give --limit",
    }.items():
        result = run("eval", plain, *wrong)
        assert result.exit_code == 2 and said in result.stderr
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install lm-eval" in fail("eval", plain, "--tasks", "arc_easy")


@pytest.mark.parametrize(
    "content, said",
    [
        ("task: a\nf: !function u.f\n", "cannot be read"),
        ("- 1\n", "one whole task"),
        ("include: b.yaml\ntask: a\n", "without `include`"),
        ("group: a\n", "one whole task"),
    ],
)
def test_files_that_are_no_task(content, said, tmp_path):
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(zero_shot.W2A4Error, match=said):
        zero_shot._loaded(str(tmp_path / "t.yaml"))


def test_intervals_and_the_table():
    assert zero_shot.interval([1.0]) == (None, None)
    low, high = zero_shot.interval([0.0, 1.0] * 50)
    assert 0.35 < low < 0.45 and 0.55 < high < 0.65
    full, packed = measured(1, 1, 1, 0), measured(1, 0, 1, 0)
    said = zero_shot.text({"full precision": full, "packed": packed})
    assert " 0.75 " in said and " 0.5 " in said and "-0.750 to 0.000" in said
    packed["t"]["metrics"]["acc"]["scores"] = None
    alone = zero_shot.text({"packed": packed})
    assert " 0.5 " in alone and "difference" not in alone and " to " not in alone


def measured(*scores):
    """What `zero_shot` gives of one task."""
    metric = {"value": sum(scores) / len(scores), "scores": list(scores)}
    return {"t": {"documents": len(scores), "metrics": {"acc": metric}}}


@with_lm_eval
def test_tasks_on_local_data(plain, quantized, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ",".join(str(TASKS / f"{name}.yaml") for name in ("choice", "cloze"))
    result = succeed(
        "eval",
        quantized[0],
        "--tasks",
        names,
        "--reference",
        plain,
        "--limit",
        4,
        "--json",
        tmp_path / "t.json",
    )
    found = json.loads((tmp_path / "t.json").read_text())["tasks"]
    assert list(found) == ["full precision", "q"]
    for tasks in found.values():
        assert {name: task["documents"] for name, task in tasks.items()} == {
            "w2a4_choice": 4,
            "w2a4_cloze": 4,
        }
        scores = tasks["w2a4_choice"]["metrics"]["acc"]["scores"]
        assert len(scores) == 4 and tasks["w2a4_choice"]["metrics"]["acc"]["value"] == sum(scores) / 4
    assert "w2a4_cloze" in result.stdout and "perplexity" in result.stdout


def test_metrics_of_filters_and_of_no_mean():
    """As gsm8k has them: an entry of a document for every filter; and perplexity, a mean of nothing."""
    results = {"exact_match,strict": 0.0, "exact_match,loose": 0.5, "exact_match_stderr,loose": 0.1}
    samples = [
        {"doc_id": i, "filter": kind, "exact_match": float(kind == "loose" and i == 1)}
        for kind in ("strict", "loose") for i in (1, 0)
    ]  # fmt: skip
    found = dict(zero_shot._metrics(results | {"alias": "t"}, samples))
    assert found == {
        "exact_match,strict": {"value": 0.0, "scores": [0.0, 0.0]},
        "exact_match,loose": {"value": 0.5, "scores": [0.0, 1.0]},
    }
    samples = [{"doc_id": i, "filter": "none", "perplexity": -3.0 * i} for i in range(2)]
    assert dict(zero_shot._metrics({"perplexity,none": 4.48}, samples))["perplexity"]["scores"] is None


def test_local_files_lie_beside_the_task():
    folder = Path("there")
    assert zero_shot._beside(folder, "a.jsonl") == "there/a.jsonl"
    files = {"test": ["a.jsonl", "https://x.org/b.jsonl"]}
    assert zero_shot._beside(folder, files) == {"test": ["there/a.jsonl", "https://x.org/b.jsonl"]}


@with_lm_eval
@pytest.mark.parametrize(
    "field", ["doc_to_txt: x", "doc_to_text: '{{passage'", "doc_to_text: '{{no.thing}}'"]
)
def test_tasks_that_are_wrong(field, plain, tmp_path):
    (tmp_path / "choice.jsonl").write_text((TASKS / "choice.jsonl").read_text())
    (tmp_path / "t.yaml").write_text((TASKS / "choice.yaml").read_text() + field + "\n")
    assert "lm-eval cannot run" in fail("eval", plain, "--tasks", tmp_path / "t.yaml", "--limit", 1)


@with_lm_eval
def test_a_task_that_there_is_not(plain, tmp_path):
    assert "nearest are" in fail("eval", plain, "--tasks", "arc_eas")
    assert "does not exist" in fail("eval", plain, "--tasks", tmp_path / "none.yaml")
    broken = yaml.safe_load((TASKS / "choice.yaml").read_text())
    broken["dataset_kwargs"]["data_files"]["test"] = "none.jsonl"
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    assert "lm-eval cannot run" in fail("eval", plain, "--tasks", tmp_path / "broken.yaml")
