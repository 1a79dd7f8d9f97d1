"""Second moments of a linear's inputs, gathered batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Sums of outer products over calibration tokens, float32 `[in, in]`.

    Attributes:
        hessian: sum of `x_q^T x_q`, x_q the inputs as the quantised model sees them.
        cross: sum of `x^T x_q`, x the full-precision model's inputs; None if not wanted.
    """

    def __init__(self, in_features: int, with_cross: bool, device: torch.device | str = "cpu"):
        self.hessian = torch.zeros(in_features, in_features, device=device)
        self.cross = torch.zeros_like(self.hessian) if with_cross else None

    def add(self, quantized: Tensor, full: Tensor) -> None:
        """Add tokens: both `[..., in]`, in the same order."""
        quantized = quantized.reshape(-1, quantized.shape[-1]).float()
        self.hessian.addmm_(quantized.T, quantized)
        if self.cross is not None:
            self.cross.addmm_(full.reshape(-1, full.shape[-1]).float().T, quantized)
