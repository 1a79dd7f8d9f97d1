"""Round to nearest: a grid for each group, then the nearest point of it. The baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.reference import divide
from .fake_quant import fp16_scale, nearest_codes
from .groups import resolve_group_size
from .lloyd import fit_levels
from .weight import QuantizedWeight

#: Fractions of max|w| that the clip search of 4-bit weights tries.
CLIP_RATIOS = tuple(1 - 0.025 * step for step in range(21))


def fit_rtn(
    weight: Tensor, bits: int, group_size: int | str, importance: Tensor | None = None
) -> QuantizedWeight:
    """Quantise a weight matrix to the nearest points of each group's best grid.

    Args:
        weight: floating `[out, in]`.
        bits: 2 (Lloyd-Max levels) or 4 (symmetric, the clip of least squared error).
        group_size: divides `in`; -1 or `auto` as in `config.resolve_group_size`.
        importance: float32 `[in]` weights of the squared errors, or None.
    """
    group_size = resolve_group_size(weight.shape[1], group_size)
    groups = weight.float().unflatten(1, (-1, group_size))
    scale, levels = fit_grid(groups, bits, importance)
    codes = nearest(groups, scale, levels).flatten(1)
    return QuantizedWeight(codes, scale, levels, group_size)


def fit_grid(groups: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale float16 `[out, G]` and, at 2 bits, levels int8 `[out, G, 4]` for groups `[out, G, g]`."""
    if importance is not None:
        importance = importance.float().unflatten(-1, groups.shape[1:])
    if bits == 2:
        levels, scale = fit_levels(groups, importance)
        return scale, levels
    return _clip_search(groups, importance), None


def nearest(values: Tensor, scale: Tensor, levels: Tensor | None) -> Tensor:
    """Codes int8 `[out, G, n]` of float values `[out, G, n]` on each group's grid."""
    if levels is not None:
        return nearest_codes(values, levels, scale)
    return (values / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int8)


def _clip_search(groups: Tensor, importance: Tensor | None) -> Tensor:
    importance = (
        torch.ones(1, dtype=torch.float32, device=groups.device) if importance is None else importance
    )
    widest = divide(groups.abs().amax(-1), 7)
    best = fp16_scale(widest)
    least = torch.full_like(widest, float("inf"))
    for ratio in CLIP_RATIOS:
        scale = fp16_scale(widest * ratio)
        step = scale.float()[..., None]
        error = (importance * ((groups / step).round().clamp(-8, 7) * step - groups).square()).sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best
