"""GPTQ for uniform and codebook grids, with level refits and coordinate descent after it.

The problem of one matrix, given calibration inputs: find codes (and levels) so that the layer's
output changes least,

    minimise  tr( (W* - W_hat) H (W* - W_hat)^T ),    H = sum over tokens of x_q^T x_q,

x_q the inputs the quantised model will really see (rotated, 4-bit, behind a quantised prefix). W* is
the weight itself, or (`target`) the least-squares weight that maps x_q to the full-precision
layer's output on full-precision inputs x: W* = W C H^-1, C = sum of x^T x_q. Column by column, each
rounding error is pushed into the columns not yet rounded (Frantar et al., arXiv 2210.17323); the
codes are then polished by exact coordinate descent, and levels and scales by least squares.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ...errors import W2A4Error
from ...format.grid import Grid, grid_of
from ...format.groups import resolve_group_size
from ...format.weight import QuantizedWeight

#: The least that is added to the diagonal of a Hessian whose mean is near 1, which is of float32.
LEAST_RIDGE = 1e-8


@dataclass(frozen=True)
class GPTQOptions:
    """See the fields of the same meaning in `recipe.Recipe` (`gptq_*`)."""

    damp: float = 0.01
    block: int = 128
    act_order: bool = True
    refine: int = 3


def fit_gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int | Grid,
    group_size: int | str,
    options: GPTQOptions | None = None,
    cross: Tensor | None = None,
) -> tuple[QuantizedWeight, float]:
    """Quantise a weight matrix against the second moments of its inputs.

    Args:
        weight: floating `[out, in]`.
        hessian: float32 `[in, in]`, sum of `x_q^T x_q`.
        bits: 2 to 8, for `grid_of(bits)`, or a grid.
        group_size: divides `in`; -1 or `auto` as in `groups.resolve_group_size`.
        cross: float32 `[in, in]`, sum of `x^T x_q`, to aim at the full-precision output; or None.

    Returns:
        the weight, and its relative output error `tr(E H E^T) / tr(W* H W*^T)`.

    Raises:
        W2A4Error: the Hessian is not finite.
    """
    options = options or GPTQOptions()
    group_size = resolve_group_size(weight.shape[1], group_size)
    weight = weight.float()
    hessian, target = _condition(weight, hessian, cross, options.damp)
    kind = bits if isinstance(bits, Grid) else grid_of(bits)
    groups = target.unflatten(1, (-1, group_size))
    importance = hessian.diagonal().unflatten(0, groups.shape[1:])
    grid = _Grids(kind, *kind.fit(groups, importance), group_size)
    order = torch.argsort(hessian.diagonal(), descending=True) if options.act_order else None
    codes = _sweep(target, hessian, grid, order, options.block)
    for _ in range(options.refine):
        _polish(target, hessian, codes, grid)
    fitted = grid.weight(codes)
    difference = target - fitted.dequantize()
    energy = ((target @ hessian) * target).sum().clamp_min(1e-30)
    return fitted, float(((difference @ hessian) * difference).sum() / energy)


def _condition(weight: Tensor, hessian: Tensor, cross: Tensor | None, damp: float) -> tuple[Tensor, Tensor]:
    """Damped Hessian, to a scale near 1 so that inputs of any size are alike, and the weight to aim at."""
    mean = hessian.diagonal().mean()
    if not bool(torch.isfinite(hessian).all() & mean.isfinite()):
        raise W2A4Error(
            "the calibration inputs hold NaN or Inf, or overflow when squared; check the model's weights and "
            "the calibration text, and load a float16 model in float32 or bfloat16"
        )
    if mean > 0:
        scale = 2.0 ** -int(torch.frexp(mean.cpu()).exponent)  # rounds nothing
        hessian, cross = hessian * scale, None if cross is None else cross * scale
    damped, factor = _damped(hessian, damp)
    if cross is None:
        return damped, weight
    # The same ridge on both sides shrinks the correction, not the weight.
    correction = torch.cholesky_solve((weight.double() @ (cross - hessian).double()).T, factor).T
    return damped, weight + correction.float()


def _damped(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """The Hessian and a ridge, and its Cholesky factor, float64; as much more of a ridge as that needs."""
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    asked = ridge = (damp * hessian.diagonal().mean()).clamp_min(LEAST_RIDGE)
    while True:
        damped = hessian + eye * ridge
        factor, failed = torch.linalg.cholesky_ex(damped.double())
        # A pivot is at least the least eigenvalue, which is the ridge if the Hessian has none below 0.
        if not int(failed) and float(factor.diagonal().square().min() / ridge) > 0.5:
            break
        ridge = 10 * ridge
    if ridge > asked:
        warnings.warn(
            f"gptq_damp={damp:g} is too little for these calibration inputs, some of which depend on others; "
            f"{float(ridge / asked):g} times as much was taken: give more calibration text, or a larger one",
            stacklevel=4,
        )
    return damped, factor


class _Grids:
    """The grids of all groups and rows, a group's together.

    Attributes:
        kind: what they are.
        scale: float32 `[groups, out]`, each a float16 number.
        levels: int8 `[groups, out, kind.level_count]`.
    """

    def __init__(self, kind: Grid, scale: Tensor, levels: Tensor, group_size: int):
        self.kind, self.group_size = kind, group_size
        self.scale = scale.float().T.contiguous()
        self.levels = levels.transpose(0, 1).contiguous()

    def numbers(self, group: int | slice) -> Tensor:
        """`Grid.numbers` of a group, float32 `[n, out]`, or of several."""
        return self.kind.numbers(self.scale[group], self.levels[group]).mT.contiguous()

    def values(self, codes: Tensor, group: int) -> Tensor:
        """Float32 values of codes `[n, out]`."""
        return self.kind.decode(codes.T, self.scale[group], self.levels[group]).T.contiguous()

    def keep(self, group: int, rows: Tensor, scale: Tensor, levels: Tensor) -> None:
        """Replace a group's scale `[out]` and levels `[out, level_count]` where `rows` `[out]` is True."""
        self.scale[group] = torch.where(rows, scale.float(), self.scale[group])
        self.levels[group] = torch.where(rows[:, None], levels, self.levels[group])

    def weight(self, codes: Tensor) -> QuantizedWeight:
        """The weight of codes `[in, out]`."""
        scale, levels = self.scale.T.contiguous().half(), self.levels.transpose(0, 1).contiguous()
        return QuantizedWeight(codes.T.contiguous(), scale, levels, self.group_size, self.kind)


