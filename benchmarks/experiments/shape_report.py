"""Shapes of weights and activations before and after rotation: histograms, and kurtosis by layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import w2a4
from benchmarks.experiments.outliers import changed_inputs
from w2a4 import arch
from w2a4.evaluate.data import load_text, windows

#: Histograms reach so many times the root mean square, in so many bins.
REACH, BINS = 8.0, 64

#: Text that activations are looked at on.
SEQLEN, WINDOWS = 256, 4


@torch.no_grad()
def shapes(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Of a float LLaMA as it is and rotated (which happens to a copy).

    Returns:
        for `before` and `after`: `weights` and `activations`, shares of the values in bins of the width
        `2 * REACH / BINS`, each value relative to the root mean square of its row or token (those farther
        out are in the end bins); and `kurtosis`, by kind of linear, one value a layer: the mean over
        tokens of mean x**4 / (mean x**2)**2.
    """
    ids = windows(tokenizer, load_text("builtin", "evaluation"), SEQLEN)[:WINDOWS]
    rotated = w2a4.rotate(copy.deepcopy(model))
    return {"before": _shape(model, ids), "after": _shape(rotated, ids), "reach": REACH}


def _shape(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    inputs, kurtosis = torch.zeros(BINS, dtype=torch.double), {}

    def look(name: str, x: Tensor) -> Tensor:
        inputs.add_(_histogram(x))
        power = x.double().square()
        value = (power.square().mean(-1) / power.mean(-1).square()).mean().item()
        kurtosis.setdefault(name.rpartition(".")[2], []).append(value)
        return x

    with changed_inputs(model, look):
        model.base_model(input_ids=ids, use_cache=False)
    weights = sum(
        _histogram(linear.weight)
        for layer in model.model.layers
        for linear in arch.of_config(model.config).linears(layer).values()
    )
    return {
        "weights": (weights / weights.sum()).tolist(),
        "activations": (inputs / inputs.sum()).tolist(),
        "kurtosis": kurtosis,
    }


def _histogram(x: Tensor) -> Tensor:
    """Counts float64 `[BINS]` of what is in the rows `[..., n]`, relative to each row's root mean square."""
    scaled = x.double() / x.double().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    edge = REACH * (1 - 1e-9)
    return torch.histc(scaled.clamp(-edge, edge), BINS, -REACH, REACH)
