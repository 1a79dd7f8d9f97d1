"""`smooth`: outlier channels' size moves from activations into weights (SmoothQuant, arXiv 2211.10438).

The baseline that rotations are compared with, and what a recipe's `smooth` switches on: channel j of a
linear's input is divided by `s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)`, and column j of every linear
that reads it multiplied. What stands before the input takes the division, so the output stays the same.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..hub.transformers import check_original
from .rotation import fold as fuse

#: The linears that share an input, and the module whose outputs are divided by its scales. From the back
#: of a layer to its front: v_proj and up_proj have their last rows when their own inputs' scales are taken.
MOVES = (
    (("mlp.down_proj",), "mlp.up_proj"),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    (("self_attn.o_proj",), "self_attn.v_proj"),
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
)

#: Scales are held in here: a channel that calibration hardly used would overflow float16 beyond.
SCALES = (1e-4, 1e4)


@torch.no_grad()
def smooth(model: nn.Module, ids: Tensor, alpha: float) -> nn.Module:
    """Smooth a LLaMA in place; its output stays the same up to rounding.

    Each tensor is computed in float64 and cast once. A channel whose activations or weights are all zero
    keeps its scale.

    Args:
        model: LlamaForCausalLM, float, unrotated.
        ids: calibration windows, int64 `[samples, tokens]`.
        alpha: in (0, 1], how much of the difficulty moves: at 1 every channel's largest activation is 1.
            0 is off: nothing is run or changed.

    Returns:
        the same model.

    Raises:
        RotationError: rotated already, or a model that `rotate` could not rotate. It is unchanged then.
        CalibrationError: an activation overflows. The model is unchanged then.
    """
    if not alpha:
        return model
    check_original(model)
    fuse.check(model)
    for layer, seen in zip(model.model.layers, input_maxima(model, ids), strict=True):
        _smooth_layer(layer, seen, alpha)
    return model


@torch.no_grad()
def input_maxima(model: nn.Module, ids: Tensor) -> list[dict[str, Tensor]]:
    """max|x| over all tokens of each channel of the decoder linears' inputs.

    Returns:
        by layer, by the first linear of each of `MOVES`: float64 `[in_features]`.

    Raises:
        CalibrationError: one of them is not finite.
    """
    maxima: list[dict[str, Tensor]] = [{} for _ in model.model.layers]

    def keep(found: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        most = args[0].abs().flatten(0, -2).amax(0).double()
        found[name] = torch.maximum(found.get(name, most), most)

    with contextlib.ExitStack() as hooks:
        for layer, found in zip(model.model.layers, maxima, strict=True):
            for (name, *_), _ in MOVES:
                hook = functools.partial(keep, found, name)
                hooks.callback(layer.get_submodule(name).register_forward_pre_hook(hook).remove)
        for window in ids.to(model.device).split(1):
            model.base_model(window, use_cache=False)
    for index, found in enumerate(maxima):
        for name, most in found.items():
            if not most.isfinite().all():
                raise CalibrationError(
                    f"the input of model.layers.{index}.{name} holds NaN or infinity on the calibration "
                    f"text in {model.dtype}; load the model in float32 or bfloat16"
                )
    return maxima


def _smooth_layer(layer: nn.Module, seen: dict[str, Tensor], alpha: float) -> None:
    values = {name: parameter.double() for name, parameter in layer.named_parameters()}
    for readers, source in MOVES:
        columns = torch.stack([values[f"{name}.weight"].abs().amax(0) for name in readers]).amax(0)
        outputs = len(values[f"{source}.weight"])
        # The query heads of one KV head read the same values: they share a scale a channel.
        width = layer.self_attn.head_dim if source == "self_attn.v_proj" else outputs
        heads = outputs // width, -1, width
        scale = _scales(seen[readers[0]].view(heads).amax(1), columns.view(heads).amax(1), alpha)
        wide = scale[:, None].expand(-1, len(columns) // outputs, -1).flatten()
        for name in readers:
            values[f"{name}.weight"] = values[f"{name}.weight"] * wide
        for name in ("weight", "bias"):
            if (value := values.get(f"{source}.{name}")) is not None:
                values[f"{source}.{name}"] = value / scale.view(-1, *[1] * (value.dim() - 1))
    for name, parameter in layer.named_parameters():
        parameter.copy_(values[name])


def _scales(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """What a channel of these maxima is divided by, float64 of their shape."""
    scale = (activations**alpha / weights ** (1 - alpha)).clamp(*SCALES)
    return torch.where((activations == 0) | (weights == 0), 1.0, scale)
