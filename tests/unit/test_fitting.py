"""Fitting: Lloyd-Max against its known optimum, GPTQ against rounding, order and refits."""

import dataclasses

import pytest
import torch

from w2a4.errors import RecipeError
from w2a4.format.fake_quant import nearest_codes
from w2a4.format.grid import Codebook, Uniform
from w2a4.format.groups import resolve_group_size
from w2a4.format.lloyd import fit_levels
from w2a4.format.rtn import fit_rtn
from w2a4.format.weight import QuantizedWeight
from w2a4.quantization.fit.gptq import GPTQOptions, _Grids, _polish, _refit_grid, _sweep, fit_gptq
from w2a4.quantization.fit.moments import Moments

GRIDS = [Codebook(4), Codebook(8), Uniform(2), Uniform(3), Uniform(4)]


def correlated_inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator)
    return torch.randn(tokens, width, generator=generator) @ mix.T / width**0.5


def output_error(weight: torch.Tensor, fitted: QuantizedWeight, hessian: torch.Tensor) -> float:
    difference = weight - fitted.dequantize()
    return float(((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum())


def test_lloyd_finds_the_gaussian_optimum():
    x = torch.erfinv(torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1]).float() * 2**0.5
    levels, scale = fit_levels(x[None], iterations=60)
    values = (levels.float() * scale.float()[..., None])[0]
    # int8 levels: half a step of 1.51 / 127.
    torch.testing.assert_close(values, torch.tensor([-1.510, -0.453, 0.453, 1.510]), atol=7e-3, rtol=0)
    middles = (values[1:] + values[:-1]) / 2
    torch.testing.assert_close(middles, torch.tensor([-0.982, 0.0, 0.982]), atol=7e-3, rtol=0)


def test_lloyd_levels_are_ascending_int8_and_constant_groups_are_exact():
    groups = torch.stack([torch.full((32,), 0.25), torch.zeros(32), torch.linspace(-3, 1, 32)])
    levels, scale = fit_levels(groups)
    assert levels.dtype == torch.int8 and scale.dtype == torch.float16
    assert (levels.diff(dim=-1) >= 0).all() and (scale > 0).all()
    values = levels.float() * scale.float()[:, None]
    codes = nearest_codes(groups, levels, scale)
    restored = values.gather(1, codes.long())
    assert (restored[1] == 0).all()
    torch.testing.assert_close(restored[0], groups[0], rtol=2**-10, atol=0)


def test_importance_moves_levels_to_what_matters():
    x = torch.cat([torch.linspace(-1, 1, 64), torch.full((4,), 5.0)])[None]
    light = torch.ones(68)
    heavy = torch.cat([torch.ones(64), torch.full((4,), 1e4)])
    error = []
    for importance in (light, heavy):
        levels, scale = fit_levels(x, importance)
        values = levels.float() * scale.float()[:, None]
        restored = values.gather(1, nearest_codes(x, levels, scale).long())
        error.append(float((restored - x)[0, 64:].abs().max()))
    assert error[1] <= error[0] and error[1] < 0.05


def test_lloyd_finds_the_gaussian_optimum_of_eight_levels():
    x = torch.erfinv(torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1]).float() * 2**0.5
    levels, scale = fit_levels(x[None], iterations=200, count=8)
    values = (levels.float() * scale.float()[..., None])[0]
    half = torch.tensor([0.2451, 0.7560, 1.3439, 2.1520])
    # int8 levels: half a step of 2.152 / 127.
    torch.testing.assert_close(values, torch.cat([-half.flip(0), half]), atol=9e-3, rtol=0)


@pytest.mark.parametrize("grid", [*GRIDS, Uniform(8)], ids=str)
@pytest.mark.parametrize("group_size", [32, -1])
def test_rtn_codes_are_the_nearest_grid_points(grid, group_size):
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    fitted = fit_rtn(weight, grid, group_size)
    size = resolve_group_size(96, group_size)
    half = 2 ** (grid.bits - 1)
    integers = fitted.levels if isinstance(grid, Codebook) else torch.arange(-half, half)
    points = integers.float() * fitted.scale.float()[..., None]
    distance = (weight.unflatten(1, (-1, size))[..., None] - points[:, :, None, :]).abs()
    chosen = (fitted.dequantize() - weight).abs().unflatten(1, (-1, size))
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=1e-6, atol=1e-7)


def test_w4_clip_search_beats_no_clip():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    searched = fit_rtn(weight, 4, 128).dequantize()
    scale = (weight.abs().amax(1, keepdim=True) / 7).half().float()
    plain = (weight / scale).round().clamp(-8, 7) * scale
    assert (searched - weight).square().sum() < 0.97 * (plain - weight).square().sum()


@pytest.mark.parametrize("bits", GRIDS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_beats_rounding_and_refinement_beats_gptq(bits, act_order, group_size):
    x = correlated_inputs(2048, 96)
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(3))
    hessian = x.T @ x
    rounded = output_error(weight, fit_rtn(weight, bits, group_size), hessian)
    plain, _ = fit_gptq(weight, hessian, bits, group_size, GPTQOptions(act_order=act_order, refine=0))
    refined, reported = fit_gptq(weight, hessian, bits, group_size, GPTQOptions(act_order=act_order))
    assert output_error(weight, plain, hessian) < 0.8 * rounded
    assert output_error(weight, refined, hessian) < 0.97 * output_error(weight, plain, hessian)
    assert reported == pytest.approx(output_error(weight, refined, hessian), rel=0.1)


