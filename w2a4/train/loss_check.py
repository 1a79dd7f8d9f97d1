"""Stops a run whose loss is not finite or explodes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..recipe import Training
from .distributed import agree, own_part

#: A loss this many times that of the first step has exploded.
EXPLODED = 10.0


class LossCheck:
    """Checks the losses of a run, step by step.

    Args:
        model: whose parameters and gradients are searched for the cause.
        training: its rates are named in the error.
        folder: of the checkpoints, named in the error.
    """

    def __init__(self, model: nn.Module, training: Training, folder: str):
        self.model, self.training, self.folder = model, training, folder
        self.first: float | None = None
        self._deferred: Tensor | None = None

    def check(self, loss: float, step: int) -> None:
        """Raise TrainingError for a loss that is not finite, or many times the first; in all processes."""
        if self.first is None and math.isfinite(loss):
            self.first = loss
        if not math.isfinite(loss) or loss > EXPLODED * (self.first or math.inf):
            raise TrainingError(
                f"step {step}: the loss is {loss:.4g}{agree(self._cause()) or ''}; lower "
                f"training.lr (now {self.training.lr:g}) or training.quantizer_lr (now "
                f"{self.training.quantizer_lr:g}); checkpoints saved before stay in {self.folder!r}"
            )

    def defer(self, loss: Tensor, step: int) -> None:
        """Check the deferred loss, of `step`, and defer this one: reading it now would wait for the GPU."""
        self.check_deferred(step, then=loss.detach())

    def check_deferred(self, step: int, then: Tensor | None = None) -> None:
        """Check the deferred loss, if there is one, and defer `then`."""
        deferred, self._deferred = self._deferred, then
        if deferred is not None:
            self.check(float(deferred), step)

    def _cause(self) -> str | None:
        """The first parameter or gradient of this process that is not finite."""
        named = list(self.model.named_parameters())
        gradients = [(f"the gradient of {name}", p.grad) for name, p in named if p.grad is not None]
        for name, value in (*named, *gradients):
            if not bool(torch.isfinite(own_part(value)).all()):
                return f", {name} holds NaN or infinity"
        return None
