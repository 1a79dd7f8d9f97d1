"""What was measured, side by side: intervals, ratios to full precision, tables.

A measurement is a dict that `perplexity.evaluate` returns, one a text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .data import HUB

#: Resamples of a bootstrap, and the quantiles between which 95 % of them lie.
RESAMPLES, ENDS = 1000, (0.025, 0.975)

FULL_PRECISION, CHECKPOINT = "full precision", "this checkpoint"
FULL_WITH_PREFIX = "full precision, with its prefix"

ONE_TEXT = "Measured on one text only: a figure on one text may flatter, so measure another kind of text too."


def interval(losses: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of `exp` of a mean loss: windows are drawn again, with a seed of its own.

    It tells what other windows of the same text would give, and nothing of another text.

    Args:
        losses: `[rows, windows]`, nats a token, or differences of these. All rows take the windows that are
            drawn, and the mean over rows of `exp` of their mean loss is what is resampled.

    Returns:
        its 2.5 and 97.5 % quantiles; None with one window, or where a loss is not finite.
    """
    values = torch.tensor([[math.nan if loss is None else loss for loss in row] for row in losses]).double()
    windows = values.shape[-1]
    if windows < 2 or not values.isfinite().all():
        return None, None
    drawn = torch.randint(windows, (RESAMPLES, windows), generator=torch.Generator().manual_seed(0))
    means = values[:, drawn].mean(-1).exp().mean(0)
    low, high = means.quantile(torch.tensor(ENDS, dtype=torch.float64)).tolist()
    return low, high


def ratio(measured: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float | None]:
    """One measurement over another of the same text: ratio, low, high.

    `low` and `high` are the `interval` of the ratio where both have losses of the same windows, else None.
    All are None where one was not measured, or tokenizers differ: a token is then another part of the text.
    """
    found: dict[str, float | None] = {"ratio": None, "low": None, "high": None}
    value, base = measured.get("perplexity"), reference.get("perplexity")
    windows, others = measured.get("tokens_sha256"), reference.get("tokens_sha256")
    if not value or not base or not math.isfinite(value) or not math.isfinite(base):
        return found
    if windows is not None and others is not None and windows != others:
        return found
    found["ratio"] = value / base
    pairs = list(zip(measured.get("losses") or [], reference.get("losses") or [], strict=False))
    if windows is not None and windows == others and pairs and not any(None in pair for pair in pairs):
        found["low"], found["high"] = interval([[loss - other for loss, other in pairs]])
    return found


def origin(text: str) -> str:
    """The source in a line of `data.describe_text`.

    >>> origin("builtin (pydoc_data.topics of Python 3.11.7), 9 characters, sha256 ba7816bf8f01")
    'builtin'
    """
    text = re.sub(r", \d+ characters, sha256 \w+$", "", text).removeprefix("the teacher's own, from ")
    return re.sub(r" \(.*\)$", "", text)


def _source(text: str) -> str:
    """`origin` without the split of a data set; lists of documents are told apart by their hash."""
    name = origin(text)
    if name.startswith(HUB):
        return HUB + name.removeprefix(HUB).partition(":")[0]
    return text if re.fullmatch(r"\d+ documents", name) else name


def marked(measured: Sequence[Mapping[str, Any]], fitted_on: Mapping[str, str]) -> list[dict[str, Any]]:
    """The measurements with `in_domain`: whether the model was calibrated or trained on text of that source.

    Args:
        fitted_on: see `Report.fitted_on`.
    """
    sources = {_source(text) for text in fitted_on.values()}
    return [{**result, "in_domain": _source(result.get("text") or "") in sources} for result in measured]


def evaluation(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], fitted_on: Mapping[str, str]
) -> dict[str, Any]:
    """What a `Report` holds of full precision and of a checkpoint, measured on the same texts.

    Returns:
        before, after (`marked`), ratios (`ratio` of each text, with its `text`).
    """
    ratios = [
        {"text": result.get("text"), **ratio(result, reference)}
        for reference, result in zip(before, after, strict=False)
    ]
    return {"before": list(before), "after": marked(after, fitted_on), "ratios": ratios}


# For people


def table(rows: Sequence[Mapping[str, Any]], markdown: bool = False, left: int = 1) -> str:
    """Rows as a table, keys of the first row as its head, `left` columns aligned left; None is a dash."""
    from tabulate import tabulate

    head = list(rows[0]) if rows else []
    align = ["left" if column < left else "right" for column in range(len(head))]
    return tabulate(
        [[row.get(key) for key in head] for row in rows], head, missingval="-", disable_numparse=True,
        tablefmt="github" if markdown else "simple", colalign=align,
    )  # fmt: skip


def quality_text(models: Mapping[str, Sequence[Mapping[str, Any]]], markdown: bool = False) -> str:
    """Perplexities of models on the same texts as a table, and what has to be known to read it.

    Args:
        models: measurements by name of the model; ratios are to the one named `FULL_PRECISION`, if any.
    """
    base = models.get(FULL_PRECISION)
    rows = []
    for index in range(max(map(len, models.values()))):
        for name, measured in models.items():
            if index >= len(measured):
                continue
            result = measured[index]
            mark = ", in domain" if result.get("in_domain") else ""
            row = {
                "text": f"{origin(result.get('text') or '-')}{mark}", "model": name,
                "perplexity": number(result["perplexity"]), "95 %": between(result),
            }  # fmt: skip
            if base is not None:
                found = ratio(result, base[index]) if measured is not base and index < len(base) else {}
                row |= {"ratio": number(found.get("ratio")), "ratio, 95 %": between(found)}
            rows.append(row)
    measured = [result for results in models.values() for result in results]
    texts = dict.fromkeys(protocol(result) for result in measured)
    notes = [f"Perplexity on {text}." for text in texts]
    if any(result.get("low") is not None for result in measured):
        notes.append("95 %: of resampled windows of that text; ratios of the same windows.")
    if any(result.get("in_domain") for result in measured):
        notes.append("In domain: the model was calibrated or trained on text of that source.")
    if len(texts) == 1:
        notes.append(ONE_TEXT)
    return f"{table(rows, markdown, left=2)}\n\n" + ("\n\n" if markdown else "\n").join(notes)


def between(found: Mapping[str, Any]) -> str:
    """`low` and `high` of a measurement or ratio."""
    low, high = found.get("low"), found.get("high")
    return "-" if low is None or high is None else f"{number(low)} to {number(high)}"


def protocol(measured: Mapping[str, Any]) -> str:
    """What stands beside every perplexity: text, seqlen, windows, tokens, BOS."""
    text = f"{measured['text']}: " if measured.get("text") else ""
    return (
        f"{text}{measured['windows']} windows of {measured['seqlen']} ({measured['tokens']} tokens), "
        f"BOS {'once at the start' if measured.get('bos') else 'none'}"
    )


def number(value: float | None) -> str:
    """Short form of a perplexity or ratio: `23.41`, `1,912`, `1.2e+05`, `-` for what was not measured."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e5 else f"{value:.1e}"
