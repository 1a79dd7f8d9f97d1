"""Quantising decoder layers one after another, each on the inputs the quantised prefix gives it.

Two streams of hidden states run through the model side by side: `full`, the rotated model at full
precision, and `quantized`, the packed layers done so far. Within a layer the linears are fitted in
the order data reaches them (q/k/v, o, gate/up, down), each group on inputs that already passed the
packed linears before it. Only one layer's full-precision copy is alive at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import W2A4Error
from ..format.linear import PACKED_LINEARS, _PackedLinear
from ..format.online import OnlineRotation
from ..format.rtn import fit_rtn
from ..hub.transformers import act_group_size, decoder_linears
from ..ops.reference import dequantize_a4
from ..recipe import Recipe
from ..runtime.attention import KVSettings
from .fit.gptq import GPTQOptions, fit_gptq
from .fit.moments import Moments

#: Clips that `act_clip: search` tries.
ACT_CLIPS = tuple(round(0.6 + 0.05 * step, 2) for step in range(9))

#: Linears that share their input, in the order data reaches them.
STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

#: Root mean square of weights by their bits: below, the least float16 scale is too coarse for them.
LEAST_SIZES = {2: 1e-7, 4: 4e-7, 8: 1e-6}


@dataclass
class Streams:
    """Hidden states before the next layer, one `[sequences, tokens, hidden]` tensor a batch."""

    full: list[Tensor]
    quantized: list[Tensor]

    def to(self, device: torch.device, sequences: int) -> Streams:
        """On a device, in batches of `sequences`."""
        return Streams(*(list(torch.cat(s).to(device).split(sequences)) for s in (self.full, self.quantized)))


def token_weights(recipe: Recipe, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """What the squared error at each place of a window counts, `[tokens]`: 1, and more at the first.

    The first token is the one that all others attend to, and what makes it so is a massive activation of one
    or two neurons. Their weights bring the noise of 4-bit inputs into every token, so that least squares can
    find it better to drop the activation of one token in hundreds, on which all the others lean.
    """
    weights = torch.ones(tokens, dtype=torch.float32, device=device)
    weights[0] = max(1.0, recipe.first_token * (tokens - 1))
    return weights


class LayerQuantizer:
    """Quantises one decoder layer in place.

    Args:
        layer: a LlamaDecoderLayer whose linears are float (down_proj may be a RotatedLinear).
        recipe: see `Recipe`.
        settings: of the KV cache of the quantised model.
        position_embeddings: cos and sin for one batch.
    """

    def __init__(self, layer: nn.Module, recipe: Recipe, settings: KVSettings, position_embeddings):
        self.layer, self.recipe, self.position_embeddings = layer, recipe, position_embeddings
        self.reference = copy.deepcopy(layer)
        self.settings, self.full_settings = settings, KVSettings(rotation=settings.rotation)
        self.errors: dict[str, float] = {}

    def run(self, streams: Streams, progress: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Quantise, and move both streams behind the layer.

        Returns:
            relative output error of each linear's fit, by name.
        """
        inputs = self._map(streams, lambda layer, x: layer.input_layernorm(x))
        self._fit(STAGES[0], inputs, progress)
        context = self._map(inputs, self._attend)
        self._fit_update(STAGES[1], "self_attn.o_proj", streams, context, progress)
        inputs = self._map(streams, lambda layer, x: layer.post_attention_layernorm(x))
        self._fit(STAGES[2], inputs, progress)
        inner = self._map(
            inputs, lambda layer, x: layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
        )
        self._fit_update(STAGES[3], "mlp.down_proj", streams, inner, progress)
        for hidden, which in ((streams.full, "full-precision"), (streams.quantized, "quantised")):
            if not all(bool(x.isfinite().all()) for x in hidden):
                raise W2A4Error(
                    f"the {which} layer's output on the calibration text holds NaN or Inf: it overflows "
                    f"{str(hidden[0].dtype).removeprefix('torch.')}, or keys or values pass float16's 65504; "
                    "load the model in float32 or bfloat16, or set kv_bits=16"
                )
        return self.errors

    def packed(self) -> list[tuple[str, nn.Module]]:
        """The layer's packed linears, by their names inside it."""
        return [(n, m) for n, m in self.layer.named_modules() if isinstance(m, _PackedLinear)]

    def _map(self, streams: Streams, fn: Callable[[nn.Module, Tensor], Tensor]) -> Streams:
        return Streams(
            [fn(self.reference, x) for x in streams.full],
            [fn(self.layer, x) for x in streams.quantized],
        )

    def _fit_update(
        self,
        names: tuple[str, ...],
        path: str,
        streams: Streams,
        inputs: Streams,
        progress: Callable[[], object],
    ) -> None:
        """Quantise a linear whose output is added to the hidden states, and add it.

        What reads hidden states normalises them first, so an error counts relative to the token's norm. Else
        a token with a massive activation, a hundred times as long as the others, would decide the fit alone.
        """
        full = [
            x + self.reference.get_submodule(path)(y) for x, y in zip(streams.full, inputs.full, strict=True)
        ]
        norms = [x.float().norm(dim=-1, keepdim=True).clamp_min(1e-6) for x in full]
        typical = torch.cat([norm.flatten() for norm in norms]).median()
        self._fit(names, inputs, progress, [typical / norm for norm in norms])
        streams.full = full
        streams.quantized = [
            x + self.layer.get_submodule(path)(y)
            for x, y in zip(streams.quantized, inputs.quantized, strict=True)
        ]

    def _attend(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What o_proj sees."""
        seen: list[Tensor] = []
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            layer.self_attn(
                hidden_states=x,
                position_embeddings=self.position_embeddings,
                attention_mask=None,
                kv_settings=self.settings if layer is self.layer else self.full_settings,
            )
        finally:
            handle.remove()
        return seen[0]

    def _fit(
        self, names: tuple[str, ...], inputs: Streams, progress: Callable[[], object],
        weights: list[Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Quantise the linears that share `inputs`, stacked into one matrix.

        Args:
            weights: what a token's error is multiplied with before it is squared, beside its place's weight,
                `[sequences, tokens, 1]` a batch; None is 1.
        """
        recipe, linears = self.recipe, decoder_linears(self.layer)
        group = [linears[name] for name in names]
        rotation: OnlineRotation | None = getattr(group[0], "rotation", None)
        rotate = rotation.apply if rotation is not None else (lambda x: x)
        in_features = group[0].in_features
        act_group = act_group_size(recipe, names[0], self.layer.self_attn.head_dim, in_features)
        inputs = Streams([rotate(x) for x in inputs.full], [rotate(x) for x in inputs.quantized])
        clip = self._act_clip(inputs.quantized, act_group)
        weight = torch.cat([linear.weight.detach().float() for linear in group])
        for name, linear in zip(names, group, strict=True):
            check_weight(name, linear.weight, recipe.weight_bits)
        if recipe.weight_method == "rtn":
            fitted = fit_rtn(weight, recipe.weight_bits, recipe.group_size)
            error = None
        else:
            moments = Moments(weight.shape[1], recipe.gptq_target == "full", weight.device)
            places = token_weights(recipe, inputs.full[0].shape[1], weight.device).sqrt()[:, None]
            for i, (full, quantized) in enumerate(zip(inputs.full, inputs.quantized, strict=True)):
                factor = places if weights is None else places * weights[i]
                moments.add(self._as_seen(quantized, clip, act_group) * factor, full * factor)
            options = GPTQOptions(
                recipe.gptq_damp, recipe.gptq_block, recipe.gptq_act_order, recipe.gptq_refine
            )
            try:
                fitted, error = fit_gptq(
                    weight, moments.hessian, recipe.weight_bits, recipe.group_size, options, moments.cross
                )
            except W2A4Error as fault:
                raise W2A4Error(f"{', '.join(names)}: {fault}") from fault
        start = 0
        for name, linear in zip(names, group, strict=True):
            part = fitted.rows(start, start + linear.out_features)
            start += linear.out_features
            self._replace(name, linear, part, clip, act_group, rotation)
            self.errors[name] = error if error is not None else _weight_error(linear.weight, part)
            progress()

    def _replace(self, name: str, linear: nn.Linear, fitted, clip: float, act_group: int, rotation) -> None:
        packed = PACKED_LINEARS[self.recipe.weight_bits].from_linear(
            linear, fitted=fitted, act_bits=self.recipe.act_bits, act_clip=clip,
            act_group_size=act_group, rotation=rotation,
        )  # fmt: skip
        parent = self.layer.mlp if hasattr(self.layer.mlp, name) else self.layer.self_attn
        setattr(parent, name, packed)

    def _as_seen(self, x: Tensor, clip: float, act_group: int) -> Tensor:
        """Activations after quantisation, as the packed linear will see them."""
        if self.recipe.act_bits == 16:
            return x
        codes, scale = ops.quantize_a4(
            x, torch.tensor([clip], dtype=torch.float32, device=x.device), act_group
        )
        return dequantize_a4(codes, scale, x.shape[-1])

    def _act_clip(self, batches: list[Tensor], act_group: int) -> float:
        """The recipe's clip, or the one of least relative squared error, mean over tokens."""
        if self.recipe.act_clip != "search" or self.recipe.act_bits == 16:
            return self.recipe.act_clip if self.recipe.act_clip != "search" else 1.0
        sample = torch.cat([x.flatten(0, -2)[:: max(1, len(batches))] for x in batches]).float()
        energy = sample.square().sum(-1).clamp_min(1e-30)

        def error(clip: float) -> float:
            return float(((self._as_seen(sample, clip, act_group) - sample).square().sum(-1) / energy).mean())

        return min(ACT_CLIPS, key=error)


def check_weight(name: str, weight: Tensor, bits: int) -> None:
    """Raise W2A4Error for a weight that is not finite, or that float16 scales do not reach."""
    weight = weight.detach()
    most, least = torch.finfo(torch.float16).max * {2: 127, 4: 7, 8: 127}[bits], LEAST_SIZES[bits]
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if not largest <= most:
        raise W2A4Error(
            f"{name}: a weight is {largest:g}, but {bits}-bit weights reach {most:g}; "
            "the checkpoint is damaged, or has to be scaled down first"
        )
    size = float(weight.double().square().mean().sqrt()) if weight.numel() else 0.0
    if 0 < size < least:
        raise W2A4Error(
            f"{name}: weights of {size:.2g} in the mean, but {bits}-bit ones begin at {least:g}: float16 "
            "scales lose them; scale them up, and down what comes before or behind"
        )


def _weight_error(weight: Tensor, fitted) -> float:
    weight = weight.detach().float()
    return float((fitted.dequantize() - weight).square().sum() / weight.square().sum().clamp_min(1e-30))
