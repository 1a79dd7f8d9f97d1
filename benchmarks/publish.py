"""Markdown tables and plots of what `gpu_run`, `bench_gemv`, `bench_engine` and others measured.

    python -m benchmarks.publish FILE ... --plots DIR

Prints a table of every op in the JSON files and draws what there is data for: the speed-up of linear layers
by shape, and tokens a second and peak memory by context. Needs matplotlib for the plots.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from benchmarks.experiments.accuracy_plots import check_matplotlib, draw_all
from benchmarks.files import read_lines
from benchmarks.gpu.summary import rows_of

Row = dict[str, Any]


def load(files: tuple[Path, ...]) -> list[Row]:
    """Rows that were measured and are correct; those of wrong results were not timed."""
    rows = []
    for file in files:
        try:
            if file.suffix == ".jsonl":
                rows += rows_of(read_lines(file)[0])
            else:
                rows += json.loads(file.read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError, KeyError, TypeError):
            raise click.ClickException(f"{file} holds no rows of a benchmark") from None
    return [row for row in rows if row.get("correct") and row.get("us")]


def tables(rows: list[Row]) -> str:
    """One an op, and a title above each."""
    return "\n\n".join(f"`{op}`\n\n{table(found)}" for (op,), found in by(rows, "op").items() if op != "copy")


def table(rows: list[Row]) -> str:
    if rows[0]["op"] == "decode":
        return _markdown(
            ("model", "context", "batch", "tokens/s", "16 bits", "ratio", "peak GB", "16 bits"),
            (
                (r["shape"], r["context"], r["tokens"], _rate(r, "us"), _rate(r, "peer_us"), r["ratio"],
                 _giga(r["peak_bytes"]), _giga(r["peer_peak_bytes"]))
                for r in rows
            ),
        )  # fmt: skip
    return _markdown(
        ("shape", "tokens", "dtype", "cache", "µs", "peer", "peer's µs", "ratio", "of the bound"),
        (
            (r["shape"], r["tokens"], r["dtype"], r["cache"], r["us"], r["peer"], r["peer_us"], r["ratio"],
             r["bound"] and r["bound"] / r["us"])
            for r in rows
        ),
    )  # fmt: skip


def _markdown(head: tuple[str, ...], lines: Iterator[tuple]) -> str:
    shown = [[_shown(cell) for cell in line] for line in lines]
    return tabulate(shown, head, tablefmt="github", disable_numparse=True)


def _shown(cell: Any) -> Any:
    """Three digits, or all before the point."""
    if not isinstance(cell, float):
        return cell
    return f"{cell:,.0f}" if cell >= 100 else f"{cell:.3g}"


def _rate(row: Row, key: str) -> float | None:
    """Tokens a second of a step's time."""
    return row[key] and 1e6 * row["tokens"] / row[key]


def _giga(count: float | None) -> float | None:
    return count and count / 1e9


def by(rows: list[Row], *keys: str) -> dict[Any, list[Row]]:
    """Rows of equal values, in the order in which these appear."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _speedup(figure, rows: list[Row]) -> None:
    """Of linear layers at one token and cold weights, against each peer."""
    one = [r for r in rows if r["op"].startswith("linear_w") and r["tokens"] == 1 and r["cache"] == "cold"]
    one = [r for r in one if r["ratio"]]
    if not one:
        return
    axes = figure.subplots()
    shapes = list(dict.fromkeys(r["shape"] for r in one))
    series = [(f"{op} / {peer}", found) for (op, peer), found in by(one, "op", "peer").items()]
    width = 0.8 / len(series)
    for place, (name, found) in enumerate(series):
        middle = [shapes.index(r["shape"]) + (place - (len(series) - 1) / 2) * width for r in found]
        axes.bar(middle, [r["ratio"] for r in found], width, label=name)
    axes.axhline(1, color="k", linewidth=0.5)
    axes.set_xticks(range(len(shapes)), shapes, rotation=30)
    axes.set(xlabel="outputs x inputs", ylabel="times as fast, one token, weights cold")
    axes.legend()


def _tokens_per_second(figure, rows: list[Row]) -> None:
    _by_context(figure, rows, "us", "peer_us", "tokens a second", _rate)


def _memory(figure, rows: list[Row]) -> None:
    rows = [r for r in rows if r.get("peak_bytes")]
    _by_context(figure, rows, "peak_bytes", "peer_peak_bytes", "peak memory, GB", lambda r, k: _giga(r[k]))


def _by_context(figure, rows: list[Row], ours: str, theirs: str, what: str, value) -> None:
    decode = [r for r in rows if r["op"] == "decode" and "context" in r]
    if not decode:
        return
    axes = figure.subplots()
    for (shape, batch), found in by(decode, "shape", "tokens").items():
        lines = sorted(found, key=lambda r: r["context"])
        contexts = [r["context"] for r in lines]
        (line,) = axes.plot(contexts, [value(r, ours) for r in lines], "o-", label=f"{shape}, batch {batch}")
        axes.plot(contexts, [value(r, theirs) for r in lines], "o--", color=line.get_color())
    axes.set(xlabel="context (dashed: 16 bits)", ylabel=what, xscale="log", yscale="log")
    axes.legend()


DRAWINGS = {"speedup": _speedup, "tokens_per_second": _tokens_per_second, "memory": _memory}


@click.command(help="\b\n" + __doc__)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--plots", type=click.Path(path_type=Path), help="Write plots here.")
def main(files, plots):
    if plots is not None:
        check_matplotlib()
    rows = load(files)
    click.echo(tables(rows))
    if plots is not None:
        for file in draw_all(DRAWINGS, rows, plots):
            click.echo(file)


if __name__ == "__main__":
    main()
