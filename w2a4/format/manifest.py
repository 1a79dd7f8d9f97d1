"""`Manifest`: what loading a checkpoint needs to know, and nothing else.

In format 2, `quantization_config` of config.json holds `manifest`, which is checked strictly, and beside it
`recipe` and `provenance`, which say how the model was made and are not read when it is loaded: a recipe of
another version, with fields that this one does not have, is no obstacle. Format 1 had no manifest; its facts
stand among the fields of the recipe, and `Manifest.from_format1` takes them from there.

There are two kinds: `Manifest` describes a model of a family in `arch` that was rotated or quantised, and
`Replacement` a model of any transformers class some of whose linears were replaced by packed ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import CheckpointError, RotationError, shown
from ..version import VERSION
from . import schema
from .groups import MOST_PREFIX, check_formats
from .kinds import OnlineKind, RotationKind
from .online import OnlineRotation

#: Raised when the layout of tensors or of the manifest changes incompatibly.
FORMAT_VERSION = 2

#: The oldest w2a4 that reads `FORMAT_VERSION`; raised with it.
NEEDS_W2A4 = "0.1.0"

#: Codes of a weight, by its bits: 2 and 3 index four and eight int8 levels a group (which hold a uniform grid
#: too), 4 are signed steps, 16 are the floats.
GRIDS = {2: "codebook", 3: "codebook", 4: "uniform", 16: "float"}

_SCHEMA = schema.Schema("manifest", CheckpointError)

#: What a recipe of format 1 means where it lacks a field.
_FORMAT1: dict[str, Any] = {
    "weight_bits": 2, "group_size": "auto", "act_bits": 4, "act_group_size": -1, "o_proj_act": "head",
    "kv_bits": 4, "kv_clip": 0.95, "sink_tokens": 0, "head_bits": 8, "embed_bits": 8,
}  # fmt: skip
_FORMAT1_ROTATION: dict[str, Any] = {
    "r1": "random_hadamard", "r2": "random_hadamard", "r3": "hadamard", "r4": "hadamard", "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Rotations:
    """The rotations that a model was given.

    Attributes:
        r1, r2: folded into the weights.
        r3: applied to queries and keys.
        r4: applied to the input of down_proj, whose weight its inverse is folded into.
        seed: that R3, R4 and the random kinds of R1 and R2 were drawn from; any whole number.
    """

    r1: RotationKind
    r2: RotationKind
    r3: OnlineKind
    r4: OnlineKind
    seed: int

    def __post_init__(self) -> None:
        _SCHEMA.check(self)


@dataclass(frozen=True)
class Manifest:
    """What the tensors of a checkpoint mean, and what is computed with them.

    Attributes:
        family: `model_type` of config.json.
        weight_bits, grid: of the decoder's linears, see `GRIDS`.
        group_size: inputs that share one scale; -1 is the whole row; see `groups.resolve_group_size`.
        act_bits: 4 (dynamic, a scale a token or a group of its inputs) or 16 (not quantised).
        act_group_size: activations of a token that share one scale; -1 is the whole token, `auto` the
            weights' group.
        o_proj_act: `head` gives each attention head of o_proj's input its own scale, `token` does not.
        kv_bits: 4 (asymmetric, a scale and a zero-point a token and head) or 16.
        kv_clip: the range of a key or value is shrunk by this factor around its middle, in (0, 1].
        sink_tokens: the first cache entries kept in 16 bits.
        prefix: ids of the tokens whose keys and values, in the checkpoint, stand before every sequence.
        head_bits, embed_bits: 8 (per row) or 16.
        rotation: which rotations the model was given.
        r3, r4: the rotations to apply online, with their widths; None where `rotation` says `none`.

    Raises:
        CheckpointError: a value that no field has, or online rotations other than `rotation` says.
    """

    family: str
    weight_bits: Literal[2, 3, 4, 16]
    grid: Literal["codebook", "uniform", "float"]
    group_size: int | Literal["auto", "fine"]
    act_bits: Literal[4, 16]
    act_group_size: int | Literal["auto"]
    o_proj_act: Literal["head", "token"]
    kv_bits: Literal[4, 16]
    kv_clip: float
    sink_tokens: int
    head_bits: Literal[8, 16]
    embed_bits: Literal[8, 16]
    rotation: Rotations
    r3: OnlineRotation | None
    r4: OnlineRotation | None
    prefix: tuple = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", _sequence("prefix", self.prefix))
        _SCHEMA.check(self)
        ids = all(type(token) is int and token >= 0 for token in self.prefix)
        if len(self.prefix) > MOST_PREFIX or not ids:
            raise CheckpointError(f"prefix={shown(list(self.prefix))}: give at most {MOST_PREFIX} token ids")
        check_formats(self, CheckpointError)
        if self.grid != GRIDS[self.weight_bits]:
            raise CheckpointError(
                f"grid={self.grid!r} with weight_bits={self.weight_bits}: give {GRIDS[self.weight_bits]!r}"
            )
        for name in ("r3", "r4"):
            kind, found = getattr(self.rotation, name), getattr(self, name)
            if (found.kind if found else "none") != kind:
                raise CheckpointError(
                    f"rotation.{name}={kind!r}, but {name} is {found.kind if found else 'none'!r}"
                )

    @property
    def r4_blocks(self) -> int:
        """Equal blocks of R4; 1 where its width alone decides them."""
        if self.r4 is None or self.r4.kind != "hadamard":
            return 1
        whole = OnlineRotation(self.r4.kind, self.r4.size)
        return 1 if self.r4.block_size == whole.block_size else self.r4.size // self.r4.block_size

    @classmethod
    def of_recipe(
        cls, recipe: Mapping[str, Any], rotation: Mapping[str, Any], family: str, prefix: Sequence[int] = ()
    ) -> Manifest:
        """The manifest of a model that was made by a recipe.

        Args:
            recipe: `Recipe.to_dict()`.
            rotation: its `online` holds `r3` and `r4`, each as `OnlineRotation.to_dict` gives it or None.
            family: `model_type` of the model's config.
            prefix: see the attribute.
        """
        record = _mapping("rotation.online", rotation.get("online"))
        online = {name: _online(record.get(name)) for name in ("r3", "r4")}
        kinds = {key: recipe["rotation"][key] for key in _FORMAT1_ROTATION}
        facts = {key: recipe[key] for key in _FORMAT1}
        grid = GRIDS.get(facts["weight_bits"], "") if isinstance(facts["weight_bits"], int) else ""
        settled = {"family": family, "grid": grid, "rotation": kinds, "prefix": prefix}
        return _SCHEMA.from_dict(cls, {**facts, **settled, **online})

    @classmethod
    def from_format1(cls, recipe: Any, rotation: Any) -> Manifest:
        """The manifest of a checkpoint of format 1: fields that loading does not need are ignored.

        Args:
            recipe, rotation: those of its `quantization_config`.
        """
        recipe = _mapping("recipe", recipe)
        kinds = {**_FORMAT1_ROTATION, **_mapping("recipe.rotation", recipe.get("rotation"))}
        recipe = {**_FORMAT1, **recipe, "rotation": kinds}
        return cls.of_recipe(recipe, _mapping("rotation", rotation), "llama")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON with every field."""
        return schema.to_dict(self) | {"prefix": list(self.prefix)}


