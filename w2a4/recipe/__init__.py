"""Recipes and checkpoint metadata: frozen dataclasses that read and write YAML.

A `Recipe` says how a model is to be quantised; `RotationConfig` is its rotation part. Both are
plain data: they travel in `recipe.yaml` and in the `quantization_config` of `config.json`, and
every field can be overridden (`w2a4 quantize --set rotation.r4=none`).
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import CheckpointError, RecipeError, shown
from ..format.files import read_text, write_atomically
from ..format.online import OnlineKind

RotationKind = Literal["none", "hadamard", "random_hadamard", "random", "learned"]

#: Bytes that a recipe file may have.
MAX_RECIPE = 1 << 16

#: Collections in collections that a recipe may hold: the parser's time grows with their square.
_MAX_DEPTH = 20

#: No number of a recipe is larger: products with a layer's or a step's number still fit 64 bits.
LARGEST = 2**32 - 1

#: Rounds of coordinate descent, of which the first few change nearly all that is to change.
MOST_ROUNDS = 1000


@dataclass(frozen=True)
class RotationConfig:
    """Which rotation goes where (METHOD: R1 residual stream, R2 value heads, R3 q/k, R4 down_proj).

    Attributes:
        r1: rotation of the residual stream, `hidden_size` wide, folded into the weights.
        r2: rotation of each value head, `head_dim` wide, one a layer, folded into v_proj and o_proj.
        r3: online rotation of queries and keys after RoPE, `head_dim` wide.
        r4: online rotation of down_proj's input, `intermediate_size` wide, its inverse folded.
        seed: from it every random rotation is drawn, independent of torch's global generator.
        learned: safetensors file with the `R1` and `R2.<layer>` that `learned` takes; None means that
            they are to be learned first, as `RotationLearning` says.
    """

    r1: RotationKind = "random_hadamard"
    r2: RotationKind = "random_hadamard"
    r3: OnlineKind = "hadamard"
    r4: OnlineKind = "hadamard"
    seed: int = 0
    learned: str | None = None

    def __post_init__(self) -> None:
        _check_fields(self)

    @property
    def is_identity(self) -> bool:
        """True if nothing is rotated, offline or online."""
        return {self.r1, self.r2, self.r3, self.r4} == {"none"}

    @property
    def to_learn(self) -> bool:
        """True if rotations are to be learned first."""
        return "learned" in (self.r1, self.r2) and self.learned is None


@dataclass(frozen=True)
class Training:
    """How `w2a4 train` trains a prepared model (METHOD: RCP).

    Attributes:
        route: `end_to_end`, or `block`: each decoder layer alone against the full-precision layer's output,
            on the calibration windows; then loss, data, seqlen, micro_batch and minutes do not matter, and
            steps are those of a layer.
        init: what training begins with: `gptq`, `lloyd` (round to nearest) or `minmax`.
        block_steps: end to end, so many steps of each decoder layer alone come first, as with the route
            `block`; `minutes` does not count them.
        keep_codes: begin with the codes of the fit, which is best for a short run; without, latent weights
            begin at their full-precision values, which GPTQ's codes are not nearest to.
        grid: `ldp`, four learned levels a group; `uniform`, learned ends and equal steps between; or
            `minmax`, equal steps between the least and the greatest weight, wherever these move.
        learn_act_clip: whether the clips of the activations are learned.
        loss: `cakld` (both KL divergences, weighted by the teacher's confidence), `kl`
            (teacher to student) or `cross_entropy` (no teacher).
        teacher_top: 0 keeps the teacher in memory; else only its so many most probable tokens at every
            position are kept, on disk, and the probability of the rest.
        steps: optimiser steps.
        batch_size, seqlen: sequences a step, over all processes and accumulations, and tokens in each.
        micro_batch: sequences in one forward pass; -1 is all that a process has.
        lr: of the latent weights, AdamW.
        quantizer_lr: of levels and clips.
        schedule: of both rates after the warm-up.
        warmup: share of the steps.
        weight_decay: of the latent weights.
        max_grad_norm: gradients are scaled down to this norm.
        gradient_checkpointing: recompute layers in the backward pass: less memory, a third more time.
        data: `builtin`, a text file, `hub:NAME`, or `self`: the teacher's own continuations.
        minutes: stop (with the schedule's end) when this much time is over; 0 is no limit.
    """

    route: Literal["end_to_end", "block"] = "end_to_end"
    init: Literal["gptq", "lloyd", "minmax"] = "gptq"
    block_steps: int = 0
    keep_codes: bool = True
    grid: Literal["ldp", "uniform", "minmax"] = "ldp"
    learn_act_clip: bool = True
    loss: Literal["cakld", "kl", "cross_entropy"] = "cakld"
    teacher_top: int = 0
    steps: int = 1600
    batch_size: int = 8
    seqlen: int = 1024
    micro_batch: int = 1
    lr: float = 5e-5
    quantizer_lr: float = 5e-4
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = True
    data: str = "builtin"
    minutes: float = 0.0

    def __post_init__(self) -> None:
        _check_fields(self)
        for key, least in {
            "teacher_top": 0,
            "block_steps": 0,
            "steps": 1,
            "batch_size": 1,
            "seqlen": 2,
        }.items():
            if getattr(self, key) < least:
                raise RecipeError(f"training.{key}={getattr(self, key)}: give a number >= {least}")
        if self.micro_batch != -1 and self.micro_batch < 1:
            raise RecipeError(f"training.micro_batch={self.micro_batch}: give -1 or a number >= 1")
        for key in ("lr", "quantizer_lr", "weight_decay", "minutes"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise RecipeError(f"training.{key}={getattr(self, key)}: give a number >= 0")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"training.warmup={self.warmup}: give a number in [0, 1)")
        if not self.max_grad_norm > 0:
            raise RecipeError(f"training.max_grad_norm={self.max_grad_norm}: give a number > 0")


@dataclass(frozen=True)
class RotationLearning:
    """How rotations are learned where `RotationConfig` says `learned` and names no file.

    Attributes:
        objective: `network` minimises the cross-entropy of the whole fake-quantised model (SpinQuant);
            `distill` its divergence from the full-precision model, whose gradients are far less noisy;
            `kurtosis` brings the kurtosis of activations near that of a uniform distribution, layer by
            layer, without a pass backward through the model (KurTail).
        steps: of Cayley SGD.
        lr: learning rate of the first step.
        schedule: what the rate falls along, `linear` or `cosine` to 0, or not at all (`constant`).
        momentum: share of the last step's direction kept.
        max_grad_norm: gradients of all matrices are scaled down together to this norm, without which the
            rate hardly matters: steps have a largest size, and most would be of it.
        batch_size: sequences a step (not for `kurtosis`).
        seqlen: tokens a sequence.
        init: rotation to start from, drawn from `rotation.seed`; `none` is the identity.
        weights: `full` keeps weights in 16 bits while learning, `recipe` rounds them to the recipe's.
    """

    objective: Literal["network", "distill", "kurtosis"] = "network"
    steps: int = 100
    lr: float = 1.5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    momentum: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 8
    seqlen: int = 2048
    init: OnlineKind = "random_hadamard"
    weights: Literal["full", "recipe"] = "full"

    def __post_init__(self) -> None:
        _check_fields(self)
        for key, least in {"steps": 1, "batch_size": 1, "seqlen": 2}.items():
            if getattr(self, key) < least:
                raise RecipeError(f"rotation_learning.{key}={getattr(self, key)}: give a number >= {least}")
        for key in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, key) < float("inf"):
                raise RecipeError(f"rotation_learning.{key}={getattr(self, key)}: give a number > 0")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"rotation_learning.momentum={self.momentum}: give a number in [0, 1)")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised. Frozen; derive another with `recipe.override(key=value)`.

    Attributes:
        name: shown in reports and model cards.
        rotation: see `RotationConfig`.
        rotation_learning: see `RotationLearning`.
        smooth: before rotating, how much of outlier channels moves from activations into weights
            (SmoothQuant's alpha), in [0, 1]; 0 is off. See `smooth.smooth`.
        weight_bits: 2 (four int8 levels and one fp16 scale a group), 4 (symmetric) or 16 (kept).
        weight_method: `rtn` (MSE clip at 4 bits, Lloyd-Max at 2) or `gptq`.
        group_size: inputs that share one scale; -1 is the whole row; `auto` the first of
            128, 64, 32 that divides, else -1.
        act_bits: 4 (per token, dynamic, symmetric) or 16 (kept).
        act_clip: the scale is `act_clip * max|x| / 7`; `search` takes, for each linear, the clip of
            least squared error on the calibration text.
        act_group_size: activations of a token that share one scale; -1 is the whole token.
        o_proj_act: `head` gives each attention head of o_proj's input its own scale, `token` as many as
            `act_group_size` says (R2 rotates inside a head only, so heads differ in size).
        kv_bits: 4 (asymmetric, a scale and a zero-point a token and head) or 16 (kept).
        kv_clip: the range is shrunk by this factor around its middle.
        sink_tokens: the first cache entries kept in 16 bits.
        head_bits, embed_bits: 8 (per row) or 16 (kept).
        gptq_damp: added to the Hessian's diagonal, as a fraction of its mean.
        gptq_block: columns quantised before the rest is updated.
        gptq_act_order: quantise the columns of large Hessian diagonal first.
        gptq_refine: rounds of coordinate descent (and level refits) after the GPTQ pass.
        gptq_target: `full` fits the full-precision layer's output, `quantized` the layer's own
            output on the quantised prefix's inputs (plain GPTQ).
        first_token: what the first token of a window counts in the GPTQ fit, as a share of all the others
            together; 0 is no more than any other. See `calibrate.token_weights`.
        calib_samples, calib_seqlen: calibration windows and tokens in each.
        training: see `Training`; only `w2a4 train` and `w2a4.prepare` read it.
    """

    name: str = "custom"
    rotation: RotationConfig = field(default_factory=RotationConfig)
    rotation_learning: RotationLearning = field(default_factory=RotationLearning)
    smooth: float = 0.0
    weight_bits: Literal[2, 4, 16] = 2
    weight_method: Literal["rtn", "gptq"] = "gptq"
    group_size: int | Literal["auto"] = "auto"
    act_bits: Literal[4, 16] = 4
    act_clip: float | Literal["search"] = "search"
    act_group_size: int = -1
    o_proj_act: Literal["head", "token"] = "head"
    kv_bits: Literal[4, 16] = 4
    kv_clip: float = 0.95
    sink_tokens: int = 0
    head_bits: Literal[8, 16] = 8
    embed_bits: Literal[8, 16] = 8
    gptq_damp: float = 0.01
    gptq_block: int = 128
    gptq_act_order: bool = True
    gptq_refine: int = 3
    gptq_target: Literal["full", "quantized"] = "full"
    first_token: float = 0.125
    calib_samples: int = 64
    calib_seqlen: int = 512
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        _check_fields(self)
        if isinstance(self.group_size, int) and self.group_size != -1 and self.group_size < 4:
            raise RecipeError(f"group_size={self.group_size}: give -1, 'auto' or a number >= 4")
        if self.act_group_size != -1 and self.act_group_size < 4:
            raise RecipeError(f"act_group_size={self.act_group_size}: give -1 or a number >= 4")
        for key in ("act_clip", "kv_clip"):
            value = getattr(self, key)
            if value != "search" and not 0 < value <= 1:
                raise RecipeError(f"{key}={value}: give a number in (0, 1]")
        for key, least in {
            "sink_tokens": 0,
            "gptq_block": 1,
            "gptq_refine": 0,
            "calib_samples": 1,
            "calib_seqlen": 2,
        }.items():
            if getattr(self, key) < least:
                raise RecipeError(f"{key}={getattr(self, key)}: give a number >= {least}")
        if self.gptq_refine > MOST_ROUNDS:
            raise RecipeError(
                f"gptq_refine={self.gptq_refine}: give at most {MOST_ROUNDS}, few change anything"
            )
        if self.weight_bits == 16 and self.act_bits == 4:
            raise RecipeError(
                "weight_bits=16 with act_bits=4: activations are quantised where weights are; "
                "set both to 16 or neither"
            )
        if not 0 <= self.smooth <= 1:
            raise RecipeError(f"smooth={self.smooth}: give a number in [0, 1]; 0 is off")
        if not 0 < self.gptq_damp < 1:
            raise RecipeError(f"gptq_damp={self.gptq_damp}: give a number in (0, 1)")
        if not 0 <= self.first_token < float("inf"):
            raise RecipeError(f"first_token={self.first_token}: give a number >= 0; 0 is off")

    def override(self, **changes: Any) -> Recipe:
        """A copy with fields replaced; nested ones as `{"rotation.r4": "none"}`."""
        data = self.to_dict()
        for key, value in changes.items():
            target, *rest = data, *key.split(".")
            for part in rest[:-1]:
                target = target.get(part) if isinstance(target, dict) else None
            if not isinstance(target, dict) or rest[-1] not in target:
                raise RecipeError(f"unknown recipe key {key!r}; known keys: {', '.join(_keys(type(self)))}")
            target[rest[-1]] = value
        return Recipe.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Inverse of `to_dict`. Raises RecipeError for an unknown key or a value out of range."""
        return _from_dict(cls, data)

    @classmethod
    def of_checkpoint(cls, data: dict[str, Any]) -> Recipe:
        """As `from_dict`, of a model that was made already: older versions took any whole number as seed."""
        rotation = data.get("rotation") if isinstance(data, dict) else None
        if not isinstance(rotation, dict) or type(rotation.get("seed")) is not int:
            return cls.from_dict(data)
        recipe = cls.from_dict({**data, "rotation": {**rotation, "seed": 0}})
        object.__setattr__(recipe.rotation, "seed", rotation["seed"])  # online rotations are drawn from it
        return recipe

    def to_yaml(self, path: str | Path) -> None:
        write_atomically(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        try:
            data = parse_yaml(read_text(path, MAX_RECIPE))
        except FileNotFoundError:
            raise RecipeError(f"recipe file {str(path)!r} does not exist") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            # A ValueError is of bytes that are not UTF-8, a date that is none, a number of too many digits.
            raise RecipeError(f"recipe file {str(path)!r} is not YAML: {error}") from None
        except (OSError, CheckpointError) as error:
            raise RecipeError(f"recipe file {str(path)!r} cannot be read: {error}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"recipe file {str(path)!r} holds {type(data).__name__}, not a mapping of keys")
        return cls.from_dict(data)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """A named recipe (`w4a4kv4`, `w2a4kv4`) or a YAML file."""
        if str(name_or_path) in RECIPES:
            return RECIPES[str(name_or_path)]
        if str(name_or_path).endswith((".yaml", ".yml")) or Path(name_or_path).is_file():
            return cls.from_yaml(name_or_path)
        raise RecipeError(
            f"unknown recipe {str(name_or_path)!r}; named recipes: {', '.join(RECIPES)}; or give a .yaml file"
        )


def parse_yaml(text: str) -> Any:
    """Plain data. A few bytes of aliases of aliases stand for more than memory holds, so there are none.

    Raises:
        yaml.YAMLError: not YAML, or with aliases.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"it holds the alias *{event.anchor}; write the value out")
    return yaml.safe_load(text)


def _keys(cls: type, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(cls)
    out = []
    for f in dataclasses.fields(cls):
        nested = hints[f.name]
        out += _keys(nested, f"{prefix}{f.name}.") if dataclasses.is_dataclass(nested) else [prefix + f.name]
    return out


def _from_dict(cls: type, data: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    if not isinstance(data, dict):
        raise RecipeError(f"{shown(data)} is no recipe: give a mapping of {', '.join(_keys(cls))}")
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = [key for key in data if key not in names]
    if unknown:
        raise RecipeError(f"unknown recipe key {shown(unknown[0])}; known keys: {', '.join(_keys(cls))}")
    values = {}
    for key, value in data.items():
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise RecipeError(f"{key}={shown(value)}: give a mapping of {', '.join(_keys(hints[key]))}")
            value = _from_dict(hints[key], value)
        values[key] = value
    return cls(**values)


def _check_fields(config: Any) -> None:
    """Every field against its annotation; an int given for a float is taken as one."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, int) and abs(value) > LARGEST:
            told = f"a number of {value.bit_length()} bits" if abs(value) >> 64 else str(value)
            raise RecipeError(f"{name} is {told}: give one from {-LARGEST} to {LARGEST}")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise RecipeError(
                f"{name}={value!r} is not text: it holds half a surrogate pair, which UTF-8 has not"
            )
        if float in (hint, *typing.get_args(hint)) and type(value) is int:
            object.__setattr__(config, name, float(value))
        elif not _matches(value, hint):
            raise RecipeError(f"{name}={shown(value)}: give {_describe(hint)}")


def _matches(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(hint))
    if typing.get_args(hint):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if hint is int and isinstance(value, bool):
        return False
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(hint))
    if typing.get_args(hint):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    return {"NoneType": "nothing"}.get(hint.__name__, f"a value of type {hint.__name__}")


#: Named recipes, for `Recipe.load` and the command line.
RECIPES = {
    "w4a4kv4": Recipe(name="w4a4kv4", weight_bits=4),
    "w2a4kv4": Recipe(name="w2a4kv4", weight_bits=2),
    "w2a4kv4-rcp": Recipe(name="w2a4kv4-rcp", training=Training(steps=2560, data="self")),
    "w2a4kv4-rcp-quick": Recipe(
        name="w2a4kv4-rcp-quick",
        training=Training(
            steps=1000, batch_size=2, seqlen=512, micro_batch=-1, minutes=3.0, quantizer_lr=2e-3
        ),
    ),
    "w2a4kv4-rcp-block": Recipe(
        name="w2a4kv4-rcp-block",
        training=Training(route="block", steps=120, batch_size=2, lr=1e-4, quantizer_lr=2e-3),
    ),
}
