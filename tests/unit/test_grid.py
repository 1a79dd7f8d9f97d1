"""Weight grids: one interface for uniform ones and codebooks, whatever their bits."""

import warnings

import pytest
import torch

import w2a4
from w2a4.errors import CheckpointError, RecipeError
from w2a4.format.fake_quant import codebook_to_ldp, ldp_fake_quant, ldp_levels, ldp_to_codebook, nearest_codes
from w2a4.format.grid import Codebook, Uniform, grid_of, no_levels
from w2a4.format.linear import PACKED_LINEARS
from w2a4.format.rtn import fit_rtn
from w2a4.train.linear import FakeQuantLinear

GRIDS = [Codebook(4), Codebook(8), *(Uniform(bits) for bits in range(2, 9))]


def matrix(out: int = 6, inputs: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, *args) -> float:
    return float((fit_rtn(weight, *args).dequantize() - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_code_decodes_to_its_point_and_back(grid):
    scale, levels = grid.fit(matrix(3, 64).unflatten(1, (2, 32)))
    assert scale.shape == (3, 2) and levels.shape == (3, 2, grid.level_count)
    points = grid.points(scale, levels)
    sign = scale.float().sign()[..., None]
    assert points.shape == (3, 2, 2**grid.bits) and (sign * points.diff(dim=-1) >= 0).all()
    codes = (torch.arange(2**grid.bits) + grid.least).to(torch.int8).expand(3, 2, -1)
    assert torch.equal(grid.decode(codes, scale, levels), points)
    assert torch.equal(grid.decode(grid.nearest(points, scale, levels), scale, levels), points)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_are_their_basis_times_their_numbers(grid):
    """What least squares solves for describes the grid: codes times numbers are the decoded values."""
    scale, levels = grid.fit(matrix(5, 32)[:, None])
    codes = grid.nearest(matrix(5, 32)[:, None], scale, levels)[:, 0]
    numbers = grid.numbers(scale, levels)[:, 0]
    values = torch.einsum("noi,on->oi", grid.basis(codes), numbers)
    assert torch.equal(values, grid.decode(codes[:, None], scale, levels)[:, 0])
    again = grid.from_numbers(grid.numbers(scale, levels))
    assert torch.allclose(grid.points(*again), grid.points(scale, levels), rtol=1e-2, atol=1e-6)


def test_more_bits_are_nearer():
    weight = matrix(64, 256)
    for kind in ("auto", "uniform"):
        errors = [relative_error(weight, grid_of(bits, kind), 128) for bits in range(2, 9)]
        assert all(a > 2 * b for a, b in zip(errors, errors[1:], strict=False)), errors
    for bits in (2, 3):
        learned, steps = (relative_error(weight, grid_of(bits, kind), 128) for kind in ("auto", "uniform"))
        assert learned < steps


def test_the_grid_of_a_recipe():
    assert [grid_of(bits) for bits in (2, 3, 4, 8)] == [Codebook(4), Codebook(8), Uniform(4), Uniform(8)]
    assert grid_of(3, "uniform") == Uniform(3) == w2a4.Recipe(weight_bits=3, weight_grid="uniform").grid
    assert w2a4.Recipe().grid == Codebook(4)
    for make in (lambda: grid_of(1), lambda: Uniform(9), lambda: grid_of(4, "codebook"), lambda: Codebook(5)):
        with pytest.raises(RecipeError):
            make()


@pytest.mark.parametrize("bits", [2, 3])
def test_a_uniform_weight_is_stored_as_a_codebook_of_its_steps(bits):
    fitted = fit_rtn(matrix(), Uniform(bits), 32)
    stored = fitted.on(Codebook(2**bits))
    half = 2 ** (bits - 1)
    steps = torch.arange(-half, half, dtype=torch.int8)
    turned = (fitted.scale < 0)[..., None]
    assert bool(turned.any()) and not bool(turned.all())  # of either sign; a codebook's are positive
    assert torch.equal(stored.levels, torch.where(turned, -steps.flip(0), steps)) and (stored.scale > 0).all()
    assert torch.equal(stored.dequantize(), fitted.dequantize())
    again = stored.on(Uniform(bits))
    assert torch.equal(again.codes, fitted.codes) and torch.equal(again.scale, fitted.scale)
    assert fitted.on(fitted.grid) is fitted
    with pytest.raises(ValueError, match="not the steps of Uniform"):
        fit_rtn(matrix(), Codebook(2**bits), 32).on(Uniform(bits))
    with pytest.raises(ValueError, match="bits differ"):
        fitted.on(Uniform(4))


def test_fits_of_two_and_four_bits_stay_what_they_were():
    """Codes, scales in steps of 2**-24 and levels."""
    weight = ((torch.arange(32) * 37) % 101 - 50).float().view(2, 16) / 16
    two, four = fit_rtn(weight, 2, 8), fit_rtn(weight, 4, 8)
    assert two.codes.tolist() == [
        [0, 1, 3, 0, 2, 3, 1, 2, 3, 1, 2, 0, 1, 3, 0, 2],
        [3, 0, 2, 3, 1, 2, 0, 1, 2, 0, 1, 3, 0, 2, 3, 1],
    ]
    assert two.levels.tolist() == [
        [[-127, -61, 6, 82], [-127, -45, 26, 107]],
        [[-107, -36, 45, 127], [-82, -16, 61, 127]],
    ]
    assert (two.scale.double() * 2**24).tolist() == [[371456, 346880], [346880, 371456]]
    assert four.codes.tolist() == [
        [-8, -2, 4, -7, -1, 6, -5, 1, 7, -3, 3, -8, -2, 4, -6, 0],
        [-6, 4, -2, -7, 3, -3, 7, 1, -5, 5, 0, -6, 4, -2, -8, 2],
    ]
    # Where the largest weight is positive, code -8 serves it: what the four bits have gained since.
    assert (four.scale.double() * 2**24).tolist() == [[6180864, 6336512], [-6688768, -6742016]]
    for fitted in (two, four):
        assert fitted.scale.dtype == torch.float16 and fitted.codes.dtype == torch.int8


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_old_name_of_rounding(bits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # told once a process
        from w2a4.fitting.rtn import fit_rtn as old
    weight = matrix()
    fitted, same = old(weight, bits, 32), fit_rtn(weight, bits, 32)
    assert torch.equal(fitted.dequantize(), same.dequantize())
    assert (fitted.dequantize() - weight).abs().max() < {2: 2.5, 4: 0.5, 8: 0.03}[bits]


# Training


@pytest.mark.parametrize("count", [4, 8])
def test_partition_gradient_is_that_of_the_chosen_levels(count):
    w = matrix(2, 64).double()
    shares = [0.5 * matrix(2, 2, seed=k).double() for k in range(count)]
    shares = [share.requires_grad_() for share in shares]
    groups, upstream = w.unflatten(1, (-1, 32)), matrix(2, 64, seed=9).double()
    levels, scale = ldp_to_codebook(w, shares, 32)
    codes = nearest_codes(groups, levels, scale).long()
    got = torch.autograd.grad((ldp_fake_quant(w, shares, 32) * upstream).sum(), shares)
    exact = ldp_levels(shares, groups.amin(-1), groups.amax(-1)).gather(-1, codes).flatten(1)
    want = torch.autograd.grad((exact * upstream).sum(), shares)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert bool(a.any())


def test_eight_levels_survive_the_round_trip():
    """In groups that reach beyond the Gaussian end levels, as nearly all of 256 weights do."""
    w, grid = matrix(32, 256), Codebook(8)
    scale, levels = grid.fit(w[:, None])
    again = grid.trained(w, codebook_to_ldp(w, levels, scale), 256)
    span = (w.amax(-1) - w.amin(-1))[:, None, None]
    apart = (grid.points(*again) - grid.points(scale, levels)).abs()
    # A level at the group's very end is held 0.001 off it; then int8 rounds.
    assert (apart <= (1e-3 + 1 / 254) * span).all()


@pytest.mark.parametrize("grid", [Codebook(4), Codebook(8), Uniform(2), Uniform(3), Uniform(4)], ids=str)
@pytest.mark.parametrize("form", ["ldp", "uniform", "minmax"])
def test_what_trains_is_what_is_packed(grid, form):
    linear = torch.nn.Linear(64, 6)
    linear.weight.data = matrix()
    start = PACKED_LINEARS[grid.bits].from_linear(linear, fitted=fit_rtn(matrix(), grid, 32))
    fake = FakeQuantLinear(linear.weight, linear.bias, start, form, grid=grid)
    assert fake.grid == grid and {name for name in grid.parameters} <= dict(fake.named_parameters()).keys()
    for name in grid.parameters:
        fake.get_parameter(name).data *= 1.01
    want = fake.fake_quant_weight()
    assert torch.equal(fake.fitted().dequantize(), want) and torch.equal(fake.to_packed().dequantize(), want)
    want.square().sum().backward()
    for name in grid.parameters:
        learned = fake.get_parameter(name)
        assert learned.requires_grad is (name not in grid.fixed(form))
        assert not learned.requires_grad or bool(learned.grad.any())


@pytest.mark.parametrize("count", [4, 8])
def test_equal_steps_are_where_uniform_training_begins(count):
    weight, grid = matrix(), Codebook(count)
    scale, levels = grid.fit(weight.unflatten(1, (-1, 32)))
    points = grid.points(*grid.trained(weight, grid.start(weight, scale, levels, "uniform", False), 32))
    steps = points.diff(dim=-1)
    assert ((steps - steps.mean(-1, keepdim=True)).abs() < 0.01 * points[..., -1:]).all()


def test_no_levels():
    levels = no_levels(torch.ones(3, 2))
    assert levels.shape == (3, 2, 0) and levels.dtype == torch.int8


def test_a_scale_of_either_sign_uses_all_codes():
    weight = matrix(64, 256)
    groups = weight.unflatten(1, (-1, 32))
    grid = Uniform(4)
    scale, levels = grid.fit(groups)
    codes = grid.nearest(groups, scale, levels)
    assert bool((codes.amin(-1) == -8).float().mean() > 0.8)
    # What it gains over scales that are positive: 8 steps on the longer side instead of 7.
    positive = torch.stack([(groups.abs().amax(-1) / 7 * (1 - 0.025 * k)).half() for k in range(21)])
    error = torch.stack([((grid.decode(grid.nearest(groups, s, levels), s, levels) - groups) ** 2).sum(-1)
                         for s in positive]).amin(0).sum()  # fmt: skip
    assert ((grid.decode(codes, scale, levels) - groups) ** 2).sum() < 0.92 * error


@pytest.mark.parametrize("damage", [0.0, float("nan"), float("inf")])
def test_a_scale_of_four_bits_is_finite_and_not_zero(damage):
    layer = w2a4.W4A4Linear.from_linear(torch.nn.Linear(64, 8), group_size=32)
    assert bool((layer.scale < 0).any())
    layer.validate("layer")
    layer.scale.data[3, 1] = damage
    with pytest.raises(CheckpointError, match=r"layer.scale\[\(?3, 1\)?\] is"):
        layer.validate("layer")
    two = w2a4.W2A4Linear.from_linear(torch.nn.Linear(64, 8), group_size=32)
    two.scale.data[3, 1] *= -1
    with pytest.raises(CheckpointError, match="scales are finite and positive"):
        two.validate("layer")