@dataclass(frozen=True)
class ReplacedLinears:
    """Linears of one kind that stand in place of a model's own; each has its clip among its tensors.

    Attributes:
        names: of the modules, as `named_modules` of the model that was saved gives them.
        weight_bits, grid: see `GRIDS`.
        group_size: inputs that share one scale; -1 is the whole row; see `groups.resolve_group_size`.
        act_bits: 4 (dynamic, a scale a token or a group of its inputs) or 16 (not quantised).
    """

    names: tuple
    weight_bits: Literal[2, 3, 4]
    grid: Literal["codebook", "uniform"]
    group_size: int | Literal["auto", "fine"]
    act_bits: Literal[4, 16]

    def __post_init__(self) -> None:
        _SCHEMA.check(self)
        if self.grid != GRIDS[self.weight_bits]:
            raise CheckpointError(
                f"grid={self.grid!r} with weight_bits={self.weight_bits}: give {GRIDS[self.weight_bits]!r}"
            )
        if isinstance(self.group_size, int) and self.group_size != -1 and self.group_size < 1:
            raise CheckpointError(f"group_size={self.group_size}: give -1, 'auto', 'fine' or a number >= 1")
        wrong = [name for name in self.names if not isinstance(name, str) or not name]
        if wrong or not self.names:
            found = shown(wrong[0]) if wrong else "nothing"
            raise CheckpointError(f"names holds {found}: give the names of modules")

    @classmethod
    def from_dict(cls, data: Any) -> ReplacedLinears:
        if isinstance(data, Mapping):
            data = {**data, "names": _sequence("names", data.get("names"))}
        return _SCHEMA.from_dict(cls, data)


