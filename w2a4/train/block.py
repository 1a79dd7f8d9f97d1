"""Block by block: each decoder layer trains alone, on the outputs of the packed layers before it.

The target is the full-precision layer's output on full-precision inputs, so a layer also corrects errors
of the layers before it. Memory holds one layer with its optimiser and the hidden states of the
calibration text: so a small device can train a large model.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..format.files import read_text, write_json
from ..quantization.layer import LayerQuantizer, Streams
from ..recipe import Recipe, Training
from ..runtime.heads import window_mask
from .linear import FakeQuantLinear, make_trainable
from .optimizer import parameter_groups, rate


class BlockTrainer:
    """Refines the packed fit of a decoder layer by gradient descent; for `pipeline.quantize(refine=…)`.

    Args:
        recipe: its `training` has the rates, and `batch_size`, the sequences of a step.
        steps: of each layer.
        kept: a file for the errors, in the directory that the quantisation may be resumed from. Errors of
            the layers that an interrupted run has finished are read from it; a layer that is trained
            again overwrites its own.

    Raises:
        TrainingError: the file is damaged.
    """

    def __init__(self, recipe: Recipe, steps: int, kept: Path | None = None):
        self.training, self.seed, self.steps = recipe.training, recipe.rotation.seed, steps
        self.kept = kept
        #: Mean relative error of a layer's output, before and after training, by its index.
        self.errors = _read_errors(kept) if kept is not None and kept.is_file() else {}

    @torch.enable_grad()
    def __call__(self, index: int, quantizer: LayerQuantizer, inputs: list[Tensor], streams: Streams) -> None:
        """Train the layer of `quantizer` and recompute the quantised hidden states behind it.

        Args:
            index: of the layer.
            quantizer: whose layer is packed.
            inputs: the quantised hidden states before the layer, batches `[sequences, tokens, hidden]`.
            streams: hidden states behind the layer; `full` is the target, `quantized` is replaced.
        """
        layer, target = quantizer.layer, torch.cat(streams.full)
        source, sequences = torch.cat(inputs), len(inputs[0])
        before = _relative_error(torch.cat(streams.quantized), target).mean()
        _replace(layer, quantizer, self.training)
        optimizer = torch.optim.AdamW(parameter_groups(layer, self.training))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate(self.training, step / self.steps)
        )
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        layer.train()
        for step in range(self.steps):
            picked = torch.randint(len(source), (self.training.batch_size,), generator=generator)
            out = _forward(layer, source[picked], quantizer)
            loss = _relative_error(out, target[picked]).mean()
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    f"step {step + 1} of layer {index}: the loss is {float(loss)}; lower training.lr "
                    f"(now {self.training.lr:g})"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(layer.parameters(), self.training.max_grad_norm)
            optimizer.step()
            schedule.step()
        self._pack(layer.eval())
        with torch.no_grad():
            behind = [_forward(layer, batch, quantizer) for batch in source.split(sequences)]
        after = _relative_error(torch.cat(behind), target).mean()
        self.errors[index] = float(before), float(after)
        if self.kept is not None:
            # Before the layer counts as finished: after a kill in between the layer is trained again.
            write_json(self.kept, {"errors": self.errors})
        streams.quantized = behind

    @staticmethod
    def _pack(layer: nn.Module) -> None:
        for name, module in list(layer.named_modules()):
            if isinstance(module, FakeQuantLinear):
                layer.set_submodule(name, module.to_packed())


def _read_errors(path: Path) -> dict[int, tuple[float, float]]:
    try:
        found = json.loads(read_text(path))["errors"]
        return {int(index): (before, after) for index, (before, after) in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrainingError(
            f"{path.name} in {str(path.parent)!r}, the errors of finished layers, cannot be read ({error}); "
            "remove that file to resume without those errors, or the directory to train these layers again"
        ) from None


def _replace(layer: nn.Module, quantizer: LayerQuantizer, training: Training) -> None:
    """Trainable linears, from the layer's packed fits and the reference's weights."""
    layer.requires_grad_(False)
    reference, family, grid = quantizer.reference, quantizer.family, quantizer.recipe.grid
    for trained in make_trainable(layer, family.linears(layer), reference, family, training, grid):
        trained.set_trainable(training.learn_act_clip)


def _forward(layer: nn.Module, x: Tensor, quantizer: LayerQuantizer) -> Tensor:
    out = layer(
        x,
        position_embeddings=quantizer.position_embeddings,
        attention_mask=window_mask(layer.self_attn, x.shape[1], x.device),
        kv_settings=quantizer.settings,
    )
    return out if isinstance(out, Tensor) else out[0]  # transformers 4.57 returns a tuple


def _relative_error(x: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token relative to its target, so that no token dominates by its norm."""
    error = (x - target).float().square().sum(-1)
    return error / target.float().square().sum(-1).clamp_min(1e-30)
