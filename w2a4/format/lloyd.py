"""Lloyd-Max: the levels of each group that minimise its weighted squared error.

Source: J. Max, Quantizing for minimum distortion, 1960, whose table I has the optima for a unit Gaussian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fake_quant import round_levels

#: Where the iterations start, in standard deviations, by the number of levels: the optimum for a Gaussian.
GAUSSIAN_LEVELS = {
    4: (-1.510, -0.453, 0.453, 1.510),
    8: (-2.152, -1.344, -0.756, -0.245, 0.245, 0.756, 1.344, 2.152),
}


def fit_levels(
    groups: Tensor, importance: Tensor | None = None, iterations: int = 15, count: int = 4
) -> tuple[Tensor, Tensor]:
    """Fit int8 levels and one fp16 scale to each group.

    Args:
        groups: float32 `[..., group_size]`.
        importance: float32, broadcastable to groups, non-negative weights of the squared errors.
        iterations: rounds of nearest-level assignment and weighted means.
        count: levels of a group, 4 or 8.

    Returns:
        levels int8 `[..., count]`, ascending; scale float16 `[...]`.
    """
    std, mean = torch.std_mean(groups, -1, keepdim=True, correction=0)
    start = mean + std * torch.tensor(GAUSSIAN_LEVELS[count], dtype=torch.float32, device=groups.device)
    return settle_levels(groups, start, importance, iterations)


def settle_levels(
    groups: Tensor, levels: Tensor, importance: Tensor | None = None, iterations: int = 15
) -> tuple[Tensor, Tensor]:
    """As `fit_levels`, from levels float32 `[..., count]`, ascending, to begin with."""
    importance = (
        torch.ones(1, dtype=torch.float32, device=groups.device) if importance is None else importance
    )
    importance, count = importance.expand(groups.shape), levels.shape[-1]
    # Group moments below a threshold are differences of sums over "code >= k": a mask less than levels.
    total_w, total_x = importance.sum(-1), (importance * groups).sum(-1)
    for _ in range(iterations):
        weight_above, value_above = [total_w], [total_x]
        for k in range(count - 1):
            above = importance * (groups > (levels[..., k : k + 1] + levels[..., k + 1 : k + 2]) / 2)
            weight_above.append(above.sum(-1))
            value_above.append((above * groups).sum(-1))
        weight_above.append(torch.zeros_like(total_w))
        value_above.append(torch.zeros_like(total_x))
        weight = -torch.stack(weight_above, -1).diff(dim=-1)
        value = -torch.stack(value_above, -1).diff(dim=-1)
        # A level nothing was assigned to stays where it is.
        levels = torch.where(weight > 1e-12 * total_w[..., None], value / weight.clamp_min(1e-30), levels)
    if count > 4:
        # An end level that no weight took may lie outside the group, where training cannot put it. Four
        # levels are left as they are, since checkpoints have their bits.
        levels = levels.clamp(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True))
    return round_levels(levels.sort(-1).values)