def _sweep(target: Tensor, hessian: Tensor, grid: _Grids, order: Tensor | None, block: int) -> Tensor:
    """One GPTQ pass; codes int8 `[in, out]`. Grids are fixed, so any column order is allowed."""
    columns = target.shape[1]
    order = torch.arange(columns, device=target.device) if order is None else order
    work = target.T[order].contiguous()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order].double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    codes = torch.empty(work.shape, dtype=torch.int8, device=target.device)
    numbers, pivots = grid.numbers(slice(None)), upper.diagonal()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        here, places = slice(start, stop), order[start:stop]
        # What is left of a column after rounding, times its row of the factor, goes into the later ones.
        coupling = -upper[here, here] / pivots[here, None]
        codes[places], change = _round_columns(
            work[here], coupling, None, numbers, places // grid.group_size, bits=grid.kind.bits
        )
        work[stop:].addmm_(upper[here, stop:].T, change / pivots[here, None])
    return codes


def _round_columns(*arguments: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """`ops.round_columns` on the CPU: one column after another is no work for a GPU, and a block is small."""
    device = arguments[0].device
    codes, changes = ops.round_columns(*(None if each is None else each.cpu() for each in arguments), bits)
    return codes.to(device), changes.to(device)


def _polish(target: Tensor, hessian: Tensor, codes: Tensor, grid: _Grids, block: int = 64) -> None:
    """One round over the groups, in place: refit the group's grid, then descend over its codes.

    Both steps are exact minimisations with everything else fixed, so the objective never rises.
    """
    size = grid.group_size
    current = grid.weight(codes).dequantize().T.contiguous()
    gradient = hessian @ (target.T - current)
    for group in range(grid.scale.shape[0]):
        columns = slice(group * size, (group + 1) * size)
        _refit_grid(
            hessian[columns, columns], gradient[columns], current[columns], codes[columns], grid, group
        )
        change = grid.values(codes[columns], group) - current[columns]
        gradient[columns.start :].addmm_(hessian[columns.start :, columns], change, alpha=-1)
        current[columns] += change
        for start in range(columns.start, columns.stop, block):
            stop = min(start + block, columns.stop)
            moves = _descend(hessian, gradient, current, codes, grid, group, start, stop)
            gradient[stop:].addmm_(hessian[stop:, start:stop], moves, alpha=-1)


def _descend(
    hessian: Tensor,
    gradient: Tensor,
    current: Tensor,
    codes: Tensor,
    grid: _Grids,
    group: int,
    start: int,
    stop: int,
) -> Tensor:
    """Coordinate descent over the codes of columns start..stop-1; returns how far the values moved."""
    here = slice(start, stop)
    block = hessian[here, here]
    pivots = block.diagonal()[:, None]
    # The best value of a column, all others fixed; a move of one shifts it for the later ones.
    codes[here], moves = _round_columns(
        current[here] + gradient[here] / pivots, (block / pivots).T, current[here].contiguous(),
        grid.numbers(group)[None], torch.zeros(stop - start, dtype=torch.long, device=codes.device),
        bits=grid.kind.bits,
    )  # fmt: skip
    current[here] += moves
    return moves


def _refit_grid(
    hessian: Tensor, gradient: Tensor, current: Tensor, codes: Tensor, grid: _Grids, group: int
) -> None:
    """Least-squares levels (or scale) of one group for its codes; kept by the rows they serve better.

    With B the matrix `[group_size, n]` that maps a row's n numbers (its levels, or one scale) to its
    values, they solve (B^T H B) numbers = B^T (H current + gradient).
    """
    basis, old = grid.kind.basis(codes), grid.numbers(group)
    projected = (hessian @ basis.permute(1, 0, 2).flatten(1)).view(len(codes), len(basis), -1)
    normal = torch.stack([(b[:, None] * projected).sum(0) for b in basis])  # [n, n, out]
    right = (basis * (hessian @ current + gradient)).sum(1)
    # A weak pull to the old number settles those that no weight uses.
    diagonal = normal.diagonal().T  # [n, out]
    pull = 1e-4 * diagonal.mean(0).clamp_min(1e-12)
    diagonal += pull
    solved = _solve(normal, right + pull * old)
    scale, levels = grid.kind.from_numbers(solved.T)
    change = grid.kind.decode(codes.T, scale, levels).T.contiguous() - current
    better = (change * (hessian @ change - 2 * gradient)).sum(0) < 0
    grid.keep(group, better, scale, levels)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """x `[n, batch]` of `matrix @ x = right` for many small positive definite matrices.

    Elimination over the whole batch: LAPACK takes them one by one.

    Args:
        matrix: `[n, n, batch]`.
        right: `[n, batch]`.
    """
    rows = torch.cat([matrix, right[:, None]], 1)  # [n, n + 1, batch]
    for i in range(len(rows)):
        rows[i] /= rows[i, i].clone()
        for j in range(len(rows)):
            if j != i:
                rows[j] -= rows[j, i].clone() * rows[i]
    return rows[:, -1]
