"""How much of an evaluation text a model may have seen while it was calibrated or trained."""

from __future__ import annotations

import re
import warnings
from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import quality
from .data import PACKAGED, TextSource, describe_text, load_text, source_of

#: Words in a row that two texts hardly have in common by chance.
SHINGLE = 12

#: The share of an evaluation text from which a user is warned.
WARN_FROM = 0.01


def shared(text: str, other: str) -> float:
    """Share of the shingles of a text, 12 words in a row, that occur in another text too.

    Case and what stands between words do not count. A shingle that occurs twice in `text` counts twice.

    Returns:
        0 to 1; 0 for a text of fewer than 12 words.
    """
    known: dict[str, int] = {}
    mine, others = (_shingles(content, known) for content in (text, other))
    return torch.isin(mine, others).double().mean().item() if len(mine) else 0.0


def warn_of_overlap(texts: Sequence[TextSource], fitted: Mapping[str, TextSource]) -> None:
    """Warn, for each evaluation text, of 1 % or more of its shingles in what the model is fitted on.

    Args:
        texts: what will be evaluated on.
        fitted: what the model is fitted on, by what it is for, as `{"calibration": "builtin"}`.

    Raises:
        CalibrationError: a text is missing or empty.
    """
    contents = {use: load_text(source, "calibration") for use, source in fitted.items()}
    for source in texts:
        text = load_text(source, "evaluation")
        for use, content in contents.items():
            share = shared(text, content)
            if share >= WARN_FROM:
                warnings.warn(
                    f"{share:.1%} of the evaluation text {source_of(source)!r} stand in the {use} text "
                    f"{source_of(fitted[use])!r} too ({SHINGLE} words in a row), so its perplexity flatters; "
                    "evaluate on a text that was not fitted",
                    stacklevel=2,
                )


def warn_of_known(texts: Sequence[TextSource], fitted_on: Mapping[str, str]) -> None:
    """`warn_of_overlap` for a checkpoint: its report names the texts, and has those of the package only.

    Args:
        fitted_on: see `Report.fitted_on`.
    """
    packaged = {use: quality.origin(line) for use, line in fitted_on.items()}
    warn_of_overlap(texts, {use: name for use, name in packaged.items() if name in PACKAGED})
    for source in texts:
        if describe_text(source, load_text(source, "evaluation")) in fitted_on.values():
            warnings.warn(
                f"the model was fitted on the evaluation text {source_of(source)!r} itself, so its "
                "perplexity flatters; evaluate on a text that was not fitted",
                stacklevel=2,
            )


def _shingles(text: str, known: dict[str, int]) -> Tensor:
    """A hash of every 12 words in a row, int64; equal for equal words, `known` gives each word a number."""
    found = re.finditer(r"\w+", text.casefold())
    words = array("q", (known.setdefault(match[0], len(known)) for match in found))
    count = len(words) - SHINGLE + 1
    if count < 1:
        return torch.empty(0, dtype=torch.int64)
    numbers = torch.frombuffer(words, dtype=torch.int64)
    factors = torch.randint(-(2**63), 2**63 - 1, (SHINGLE,), generator=torch.Generator().manual_seed(0))
    hashes = torch.zeros(count, dtype=torch.int64)
    for offset, factor in enumerate(factors):  # sums wrap around at 64 bits
        hashes += (numbers[offset : offset + count] + 1) * factor
    return hashes
