"""`rotate`: fold norm weights, R1, R2 and R4 into a model's weights; its output does not change.

One function makes a plan that names every parameter and what happens to it, one checks that the plan
covers the model, one carries it out. A model that fails a check is left as it was.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import arch
from ...errors import RotationError
from ...format.online import OnlineRotation, RotatedLinear
from ...recipe import RotationConfig
from .files import model_mark, read_metadata, read_tensors

#: Largest max |RᵀR - I| of a learned rotation: that of rounding to float32 and of some drift.
ORTHOGONAL_TOLERANCE = 1e-4

#: Rows of an embedding or lm_head held in float64 at a time.
_ROWS = 8192


@torch.no_grad()
def rotate(model: nn.Module, config: RotationConfig) -> nn.Module:
    """Fold a model's norm weights and rotations into its weights, in place.

    Norm weights are always folded (and become 1) and tied embeddings untied, whichever rotations are on.
    Each tensor is computed in float64 and cast once. With R4, every linear that reads the inner activations
    of an MLP becomes a `RotatedLinear`. R3 changes no weight: attention applies it to queries and keys, or
    leaves it out, with the same scores. `model.config.w2a4_rotation` records all of it: the fields of
    `config` and `online` = {"r3": ..., "r4": ...}, each for `OnlineRotation.from_dict`.

    Args:
        model: a causal language model of a family in `arch`, in floating point, its weights loaded (not on
            the meta device).
        config: which rotation goes where.

    Returns:
        `model`, whose logits are those from before up to rounding.

    Raises:
        RotationError: of no supported family, rotated or quantised already, a parameter that no rotation
            covers, a weight on the meta device or not finite, or a learned rotation that does not fit.
            The model is unchanged then.
    """
    check(model)
    family = arch.of_config(model.config)
    r1, r2, online = _rotations(model, config)
    plan = list(_plan(model, family, r1, r2, online["r4"]))
    _untie(model)
    for fold in plan:
        _carry_out(fold, model.get_submodule(fold.name))
    for name in _norm_names(model, family):
        model.get_submodule(name).weight.fill_(1)
    for path in family.mlp_out.paths if online["r4"].kind != "none" else ():
        for layer in model.model.layers:
            layer.set_submodule(path, RotatedLinear.from_linear(layer.get_submodule(path), online["r4"]))
    record = {name: rotation.to_dict() for name, rotation in online.items()}
    model.config.w2a4_rotation = {**dataclasses.asdict(config), "online": record}
    return model


def check(model: nn.Module) -> None:
    """Raise RotationError if `rotate` would, but for a learned rotation that does not fit."""
    family = _check_architecture(model)
    _check_coverage(model, family, list(_plan(model, family, None, [None] * len(model.model.layers), None)))


@dataclass(frozen=True)
class _Learned:
    """A rotation from a file, with the same use as an `OnlineRotation`."""

    dense: Tensor  # float64 [size, size]
    kind = "learned"

    @property
    def size(self) -> int:
        return self.dense.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.dense.to(x)


_Rotation = OnlineRotation | _Learned


@dataclass(frozen=True)
class _Fold:
    """What happens to the module `name`: `W <- leftᵀ · (W · diag(gamma)) · right`, `b <- leftᵀ · b`.

    A rotation narrower than the weight acts on every head alike (I ⊗ R). `left` lists the rows that it is of,
    as (start, stop, rotation); the others stay.
    """

    name: str
    gamma: Tensor | None = None
    right: _Rotation | None = None
    left: tuple[tuple[int, int, _Rotation], ...] = ()


def _plan(
    model: nn.Module, family: arch.Architecture, r1: _Rotation | None, r2: list[_Rotation | None],
    r4: OnlineRotation | None,
) -> Iterator[_Fold]:  # fmt: skip
    yield _Fold("model.embed_tokens", right=r1)
    for i, layer in enumerate(model.model.layers):
        inputs = {"r1": r1, "r2": r2[i], "r4": r4}
        outputs = {"v": r2[i], "o": r1, "down": r1}
        for site in family.sites:
            gamma = None if site.norm is None else layer.get_submodule(site.norm).weight.double()
            rows = list(family.rows(model.config, site))
            for path in site.paths:
                left = tuple(
                    (part.start, part.stop, outputs[part.output])
                    for part in rows
                    if part.path == path and not _is_identity(outputs.get(part.output))
                )
                yield _Fold(f"model.layers.{i}.{path}", gamma, inputs[site.rotation], left)
    yield _Fold("lm_head", model.model.norm.weight.double(), right=r1)


def _norm_names(model: nn.Module, family: arch.Architecture) -> list[str]:
    """Norms whose weights are folded."""
    layers = range(len(model.model.layers))
    return [*(f"model.layers.{i}.{norm}" for i in layers for norm in family.norms), "model.norm"]


def _carry_out(fold: _Fold, module: nn.Module) -> None:
    # Without a left rotation rows are independent, so a vocabulary never needs float64 as a whole.
    rows = module.weight.shape[0] if fold.left else _ROWS
    for part in module.weight.split(rows):
        weight = part.double()
        if fold.gamma is not None:
            weight = weight * fold.gamma.to(weight.device)
        weight = _turn(weight, fold.right)
        for start, stop, rotation in fold.left:
            weight[start:stop] = _turn(weight[start:stop].T, rotation).T
        part.copy_(weight)
    if getattr(module, "bias", None) is not None:
        for start, stop, rotation in fold.left:
            module.bias[start:stop] = _turn(module.bias[start:stop].double(), rotation).to(module.bias.dtype)


def _turn(x: Tensor, rotation: _Rotation | None) -> Tensor:
    """`x @ (I ⊗ R)` along the last dimension."""
    if _is_identity(rotation):
        return x
    return rotation.apply(x.unflatten(-1, (-1, rotation.size))).flatten(-2)


def _is_identity(rotation: _Rotation | None) -> bool:
    return rotation is None or rotation.kind == "none"


def _untie(model: nn.Module) -> None:
    """Give lm_head a weight of its own, and keep transformers from tying it again, also when loading."""
    tied = model.lm_head.weight
    if tied.data_ptr() == model.model.embed_tokens.weight.data_ptr():
        model.lm_head.weight = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)
    model.config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):  # transformers 5: what `tie_weights` goes by, not the config
        model.all_tied_weights_keys = {}


def _rotations(
    model: nn.Module, config: RotationConfig
) -> tuple[_Rotation, list[_Rotation], dict[str, OnlineRotation]]:
    """R1, R2 of each layer, and R3 and R4 by name."""
    shape, head_dim = model.config, arch.head_dim(model.config)
    learned = _load_learned(model, config) if "learned" in (config.r1, config.r2) else {}

    def pick(kind: str, size: int, name: str) -> _Rotation:
        return learned[name] if kind == "learned" else OnlineRotation(kind, size, config.seed, name)

    online = {
        "r3": OnlineRotation(config.r3, head_dim, config.seed, "r3"),
        "r4": OnlineRotation.in_blocks(
            config.r4, shape.intermediate_size, config.seed, "r4", config.r4_blocks
        ),
    }
    r2 = [pick(config.r2, head_dim, f"r2.{i}") for i in range(shape.num_hidden_layers)]
    return pick(config.r1, shape.hidden_size, "r1"), r2, online


def _load_learned(model: nn.Module, config: RotationConfig) -> dict[str, _Learned]:
    """The tensors `R1` and `R2.<layer>` that the configuration asks for, as `r1` and `r2.<layer>`."""
    if config.learned is None:
        raise RotationError(
            f"r1={config.r1!r}, r2={config.r2!r}, but learned names no file with R1 and R2.<layer>: "
            "learn them with `w2a4 learn-rotation`, or use `quantize`, which learns them first"
        )
    path = Path(config.learned)
    if not path.is_file():
        raise RotationError(
            f"learned={config.learned!r} does not exist; give the safetensors file with R1, R2.<layer>"
        )
    tensors = read_tensors(path)
    layers = model.config.num_hidden_layers
    sizes = {
        "R1": model.config.hidden_size,
        **{f"R2.{i}": arch.head_dim(model.config) for i in range(layers)},
    }
    wanted = [name for name in sizes if (config.r1 if name == "R1" else config.r2) == "learned"]
    strange = sorted(set(tensors) - set(sizes)) or sorted(set(wanted) - set(tensors))
    if strange:
        state = "has" if strange[0] in tensors else "lacks"
        raise RotationError(
            f"learned={config.learned!r} {state} {strange[0]!r}, but this model has {layers} layers; "
            "use the file that was learned on this model"
        )
    rotations = {name.lower(): _orthogonal(tensors[name], sizes[name], name, path) for name in wanted}
    _check_mark(path, model)
    return {name: _Learned(matrix) for name, matrix in rotations.items()}


def _check_mark(path: Path, model: nn.Module) -> None:
    """Raise RotationError for a file that was learned on another model; a file without a mark passes."""
    about = read_metadata(path)
    if about.get("model", model_mark(model)) != model_mark(model):
        source = about.get("report", {}).get("source", "another model")
        raise RotationError(
            f"learned={str(path)!r} was learned on {source!r}, a model with other weights than this one; "
            "learn rotations on this model"
        )


def _orthogonal(matrix: Tensor, size: int, name: str, path: Path) -> Tensor:
    """The orthogonal matrix nearest to `matrix`, float64; `matrix` must be a rotation up to rounding."""
    if matrix.shape != (size, size):
        raise RotationError(
            f"{name} in {str(path)!r} is {tuple(matrix.shape)}, but this model needs {(size, size)}; "
            "use the file that was learned on this model"
        )
    matrix, eye = matrix.double(), torch.eye(size, dtype=torch.float64)
    error = (matrix.T @ matrix - eye).abs().max().item()
    if not error <= ORTHOGONAL_TOLERANCE:
        raise RotationError(
            f"{name} in {str(path)!r} is not orthogonal: max |RᵀR - I| = {error:.3g} "
            f"> {ORTHOGONAL_TOLERANCE:g}; learn it again, or project it onto the rotations (U Vᵀ of its SVD)"
        )
    for _ in range(3):  # Newton-Schulz squares the error each time, 1e-4 -> 1e-8 -> 1e-16
        matrix = matrix @ (1.5 * eye - 0.5 * (matrix.T @ matrix))
    return matrix


def _check_architecture(model: nn.Module) -> arch.Architecture:
    """The family of a model, once its modules are those of the family and not rotated yet."""
    config = getattr(model, "config", None)
    family = arch.of_config(config)
    if getattr(config, "w2a4_rotation", None):
        raise RotationError(
            f"the model is rotated already ({config.w2a4_rotation}); load the original weights"
        )
    try:
        linears = {name: model.get_submodule(name) for name in _linear_names(model, family)}
        for name in ("model.embed_tokens", *_norm_names(model, family)):
            _ = model.get_submodule(name).weight
    except AttributeError as error:
        raise RotationError(
            f"{type(model).__name__} is not shaped like {family.model_class} ({error}); "
            "merge or unload adapters and pass the causal language model itself"
        ) from None
    for name, linear in linears.items():
        if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
            found = (
                f"{type(linear).__name__} of {getattr(getattr(linear, 'weight', None), 'dtype', 'no weight')}"
            )
            raise RotationError(
                f"{name} is a {found}, not a floating-point nn.Linear; "
                "rotate the original model before quantising or adding adapters"
            )
    _check_shapes(model, family)
    return family


def _check_shapes(model: nn.Module, family: arch.Architecture) -> None:
    for i, layer in enumerate(model.model.layers):
        for path, (rows, columns) in family.linear_shapes(model.config).items():
            found = tuple(layer.get_submodule(path).weight.shape)
            if found != (rows, columns):
                raise RotationError(
                    f"model.layers.{i}.{path} has the shape {found}, the config asks for {(rows, columns)}; "
                    "correct config.head_dim, or the sizes that differ"
                )


def _linear_names(model: nn.Module, family: arch.Architecture) -> list[str]:
    layers = range(len(model.model.layers))
    return [*(f"model.layers.{i}.{path}" for i in layers for path in family.paths), "lm_head"]


def _check_coverage(model: nn.Module, family: arch.Architecture, plan: list[_Fold]) -> None:
    """Every parameter is in the plan exactly once, loaded and finite; no buffer but RoPE's."""
    covered = {f"{fold.name}.{kind}" for fold in plan for kind in ("weight", "bias")}
    covered |= {f"{name}.weight" for name in _norm_names(model, family)}
    # Norms of heads lie between rotations, and stay.
    layers = range(len(model.model.layers))
    covered |= {f"model.layers.{i}.{norm}.weight" for i in layers for norm in family.head_norms}
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = [name for name, _ in model.named_buffers() if "rotary_emb." not in name]
    for name in [*named, *buffers]:
        if name not in covered:
            raise RotationError(
                f"{name} is not part of a plain {family.model_class}, and no rotation covers it: the output "
                "would change; merge or remove the module that holds it"
            )
    for name, parameter in named.items():
        if parameter.is_meta:
            raise RotationError(f"{name} is on the meta device; load the weights first, without offloading")
        if not parameter.isfinite().all():
            raise RotationError(
                f"{name} holds NaN or infinity; the checkpoint is damaged or overflowed its dtype"
            )
    uses = Counter(p.data_ptr() for name, p in named.items() if name != "lm_head.weight")
    for name, parameter in named.items():
        if uses[parameter.data_ptr()] > 1:
            raise RotationError(
                f"{name} shares its memory with another parameter and would be rotated twice; "
                "give it its own copy"
            )
