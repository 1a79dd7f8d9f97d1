"""Round to nearest: a grid for each group, then the nearest point of it. The baseline."""

from __future__ import annotations

from torch import Tensor

from .grid import Grid, grid_of
from .groups import resolve_group_size
from .weight import QuantizedWeight


def fit_rtn(
    weight: Tensor, bits: int | Grid, group_size: int | str, importance: Tensor | None = None
) -> QuantizedWeight:
    """Quantise a weight matrix to the nearest points of each group's best grid.

    Args:
        weight: floating `[out, in]`.
        bits: 2 to 8, for `grid_of(bits)`, or a grid: Lloyd-Max levels, or the clip of least squared error.
        group_size: divides `in`; -1 or `auto` as in `groups.resolve_group_size`.
        importance: float32 `[in]` weights of the squared errors, or None.

    Raises:
        RecipeError: there is no such grid, or the group size does not divide.
    """
    grid = bits if isinstance(bits, Grid) else grid_of(bits)
    group_size = resolve_group_size(weight.shape[1], group_size)
    groups = weight.float().unflatten(1, (-1, group_size))
    if importance is not None:
        importance = importance.float().unflatten(-1, groups.shape[1:])
    scale, levels = grid.fit(groups, importance)
    return QuantizedWeight(grid.nearest(groups, scale, levels).flatten(1), scale, levels, group_size, grid)
