"""benchmarks.publish: tables and plots of rows, of which some may be missing."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import publish
from support.bench import row


def decode(context, **changes):
    return row(op="decode", shape="llama-2-7b", context=context, us=5000.0, peer_us=20000.0, ratio=4.0,
               peak_bytes=3_000_000_000, peer_peak_bytes=15_000_000_000) | changes  # fmt: skip


def run(tmp_path, rows, *arguments):
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"rows": rows}))
    done = CliRunner().invoke(publish.main, [str(file), *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_tables_hold_what_was_measured(tmp_path):
    rows = [
        row(),
        row(shape="1x2", us=None, correct=False),
        row(op="copy"),
        decode(128),
        decode(4096, batch=1),
    ]
    shown = run(tmp_path, rows)
    assert "1x2" not in shown and "`copy`" not in shown
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if "|" in line]
    assert ["4096x4096", "1", "float16", "cold", "2", "cublas.float16", "6", "3", "0.6"] in cells
    assert ["llama-2-7b", "4096", "1", "200", "50", "4", "3", "15"] in cells


def test_lines_of_a_run_are_read_too(tmp_path):
    """Ours alone stands there first, and then with its peer."""
    file = tmp_path / "results.jsonl"
    alone = row(peer=None, peer_us=None, ratio=None)
    lines = [
        {"stage": "gemv", "status": "ok"},
        alone,
        row(),
        alone | {"shape": "8x8"},
        {"test": "a", "outcome": "passed"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    shown = CliRunner().invoke(publish.main, [str(file)]).output
    assert shown.count("4096x4096") == 1 and "cublas.float16" in shown and shown.count("8x8") == 1


def test_plots_are_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    shown = run(tmp_path, [row(), row(op="linear_w4a4", peer="other")], "--plots", tmp_path / "a")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["speedup.png"] and "speedup.png" in shown
    run(tmp_path, [decode(128), decode(4096, peak_bytes=None)], "--plots", tmp_path / "b")
    assert {file.name for file in (tmp_path / "b").iterdir()} == {"tokens_per_second.png", "memory.png"}
    run(tmp_path, [row(tokens=8)], "--plots", tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    done = CliRunner().invoke(publish.main, [str(tmp_path / "x.json")])
    assert done.exit_code == 1 and "x.json holds no rows of a benchmark" in done.output
