"""`smooth`: outlier channels' size moves from activations into weights (SmoothQuant, arXiv 2211.10438).

The baseline that rotations are compared with, and what a recipe's `smooth` switches on: channel j of a
linear's input is divided by `s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)`, and column j of every linear
that reads it multiplied. What stands before the input takes the division, so the output stays the same.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..errors import CalibrationError
from ..hub.transformers import check_original
from .rotation import fold

#: Scales are held in here: a channel that calibration hardly used would overflow float16 beyond.
SCALES = (1e-4, 1e4)


@torch.no_grad()
def smooth(model: nn.Module, ids: Tensor, alpha: float) -> nn.Module:
    """Smooth a model in place; its output stays the same up to rounding.

    Each tensor is computed in float64 and cast once. A channel whose activations or weights are all zero
    keeps its scale.

    Args:
        model: a causal language model of a family in `arch`, float, unrotated.
        ids: calibration windows, int64 `[samples, tokens]`.
        alpha: in (0, 1], how much of the difficulty moves: at 1 every channel's largest activation is 1.
            0 is off: nothing is run or changed.

    Returns:
        the same model.

    Raises:
        RotationError: rotated already, or a model that `rotate` could not rotate. It is unchanged then.
        CalibrationError: an activation overflows. The model is unchanged then.
    """
    if not alpha:
        return model
    check_original(model)
    fold.check(model)
    moves = _moves(model.config)
    for layer, seen in zip(model.model.layers, input_maxima(model, ids), strict=True):
        _smooth_layer(layer, moves, seen, alpha)
    return model


@dataclass(frozen=True)
class _Move:
    """Linears that share an input, and the rows, or the norm, whose outputs are divided by its scales.

    The query heads of one KV head read the same values, and so share `width` scales.
    """

    readers: tuple[str, ...]
    source: str
    rows: slice
    width: int


def _moves(config: Any) -> list[_Move]:
    """From the back of a layer to its front: v and up have their last rows when their own inputs' scales are
    taken.
    """
    family, found = arch.of_config(config), []
    for site in reversed(family.sites):
        if site.norm is not None:
            found.append(_Move(site.paths, site.norm, slice(config.hidden_size), config.hidden_size))
            continue
        rows = family.output_rows(config, "up" if site is family.mlp_out else "v")
        width = rows.stop - rows.start if site is family.mlp_out else arch.head_dim(config)
        found.append(_Move(site.paths, rows.path, slice(rows.start, rows.stop), width))
    return found


@torch.no_grad()
def input_maxima(model: nn.Module, ids: Tensor) -> list[dict[str, Tensor]]:
    """max|x| over all tokens of each channel of the decoder linears' inputs.

    Returns:
        by layer, by the first linear of each site: float64 `[in_features]`.

    Raises:
        CalibrationError: one of them is not finite.
    """
    maxima: list[dict[str, Tensor]] = [{} for _ in model.model.layers]

    def keep(found: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        most = args[0].abs().flatten(0, -2).amax(0).double()
        found[name] = torch.maximum(found.get(name, most), most)

    with contextlib.ExitStack() as hooks:
        for layer, found in zip(model.model.layers, maxima, strict=True):
            for site in arch.of_config(model.config).sites:
                name = site.paths[0]
                hook = functools.partial(keep, found, name)
                hooks.callback(layer.get_submodule(name).register_forward_pre_hook(hook).remove)
        for window in ids.to(model.device).split(1):
            model.base_model(window, use_cache=False)
    for index, found in enumerate(maxima):
        for name, most in found.items():
            if not most.isfinite().all():
                raise CalibrationError(
                    f"the input of model.layers.{index}.{name} holds NaN or infinity on the calibration "
                    f"text in {model.dtype}; load the model in float32 or bfloat16"
                )
    return maxima


def _smooth_layer(layer: nn.Module, moves: list[_Move], seen: dict[str, Tensor], alpha: float) -> None:
    values = {name: parameter.double() for name, parameter in layer.named_parameters()}
    for move in moves:
        columns = torch.stack([values[f"{name}.weight"].abs().amax(0) for name in move.readers]).amax(0)
        outputs = move.rows.stop - (move.rows.start or 0)
        heads = outputs // move.width, -1, move.width
        activations = seen[move.readers[0]].view(heads).amax(1)
        scale = _scales(activations, columns.view(heads).amax(1), alpha)
        wide = scale[:, None].expand(-1, len(columns) // outputs, -1).flatten()
        for name in move.readers:
            values[f"{name}.weight"] = values[f"{name}.weight"] * wide
        for name in ("weight", "bias"):
            if (value := values.get(f"{move.source}.{name}")) is not None:
                value = value.clone()
                value[move.rows] /= scale.view(-1, *[1] * (value.dim() - 1))
                values[f"{move.source}.{name}"] = value
    for name, parameter in layer.named_parameters():
        parameter.copy_(values[name])


def _scales(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """What a channel of these maxima is divided by, float64 of their shape."""
    scale = (activations**alpha / weights ** (1 - alpha)).clamp(*SCALES)
    return torch.where((activations == 0) | (weights == 0), 1.0, scale)
