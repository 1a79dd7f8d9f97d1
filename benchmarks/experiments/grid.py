"""Grids of recipes: what `benchmarks.experiments.accuracy` reads.

model: testbed                  # or a directory or .gguf file
outliers: {factor: 16.0}        # planted in the testbed: arguments of `plant_outliers`
seeds: [0, 1, 2]                # of the testbed, its outliers, rotations and the order of the text
text: [general, builtin]        # what is evaluated on: one source or several; this is the default
seqlen: 256                     # of the evaluation's windows
windows: 128                    # at most, of each text
set: {calib_samples: 32}        # recipe keys of every row
rows:
  rcp: {recipe: w2a4kv4-rcp-quick, train: true, set: {training.steps: 200}}
  gptq: {recipe: w2a4kv4}
claims: ["rcp < gptq", "rcp <= 1.5 on general"]   # of ratios to full precision; on all texts if none is named
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import w2a4
from w2a4 import Recipe
from w2a4.evaluate.perplexity import EVALUATION_TEXTS

#: The row that others are compared with; every grid has it.
FULL_PRECISION = "full precision"

GRIDS = Path(__file__).parent / "grids"

#: Cells of earlier runs do not count when this changes.
VERSION = 2


@dataclass(frozen=True)
class Row:
    """What is done to the model.

    Attributes:
        recipe: None keeps the model as it is.
        train: run `w2a4 train` with it, else `w2a4 quantize`.
    """

    name: str
    recipe: Recipe | None = None
    train: bool = False

    def key(self, grid: Grid, seed: int) -> str:
        """Names all that the row's perplexity depends on but the code."""
        content = [
            VERSION, grid.model, grid.calibration, grid.text, grid.seqlen, grid.windows, seed, self.train,
            grid.outliers, self.name if self.recipe is None else self.recipe.to_dict(),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Claim:
    """`left < right` of two rows, or `left <= limit`; `on text`, or on every text of the grid."""

    left: str
    right: str | None = None
    limit: float | None = None
    text: str | None = None

    def __str__(self) -> str:
        claim = f"{self.left} < {self.right}" if self.limit is None else f"{self.left} <= {self.limit:g}"
        return claim if self.text is None else f"{claim} on {self.text}"

    @classmethod
    def parse(cls, text: str, rows: Sequence[str], sources: Sequence[str]) -> Claim:
        match = re.fullmatch(r"\s*(.+?)\s*(<=?)\s*(.+?)(?:\s+on\s+(\S+))?\s*", str(text))
        if match is None:
            raise w2a4.RecipeError(
                f"claim {text!r}: give 'row < row' or 'row <= number', and 'on TEXT' if need be"
            )
        left, sign, right, source = match.groups()
        if source not in (None, *sources):
            raise w2a4.RecipeError(
                f"claim {text!r}: there is no text {source!r}; texts of the grid: {', '.join(sources)}"
            )
        for name in (left, *([right] if sign == "<" else [])):
            if name not in rows:
                raise w2a4.RecipeError(f"claim {text!r}: there is no row {name!r}; rows: {', '.join(rows)}")
        try:
            return (
                cls(left, right, text=source) if sign == "<" else cls(left, limit=float(right), text=source)
            )
        except ValueError:
            raise w2a4.RecipeError(f"claim {text!r}: {right!r} is not a number") from None


@dataclass(frozen=True)
class Grid:
    """See the head of this file."""

    name: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    model: str = "testbed"
    calibration: str = "builtin"
    text: tuple[str, ...] = EVALUATION_TEXTS
    seeds: tuple[int, ...] = (0,)
    seqlen: int = 2048
    windows: int | None = None
    outliers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, source: str) -> Grid:
        """A YAML file, or the name of one in `GRIDS`.

        Raises:
            w2a4.RecipeError: not there, not YAML, or with keys or values that mean nothing.
        """
        path = Path(source)
        if not path.suffix:
            path = GRIDS / f"{source}.yaml"
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError:
            named = ", ".join(sorted(file.stem for file in GRIDS.glob("*.yaml")))
            raise w2a4.RecipeError(f"no grid {source!r}; give a YAML file, or one of {named}") from None
        except yaml.YAMLError as error:
            raise w2a4.RecipeError(f"grid {source!r} is not YAML: {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
            raise w2a4.RecipeError(f"grid {source!r} has no mapping 'rows'")
        return cls._parse(path.stem, content)

    @classmethod
    def _parse(cls, name: str, content: dict[str, Any]) -> Grid:
        shared, given = content.pop("set", {}), content.pop("rows")
        rows = (Row(FULL_PRECISION), *(_parse_row(key, value or {}, shared) for key, value in given.items()))
        texts = content.pop("text", EVALUATION_TEXTS)
        texts = tuple(map(str, texts if isinstance(texts, (list, tuple)) else [texts]))
        if not texts or len(set(texts)) < len(texts):
            raise w2a4.RecipeError(
                f"grid {name!r}: text is {list(texts)}; give at least one source, each once"
            )
        names = [row.name for row in rows]
        claims = [Claim.parse(text, names, texts) for text in content.pop("claims", [])]
        known = {field.name for field in dataclasses.fields(cls)}
        for key in content:
            if key not in known - {"name"}:
                raise w2a4.RecipeError(
                    f"grid {name!r}: unknown key {key!r}; known: {', '.join(sorted(known))}, set"
                )
        content["seeds"] = tuple(content.get("seeds", (0,)))
        return cls(name=name, rows=rows, claims=tuple(claims), text=texts, **content)

    def pick(self, rows: Sequence[str] | None, seeds: Sequence[str] | None) -> Grid:
        """Only these rows and seeds, and the claims on them; None is all."""
        names = [row.name for row in self.rows] if rows is None else [FULL_PRECISION, *rows]
        for name in names:
            if name not in {row.name for row in self.rows}:
                raise w2a4.RecipeError(
                    f"there is no row {name!r}; rows: {', '.join(row.name for row in self.rows)}"
                )
        if seeds is not None and not all(seed.isdecimal() for seed in seeds):
            raise w2a4.RecipeError(f"seeds {','.join(seeds)!r}: give whole numbers, separated by commas")
        return dataclasses.replace(
            self,
            rows=tuple(row for row in self.rows if row.name in names),
            claims=tuple(c for c in self.claims if c.left in names and c.right in (None, *names)),
            seeds=self.seeds if seeds is None else tuple(map(int, seeds)),
        )

    def override(self, model: str | None, settings: dict[str, Any]) -> Grid:
        """With another model, and recipe fields that every row is to have."""
        rows = (
            row if row.recipe is None else dataclasses.replace(row, recipe=row.recipe.override(**settings))
            for row in self.rows
        )
        return dataclasses.replace(self, model=model or self.model, rows=tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        return content | {"claims": [str(claim) for claim in self.claims]}


def _parse_row(name: str, content: dict[str, Any], shared: dict[str, Any]) -> Row:
    known = {"recipe", "train", "set"}
    for key in content:
        if key not in known:
            raise w2a4.RecipeError(f"row {name!r}: unknown key {key!r}; known: {', '.join(sorted(known))}")
    recipe = Recipe.load(content.get("recipe", "w2a4kv4")).override(**(shared | content.get("set", {})))
    return Row(name, recipe, bool(content.get("train", False)))
