"""A weight matrix after fitting, before packing: integer codes and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Codebook, Grid, Uniform, no_levels


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix as codes on the grids of its groups.

    Attributes:
        codes: int8 `[out, in]`, `grid.least` .. `grid.least + 2**grid.bits - 1`.
        scale: float16 `[out, in / group_size]`.
        levels: int8 `[out, in / group_size, grid.level_count]`, ascending.
        group_size: inputs that share a grid.
        grid: what codes, scale and levels stand for.
    """

    codes: Tensor
    scale: Tensor
    levels: Tensor
    group_size: int
    grid: Grid

    def dequantize(self) -> Tensor:
        """Float32 `[out, in]`: `scale * levels[code]`, or `scale * code`."""
        codes = self.codes.unflatten(1, (-1, self.group_size))
        return self.grid.decode(codes, self.scale, self.levels).flatten(1)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Output rows start..stop-1."""
        rows = slice(start, stop)
        return QuantizedWeight(
            self.codes[rows], self.scale[rows], self.levels[rows], self.group_size, self.grid
        )

    def on(self, grid: Grid) -> QuantizedWeight:
        """The same weight as another grid stores it: a uniform one as a codebook of its steps, or back.

        Raises:
            ValueError: a number of bits that differs, or a codebook whose levels are not equal steps.
        """
        if grid == self.grid:
            return self
        if grid.bits != self.grid.bits:
            raise ValueError(f"a weight on {self.grid} has no form on {grid}: the bits differ")
        least = Uniform(grid.bits).least
        steps = torch.arange(least, -least, dtype=torch.int8, device=self.codes.device)
        # A codebook's scales are positive and its levels ascend: a negative scale turns the steps round.
        turned = self.scale < 0 if isinstance(grid, Codebook) else self.levels[..., -1] == -least
        steps = torch.where(turned[..., None], -steps.flip(0), steps)
        scale = torch.where(turned, -self.scale, self.scale)
        codes = self.codes.unflatten(1, (-1, self.group_size))
        if isinstance(grid, Codebook):
            codes, levels = torch.where(turned[..., None], -1 - codes, codes) - least, steps
        else:
            if not torch.equal(self.levels, steps):
                raise ValueError(
                    f"levels of this {self.grid} are not the steps of {grid}; fit the weight to that"
                )
            codes, levels = codes + least, no_levels(scale)
            codes = torch.where(turned[..., None], -1 - codes, codes)
        return QuantizedWeight(codes.flatten(1), scale, levels, self.group_size, grid)
