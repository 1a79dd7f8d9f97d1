"""The optimiser's parameter groups and the learning-rate schedule, for both routes of training."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..recipe import Training
from .linear import fake_quant_linears

#: Root mean square of the weights that `training.lr` is for. One step of AdamW moves each number by about its
#: rate, whatever the gradient; matrices of one model differ a hundredfold in size, so their rates do too.
TYPICAL_WEIGHT = 2.0**-4


def parameter_groups(model: nn.Module, training: Training) -> list[dict[str, Any]]:
    """The optimiser's groups: latent weights (and biases), then quantiser parameters, without decay.

    A matrix's rate is `training.lr` times its size to `TYPICAL_WEIGHT`, and the rate of its steps is
    `quantizer_lr` times theirs, both rounded to powers of two so that groups are few. Shares and clips, which
    have no unit, have `quantizer_lr` itself.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    later: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for linear in fake_quant_linears(model).values():
        quantizers = {id(parameter) for parameter in linear.quantizer_parameters()}
        for name, parameter in linear.named_parameters():
            if not parameter.requires_grad or id(parameter) in seen:  # linears of one input share a clip
                continue
            seen.add(id(parameter))
            if id(parameter) in quantizers:
                lr = training.quantizer_lr * _power_of_two(linear.sizes.get(name, 1.0))
                later.setdefault((lr, 0.0), []).append(parameter)
            else:
                lr = training.lr * _power_of_two(linear.sizes["weight"] / TYPICAL_WEIGHT)
                groups.setdefault((lr, training.weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for found in (groups, later)
        for (lr, decay), parameters in found.items()
    ]


def _power_of_two(size: float) -> float:
    """The nearest one by its logarithm; 1 for 0."""
    return 2.0 ** round(math.log2(size)) if size else 1.0


def rate(training: Training, progress: float) -> float:
    """Factor on the learning rates after a share `progress` of the run, 0..1."""
    if progress < training.warmup:
        return progress / training.warmup if progress > 0 else 0.01
    left = max(0.0, 1 - progress) / (1 - training.warmup)
    if training.schedule == "constant":
        return 1.0
    return left if training.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
