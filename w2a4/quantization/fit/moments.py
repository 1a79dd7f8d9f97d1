"""Second moments of a linear's inputs, gathered batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

#: Parts of a Hessian's rows that are summed apart, each from its diagonal on: the rest is their mirror image.
PARTS = 4


class Moments:
    """Sums of outer products over calibration tokens, float32 `[in, in]`.

    Attributes:
        hessian: sum of `x_q^T x_q`, x_q the inputs as the quantised model sees them.
        cross: sum of `x^T x_q`, x the full-precision model's inputs; None if not wanted.
    """

    def __init__(self, in_features: int, with_cross: bool, device: torch.device | str = "cpu"):
        self._upper = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.cross = torch.zeros_like(self._upper) if with_cross else None

    @property
    def hessian(self) -> Tensor:
        return self._upper.triu() + self._upper.triu(1).T

    def add(self, quantized: Tensor, full: Tensor | None = None) -> None:
        """Add tokens: both `[..., in]`, in the same order; `full` where `cross` is wanted."""
        quantized = quantized.reshape(-1, quantized.shape[-1]).float()
        for part in torch.arange(len(self._upper)).tensor_split(PARTS):
            if len(part):
                first, stop = int(part[0]), int(part[-1]) + 1
                self._upper[first:stop, first:].addmm_(quantized[:, first:stop].T, quantized[:, first:])
        if self.cross is not None and full is not None:
            self.cross.addmm_(full.reshape(-1, full.shape[-1]).float().T, quantized)
