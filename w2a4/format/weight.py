"""A weight matrix after fitting, before packing: integer codes and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A 2-bit (with levels) or 4-bit (without) weight matrix.

    Attributes:
        codes: int8 `[out, in]`; 0..3 with levels, -8..7 without.
        scale: float16 `[out, in / group_size]`.
        levels: int8 `[out, in / group_size, 4]`, ascending, or None.
        group_size: inputs that share a scale.
    """

    codes: Tensor
    scale: Tensor
    levels: Tensor | None
    group_size: int

    def dequantize(self) -> Tensor:
        """Float32 `[out, in]`: `scale * levels[code]`, or `scale * code`."""
        ints = self.codes.unflatten(1, (-1, self.group_size))
        if self.levels is not None:
            ints = torch.gather(self.levels, 2, ints.long())
        return (ints.float() * self.scale.float()[..., None]).flatten(1)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Output rows start..stop-1."""
        levels = None if self.levels is None else self.levels[start:stop]
        return QuantizedWeight(self.codes[start:stop], self.scale[start:stop], levels, self.group_size)
