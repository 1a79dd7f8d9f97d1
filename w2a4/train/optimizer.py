"""The optimiser's parameter groups and the learning-rate schedule, for both routes of training."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..recipe import Training
from .linear import fake_quant_linears


def parameter_groups(model: nn.Module, training: Training) -> list[dict[str, Any]]:
    """The optimiser's groups: latent weights (and biases), and quantiser parameters, without decay."""
    special = {id(p) for m in fake_quant_linears(model).values() for p in m.quantizer_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trained if id(p) not in special]
    quantizers = [p for p in trained if id(p) in special]
    return [
        {"params": weights, "lr": training.lr, "weight_decay": training.weight_decay},
        {"params": quantizers, "lr": training.quantizer_lr, "weight_decay": 0.0},
    ]


def rate(training: Training, progress: float) -> float:
    """Factor on the learning rates after a share `progress` of the run, 0..1."""
    if progress < training.warmup:
        return progress / training.warmup if progress > 0 else 0.01
    left = max(0.0, 1 - progress) / (1 - training.warmup)
    if training.schedule == "constant":
        return 1.0
    return left if training.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
