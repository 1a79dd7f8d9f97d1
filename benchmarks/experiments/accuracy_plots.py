"""Plots of what `benchmarks.experiments.accuracy` measured; needs matplotlib (pip install 'w2a4[plots]')."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np


def check_matplotlib() -> None:
    """Before hours of work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--plots needs matplotlib: pip install matplotlib")


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw everything there is data for.

    Returns:
        the PNG files written.
    """
    drawings = {"perplexity": _ratios, "losses": _losses, "histograms": _histograms, "kurtosis": _kurtosis}
    return draw_all(drawings, result, folder)


def draw_all(drawings: dict[str, Callable[[Any, Any], None]], data: Any, folder: Path) -> list[Path]:
    """Each of `figure, data ->`, as NAME.png; one that draws nothing leaves no file."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in drawings.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        draw(figure, data)
        if figure.axes:
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=120)
    return files


def _ratios(figure, result: dict[str, Any]) -> None:
    rows = result["summary"][::-1]
    axes = figure.subplots()
    axes.barh(
        [f"{row['row']} ({row['text']})" for row in rows],
        [row["mean"] - 1 for row in rows],
        left=1,
        color="tab:blue",
        alpha=0.6,
    )
    for place, row in enumerate(rows):
        axes.plot(row["ratio"], [place] * len(row["ratio"]), "k.", markersize=4)
    axes.set(xlabel="perplexity / full precision (dots: seeds)", xscale="log")


def _losses(figure, result: dict[str, Any]) -> None:
    curves = {(cell["row"], cell["seed"]): cell["losses"] for cell in result["cells"] if cell["losses"]}
    first = min((seed for _, seed in curves), default=None)
    if first is None:
        return
    axes = figure.subplots()
    for (name, seed), losses in curves.items():
        if seed == first:
            width = max(1, len(losses) // 40)
            smooth = np.convolve(losses, np.ones(width) / width, "valid")
            axes.plot(np.arange(len(smooth)) + width, smooth, label=name)
    axes.set(xlabel="step", ylabel=f"training loss, seed {first} (each row's own loss)", yscale="log")
    axes.legend()


def _histograms(figure, result: dict[str, Any]) -> None:
    shapes = result.get("shapes")
    if not shapes:
        return
    for axes, what in zip(figure.subplots(1, 2, sharey=True), ("weights", "activations"), strict=True):
        for state in ("before", "after"):
            shares = np.array(shapes[state][what])
            edges = np.linspace(-shapes["reach"], shapes["reach"], len(shares) + 1)
            axes.stairs(shares, edges, label=f"{state} rotation")
        axes.set(title=what, xlabel="value / rms of its row or token", yscale="log")
        axes.legend()


def _kurtosis(figure, result: dict[str, Any]) -> None:
    shapes = result.get("shapes")
    if not shapes:
        return
    axes = figure.subplots()
    for kind, values in shapes["before"]["kurtosis"].items():
        (line,) = axes.plot(values, "--")
        axes.plot(shapes["after"]["kurtosis"][kind], color=line.get_color(), label=kind)
    axes.axhline(3, color="k", linewidth=0.5)
    axes.set(
        xlabel="layer", ylabel="kurtosis of inputs (dashed: before rotation; line: Gaussian)", yscale="log"
    )
    axes.legend()
