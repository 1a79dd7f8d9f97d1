"""Accuracy by recipe: a model quantised or trained by every row of a grid, for every seed.

    python -m benchmarks.experiments.accuracy --grid FILE|NAME [--model MODEL] [--set key=value ...]
        [--json FILE] [--plots DIR] [--rows a,b] [--seeds 0,1] [--workers N] [--device cuda]

A grid is a YAML file, or the name of one in `benchmarks/experiments/grids`. Rows run side by side in
processes of one thread each, so that no figure depends on the number of cores; with `--device cuda` they
share the GPU and the cores. With `--json`, a killed run is gone on with.
Exits 1 when a claim of the grid does not hold.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from tqdm import tqdm

import w2a4
from benchmarks.experiments import testbed
from benchmarks.experiments.grid import FULL_PRECISION, Claim, Grid, Row
from benchmarks.experiments.outliers import plant_outliers
from benchmarks.experiments.shape_report import shapes
from benchmarks.files import write_json
from benchmarks.harness import metadata
from w2a4.cli.options import parse_settings
from w2a4.evaluate import quality
from w2a4.evaluate.overlap import warn_of_overlap
from w2a4.evaluate.perplexity import evaluate
from w2a4.evaluate.quality import number
from w2a4.ops.devices import pick_device
from w2a4.train.data import fitted_texts
from w2a4.train.run import train


def load(grid: Grid, seed: int) -> tuple[Any, Any]:
    """The float model that every row begins with, and its tokenizer."""
    if grid.model != "testbed":
        return w2a4.load_model(grid.model, dtype=torch.float32)
    model, tokenizer = testbed.load(seed, progress=False)
    return (plant_outliers(model, seed=seed, **grid.outliers) if grid.outliers else model), tokenizer


def measure(grid: Grid, row: Row, seed: int, device: torch.device, threads: int) -> dict[str, Any]:
    """One row with one seed: quantised or trained, packed, evaluated. Runs in a process of its own."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    model, tokenizer = load(grid, seed)
    model.to(device)
    losses: Any = None
    if row.recipe is not None:
        recipe = row.recipe.override(**{"rotation.seed": seed})
        with tempfile.TemporaryDirectory() as work:
            if row.train:
                train(model, tokenizer, recipe, work, grid.calibration, progress=False)
                losses = model.w2a4_report.training.get("losses")
            else:
                w2a4.quantize(model, tokenizer, recipe, grid.calibration, progress=False)
    making = time.perf_counter() - started
    made = getattr(model, "w2a4_report", None)
    found = evaluate(model, tokenizer, grid.text, seqlen=grid.seqlen, windows=grid.windows, progress=False)
    found = quality.marked(found, made.fitted_on if made is not None else {})
    return {
        "row": row.name, "seed": seed, "key": row.key(grid, seed),
        "evaluation": dict(zip(grid.text, found, strict=True)), "losses": losses, "seconds": making,
    }  # fmt: skip


def run(grid: Grid, path: Path | None, workers: int, device: torch.device) -> dict[str, Any]:
    """Measure what `path` does not hold yet, rewriting it after every cell.

    Returns:
        what the file holds: `meta`, `grid`, `cells`.
    """
    cells = _earlier(path, grid)
    todo = [
        (row, seed)
        for seed in grid.seeds
        for row in grid.rows
        if not any(cell["key"] == row.key(grid, seed) for cell in cells)
    ]
    threads = 1 if device.type == "cpu" else max(1, (os.cpu_count() or 1) // workers)
    result = {"meta": metadata(device.type) | {"command": _command()}, "grid": grid.to_dict(), "cells": cells}
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(todo), desc=grid.name, unit="cell") as bar,
    ):
        futures: dict[Future, tuple[Row, int]] = {
            pool.submit(measure, grid, row, seed, device, threads): (row, seed) for row, seed in todo
        }
        try:
            for future in as_completed(futures):
                cell = future.result()
                cells.append(cell | {"commit": result["meta"]["commit"]})
                bar.update()
                figures = (number(found["perplexity"]) for found in cell["evaluation"].values())
                bar.set_postfix_str(f"{cell['row']} {', '.join(figures)}")
                if path is not None:
                    write_json(path, result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    order = [row.name for row in grid.rows]
    cells.sort(key=lambda cell: (order.index(cell["row"]), cell["seed"]))
    return result


def _earlier(path: Path | None, grid: Grid) -> list[dict[str, Any]]:
    """Cells of `path` that this grid would measure again."""
    if path is None or not path.is_file():
        return []
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError):
        raise click.ClickException(
            f"{path} exists and holds no result of this program; give another --json"
        ) from None
    wanted = {row.key(grid, seed) for row in grid.rows for seed in grid.seeds}
    return [cell for cell in cells if cell["key"] in wanted]


def _command() -> str:
    return " ".join(["python -m benchmarks.experiments.accuracy", *sys.argv[1:]])


def check_overlap(grid: Grid) -> None:
    """Warn of evaluation texts that share content with what rows are fitted on; before the work."""
    fitted: dict[str, str] = {"calibration": grid.calibration}
    for row in grid.rows:
        text = fitted_texts(row.recipe, grid.calibration).get("training") if row.train else None
        if text not in (None, *fitted.values()):
            fitted[f"training ({row.name})"] = text
    warn_of_overlap(grid.text, fitted)


