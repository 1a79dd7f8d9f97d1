"""A self-contained HTML page of what was made and measured: tables as the commands print them, and pictures.

Pictures are matplotlib's SVG inside the page: nothing else is loaded.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import W2A4Error
from . import quality, report
from .spreads import EDGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc }
pre { font-size: 12.5px; line-height: 1.4; overflow-x: auto; background: #f6f6f6; padding: .8em }
svg { max-width: 100%; height: auto }
"""

_BEFORE, _BEHIND = "#b4552d", "#2d6ab4"


def check_pictures() -> None:
    """Raise W2A4Error if there is no matplotlib, before the work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise W2A4Error("--report needs matplotlib for its pictures: pip install matplotlib") from None


def page(
    title: str,
    models: Mapping[str, Sequence[Mapping[str, Any]]],
    spreads: Sequence[Mapping[str, Any]] = (),
    made: report.Report | None = None,
    summary: Mapping[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
) -> str:
    """The page, as HTML.

    Args:
        title: its heading.
        models: measurements of perplexity by name of the model, as `quality.quality_text` takes them.
        spreads: of activations, see `spreads.spreads`.
        made: how the checkpoint came about.
        summary: `report.checkpoint_summary` of it.
        facts: lines on speed and memory.
    """
    parts: list[tuple[str, str, list[Figure]]] = []
    if summary is not None:
        parts.append(("What it is", report.summary_text(summary), [_bytes(summary["bytes"])]))
    if any(models.values()):
        parts.append(("Perplexity by text", quality.quality_text(models), [_perplexities(models)]))
    if made is not None and made.layers:
        told = "Relative error of the output on calibration text.\n\n" + report.layers_table(made)
        parts.append(("Error by layer and linear", told, [_errors(made.layers)]))
    if made is not None and made.training:
        losses = made.training.get("losses") or []
        parts.append(("Training", report.training_text(made.training), [_losses(losses)] if losses else []))
    if spreads:
        parts.append(("Activations before and behind rotations", _largest(spreads), [_histograms(spreads)]))
    lines = {**(facts or {}), **(_facts(made) if made is not None else {})}
    if lines:
        parts.append(("Speed, memory and versions", "\n".join(f"{k}: {v}" for k, v in lines.items()), []))
    body = "\n".join(
        f"<h2>{html.escape(heading)}</h2>\n" + "".join(map(_svg, figures)) + f"<pre>{html.escape(text)}</pre>"
        for heading, text, figures in parts
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _facts(made: report.Report) -> dict[str, str]:
    return {
        "quantised in": f"{made.seconds:.0f} s, {made.peak_memory_mb:.0f} MB at the peak",
        "calibration": made.calibration or "none",
        "versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
    }


def _svg(figure: Figure) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text, in the reader's font
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return text.getvalue().partition("<svg")[2].join(("<svg", "")) + "\n"


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bytes(size: Mapping[str, int]) -> Figure:
    """One bar, of the bytes by part."""
    figure, ((axes,),) = _figure(9, 1.4)
    left = 0.0
    for part, label in report.PARTS.items():
        if size.get(part):
            axes.barh(0, size[part] / 1e6, left=left, label=label)
            left += size[part] / 1e6
    axes.set_yticks([])
    axes.set_xlabel("MB")
    axes.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def _perplexities(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Bars with intervals, a group for each text."""
    texts = max(models.values(), key=len)
    figure, ((axes,),) = _figure(9, 0.6 + 0.34 * len(models) * len(texts))
    for place, (name, measured) in enumerate(models.items()):
        rows = [row * (len(models) + 1) + place for row in range(len(measured))]
        values = [p if math.isfinite(p := result["perplexity"]) else math.nan for result in measured]
        axes.barh(rows, values, label=name)
        for row, result in zip(rows, measured, strict=True):
            low, high = result.get("low"), result.get("high")
            if low is not None and high is not None:
                axes.plot([low, high], [row, row], color="#222", linewidth=1)
            x = result["perplexity"] if math.isfinite(result["perplexity"]) else 0
            axes.annotate(f" {quality.number(result['perplexity'])}", (x, row - 0.3), fontsize=8)
    names = [quality.origin(result.get("text") or "-") for result in texts]
    axes.set_yticks([row * (len(models) + 1) + (len(models) - 1) / 2 for row in range(len(texts))], names)
    axes.invert_yaxis()
    axes.set_xlabel("perplexity, with the 95 % interval of windows")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _errors(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """A map of errors: linears by layers."""
    kinds = list(dict.fromkeys(layer["name"].rpartition(".")[2] for layer in layers))
    numbers: dict[str, list[float]] = {kind: [] for kind in kinds}
    for layer in layers:
        error = layer["relative_error"]
        numbers[layer["name"].rpartition(".")[2]].append(math.nan if error is None else 100 * error)
    count = max(map(len, numbers.values()))
    grid = [row + [math.nan] * (count - len(row)) for row in numbers.values()]
    figure, ((axes,),) = _figure(9, 0.9 + 0.3 * len(kinds))
    drawn = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    figure.colorbar(drawn, ax=axes, label="relative error, %")
    return figure


def _losses(losses: Sequence[float]) -> Figure:
    figure, ((axes,),) = _figure(9, 2.6)
    axes.plot(range(1, len(losses) + 1), losses, color=_BEHIND, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    return figure


def _histograms(spreads: Sequence[Mapping[str, Any]]) -> Figure:
    """A row for each layer, a column for each site; counts on a logarithmic axis."""
    layers = list(dict.fromkeys(entry["layer"] for entry in spreads))
    sites = list(dict.fromkeys(entry["site"] for entry in spreads))
    figure, axes = _figure(9, 0.5 + 1.9 * len(layers), len(layers), len(sites))
    for entry in spreads:
        here = axes[layers.index(entry["layer"])][sites.index(entry["site"])]
        for side, color in (("before", _BEFORE), ("behind", _BEHIND)):
            if entry[side] is not None:
                shares = [
                    count / (end - start)
                    for count, start, end in zip(entry[side]["counts"], EDGES, EDGES[1:], strict=False)
                ]
                here.stairs(shares, EDGES, color=color, label=side)
        here.set_yscale("log")
        here.set_xscale("symlog", linthresh=4, linscale=2)
        here.set_xlim(0, EDGES[-1])
        here.set_xticks([0, 1, 2, 4, 16, 64], ["0", "1", "2", "4", "16", "64"], fontsize=7)
        here.tick_params(axis="y", labelsize=7)
        here.set_title(f"layer {entry['layer']}: {entry['site']}", fontsize=7)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.supxlabel("|x| / rms of the token", fontsize=8)
    figure.supylabel("share of inputs, a unit of that", fontsize=8)
    return figure


def _largest(spreads: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        {
            "layer": str(entry["layer"]), "inputs of": entry["site"],
            **{
                f"largest / rms, {side}": None if entry[side] is None else f"{entry[side]['largest']:.1f}"
                for side in ("before", "behind")
            },
        }
        for entry in spreads
    ]  # fmt: skip
    return (
        quality.table(rows, left=2)
        + "\n\nMean over tokens. A dash: no rotation there, or one that is not known."
    )
