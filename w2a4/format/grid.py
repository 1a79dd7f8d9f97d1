"""Weight grids: the values that the weights of a group may take, and all that depends on which they are.

A grid is `Uniform(bits)`, the multiples of one float16 scale, or `Codebook(count)`, `count` int8 levels
times one float16 scale. It is stored for each group as `scale` float16 `[..., G]` and `levels` int8
`[..., G, level_count]`; a uniform grid has 0 of these. Fitting, packing and training ask a grid for what
differs between the two, and do not look at bits or levels themselves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import RecipeError
from ..ops.reference import divide
from .fake_quant import (
    codebook_to_ldp,
    fp16_scale,
    ldp_fake_quant,
    ldp_to_codebook,
    lsq_fake_quant,
    nearest_codes,
    round_levels,
)
from .lloyd import GAUSSIAN_LEVELS, fit_levels

#: What a recipe's `weight_grid` may be.
Kind = Literal["auto", "codebook", "uniform"]

#: How a codebook is trained, a recipe's `training.grid`.
Form = Literal["ldp", "uniform", "minmax"]

#: Fractions of max|w| that the clip search of uniform grids tries.
CLIP_RATIOS = tuple(1 - 0.025 * step for step in range(21))

#: The outermost weight of a group lies this much outside its end level, so that its share can be learned.
_END_MARGIN = 0.02


class Grid(ABC):
    """What the grids of all groups of a weight matrix have in common.

    Attributes:
        bits: of a code.
        least: the least code, that of the least value.
        most: the greatest integer that a scale multiplies.
        level_count: int8 levels stored for each group.
        parameters: names of what training learns of each group, float32 `[out, G]` each.
        with_unit: those of them that have the unit of the weights.
    """

    bits: int
    least: int
    most: int
    level_count: int
    parameters: tuple[str, ...]
    with_unit: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """What a packed layer stores of a grid, in the order of the format."""
        return ("levels", "scale") if self.level_count else ("scale",)

    @abstractmethod
    def fit(self, groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The grids of least squared error.

        Args:
            groups: float32 `[..., G, g]`.
            importance: float32, broadcastable to groups, non-negative weights of the squared errors.

        Returns:
            scale float16 `[..., G]` and levels int8 `[..., G, level_count]`.
        """

    @abstractmethod
    def rough(self, groups: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """As `fit` but without a search: for weights whose grids are needed anew at every step.

        Args:
            clip: a uniform grid ends at this fraction of max|w|.
        """

    @abstractmethod
    def nearest(self, values: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
        """Codes int8 `[..., G, n]` of the points nearest to floating values `[..., G, n]`."""

    @abstractmethod
    def integers(self, codes: Tensor, levels: Tensor) -> Tensor:
        """What the scale multiplies, int8 `[..., G, n]`, for codes int8 `[..., G, n]`."""

    def decode(self, codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
        """Float32 values `[..., G, n]` of codes int8 `[..., G, n]`."""
        return self.integers(codes, levels).float() * scale.float()[..., None]

    def points(self, scale: Tensor, levels: Tensor) -> Tensor:
        """All values of each grid in the order of its codes, float32 `[..., G, 2**bits]`."""
        codes = torch.arange(self.least, self.least + 2**self.bits, dtype=torch.int16, device=scale.device)
        return self.decode(codes.to(torch.int8).expand(*scale.shape, -1), scale, levels)

    # GPTQ: a grid as numbers that least squares can solve for.

    @abstractmethod
    def numbers(self, scale: Tensor, levels: Tensor) -> Tensor:
        """What `ops.round_columns` and least squares know a grid by, float32 `[..., G, n]`.

        Its points, or its scale alone if the points are the multiples of that.
        """

    @abstractmethod
    def basis(self, codes: Tensor) -> Tensor:
        """Float32 `[n, *codes.shape]`: how a value depends on each of its grid's n numbers."""

    @abstractmethod
    def from_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Scale float16 `[...]` and levels int8 `[..., level_count]` nearest to numbers `[..., n]`."""

    # Training.

    def fixed(self, form: Form) -> frozenset[str]:
        """The parameters that `form` does not learn."""
        return frozenset()

    @abstractmethod
    def start(
        self, latent: Tensor, scale: Tensor, levels: Tensor, form: Form, minmax: bool
    ) -> tuple[Tensor, ...]:
        """The parameters that training begins with.

        Args:
            latent: float32 `[out, in]`.
            scale, levels: of a fit of this weight.
            form: see `recipe.Training.grid`.
            minmax: begin with the plain range of the weights instead of the fit.
        """

    @abstractmethod
    def fake_quant(self, weight: Tensor, values: Sequence[Tensor], group_size: int) -> Tensor:
        """Latent weights `[out, in]` as their packed form gives them back, differentiable.

        Args:
            weight: floating `[out, in]`.
            values: the parameters, float32 `[out, G]` each.
        """

    @abstractmethod
    def trained(self, weight: Tensor, values: Sequence[Tensor], group_size: int) -> tuple[Tensor, Tensor]:
        """Scale and levels that the parameters stand for; `fake_quant` is the nearest of their points."""

    def reach_ends(self, latent: Tensor, points: Tensor) -> Tensor:
        """Weights `[out, G, g]`, moved in place as far as training needs to represent the end points."""
        return latent


@dataclass(frozen=True)
class Uniform(Grid):
    """Codes -2**(bits - 1) .. 2**(bits - 1) - 1 times a scale; 2 to 8 bits.

    The scale of a group that was fitted has the sign with which the least code, which has no counterpart,
    serves the largest weight: all codes are then in use.

    >>> Uniform(3).points(torch.ones(1).half(), no_levels(torch.ones(1)))
    tensor([[-4., -3., -2., -1.,  0.,  1.,  2.,  3.]])
    """

    bits: int
    level_count = 0
    parameters = with_unit = ("step",)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"a uniform grid of {self.bits} bits: give 2 to 8")

    @property
    def least(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def most(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def _round(self, steps: Tensor) -> Tensor:
        return steps.round().clamp(self.least, self.most)

    def fit(self, groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        one = torch.ones(1, dtype=torch.float32, device=groups.device)
        importance = one if importance is None else importance
        low, high = groups.amin(-1), groups.amax(-1)
        widest = divide(torch.where(high > -low, -high, -low), self.most)
        best = fp16_scale(widest)
        least = torch.full_like(widest, float("inf"))
        for ratio in CLIP_RATIOS:
            scale = fp16_scale(widest * ratio)
            step = scale.float()[..., None]
            error = (importance * (self._round(groups / step) * step - groups).square()).sum(-1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return best, no_levels(best)

    def rough(self, groups: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        scale = fp16_scale(divide(clip * groups.abs().amax(-1), self.most))
        return scale, no_levels(scale)

    def nearest(self, values: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
        return self._round(values / scale.to(values.dtype)[..., None]).to(torch.int8)

    def integers(self, codes: Tensor, levels: Tensor) -> Tensor:
        return codes

    def numbers(self, scale: Tensor, levels: Tensor) -> Tensor:
        return scale.float()[..., None]

    def basis(self, codes: Tensor) -> Tensor:
        return codes.float()[None]

    def from_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        scale = fp16_scale(numbers[..., 0])
        return scale, no_levels(scale)

    def start(
        self, latent: Tensor, scale: Tensor, levels: Tensor, form: Form, minmax: bool
    ) -> tuple[Tensor, ...]:
        if minmax:
            groups = latent.unflatten(1, (scale.shape[1], -1))
            return (divide(groups.abs().amax(-1), self.most),)
        return (scale.float(),)

    def fake_quant(self, weight: Tensor, values: Sequence[Tensor], group_size: int) -> Tensor:
        return lsq_fake_quant(weight, *values, group_size, self.bits)

    def trained(self, weight: Tensor, values: Sequence[Tensor], group_size: int) -> tuple[Tensor, Tensor]:
        scale = fp16_scale(*values)
        return scale, no_levels(scale)


@dataclass(frozen=True)
class Codebook(Grid):
    """`count` int8 levels, ascending, times a scale: 4 (2 bits a weight) or 8 (3 bits)."""

    count: int
    least = 0
    most = 127

    def __post_init__(self) -> None:
        if self.count not in GAUSSIAN_LEVELS:
            raise RecipeError(f"a codebook of {self.count} levels: give one of {sorted(GAUSSIAN_LEVELS)}")

    @property
    def bits(self) -> int:
        return self.count.bit_length() - 1

    @property
    def level_count(self) -> int:
        return self.count

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("beta", "gamma", *self._shares)

    @property
    def _shares(self) -> tuple[str, ...]:
        """Shares of the span that place the levels between the ends."""
        return tuple(f"s{k}" for k in range(1, self.count - 1))

    def fit(self, groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        levels, scale = fit_levels(groups, importance, count=self.count)
        return scale, levels

    def rough(self, groups: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        levels, scale = fit_levels(groups, iterations=0, count=self.count)
        return scale, levels

    def nearest(self, values: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
        return nearest_codes(values, levels, scale)

    def integers(self, codes: Tensor, levels: Tensor) -> Tensor:
        return levels.gather(-1, codes.long())

    def numbers(self, scale: Tensor, levels: Tensor) -> Tensor:
        return levels.float() * scale.float()[..., None]

    def basis(self, codes: Tensor) -> Tensor:
        return torch.stack([(codes == k).float() for k in range(self.count)])

    def from_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        levels, scale = round_levels(numbers.sort(-1).values)
        return scale, levels

    def fixed(self, form: Form) -> frozenset[str]:
        learned = {"ldp": self.parameters, "uniform": ("beta", "gamma"), "minmax": ()}[form]
        return frozenset(self.parameters) - set(learned)

    def start(
        self, latent: Tensor, scale: Tensor, levels: Tensor, form: Form, minmax: bool
    ) -> tuple[Tensor, ...]:
        if minmax or form != "ldp":
            groups = latent.unflatten(1, (scale.shape[1], -1))
            ends = torch.stack([groups.amin(-1), groups.amax(-1)], -1)
            if not minmax:
                ends = levels[..., [0, -1]].float() * scale.float()[..., None]
            steps = torch.arange(self.count, dtype=torch.float32, device=latent.device) / (self.count - 1)
            levels, scale = round_levels((ends[..., :1] + steps * ends.diff(dim=-1)).sort(-1).values)
        beta, gamma, *shares = codebook_to_ldp(latent, levels, scale)
        if form != "ldp":  # equal steps: each share is one step of those that are left
            left = range(self.count - 1, 1, -1)
            shares = [torch.full_like(s, math.log(1 / (n - 1))) for n, s in zip(left, shares, strict=True)]
        return beta, gamma, *shares

    def fake_quant(self, weight: Tensor, values: Sequence[Tensor], group_size: int) -> Tensor:
        return ldp_fake_quant(weight, values, group_size)

    def trained(self, weight: Tensor, values: Sequence[Tensor], group_size: int) -> tuple[Tensor, Tensor]:
        levels, scale = ldp_to_codebook(weight, values, group_size)
        return scale, levels

    def reach_ends(self, latent: Tensor, points: Tensor) -> Tensor:
        # LDP's end levels are shares of the least and the greatest weight.
        _reach(latent, points[..., 0], torch.argmin)
        _reach(latent, points[..., -1], torch.argmax)
        return latent


def _reach(latent: Tensor, end: Tensor, outermost: Callable[..., Tensor]) -> None:
    """Let the outermost weights of groups `[out, G, g]` pass their end levels `[out, G]`, in place."""
    index = outermost(latent, -1, keepdim=True)
    weight, wanted = latent.gather(-1, index), (1 + _END_MARGIN) * end[..., None]
    short = (weight * wanted > 0) & (weight.abs() < wanted.abs())
    latent.scatter_(-1, index, torch.where(short, wanted, weight))


def no_levels(scale: Tensor) -> Tensor:
    """The levels of uniform grids with scales `[..., G]`: int8 `[..., G, 0]`."""
    return torch.empty(*scale.shape, 0, dtype=torch.int8, device=scale.device)


def grid_of(bits: int, kind: Kind = "auto") -> Grid:
    """The grid of a recipe's `weight_bits` and `weight_grid`.

    Args:
        bits: 2 to 8.
        kind: `codebook` (2 and 3 bits only), `uniform`, or `auto`: a codebook where there is one.

    Raises:
        RecipeError: there is no such grid.

    >>> grid_of(2), grid_of(3, "uniform"), grid_of(4)
    (Codebook(count=4), Uniform(bits=3), Uniform(bits=4))
    """
    has_codebook = 2**bits in GAUSSIAN_LEVELS
    if kind == "codebook" and not has_codebook:
        raise RecipeError(
            f"weight_grid='codebook' with weight_bits={bits}: a codebook has 2 or 3 bits; "
            "give 'uniform' or 'auto'"
        )
    return Codebook(2**bits) if has_codebook and kind != "uniform" else Uniform(bits)