def summarise(result: dict[str, Any], grid: Grid) -> list[dict[str, Any]]:
    """A row a text and recipe: perplexities by seed, their ratios to full precision, and how far these go.

    Of the ratios there are mean and standard deviation over seeds, and `low` and `high`, the
    `quality.interval` of their mean over the windows that both were measured on.
    """
    found = {(cell["row"], cell["seed"]): cell for cell in result["cells"]}
    rows = []
    for text in grid.text:
        for row in grid.rows:
            cells = [found[row.name, seed]["evaluation"][text] for seed in grid.seeds]
            full = [found[FULL_PRECISION, seed]["evaluation"][text] for seed in grid.seeds]
            pairs = list(zip(cells, full, strict=True))
            ratios = [cell["perplexity"] / base["perplexity"] for cell, base in pairs]
            low, high = quality.interval(
                [[a - b for a, b in zip(cell["losses"], base["losses"], strict=True)] for cell, base in pairs]
            )
            rows.append({
                "text": text, "row": row.name, "in_domain": any(cell["in_domain"] for cell in cells),
                "perplexity": [cell["perplexity"] for cell in cells], "ratio": ratios,
                "mean": statistics.fmean(ratios), "spread": _spread(ratios), "low": low, "high": high,
                "seconds": statistics.fmean(found[row.name, seed]["seconds"] for seed in grid.seeds),
            })  # fmt: skip
    return rows


def judge(claim: Claim, rows: list[dict[str, Any]], text: str) -> dict[str, Any]:
    """Does it hold on a text?

    Of two rows, the mean gap at equal seeds must be more than its spread over seeds.
    """
    by_name = {row["row"]: row for row in rows if row["text"] == text}
    left = by_name[claim.left]["ratio"]
    right = [claim.limit] * len(left) if claim.limit is not None else by_name[claim.right]["ratio"]
    gaps = [b - a for a, b in zip(left, right, strict=True)]
    gap, spread = statistics.fmean(gaps), _spread(gaps)
    holds = gap >= 0 if claim.limit is not None else gap > spread
    return {"claim": str(claim), "text": text, "holds": holds, "gap": gap, "spread": spread}


def judge_all(grid: Grid, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every claim on the text that it names, or on each of the grid's."""
    return [
        judge(claim, rows, text) for claim in grid.claims for text in grid.text if claim.text in (None, text)
    ]


def _spread(values: list[float]) -> float:
    """Standard deviation."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def report(result: dict[str, Any], grid: Grid) -> str:
    """The tables for people."""
    lines = [
        (row["text"] + (", in domain" if row["in_domain"] else ""), row["row"],
         *(number(value) for value in row["perplexity"]), f"{row['mean']:.3f}", f"{row['spread']:.3f}",
         quality.between(row), f"{row['seconds']:.0f}")
        for row in result["summary"]
    ]  # fmt: skip
    head = ("text", "row", *(f"seed {seed}" for seed in grid.seeds), "ratio", "spread", "ratio, 95 %", "s")
    align = ("left", "left", *["right"] * (len(head) - 2))
    text = tabulate(lines, head, disable_numparse=True, colalign=align) + "\n"
    for found in result["cells"][0]["evaluation"].values():
        text += f"Perplexity on {quality.protocol(found)}.\n"
    text += "Ratio to full precision: mean and standard deviation over seeds; 95 %: of resampled windows.\n"
    if len(grid.text) == 1:
        text += f"{quality.ONE_TEXT}\n"
    if result["claims"]:
        claims = [
            (claim["claim"], claim["text"], f"{claim['gap']:.3f}", f"{claim['spread']:.3f}",
             "yes" if claim["holds"] else "NO")
            for claim in result["claims"]
        ]  # fmt: skip
        text += (
            "\n" + tabulate(claims, ("claim", "on", "gap", "spread", "holds"), disable_numparse=True) + "\n"
        )
    return text


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--grid", "source", required=True, help="A YAML file, or one of benchmarks/experiments/grids.")
@click.option("--model", help="A directory, hub id or .gguf file instead of the grid's.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A recipe field, in every row.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write results here; kept ones count.")
@click.option("--plots", type=click.Path(path_type=Path), help="Write plots here (needs matplotlib).")
@click.option("--rows", help="Only these, separated by commas; claims on others are left out.")
@click.option("--seeds", help="Instead of the grid's, separated by commas.")
@click.option("--workers", default=os.cpu_count(), show_default=True, help="Rows measured at one time.")
@click.option("--device", default="cpu", show_default=True, help="Or cuda; see --workers.")
def main(
    source: str, model: str | None, settings: tuple[str, ...], path: Path | None, plots: Path | None,
    rows: str | None, seeds: str | None, workers: int, device: str,
):  # fmt: skip
    if plots is not None:
        from benchmarks.experiments.accuracy_plots import check_matplotlib, plot

        check_matplotlib()
    try:
        grid = Grid.load(source).pick(rows and rows.split(","), seeds and seeds.split(","))
        grid = grid.override(model, parse_settings(settings))
        check_overlap(grid)
        result = run(grid, path, workers, pick_device(device))
        result["summary"] = summarise(result, grid)
        result["claims"] = judge_all(grid, result["summary"])
        if plots is not None:
            result["shapes"] = shapes(*load(grid, grid.seeds[0]))
    except w2a4.W2A4Error as error:
        raise click.ClickException(str(error)) from None
    if path is not None:
        write_json(path, result)
    click.echo(report(result, grid))
    if plots is not None:
        for file in plot(result, plots):
            click.echo(file)
    if not all(claim["holds"] for claim in result["claims"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