@pytest.mark.parametrize("bits", GRIDS, ids=str)
def test_gptq_without_correlation_is_rounding(bits):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    fitted, _ = fit_gptq(weight, torch.eye(64) * 7, bits, 32, GPTQOptions(refine=0))
    assert torch.equal(fitted.codes, fit_rtn(weight, bits, 32).codes)


def test_act_order_returns_codes_in_the_order_of_the_weight():
    """Undoing the order wrongly would leave codes of other columns: the fit would be far off."""
    x = correlated_inputs(4096, 64) * torch.logspace(0, 2, 64)[torch.randperm(64)]
    weight = torch.randn(16, 64)
    fitted, _ = fit_gptq(weight, x.T @ x, 4, 32, GPTQOptions(act_order=True, refine=0))
    assert output_error(weight, fitted, x.T @ x) < 0.02


def test_sweep_does_not_depend_on_the_block_size():
    x = correlated_inputs(1024, 64).double()
    hessian = (x.T @ x + torch.eye(64)).float()
    weight = torch.randn(8, 64)
    grids = _Grids(Codebook(4), *Codebook(4).fit(weight.unflatten(1, (-1, 32))), 32)
    codes = [_sweep(weight, hessian, grids, None, block) for block in (1, 7, 64)]
    # Blocks only reorder additions: a code may differ where a value lies on a threshold.
    assert all((c != codes[0]).float().mean() < 0.02 for c in codes)


@pytest.mark.parametrize("bits", GRIDS, ids=str)
@pytest.mark.parametrize("group_size", [32, 96])
def test_polishing_never_raises_the_error(bits, group_size):
    x = correlated_inputs(1024, 96)
    hessian = x.T @ x + torch.eye(96) * 0.1
    weight = torch.randn(16, 96)
    fitted = fit_rtn(weight, bits, group_size)
    grid, codes = _Grids(bits, fitted.scale, fitted.levels, group_size), fitted.codes.T.contiguous()
    errors = [output_error(weight, fitted, hessian)]
    for _ in range(4):
        _polish(weight, hessian, codes, grid, block=20)
        errors.append(output_error(weight, grid.weight(codes), hessian))
    assert (
        all(b <= a * (1 + 1e-5) for a, b in zip(errors, errors[1:], strict=False))
        and errors[-1] < 0.8 * errors[0]
    )


@pytest.mark.parametrize("bits", GRIDS, ids=str)
def test_refit_solves_the_least_squares_problem(bits):
    """A weight that a grid of other numbers represents exactly: the refit finds that grid."""
    x = correlated_inputs(1024, 32)
    hessian = x.T @ x + torch.eye(32) * 0.1
    start = fit_rtn(torch.randn(4, 32), bits, 32)
    true = dataclasses.replace(start, scale=(start.scale * 1.25).half()).dequantize()
    grid, codes = _Grids(bits, start.scale, start.levels, 32), start.codes.T.contiguous()
    current = start.dequantize().T.contiguous()
    _refit_grid(hessian, hessian @ (true.T - current), current, codes, grid, 0)
    torch.testing.assert_close(
        grid.weight(codes).dequantize(), true, rtol=0.01, atol=0.01 * float(true.abs().max())
    )


def test_cross_moments_aim_at_the_full_precision_output():
    x = correlated_inputs(4096, 64)
    seen = x + 0.3 * correlated_inputs(4096, 64, seed=1)
    weight = torch.randn(32, 64)
    moments = Moments(64, with_cross=True)
    for a, b in zip(seen.split(1000), x.split(1000), strict=True):
        moments.add(a, b)
    torch.testing.assert_close(moments.hessian, seen.T @ seen, rtol=1e-4, atol=1e-2)
    plain, _ = fit_gptq(weight, moments.hessian, 4, 32)
    aimed, _ = fit_gptq(weight, moments.hessian, 4, 32, cross=moments.cross)
    error = [(seen @ w.dequantize().T - x @ weight.T).square().sum() for w in (plain, aimed)]
    assert error[1] < 0.9 * error[0]


def test_dead_inputs_and_bad_hessians():
    x = correlated_inputs(512, 64)
    x[:, 10] = 0
    fitted, error = fit_gptq(torch.randn(8, 64), x.T @ x, 2, 32)
    assert torch.isfinite(fitted.dequantize()).all() and 0 < error < 1
    with pytest.raises(ValueError, match="NaN or Inf"):
        fit_gptq(torch.randn(8, 64), torch.full((64, 64), float("nan")), 2, 32)


def test_group_size_that_does_not_divide_names_what_does():
    with pytest.raises(RecipeError, match=r"group_size=128 does not divide in_features=576.*64"):
        fit_rtn(torch.randn(4, 576), 2, 128)
    assert resolve_group_size(576, "auto") == 64 and resolve_group_size(1536, "auto") == 128
    assert resolve_group_size(90, "auto") == 90
