"""What fitting weights passes through."""

from __future__ import annotations

import torch
from torch import Tensor

from .table import fake_of, one_device, op


@op(
    "(Tensor work, Tensor coupling, Tensor? current, Tensor grid, Tensor group, int bits=4) "
    "-> (Tensor, Tensor)",
    kernels="cpu",
)
def round_columns(
    work: Tensor, coupling: Tensor, current: Tensor | None, grid: Tensor, group: Tensor, bits: int = 4
) -> tuple[Tensor, Tensor]:
    """See `ops.round_columns`."""
    work = work.clone()
    codes, change = torch.empty_like(work, dtype=torch.int8), torch.empty_like(work)
    for j, index in enumerate(group.tolist()):
        points = grid[index]
        if len(points) > 1:
            codes[j] = (work[j] > (points[1:] + points[:-1]) / 2).sum(0)
            rounded = points.gather(0, codes[j, None].long())[0]
        else:
            rounded = (work[j] / points[0]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            codes[j] = rounded
            rounded = rounded * points[0]
        change[j] = rounded - (work if current is None else current)[j]
        work[j + 1 :] -= coupling[j, j + 1 :, None] * change[j]
    return codes, change


@fake_of(round_columns)
def _(work, coupling, current, grid, group, bits=4):
    one_device(work=work, coupling=coupling, current=current, grid=grid, group=group)
    return torch.empty_like(work, dtype=torch.int8), torch.empty_like(work)