@dataclass(frozen=True)
class Replacement:
    """What the packed tensors of a model mean that `w2a4.replace_linears` has changed.

    Attributes:
        family: `model_type` of config.json; any.
        model_class: the transformers class that was saved, whose modules the names are of.
        replaced: `ReplacedLinears`, one a kind; no name is in two of them.

    Raises:
        CheckpointError: a value that no field has, or a name that stands there twice.
    """

    family: str
    model_class: str
    replaced: tuple

    def __post_init__(self) -> None:
        _SCHEMA.check(self)
        times = Counter(name for part in self.replaced for name in part.names)
        for name, count in times.most_common(1):
            if count > 1:
                raise CheckpointError(f"replaced names {shown(name)} {count} times; a linear has one kind")
        if not times:
            raise CheckpointError("replaced is empty: give the linears that are packed")

    @property
    def kinds(self) -> dict[str, ReplacedLinears]:
        """What stands under each name."""
        return {name: part for part in self.replaced for name in part.names}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Replacement:
        parts = _sequence("replaced", data.get("replaced"))
        return _SCHEMA.from_dict(cls, {**data, "replaced": tuple(map(ReplacedLinears.from_dict, parts))})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON with every field."""
        parts = [schema.to_dict(part) | {"names": list(part.names)} for part in self.replaced]
        return schema.to_dict(self) | {"replaced": parts}


def is_replacement(quantization: Any) -> bool:
    """Whether a `quantization_config` of w2a4, as config.json holds it, is of a `Replacement`."""
    manifest = quantization.get("manifest") if isinstance(quantization, Mapping) else None
    return isinstance(manifest, Mapping) and "replaced" in manifest


def read_manifest(quantization: Mapping[str, Any]) -> Manifest | Replacement:
    """The manifest of a `quantization_config` of any format up to `FORMAT_VERSION`.

    Raises:
        CheckpointError: a newer format, with the w2a4 that reads it, or a value that no checkpoint has.
    """
    version = quantization.get("format_version", 1)
    if type(version) is not int or version < 1:
        raise CheckpointError(f"format_version={shown(version)}: give a number from 1 on")
    if version > FORMAT_VERSION:
        needs = quantization.get("needs_w2a4")
        raise CheckpointError(
            f"checkpoint format {version} is newer than {FORMAT_VERSION}, which w2a4 {VERSION} reads: it was "
            f"written by w2a4 {quantization.get('w2a4_version', 'of unknown version')!s:.20} and needs "
            f"{f'w2a4 >= {needs!s:.20}' if needs else 'a newer w2a4'}; upgrade w2a4"
        )
    try:
        if version == 1:
            return Manifest.from_format1(quantization.get("recipe"), quantization.get("rotation"))
        if is_replacement(quantization):
            return Replacement.from_dict(quantization["manifest"])
        return _SCHEMA.from_dict(Manifest, quantization.get("manifest"))
    except (CheckpointError, RotationError) as error:
        raise CheckpointError(
            f"quantization_config of format {version}: {error!s:.600}; config.json was changed or is "
            "damaged, copy or download it again"
        ) from None


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{name}={shown(value)} is not a mapping")
    return value or {}


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise CheckpointError(f"{name}={shown(value)}: give a list")
    return tuple(value)


def _online(data: Any) -> Mapping[str, Any] | None:
    """An online rotation of format 1, which also recorded those of the kind `none`."""
    return None if not data or (isinstance(data, Mapping) and data.get("kind") == "none") else data
