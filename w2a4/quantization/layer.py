"""Quantising decoder layers one after another, each on the inputs the quantised prefix gives it.

Two streams of hidden states run through the model side by side: `full`, the rotated model at full
precision, and `quantized`, the packed layers done so far. Where no fit aims at the first, it is of a few
windows only, for the error that is shown, which saves nearly half of the work. Within a layer the linears are
fitted in the order of the family's sites (q/k/v, o, gate/up, down), each group on inputs that already passed
the packed linears before it. Only one layer's full-precision copy is alive at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arch.architecture import Architecture, Site, activation
from ..arch.forward import decoder_layer
from ..errors import W2A4Error
from ..format.fake_quant import fake_quant_a4
from ..format.grid import Grid
from ..format.linear import PACKED_LINEARS, _PackedLinear
from ..format.online import OnlineRotation
from ..format.rtn import fit_rtn
from ..recipe import Recipe
from ..runtime.attention import KVSettings
from ..runtime.heads import attend
from .fit.gptq import GPTQOptions, fit_gptq
from .fit.moments import Moments

#: Clips that `act_clip: search` tries.
ACT_CLIPS = tuple(round(0.6 + 0.05 * step, 2) for step in range(9))

#: Random directions along which the length of a token is measured, which finds it to within a tenth or so.
DIRECTIONS = 64

#: Root mean square of weights by their bits: below, the least float16 scale is too coarse for them.
LEAST_SIZES = {2: 1e-7, 3: 2e-7, 4: 4e-7, 8: 1e-6}


@dataclass
class Streams:
    """Hidden states before the next layer, one `[sequences, tokens, hidden]` tensor a batch.

    `full` may be of the first batches only, see `needs_full`.
    """

    full: list[Tensor]
    quantized: list[Tensor]

    def to(self, device: torch.device, sequences: int) -> Streams:
        """On a device, in batches of `sequences`."""
        return Streams(*(list(torch.cat(s).to(device).split(sequences)) for s in (self.full, self.quantized)))


def needs_full(recipe: Recipe) -> bool:
    """Whether a fit aims at what the full-precision model computes, of all calibration windows."""
    return recipe.weight_method == "gptq" and recipe.gptq_target == "full"


def token_weights(recipe: Recipe, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """What the squared error at each position of a window counts, `[tokens]`: 1, and more at the first.

    The first token is the one that all others attend to, and what makes it so is a massive activation of one
    or two neurons. Their weights bring the noise of 4-bit inputs into every token, so that least squares can
    find it better to drop the activation of one token in hundreds, on which all the others lean.
    """
    weights = torch.ones(tokens, dtype=torch.float32, device=device)
    weights[0] = max(1.0, recipe.first_token * (tokens - 1))
    return weights


class LayerQuantizer:
    """Quantises one decoder layer in place, as the steps of its forward pass reach its sites.

    Args:
        layer: a decoder layer of transformers whose linears are float (mlp_out's may be RotatedLinears).
        recipe: see `Recipe`.
        settings: of the KV cache of the quantised model; its prefix is the full-precision one's too.
        position_embeddings: cos and sin for one batch.
        family: of the model.
    """

    def __init__(
        self, layer: nn.Module, recipe: Recipe, settings: KVSettings, position_embeddings: Any,
        family: Architecture,
    ):  # fmt: skip
        self.layer, self.recipe, self.position_embeddings = layer, recipe, position_embeddings
        self.reference, self.family = copy.deepcopy(layer), family
        self.settings = settings
        self.full_settings = KVSettings(rotation=settings.rotation, prefix=settings.prefix)
        self.errors: dict[str, float] = {}
        self.progress: Callable[[], object] = lambda: None

    def run(self, streams: Streams, progress: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Quantise, and move both streams behind the layer.

        Returns:
            relative squared error of each linear's fit, by path: of what its site computes on the calibration
            text, or with `rtn` of the weight.
        """
        self.progress = progress
        after = decoder_layer(self.family, self, streams)
        streams.full, streams.quantized = after.full, after.quantized
        for hidden, which in ((streams.full, "full-precision"), (streams.quantized, "quantised")):
            if not all(bool(x.isfinite().all()) for x in hidden):
                raise W2A4Error(
                    f"the {which} layer's output on the calibration text holds NaN or Inf: it overflows "
                    f"{str(hidden[0].dtype).removeprefix('torch.')}, or keys or values pass float16's 65504; "
                    "load the model in float32 or bfloat16, or set kv_bits=16"
                )
        return self.errors

    def packed(self) -> list[tuple[str, nn.Module]]:
        """The layer's packed linears, by their paths."""
        return [(n, m) for n, m in self.family.linears(self.layer).items() if isinstance(m, _PackedLinear)]

    def attention(self, streams: Streams) -> Streams:
        """What o_proj sees; fits q, k and v."""
        inputs = self._normed(self.family.attention_in, streams)
        self._fit(self.family.attention_in, inputs)

        def attend_in(layer: nn.Module, x: Tensor) -> Tensor:
            settings = self.settings if layer is self.layer else self.full_settings
            qkv = _outputs(layer, self.family.attention_in, x)
            return attend(layer.self_attn, qkv, self.position_embeddings, settings)

        return self._map(inputs, attend_in)

    def mlp(self, streams: Streams) -> Streams:
        """What down_proj sees; fits gate and up."""
        inputs = self._normed(self.family.mlp_in, streams)
        self._fit(self.family.mlp_in, inputs)

        def activate(layer: nn.Module, x: Tensor) -> Tensor:
            gate, up = _outputs(layer, self.family.mlp_in, x).chunk(2, -1)
            return activation(layer.mlp)(gate) * up

        return self._map(inputs, activate)

    def add(self, site: Site, inputs: Streams, streams: Streams) -> Streams:
        """Quantise a linear whose output is added to the hidden states, and add it.

        What reads hidden states normalises them first, so an error counts relative to the token's norm. Else
        a token with a massive activation, a hundred times as long as the others, would decide the fit alone.
        """
        pairs = zip(streams.full, inputs.full, strict=True)
        full = [x + _outputs(self.reference, site, y) for x, y in pairs]
        rotated = self._rotated(site, inputs)
        if len(full) < len(streams.quantized):
            norms = self._lengths(site, streams.quantized, rotated.quantized)
        else:
            norms = [x.float().norm(dim=-1, keepdim=True) for x in full]
        norms = [norm.clamp_min(1e-6) for norm in norms]
        typical = torch.cat([norm.flatten() for norm in norms]).median()
        self._fit(site, rotated, [typical / norm for norm in norms])
        pairs = zip(streams.quantized, inputs.quantized, strict=True)
        return Streams(full, [x + _outputs(self.layer, site, y) for x, y in pairs])

    def _rotated(self, site: Site, inputs: Streams) -> Streams:
        """What the weights of a site multiply: behind its online rotation, if it has one."""
        rotation = self._rotation(site)
        if rotation is None:
            return inputs
        return Streams(*([rotation.apply(x) for x in some] for some in (inputs.full, inputs.quantized)))

    def _rotation(self, site: Site) -> OnlineRotation | None:
        return getattr(self.layer.get_submodule(site.paths[0]), "rotation", None)

    def _lengths(self, site: Site, hidden: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """About the norm of each token of `hidden` plus the site's full-precision output, `[..., 1]`.

        Along all directions it would be the largest product of the fit, and a weight need not be exact.
        """
        linear = self.reference.get_submodule(site.paths[0])
        weight = linear.weight.detach().float()
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (min(DIRECTIONS, len(weight)), len(weight)), generator=generator) * 2.0 - 1
        signs = signs.to(weight.device) * len(signs) ** -0.5
        weight = signs @ weight
        bias = None if linear.bias is None else signs @ linear.bias.detach().float()
        return [
            (x.float() @ signs.T + F.linear(y.float(), weight, bias)).norm(dim=-1, keepdim=True)
            for x, y in zip(hidden, inputs, strict=True)
        ]

    def _map(self, streams: Streams, fn: Callable[[nn.Module, Tensor], Tensor]) -> Streams:
        return Streams(
            [fn(self.reference, x) for x in streams.full],
            [fn(self.layer, x) for x in streams.quantized],
        )

    def _normed(self, site: Site, streams: Streams) -> Streams:
        return self._map(streams, lambda layer, x: layer.get_submodule(site.norm)(x))

    def _fit(self, site: Site, inputs: Streams, weights: list[Tensor] | None = None) -> None:
        """Quantise the linears of a site, stacked into one matrix.

        Args:
            inputs: behind the site's rotation.
            weights: what a token's error is multiplied with before it is squared, beside its position's
                weight, `[sequences, tokens, 1]` a batch; None is 1.
        """
        recipe, names = self.recipe, [linear.name for linear in site.linears]
        group = [self.layer.get_submodule(path) for path in site.paths]
        rotation = self._rotation(site)
        head_dim, in_features = self.layer.self_attn.head_dim, group[0].in_features
        act_group = self.family.act_group_size(recipe, site, head_dim, in_features)
        clip = self._act_clip(inputs.quantized, act_group)
        weight = torch.cat([linear.weight.detach().float() for linear in group])
        for name, linear in zip(names, group, strict=True):
            check_weight(name, linear.weight, recipe.grid)
        if recipe.weight_method == "rtn":
            fitted = fit_rtn(weight, recipe.grid, recipe.group_size)
            error = None
        else:
            moments = Moments(weight.shape[1], needs_full(recipe), weight.device)
            positions = self._position_weights(inputs.quantized[0]).sqrt()[:, None]
            for i, quantized in enumerate(inputs.quantized):
                factor = positions if weights is None else positions * weights[i]
                full = inputs.full[i] * factor if needs_full(recipe) else None
                moments.add(self._as_seen(quantized, clip, act_group) * factor, full)
            options = GPTQOptions(
                recipe.gptq_damp, recipe.gptq_block, recipe.gptq_act_order, recipe.gptq_refine
            )
            try:
                fitted, error = fit_gptq(
                    weight, moments.hessian, recipe.grid, recipe.group_size, options, moments.cross
                )
            except W2A4Error as fault:
                raise W2A4Error(f"{', '.join(names)}: {fault}") from fault
        start = 0
        for path, linear in zip(site.paths, group, strict=True):
            part = fitted.rows(start, start + linear.out_features)
            start += linear.out_features
            self._replace(path, linear, part, clip, act_group, rotation)
            self.errors[path] = error if error is not None else _weight_error(linear.weight, part)
            self.progress()

    def _position_weights(self, x: Tensor) -> Tensor:
        """`token_weights` of `[sequences, tokens, …]`; behind a prefix the first token is like any other."""
        if self.settings.prefix is not None:
            return torch.ones(x.shape[1], device=x.device)
        return token_weights(self.recipe, x.shape[1], x.device)

    def _replace(self, path: str, linear: nn.Linear, fitted, clip: float, act_group: int, rotation) -> None:
        packed = PACKED_LINEARS[self.recipe.weight_bits].from_linear(
            linear, fitted=fitted, act_bits=self.recipe.act_bits, act_clip=clip,
            act_group_size=act_group, rotation=rotation,
        )  # fmt: skip
        self.layer.set_submodule(path, packed)

    def _as_seen(self, x: Tensor, clip: float, act_group: int) -> Tensor:
        """Activations after quantisation, as the packed linear will see them."""
        if self.recipe.act_bits == 16:
            return x
        # To the bit what the codes stand for, without writing them.
        as_tensor = torch.tensor([clip], dtype=torch.float32, device=x.device)
        return fake_quant_a4(x.float(), as_tensor, act_group)

    def _act_clip(self, batches: list[Tensor], act_group: int) -> float:
        """The recipe's clip, or the one of least relative squared error, mean over tokens; with its sign."""
        recipe = self.recipe
        if recipe.act_clip != "search" or recipe.act_bits == 16:
            return recipe.signed_clip(recipe.act_clip if recipe.act_clip != "search" else 1.0)
        sample = torch.cat([x.flatten(0, -2)[:: max(1, len(batches))] for x in batches]).float()
        energy = sample.square().sum(-1).clamp_min(1e-30)

        def error(clip: float) -> float:
            return float(((self._as_seen(sample, clip, act_group) - sample).square().sum(-1) / energy).mean())

        return min(map(recipe.signed_clip, ACT_CLIPS), key=error)


def _outputs(layer: nn.Module, site: Site, x: Tensor) -> Tensor:
    """What a site's linears give for their input, one behind the other."""
    out = [layer.get_submodule(path)(x) for path in site.paths]
    return out[0] if len(out) == 1 else torch.cat(out, -1)


def check_weight(name: str, weight: Tensor, grid: Grid) -> None:
    """Raise W2A4Error for a weight that is not finite, or that float16 scales do not reach."""
    weight, bits = weight.detach(), grid.bits
    most, least = torch.finfo(torch.float16).max * grid.most, LEAST_SIZES[bits]
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
