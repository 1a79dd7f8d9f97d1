"""`Recipe`, how a model is quantised, and the recipes that have names."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..errors import RecipeError
from ..format import schema
from ..format.files import write_atomically
from ..format.groups import MOST_PREFIX, check_formats
from .limits import MOST_ROUNDS, SCHEMA
from .rotation import RotationConfig, RotationLearning
from .text import parse_yaml, read_yaml
from .training import Training

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from ..format.grid import Grid


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised. Frozen; derive another with `recipe.override(key=value)`.

    Attributes:
        name: shown in reports and model cards.
        rotation: see `RotationConfig`.
        rotation_learning: see `RotationLearning`.
        smooth: before rotating, how much of outlier channels moves from activations into weights
            (SmoothQuant's alpha), in [0, 1]; 0 is off. See `smooth.smooth`.
        weight_bits: 2, 3, 4 or 16 (kept).
        weight_grid: `codebook` (2 and 3 bits: four or eight int8 levels and one fp16 scale a group),
            `uniform` (symmetric steps of one scale), or `auto`: a codebook at 2 and 3 bits, else uniform.
        weight_method: `rtn` (Lloyd-Max for a codebook, the clip of least squared error for a uniform grid)
            or `gptq`.
        group_size: inputs that share one scale; -1 is the whole row; `auto` the first of
            128, 64, 32 that divides, else -1; `fine` 32, or -1 where that does not divide.
        act_bits: 4 (dynamic, a scale a token or a group of its inputs) or 16 (kept).
        act_clip: where activations are clipped, as a share of the largest; `search` takes, for each site,
            the clip of least squared error on the calibration text.
        act_codes: `all` sixteen codes are used by activations: their scale is `-act_clip * x / 8` for the x
            furthest from 0, whose code is -8 whatever its sign. `symmetric`, the papers' choice, spares -8:
            `act_clip * max|x| / 7`.
        act_group_size: activations of a token that share one scale; -1 is the whole token, `auto` the
            weights' group.
        o_proj_act: `head` gives each attention head of o_proj's input its own scale, `token` as many as
            `act_group_size` says (R2 rotates inside a head only, so heads differ in size).
        kv_bits: 4 (asymmetric, a scale and a zero-point a token and head) or 16 (kept).
        kv_clip: the range is shrunk by this factor around its middle.
        sink_tokens: the first cache entries kept in 16 bits.
        prefix_tokens: tokens whose keys and values by the full-precision model stand before every sequence,
            0 to 4; `auto` is as many as it takes to keep massive activations out of texts, 0 where there are
            none, and with `sink_tokens`. See `quantization.prefix`.
        head_bits, embed_bits: 8 (per row) or 16 (kept).
        gptq_damp: added to the Hessian's diagonal, as a fraction of its mean.
        gptq_block: columns quantised before the rest is updated.
        gptq_act_order: quantise the columns of large Hessian diagonal first.
        gptq_refine: rounds of coordinate descent (and level refits) after the GPTQ pass.
        gptq_target: `full` fits the full-precision layer's output, `quantized` the layer's own
            output on the quantised prefix's inputs (plain GPTQ).
        first_token: what the first token of a window counts in the GPTQ fit, as a share of all the others
            together; 0 is no more than any other. See `quantization.layer.token_weights`.
        calib_samples, calib_seqlen: calibration windows and tokens in each.
        training: see `Training`; only `w2a4 train` and `w2a4.prepare` read it.
    """

    name: str = "custom"
    rotation: RotationConfig = field(default_factory=RotationConfig)
    rotation_learning: RotationLearning = field(default_factory=RotationLearning)
    smooth: float = 0.0
    weight_bits: Literal[2, 3, 4, 16] = 2
    weight_grid: Literal["auto", "codebook", "uniform"] = "auto"
    weight_method: Literal["rtn", "gptq"] = "gptq"
    group_size: int | Literal["auto", "fine"] = "auto"
    act_bits: Literal[4, 16] = 4
    act_clip: float | Literal["search"] = "search"
    act_codes: Literal["all", "symmetric"] = "all"
    act_group_size: int | Literal["auto"] = "auto"
    o_proj_act: Literal["head", "token"] = "head"
    kv_bits: Literal[4, 16] = 4
    kv_clip: float = 0.95
    sink_tokens: int = 0
    prefix_tokens: int | Literal["auto"] = "auto"
    head_bits: Literal[8, 16] = 8
    embed_bits: Literal[8, 16] = 8
    gptq_damp: float = 0.01
    gptq_block: int = 128
    gptq_act_order: bool = True
    gptq_refine: int = 3
    gptq_target: Literal["full", "quantized"] = "quantized"
    first_token: float = 0.125
    calib_samples: int = 64
    calib_seqlen: int = 512
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        SCHEMA.check(self)
        check_formats(self, RecipeError)
        if self.weight_grid == "codebook" and self.weight_bits not in (2, 3):
            raise RecipeError(
                f"weight_grid='codebook' with weight_bits={self.weight_bits}: a codebook has 2 or 3 bits; "
                "give 'uniform' or 'auto'"
            )
        if self.act_clip != "search" and not 0 < self.act_clip <= 1:
            raise RecipeError(f"act_clip={self.act_clip}: give a number in (0, 1]")
        if isinstance(self.prefix_tokens, int) and not 0 <= self.prefix_tokens <= MOST_PREFIX:
            raise RecipeError(f"prefix_tokens={self.prefix_tokens}: give 'auto' or 0 to {MOST_PREFIX}")
        if self.sink_tokens and self.prefix_tokens not in (0, "auto"):
            raise RecipeError(
                f"sink_tokens={self.sink_tokens} with prefix_tokens={self.prefix_tokens!r}: what begins a "
                "text is an ordinary token behind a prefix; set one of them to 0"
            )
        least = {"gptq_block": 1, "gptq_refine": 0, "calib_samples": 1, "calib_seqlen": 2}
        SCHEMA.check_least(self, least)
        if self.gptq_refine > MOST_ROUNDS:
            raise RecipeError(
                f"gptq_refine={self.gptq_refine}: give at most {MOST_ROUNDS}, few change anything"
            )
        if not 0 <= self.smooth <= 1:
            raise RecipeError(f"smooth={self.smooth}: give a number in [0, 1]; 0 is off")
        if not 0 < self.gptq_damp < 1:
            raise RecipeError(f"gptq_damp={self.gptq_damp}: give a number in (0, 1)")
        if not 0 <= self.first_token < float("inf"):
            raise RecipeError(f"first_token={self.first_token}: give a number >= 0; 0 is off")

    def signed_clip(self, clip: float) -> float:
        """A clip in (0, 1] as packed layers and ops have it: negative for all sixteen codes."""
        return -clip if self.act_codes == "all" else clip

    @property
    def grid(self) -> Grid:
        """That of the weights; they have one where `weight_bits` is less than 16."""
        from ..format.grid import grid_of  # recipes are read before torch is imported

        return grid_of(self.weight_bits, self.weight_grid)

    def override(self, **changes: Any) -> Recipe:
        """A copy with fields replaced; nested ones as `{"rotation.r4": "none"}`.

        Raises:
            RecipeError: an unknown key, with the keys that are spelled nearly so, or a value out of range.
        """
        return SCHEMA.override(self, changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every field; `from_dict` is the inverse."""
        return schema.to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Inverse of `to_dict`. Raises RecipeError for an unknown key or a value out of range."""
        return SCHEMA.from_dict(cls, data)

    def to_yaml(self, path: str | Path) -> None:
        """Write every field to a YAML file."""
        write_yaml(path, self.to_dict())

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a YAML file; fields that it lacks keep their defaults. Raises RecipeError."""
        return cls.from_dict(read_yaml(path))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """A named recipe (`w4a4kv4`, see `RECIPES`) or a YAML file.

        Raises:
            RecipeError: no recipe has that name, with those that are spelled nearly so, or as `from_yaml`.
        """
        name = str(name_or_path)
        if name in RECIPES:
            return RECIPES[name]
        if name.endswith((".yaml", ".yml")) or Path(name_or_path).is_file():
            return cls.from_yaml(name_or_path)
        raise RecipeError(
            f"unknown recipe {name!r}; named recipes: {', '.join(RECIPES)}; or give a .yaml file"
            f"{schema.did_you_mean(name, RECIPES)}"
        )


def write_yaml(path: str | Path, recipe: Mapping[str, Any]) -> None:
    """Write a recipe that is plain data, perhaps of another version, in the order of `Recipe`'s fields."""
    write_atomically(path, yaml.safe_dump(schema.ordered(Recipe, recipe), sort_keys=False))


class _Named(Mapping[str, Recipe]):
    """Recipes by name, each read from its file in this package when it is asked for."""

    def __init__(self) -> None:
        self._recipes: dict[str, Recipe] = {}

    @functools.cached_property
    def _files(self) -> dict[str, Traversable]:
        files = importlib.resources.files(__package__).iterdir()
        named = {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}
        return dict(sorted(named.items()))

    def __getitem__(self, name: str) -> Recipe:
        if name not in self._recipes:
            self._recipes[name] = Recipe.from_dict(parse_yaml(self._files[name].read_text(encoding="utf-8")))
        return self._recipes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


#: Named recipes, for `Recipe.load` and the command line. Their names are known without reading the files.
RECIPES: Mapping[str, Recipe] = _Named()
