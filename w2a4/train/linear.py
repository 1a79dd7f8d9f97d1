"""`FakeQuantLinear`: a linear layer that trains as the packed one will compute."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arch import Architecture
from ..format.fake_quant import fake_quant_a4
from ..format.grid import Form, Grid
from ..format.linear import PACKED_LINEARS, _PackedLinear
from ..format.online import OnlineRotation
from ..format.weight import QuantizedWeight
from ..recipe import Training

#: A latent weight starts inside the cell of its code, at least this share of a cell from its borders: so far
#: that only gradients which agree over many steps take it across. Nearer, noise undoes what the fit weighed.
_CELL_MARGIN = 0.4

#: A trained clip counts as at least this far from 0: a step may take it across, which turns its meaning.
_LEAST_CLIP = 2.0**-10


class FakeQuantLinear(nn.Module):
    """`nn.Linear` with quantised weights and 4-bit activations, differentiable.

    While training it fake-quantises in float; in eval mode without gradients it packs itself and
    runs the packed layer's op, so that what is evaluated is what `to_packed` will be.

    Parameters: `weight` (latent, float32 `[out, in]`), `bias`, `act_clip` float32 `[1]`, and of the
    weight quantiser float32 `[out, G]`: `beta`, `gamma`, `s1`, `s2`, ... (`fake_quant.ldp_fake_quant`)
    for a codebook, `step` (`fake_quant.lsq_fake_quant`) for a uniform grid.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        start: _PackedLinear,
        form: Form = "ldp",
        minmax: bool = False,
        keep_codes: bool = True,
        grid: Grid | None = None,
    ):
        """
        Args:
            weight: full-precision `[out, in]`, rotated as `start` expects it.
            bias: `[out]` or None.
            start: a packed fit of this weight; training begins with its levels.
            form: how a codebook is trained, see `grid` in `recipe.Training`.
            minmax: begin with the plain range of the weights instead of the fit; form `minmax` always does.
            keep_codes: begin with the codes of `start` too, not with those nearest to the weight.
            grid: of the weights, where `start` stores a uniform one as a codebook; None is that of `start`.
        """
        super().__init__()
        self.in_features, self.out_features = start.in_features, start.out_features
        self.bits, self.group_size = start.bits, start.group_size
        self.act_bits, self.act_group_size = start.act_bits, start.act_group_size
        self.rotation: OnlineRotation | None = start.rotation
        fitted, minmax = start.fitted(), minmax or form == "minmax"
        fitted = fitted.on(grid or fitted.grid)
        self.grid = fitted.grid
        latent = weight.detach().float()
        if keep_codes and not minmax:
            latent = _inside_cells(latent, fitted)
        # A step of training is a thousandth of a weight: 16 bits would round most of them away.
        self.weight = nn.Parameter(latent)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        values = self.grid.start(latent, fitted.scale, fitted.levels, form, minmax)
        for name, value in zip(self.grid.parameters, values, strict=True):
            self.register_parameter(name, nn.Parameter(value))
        #: How large numbers are that have a unit, by the names of the parameters: of these the optimiser's
        #: rates are shares.
        self.sizes = {"weight": float(latent.square().mean().sqrt())}
        for name in self.grid.with_unit:
            self.sizes[name] = float(self._parameters[name].detach().abs().mean())
        clip = (
            start.act_clip.detach().clone()
            if self.act_bits == 4
            else torch.ones(1, dtype=torch.float32, device=weight.device)
        )
        self._negative_clip = bool(clip < 0)
        self.act_clip = nn.Parameter(clip)
        self._fixed = self.grid.fixed(form)
        self._packed: tuple[tuple, _PackedLinear] | None = None
        self.set_trainable()

    def set_trainable(self, act_clip: bool = True) -> None:
        """Require gradients of what this layer is to learn, and of nothing else."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self._fixed)
        self.act_clip.requires_grad_(act_clip and self.act_bits == 4)

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """Those of the weight quantiser and of the activations, for an optimiser group of their own."""
        return [*self._values(), self.act_clip]

    def _values(self) -> list[nn.Parameter]:
        return [self._parameters[name] for name in self.grid.parameters]

    def train(self, mode: bool = True) -> FakeQuantLinear:
        # Fused optimisers change parameters without raising their version.
        self._packed = None
        return super().train(mode)

    def fake_quant_weight(self) -> Tensor:
        """The weight as its packed form gives it back, `[out, in]`, differentiable."""
        return self.grid.fake_quant(self.weight, self._values(), self.group_size)

    def bounded_clip(self) -> Tensor:
        """`act_clip` as it is used and packed, with a gradient that still reaches one that is too small."""
        clip = self.act_clip.detach()
        bounded = clip.clamp_max(-_LEAST_CLIP) if self._negative_clip else clip.clamp_min(_LEAST_CLIP)
        return bounded + (self.act_clip - clip)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in x's dtype."""
        if not self.training and not torch.is_grad_enabled():
            return self._cached_packed()(x)
        if self.rotation is not None:
            x = self.rotation.apply(x)
        if self.act_bits == 4:
            x = fake_quant_a4(x, self.bounded_clip(), self.act_group_size)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.fake_quant_weight().to(x.dtype), bias)

    @torch.no_grad()
    def to_packed(self) -> _PackedLinear:
        """The packed layer that this one stands for."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return PACKED_LINEARS[self.bits].from_linear(
            linear, fitted=self.fitted(), act_bits=self.act_bits, act_clip=float(self.bounded_clip()),
            act_group_size=self.act_group_size, rotation=self.rotation,
        )  # fmt: skip

    @torch.no_grad()
    def fitted(self) -> QuantizedWeight:
        """Codes, scales and levels of the latent weight."""
        scale, levels = self.grid.trained(self.weight, self._values(), self.group_size)
        groups = self.weight.float().unflatten(1, (-1, self.group_size))
        codes = self.grid.nearest(groups, scale, levels).flatten(1)
        return QuantizedWeight(codes, scale, levels, self.group_size, self.grid)

    def _cached_packed(self) -> _PackedLinear:
        key = tuple((p.data_ptr(), p._version) for p in self._parameters.values() if p is not None)
        if self._packed is None or self._packed[0] != key:
            self._packed = key, self.to_packed()
        return self._packed[1]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}, "
            f"group_size={self.group_size}, act_bits={self.act_bits}, act_group_size={self.act_group_size}"
        )


def _inside_cells(weight: Tensor, fitted: QuantizedWeight) -> Tensor:
    """The values nearest to `weight` `[out, in]` whose nearest level is that of the fitted code.

    GPTQ rounds many weights to a level that is not their nearest, to make up for the errors of others;
    a latent weight left at its full-precision value would undo that.
    """
    groups = weight.unflatten(1, (-1, fitted.group_size))
    codes = fitted.codes.unflatten(1, (-1, fitted.group_size)).long() - fitted.grid.least
    levels = fitted.grid.points(fitted.scale, fitted.levels)
    turned = levels[..., :1] > levels[..., -1:]  # a negative scale: the last code is the least
    codes = torch.where(turned, levels.shape[-1] - 1 - codes, codes)
    levels = torch.where(turned, levels.flip(-1), levels)
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    margin = _CELL_MARGIN * levels.diff(dim=-1)
    infinite = torch.full_like(levels[..., :1], float("inf"))
    low = torch.cat([-infinite, middles + margin], -1).gather(-1, codes)
    high = torch.cat([middles - margin, infinite], -1).gather(-1, codes)
    # Levels that coincide have no cell, only themselves.
    latent = torch.where(low > high, levels.gather(-1, codes), groups.clamp(low, high))
    return fitted.grid.reach_ends(latent, levels).flatten(1)


def fake_quant_linear(
    linear: nn.Linear, fit: _PackedLinear, training: Training, grid: Grid
) -> FakeQuantLinear:
    """A linear layer that begins at its packed fit, with weights on `grid`."""
    minmax = training.init == "minmax"
    return FakeQuantLinear(linear.weight, linear.bias, fit, training.grid, minmax, training.keep_codes, grid)


def share_act_clips(layer: nn.Module, family: Architecture) -> None:
    """One clip for the linears that read one input, so that it is quantised once for all of them."""
    for site in family.sites:
        first, *others = (layer.get_submodule(path) for path in site.paths)
        for other in others:
            other.act_clip = first.act_clip


def make_trainable(
    layer: nn.Module, fits: Mapping[str, nn.Module], source: nn.Module, family: Architecture,
    training: Training, grid: Grid,
) -> list[FakeQuantLinear]:  # fmt: skip
    """Put trainable linears into a layer: `fits` are packed ones by path, `source` has the weights.

    Weights are trained on `grid`, see `FakeQuantLinear`.
    """
    made = []
    for path, linear in family.linears(source).items():
        made.append(fake_quant_linear(linear, fits[path], training, grid))
        layer.set_submodule(path, made[-1])
    share_act_clips(layer, family)
    return made


def fake_quant_linears(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """The trained linears of a prepared model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}
