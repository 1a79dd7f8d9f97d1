"""benchmarks.experiments.accuracy: grids are read, cells measured once, claims judged."""

import functools
import json

import pytest
import torch
from click.testing import CliRunner

import w2a4
from benchmarks.experiments import accuracy
from benchmarks.experiments.grid import FULL_PRECISION, GRIDS, Claim, Grid
from benchmarks.experiments.shape_report import BINS, shapes
from benchmarks.experiments.testbed import byte_tokenizer
from support.tiny_models import tiny_llama
from w2a4.evaluate import quality
from w2a4.evaluate.perplexity import EVALUATION_TEXTS

ROWS = """
rows:
  rtn: {set: {weight_method: rtn}}
  trained: {recipe: w2a4kv4-rcp-quick, train: true, set: {training.steps: 2, weight_method: rtn}}
"""
SETTINGS = """
seeds: [0, 1]
seqlen: 32
windows: 4
set: {calib_samples: 4, calib_seqlen: 32, gptq_refine: 0, training.seqlen: 32, training.minutes: 0.0,
      training.init: lloyd}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model that reads bytes, saved."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=257, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def grid(model, tmp_path):
    """Writes a grid file: rows, settings and whatever else is given."""

    def write(more="", rows=ROWS, settings=SETTINGS):
        path = tmp_path / "grid.yaml"
        path.write_text(f"model: {model}\n{settings}{rows}{more}", encoding="utf-8")
        return str(path)

    return write


def test_a_grid_is_measured_and_gone_on_with(grid, tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--grid", grid("claims: [rtn <= 1000, trained <= 0.001 on builtin]"), "--json", str(path)]
    run = CliRunner().invoke(accuracy.main, [*arguments, "--workers", "1"])
    assert run.exit_code == 1, run.output  # the second claim cannot hold
    result = json.loads(path.read_text())
    assert [(cell["row"], cell["seed"]) for cell in result["cells"]] == [
        (row, seed) for row in (FULL_PRECISION, "rtn", "trained") for seed in (0, 1)
    ]
    # A claim that names no text has to hold on each.
    assert [(claim["claim"], claim["text"], claim["holds"]) for claim in result["claims"]] == [
        ("rtn <= 1000", "general", True), ("rtn <= 1000", "builtin", True),
        ("trained <= 0.001 on builtin", "builtin", False),
    ]  # fmt: skip
    assert len(result["cells"][-1]["losses"]) == 2 and result["cells"][0]["losses"] is None
    assert result["meta"]["commit"] == result["cells"][0]["commit"]
    for summed in result["summary"]:
        # Calibrated on builtin, and trained on general.
        fitted = {FULL_PRECISION: [], "rtn": ["builtin"], "trained": ["builtin", "general"]}
        assert summed["in_domain"] == (summed["text"] in fitted[summed["row"]])
        assert summed["low"] <= summed["mean"] <= summed["high"] or summed["row"] == FULL_PRECISION
    rows = [(summed["text"], summed["row"]) for summed in result["summary"]]
    assert rows == [(text, row) for text in EVALUATION_TEXTS for row in (FULL_PRECISION, "rtn", "trained")]
    for cell in result["cells"]:
        assert {text: len(found["losses"]) for text, found in cell["evaluation"].items()} == dict.fromkeys(
            EVALUATION_TEXTS, 4
        )
    perplexities = [cell["evaluation"]["general"]["perplexity"] for cell in result["cells"]]
    assert perplexities[0] == perplexities[1]  # of one model; the seeds of the others differ
    assert len(set(perplexities)) == 5
    for part in ("full precision", "rtn", "trained", "Perplexity on general, ", "Perplexity on builtin "):
        assert part in run.output

    for cell in result["cells"]:
        cell["evaluation"]["general"]["perplexity"] *= 2  # kept cells are not measured again
    path.write_text(json.dumps({"cells": result["cells"][:-1]}))
    again = CliRunner().invoke(
        accuracy.main, [*arguments, "--rows", "trained", "--seeds", "1", "--workers", "1"]
    )
    cells = json.loads(path.read_text())["cells"]
    assert [cell["row"] for cell in cells] == [FULL_PRECISION, "trained"] and again.exit_code == 1
    kept, measured = (cell["evaluation"]["general"]["perplexity"] for cell in cells)
    assert kept == 2 * perplexities[1] and measured == perplexities[5]


def test_a_grid_of_one_text_says_so_and_warns_of_what_was_trained_on(grid, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word {number}" for number in range(4000)))
    settings = SETTINGS.replace("set: {", f"text: {text}\nset: {{training.data: {text}, ")
    with pytest.warns(
        UserWarning, match=r"100.0% of the evaluation text 'text.txt' .* training \(trained\) text"
    ):
        run = CliRunner().invoke(
            accuracy.main,
            ["--grid", grid("", settings=settings), "--rows", "trained", "--seeds", "0", "--workers", "1"],
        )
    assert run.exit_code == 0 and quality.ONE_TEXT in run.output
    assert f"{text}, in domain" in run.output


@pytest.mark.parametrize(
    "more, rows, said",
    [
        ("claims: [rtn < other]", ROWS, "there is no row 'other'"),
        (
            "claims: [rtn < trained on nothing]",
            ROWS,
            "there is no text 'nothing'; texts of the grid: general",
        ),
        ("text: []", ROWS, "text is []; give"),
        ("text: [builtin, builtin]", ROWS, "text is ['builtin', 'builtin']; give"),
        ("text: nothing.txt", ROWS, "text file 'nothing.txt' does not exist"),
        ("claims: [rtn = 2]", ROWS, "give 'row < row'"),
        ("claims: [rtn <= much]", ROWS, "'much' is not a number"),
        ("speed: 3", ROWS, "unknown key 'speed'"),
        ("", "rows: {a: {sett: {}}}", "unknown key 'sett'"),
        ("", "rows: {a: {set: {group_sise: 3}}}", "unknown recipe key 'group_sise'"),
        ("", "rows: 3", "no mapping 'rows'"),
        ("", "rows: {a: [}", "is not YAML"),
    ],
)
def test_bad_grids(grid, more, rows, said):
    run = CliRunner().invoke(accuracy.main, ["--grid", grid(more, rows)])
    assert run.exit_code == 1 and said in run.output and "Traceback" not in run.output


def test_bad_arguments(grid, tmp_path):
    def message(*arguments):
        run = CliRunner().invoke(accuracy.main, arguments)
        assert run.exit_code == 1
        return run.output

    assert "no grid 'nonsense'; give a YAML file, or one of " in message("--grid", "nonsense")
    assert "there is no row 'x'" in message("--grid", grid(), "--rows", "x")
    assert "seeds 'a'" in message("--grid", grid(), "--seeds", "a")
    other = tmp_path / "other.json"
    other.write_text("[]")
    assert "holds no result" in message("--grid", grid(), "--json", str(other))
    assert other.read_text() == "[]"


@pytest.mark.parametrize("name", sorted(file.stem for file in GRIDS.glob("*.yaml")))
def test_grids_of_the_repository_are_read(name):
    grid = Grid.load(name)
    assert grid.rows[0].recipe is None and len(grid.rows) > 2
    keys = {row.key(grid, seed) for row in grid.rows for seed in grid.seeds}
    assert len(keys) == len(grid.rows) * len(grid.seeds)


def test_claims_need_more_than_the_spread_at_equal_seeds():
    rows = [
        {"text": "t", "row": "a", "ratio": [1.0, 1.5, 2.0]},
        {"text": "t", "row": "b", "ratio": [1.1, 1.62, 2.08]},  # a little more at every seed
        {"text": "t", "row": "c", "ratio": [1.4, 1.2, 2.2]},  # more on average
        {"text": "other", "row": "a", "ratio": [9.0, 9.0, 9.0]},
        {"text": "other", "row": "b", "ratio": [1.0, 1.0, 1.0]},
    ]
    judge = functools.partial(accuracy.judge, rows=rows, text="t")
    assert not accuracy.judge(Claim("a", "b"), rows, "other")["holds"]
    judged = judge(Claim("a", "b"))
    assert judged["claim"] == "a < b" and judged["holds"]
    assert judged["gap"] == pytest.approx(0.1) and judged["spread"] == pytest.approx(0.02)
    assert not judge(Claim("a", "c"))["holds"]
    assert not judge(Claim("b", "a"))["holds"]
    limited = judge(Claim("a", limit=1.5))
    assert limited["claim"] == "a <= 1.5" and limited["holds"] and limited["gap"] == pytest.approx(0)
    assert not judge(Claim("a", limit=1.4))["holds"]


def test_shapes_are_relative_to_the_root_mean_square():
    model = tiny_llama(vocab_size=257, hidden_size=64, intermediate_size=128, head_dim=16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[3] *= 1000  # an outlier channel of down_proj's input
    found = shapes(model, byte_tokenizer())
    for state in ("before", "after"):
        for what in ("weights", "activations"):
            shares = found[state][what]
            assert len(shares) == BINS and sum(shares) == pytest.approx(1)
            second = sum(s * ((i + 0.5) * 16 / BINS - 8) ** 2 for i, s in enumerate(shares))
            if what == "weights":  # a mean square of 1, but for the width of bins
                assert second == pytest.approx(1, abs=0.05)
        assert set(found[state]["kurtosis"]) >= {"q_proj", "o_proj", "down_proj"}
    before, after = (found[state]["kurtosis"]["down_proj"] for state in ("before", "after"))
    assert min(before) > 100 > 5 > max(after)
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)  # the model itself is as it was
    assert not hasattr(model.config, "quantization_config")


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.experiments.accuracy_plots import plot

    cells = [{"row": "a", "seed": s, "losses": [3.0, 2.0, 1.0]} for s in (0, 1)]
    summary = [{"text": "builtin", "row": "a", "mean": 1.5, "ratio": [1.4, 1.6]}]
    shape = {"weights": [0.5] * BINS, "activations": [0.5] * BINS, "kurtosis": {"q_proj": [3.0, 4.0]}}
    result = {"cells": cells, "summary": summary, "shapes": {"before": shape, "after": shape, "reach": 8.0}}
    names = ["perplexity", "losses", "histograms", "kurtosis"]
    assert plot(result, tmp_path / "plots") == [tmp_path / "plots" / f"{name}.png" for name in names]
    del result["shapes"]
    assert [file.stem for file in plot(result, tmp_path / "fewer")] == names[:2]


def test_plots_without_matplotlib(monkeypatch, grid):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = CliRunner().invoke(accuracy.main, ["--grid", grid(), "--plots", "x"])
    assert run.exit_code == 1 and "pip install matplotlib" in run.output


def test_model_that_is_not_there(grid, tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text("model: /nonexistent\nrows: {a: {}}")
    run = CliRunner().invoke(accuracy.main, ["--grid", str(path), "--workers", "1"])
    assert run.exit_code == 1 and "/nonexistent" in run.output and "Traceback" not in run.output
    assert issubclass(w2a4.CheckpointError, w2a4.W2A4Error)
