"""`replace_linears`: packed linears in any model, and which linears of a transformers model may be packed.

Nothing here imports transformers, since plain modules need none; `replaced` does, for models of transformers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import typing
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import RecipeError, W2A4Error
from ..format.grid import Kind, grid_of
from ..format.groups import resolve_group_size
from ..format.linear import PACKED_LINEARS, _PackedLinear
from ..format.rtn import fit_rtn

#: Names that the tensors of a packed linear may have.
_TENSORS = ("weight", "levels", "scale", "act_clip", "bias")


def replace_linears(
    model: nn.Module,
    bits: int = 2,
    group_size: int | str = "auto",
    *,
    act_clip: float = 0.9,
    weight_grid: Kind = "auto",
    skip: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Replace every `nn.Linear` of any model by a packed one (round to nearest), in place.

    A model of transformers records what was replaced in its config, so that what its `save_pretrained`
    writes is read by `from_pretrained` of the same class once w2a4 is imported. Its linears are left alone
    where parameters have another name too (tied weights), where it keeps them in float32, and where its code
    reads `.weight` besides calling them.

    Args:
        model: any module.
        bits: 2, 3 or 4.
        group_size: see `groups.resolve_group_size`.
        act_clip: see `W2A4Linear.from_linear`.
        weight_grid: see `grid.grid_of`.
        skip: module names (or their last parts) to leave alone.

    Returns:
        the same model.

    Raises:
        ValueError: nothing was left to replace.
        W2A4Error: a group size, a clip or a weight that cannot be, or a model that is rotated or quantised
            already; nothing was replaced then.
    """
    if bits not in PACKED_LINEARS:
        raise ValueError(f"bits={bits}: give one of {sorted(PACKED_LINEARS)}")
    if weight_grid not in typing.get_args(Kind):
        raise RecipeError(f"weight_grid={weight_grid!r}: give one of {', '.join(typing.get_args(Kind))}")
    grid, skip = grid_of(bits, weight_grid), (skip,) if isinstance(skip, str) else skip
    saves = is_of_transformers(model)
    if saves:
        from . import replaced

        replaced.check_replaceable(model)
    fixed = fixed_linears(model) | linears_read_by_code(model) if saves else set()
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)  # one may have several names
        if name and type(module) is nn.Linear and not {name, name.rpartition(".")[2]} & set(skip)
    }
    if not linears.keys() - fixed:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear outside skip={skip} to replace"
            + (", but for those that are tied, kept in float32 or read by its code" if linears else "")
        )
    linears = {name: linear for name, linear in linears.items() if name not in fixed}
    _check(linears, group_size, act_clip)
    packed: dict[nn.Module, _PackedLinear] = {}
    for name, linear in linears.items():
        if linear not in packed:
            fitted = fit_rtn(linear.weight.detach(), grid, group_size)
            packed[linear] = PACKED_LINEARS[bits].from_linear(linear, fitted=fitted, act_clip=act_clip)
        model.set_submodule(name, packed[linear])
    if saves:
        replaced.record(model, tuple(linears), bits, group_size)
    return model


def _check(linears: dict[str, nn.Linear], group_size: int | str, act_clip: float) -> None:
    """Raise W2A4Error if one of the linears cannot be packed."""
    if not 0 < abs(act_clip) <= 1:
        raise RecipeError(f"act_clip={act_clip}: give a number in (0, 1], or in [-1, 0) for 16 codes")
    for name, linear in linears.items():
        resolve_group_size(linear.in_features, group_size)
        if not bool(torch.isfinite(linear.weight.detach()).all()):
            raise W2A4Error(f"{name}.weight holds NaN or infinity; the model is damaged")


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is a `PreTrainedModel`, asked without importing transformers."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__ == "transformers.modeling_utils"
        for kind in type(model).__mro__
    )


def fixed_linears(model: nn.Module) -> set[str]:
    """Names of the linears of a transformers model that packed ones cannot stand for.

    transformers ties parameters by their names when it loads, and casts some by theirs; either would write
    into packed tensors.
    """
    tied, patterns = tied_parameters(model), list(float32_patterns(model))
    fixed = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            tensors = [f"{name}.{tensor}" for tensor in _TENSORS]
            cast = any(pattern.search(tensor) for pattern in patterns for tensor in tensors)
            if cast or not tied.isdisjoint(tensors):
                fixed.add(name)
    return fixed


def linears_read_by_code(model: nn.Module) -> set[str]:
    """Names of linears whose `.weight` the class that holds them reads: to multiply by it, or its dtype."""
    found = set()
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, leaf = name.rpartition(".")
        if type(module) is nn.Linear and f".{leaf}.weight" in _source(type(model.get_submodule(parent))):
            found.add(name)
    return found


@functools.cache
def _source(kind: type) -> str:
    """The source of a class of transformers or of a model's own code; empty where there is none."""
    parts = []
    for base in kind.__mro__:
        if base.__module__.startswith(("transformers.models.", "transformers_modules.")):
            with contextlib.suppress(OSError, TypeError):
                parts.append(inspect.getsource(base))
    return "".join(parts)


def tied_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that have other names too, in the model or by what its class declares."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    times = Counter(map(id, parameters.values()))
    tied = {name for name, value in parameters.items() if times[id(value)] > 1}
    declared = getattr(model, "all_tied_weights_keys", None)  # of transformers 5: targets and their sources
    if declared is not None:
        return tied | {*declared, *declared.values()}
    if not getattr(model.config, "tie_word_embeddings", True):
        return tied
    patterns = list(map(re.compile, getattr(model, "_tied_weights_keys", None) or ()))
    return tied | {name for name in parameters if any(pattern.search(name) for pattern in patterns)}


def float32_patterns(model: nn.Module) -> Iterable[re.Pattern[str]]:
    """Of the names that transformers casts to float32 where it loads a model in 16 bits."""
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            for pattern in getattr(module, attribute, None) or ():
                yield re.compile(pattern.replace("*", ".*"))
