"""benchmarks.bench_training: runs, checks first, and reports ratios of the same run."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import bench_training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Steps of seconds: no processes for memory, which a run by hand has."""
    monkeypatch.setattr(
        bench_training, "memory", lambda kind, layers, ids: 100.0 if kind == "plain" else 120.0
    )


def test_rows(tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--layers", "1", "--tokens", "24", "--repeats", "1", "--json", str(path)]
    run = CliRunner().invoke(bench_training.main, arguments)
    assert run.exit_code == 0, run.output
    result = json.loads(path.read_text())
    assert [row["step"] for row in result["rows"]] == list(bench_training.KINDS)
    plain, *others = result["rows"]
    assert plain["ratio"] == 1 and [row["memory_ratio"] for row in others] == [1.2, 1.2]
    for row in others:
        assert row["ratio"] == pytest.approx(row["times"][0] / plain["times"][0])
    assert result["tokens"] == 24 and result["meta"]["versions"]["torch"]


def test_both_kinds_train_the_same_matrices():
    names = [
        {n for n, p in bench_training.build(kind, 1).named_parameters() if p.requires_grad and "weight" in n}
        for kind in ("plain", "quantised")
    ]
    assert names[0] == names[1] and len(names[0]) == 7


def test_nothing_is_timed_where_the_model_is_wrong(monkeypatch):
    monkeypatch.setattr(bench_training, "is_right", lambda layers, ids: False)
    run = CliRunner().invoke(bench_training.main, ["--layers", "1"])
    assert run.exit_code == 1 and "nothing was timed" in run.output
