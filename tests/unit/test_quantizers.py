"""Fake quantisers: forward equal to the packed form to the bit, gradients as promised."""

import pytest
import torch
from torch import Tensor

from w2a4.format.fake_quant import (
    codebook_to_ldp,
    fake_quant_a4,
    fake_quant_kv4,
    ldp_fake_quant,
    ldp_levels,
    ldp_to_codebook,
    nearest_codes,
    straight_through,
)
from w2a4.format.lloyd import fit_levels
from w2a4.ops import reference
from w2a4.ops.packing import pack, unpack


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hard_inputs(*shape: int) -> Tensor:
    """Rows of every kind: normal, outliers, zeros, constant, one sign, tiny, huge, exact ties."""
    x = randn(*shape)
    rows = x.flatten(0, -2)
    rows[0] = 0
    rows[1] = 3.25
    rows[2] = rows[2].abs() + 5
    rows[3] = -rows[3].abs() - 0.125
    rows[4] *= 1e-9
    rows[5] *= 1e3
    rows[6, 0] = 1000
    rows[7] = (torch.arange(shape[-1]) % 16 - 8) / 2
    rows[8] = -0.0
    return x


def test_straight_through_is_exact():
    soft = torch.cat([randn(20000), 8 * randn(20000, seed=1), torch.arange(-8, 8, 0.25), 1e-6 * randn(999)])
    for hard in (soft.round(), soft.half().float(), (soft / 0.013).round() * 0.013):
        assert torch.equal(straight_through(soft, hard), hard)


class TestA4:
    @pytest.mark.parametrize("group_size", [-1, 12, 3])
    @pytest.mark.parametrize("clip", [0.9, 1.0, 0.37])
    def test_forward_is_the_packed_form(self, clip, group_size):
        x, clip = hard_inputs(3, 5, 36), torch.tensor([clip])
        expected = reference.dequantize_a4(*reference.quantize_a4(x, clip, group_size), 36)
        assert torch.equal(fake_quant_a4(x, clip, group_size), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes_are_rounded_once(self, dtype):
        x, clip = randn(9, 36).to(dtype), torch.tensor([0.9])
        expected = reference.dequantize_a4(*reference.quantize_a4(x, clip), 36)
        out = fake_quant_a4(x, clip)
        assert out.dtype == dtype and torch.equal(out, expected.to(dtype))

    def test_empty_and_single_token(self):
        clip = torch.tensor([0.9])
        assert fake_quant_a4(torch.zeros(0, 8), clip).shape == (0, 8)
        assert fake_quant_a4(torch.ones(8), clip).shape == (8,)

    def test_nan_is_not_hidden(self):
        x = randn(2, 8)
        x[0, 3] = float("nan")
        out = fake_quant_a4(x, torch.tensor([0.9]))
        assert out[0].isnan().all() and out[1].isfinite().all()

    def test_gradient_to_x(self):
        """The identity inside the clip range; the largest entry also moves the scale of all."""
        x, clip = randn(4, 32).requires_grad_(), torch.tensor([0.5])
        upstream = randn(4, 32, seed=1)
        fake_quant_a4(x, clip).backward(upstream)
        values = x.detach().double()
        top, where = values.abs().max(-1, keepdim=True)
        scaled = values / (0.5 * top / 7)
        inside = (scaled >= -8) & (scaled <= 7)
        assert 0 < inside.sum() < inside.numel()
        slope = torch.where(inside, scaled.round() - scaled, scaled.clamp(-8, 7))
        by_scale = (upstream * slope).sum(-1, keepdim=True) * 0.5 / 7 * values.gather(-1, where).sign()
        expected = (upstream * inside).double().scatter_add(-1, where, by_scale)
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("group_size", [-1, 8])
    def test_gradient_to_clip(self, group_size):
        """LSQ: d(scale * code)/d scale is code - x / scale inside, the end code outside."""
        x, clip = randn(5, 32), torch.tensor([0.6], requires_grad=True)
        upstream = randn(5, 32, seed=1)
        fake_quant_a4(x, clip, group_size).backward(upstream)
        groups = x.double().unflatten(-1, (-1, 32 if group_size == -1 else group_size))
        top = groups.abs().amax(-1, keepdim=True) / 7
        v = groups / (0.6 * top)
        slope = torch.where((v >= -8) & (v <= 7), v.round() - v, v.clamp(-8, 7)) * top
        expected = (slope.flatten(-2) * upstream).sum()
        torch.testing.assert_close(clip.grad.double().squeeze(), expected, rtol=1e-5, atol=1e-5)

    def test_gradient_to_clip_against_numeric_differences(self):
        """Where every value is clipped there is no rounding, so plain differences are the gradient."""
        x = torch.tensor([[5.0, -5.0, 4.9, -4.8]])
        clip = torch.tensor([0.2], requires_grad=True)
        fake_quant_a4(x, clip).sum().backward()
        step = 1e-3
        up, down = (fake_quant_a4(x, torch.tensor([0.2 + d])).sum() for d in (step, -step))
        torch.testing.assert_close(clip.grad[0], (up - down) / (2 * step), rtol=1e-3, atol=1e-4)

    def test_zero_rows_have_finite_gradients(self):
        x, clip = torch.zeros(2, 8, requires_grad=True), torch.tensor([0.9], requires_grad=True)
        fake_quant_a4(x, clip).sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(clip.grad, torch.zeros(1))


class TestKV4:
    @pytest.mark.parametrize("clip", [0.95, 1.0, 0.4])
    def test_forward_is_the_packed_form(self, clip):
        x = hard_inputs(2, 3, 5, 12)
        expected = reference.dequantize_kv4(*reference.quantize_kv4(x, clip))
        assert torch.equal(fake_quant_kv4(x, clip), expected)
        assert torch.equal(fake_quant_kv4(x, torch.tensor([clip])), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes_are_rounded_once(self, dtype):
        x = randn(1, 2, 5, 12).to(dtype)
        expected = reference.dequantize_kv4(*reference.quantize_kv4(x, 0.95)).to(dtype)
        out = fake_quant_kv4(x, 0.95)
        assert out.dtype == dtype and torch.equal(out, expected)

    def test_constant_and_same_sign_groups(self):
        x = torch.full((1, 1, 1, 8), 3.25)
        assert torch.equal(fake_quant_kv4(x, 0.95), x)
        x = 100 + randn(1, 1, 4, 64)
        assert (fake_quant_kv4(x, 1.0) - x).abs().max() <= 0.51 * (x.amax(-1) - x.amin(-1)).max() / 15 + 0.04

    def test_empty(self):
        assert fake_quant_kv4(torch.zeros(1, 2, 0, 8), 0.95).shape == (1, 2, 0, 8)

    def test_gradient_to_x(self):
        """The identity inside the clip range; least and greatest entry also move scale and zero."""
        x = randn(1, 2, 6, 32).requires_grad_()
        upstream = randn(1, 2, 6, 32, seed=1)
        fake_quant_kv4(x, 0.6).backward(upstream)
        values = x.detach().double()
        _, params = reference.quantize_kv4(x.detach(), 0.6)
        scale, zero = params.double().split(1, -1)
        v = (values - zero) / scale
        inside = (v >= 0) & (v <= 15)
        assert 0 < inside.sum() < inside.numel()
        code = v.round().clamp(0, 15)
        by_scale = (upstream * torch.where(inside, code - v, code)).sum(-1, keepdim=True)
        by_zero = (upstream * ~inside).sum(-1, keepdim=True)
        expected = (upstream * inside).double()
        expected.scatter_add_(-1, values.argmax(-1, keepdim=True), by_scale * 0.6 / 15 + by_zero * 0.2)
        expected.scatter_add_(-1, values.argmin(-1, keepdim=True), -by_scale * 0.6 / 15 + by_zero * 0.8)
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)

    def test_gradient_to_clip(self):
        x, clip = randn(1, 2, 6, 32), torch.tensor([0.6], requires_grad=True)
        upstream = randn(1, 2, 6, 32, seed=1)
        fake_quant_kv4(x, clip).backward(upstream)
        _, params = reference.quantize_kv4(x, 0.6)
        scale, zero = params.double().split(1, -1)
        half = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).double() / 2
        v = (x.double() - zero) / scale
        code, inside = v.round().clamp(0, 15), (v >= 0) & (v <= 15)
        by_scale, by_zero = torch.where(inside, code - v, code), (~inside).double()
        expected = ((by_scale * 2 * half / 15 - by_zero * half) * upstream).sum()
        torch.testing.assert_close(clip.grad.double().squeeze(), expected, rtol=1e-4, atol=1e-4)


def ldp_case(out: int = 6, inputs: int = 64, group_size: int = 32, dtype: torch.dtype = torch.float32):
    """Weights and four random parameters `[out, G]`."""
    w = 0.02 * randn(out, inputs, dtype=dtype)
    count = inputs if group_size == -1 else group_size
    shape = out, inputs // count
    shift = {"beta": 0.5, "gamma": 1.0, "s1": -0.6, "s2": 0.0}
    parameters = [
        (shift[name] + 0.5 * randn(*shape, seed=i, dtype=dtype)).requires_grad_()
        for i, name in enumerate(shift, start=1)
    ]
    return w, parameters, group_size


class TestLDP:
    def test_levels(self):
        beta, gamma, s1, s2 = (torch.logit(torch.tensor([v])) for v in (0.5, 0.8, 0.25, 0.6))
        levels = ldp_levels((beta, gamma, s1, s2), torch.tensor([-2.0]), torch.tensor([5.0]))
        # lo -1, hi 4; widths 0.25, 0.75 * 0.6 = 0.45, 0.3 of 5.
        torch.testing.assert_close(levels, torch.tensor([[-1.0, 0.25, 2.5, 4.0]]))

    @pytest.mark.parametrize(
        "out, inputs, group_size", [(6, 64, 32), (3, 30, -1), (5, 91, 13), (1, 128, 128)]
    )
    def test_forward_is_the_packed_form(self, out, inputs, group_size):
        w, parameters, group_size = ldp_case(out, inputs, group_size)
        levels, scale = ldp_to_codebook(w, parameters, group_size)
        groups = scale.shape[1]
        assert levels.dtype == torch.int8 and levels.shape == (out, groups, 4)
        assert scale.dtype == torch.float16 and levels.abs().amax(-1).min() >= 126
        assert (levels.int().diff(dim=-1) >= 0).all()
        codes = nearest_codes(w.unflatten(1, (groups, -1)), levels, scale)
        stored = unpack(pack(codes.flatten(1), 2), 2, inputs).long().unflatten(1, (groups, -1))
        expected = (levels.gather(2, stored).float() * scale.float()[..., None]).flatten(1)
        fake = ldp_fake_quant(w, parameters, group_size)
        assert torch.equal(fake, expected)
        assert set(codes.unique().tolist()) == {0, 1, 2, 3}

    def test_codes_are_nearest(self):
        w, parameters, group_size = ldp_case()
        levels, scale = ldp_to_codebook(w, parameters, group_size)
        groups = w.unflatten(1, (-1, group_size))
        values = levels.float() * scale.float()[..., None]
        codes = nearest_codes(groups, levels, scale)
        distance = (groups[..., None] - values[..., None, :]).abs()
        chosen = distance.gather(-1, codes.long()[..., None]).squeeze(-1)
        assert torch.equal(chosen, distance.amin(-1))

    def test_bfloat16_weights(self):
        w, parameters, group_size = ldp_case()
        fake = ldp_fake_quant(w.bfloat16(), parameters, group_size)
        exact = ldp_fake_quant(w.bfloat16().float(), parameters, group_size)
        assert fake.dtype == torch.bfloat16 and torch.equal(fake, exact.bfloat16())

    def test_gradient_to_the_weight_is_the_identity_inside_the_clip_range(self):
        w, parameters, group_size = ldp_case()
        w.requires_grad_()
        upstream = randn(*w.shape, seed=9)
        ldp_fake_quant(w, parameters, group_size).backward(upstream)
        groups = w.detach().unflatten(1, (-1, group_size))
        levels = ldp_levels(parameters, groups.amin(-1), groups.amax(-1)).detach()
        inside = ((groups >= levels[..., :1]) & (groups <= levels[..., 3:])).flatten(1)
        assert 0 < inside.sum() < inside.numel()
        assert torch.equal(w.grad, upstream * inside)

    def test_gradient_to_the_parameters_is_exact(self):
        """Against numeric differences of the levels at the codes chosen."""
        w, parameters, group_size = ldp_case(2, 64, 32, torch.float64)
        upstream = randn(*w.shape, seed=9, dtype=torch.float64)
        groups = w.unflatten(1, (-1, group_size))
        codes = nearest_codes(groups, *ldp_to_codebook(w, parameters, group_size)).long()

        def fixed(*parameters):
            levels = ldp_levels(parameters, groups.amin(-1), groups.amax(-1))
            return (levels.gather(-1, codes).flatten(1) * upstream).sum()

        loss = (ldp_fake_quant(w, parameters, group_size) * upstream).sum()
        gradients = torch.autograd.grad(loss, parameters)
        step = 1e-6
        for i, gradient in enumerate(gradients):
            for at in torch.cartesian_prod(torch.arange(2), torch.arange(2)):
                moved = []
                for sign in (1, -1):
                    nudged = [p.detach().clone() for p in parameters]
                    nudged[i][tuple(at)] += sign * step
                    moved.append(fixed(*nudged))
                numeric = (moved[0] - moved[1]) / (2 * step)
                torch.testing.assert_close(gradient[tuple(at)], numeric, rtol=1e-6, atol=1e-10)
            assert gradient.abs().min() > 0

    def test_gradcheck_of_a_soft_assignment(self):
        w, parameters, group_size = ldp_case(2, 16, 8, torch.float64)
        groups = (50 * w).unflatten(1, (-1, group_size))

        def soft(*parameters):
            levels = ldp_levels(parameters, groups.amin(-1), groups.amax(-1))
            share = (-4 * (groups[..., None] - levels[..., None, :]).square()).softmax(-1)
            return (share * levels[..., None, :]).sum(-1)

        assert torch.autograd.gradcheck(soft, parameters)

    def test_gradient_descent_improves_a_plain_min_max_start(self):
        """Min-max is far too wide at 2 bits; the clips must learn to shrink to about +-1.51 sigma."""
        w = randn(16, 256)
        start = (3.0, 3.0, -0.7, 0.0)
        parameters = [torch.full((16, 1), v, requires_grad=True) for v in start]
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        losses = []
        for _ in range(150):
            loss = (ldp_fake_quant(w, parameters, -1) - w).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > 0.2 and losses[-1] < 0.125
        levels, scale = ldp_to_codebook(w, parameters, -1)
        mean = (levels.float() * scale.float()[..., None]).mean((0, 1))
        torch.testing.assert_close(mean, torch.tensor([-1.510, -0.453, 0.453, 1.510]), rtol=0, atol=0.08)

    @pytest.mark.parametrize("group_size", [32, 128])
    def test_lloyd_levels_survive_the_round_trip(self, group_size):
        w = 0.02 * randn(16, 256)
        groups = w.unflatten(1, (-1, group_size))
        levels, scale = fit_levels(groups)
        parameters = codebook_to_ldp(w, levels, scale)
        assert all(p.shape == scale.shape and p.dtype == torch.float32 for p in parameters)
        again, again_scale = ldp_to_codebook(w, parameters, group_size)
        exact = (again == levels).all(-1) & (again_scale == scale)
        # A level at the group's very end is held 0.001 off it.
        assert exact.float().mean() > 0.9
        value, expected = (
            again.float() * again_scale.float()[..., None],
            levels.float() * scale.float()[..., None],
        )
        span = (groups.amax(-1) - groups.amin(-1))[..., None]
        assert ((value - expected).abs() <= (1e-3 + 1 / 254) * span).all()

    def test_degenerate_groups(self):
        """Zeros, a constant, one sign, zero at an end: no NaN, still the packed form, error bounded."""
        w = torch.stack(
            [
                torch.zeros(32),
                torch.full((32,), 0.5),
                randn(32).abs() + 1,
                -randn(32).abs() - 1,
                randn(32).relu(),
            ]
        )
        levels, scale = fit_levels(w[:, None])
        parameters = [p.requires_grad_() for p in codebook_to_ldp(w, levels, scale)]
        fake = ldp_fake_quant(w.requires_grad_(), parameters, -1)
        fake.sum().backward()
        assert all(p.isfinite().all() and p.grad.isfinite().all() for p in (w, *parameters))
        again, again_scale = ldp_to_codebook(w, parameters, -1)
        assert (again.int().diff(dim=-1) >= 0).all()
        codes = nearest_codes(w.detach()[:, None], again, again_scale).long()
        assert torch.equal(fake, (again.gather(2, codes).float() * again_scale.float()[..., None]).flatten(1))
        assert torch.equal(fake[0], torch.zeros(32))
        # The end levels come within a factor 0.999 of the extreme weights only.
        torch.testing.assert_close(fake[1], w[1], rtol=2e-3, atol=0)
        assert (fake - w).square().mean(-1)[2:].max() < 0.1

    def test_levels_stay_ascending_when_lo_passes_hi(self):
        w = -randn(1, 32).abs() - 1
        parameters = [torch.tensor([[v]]) for v in (-3.0, 3.0, 0.0, 0.0)]
        levels, _ = ldp_to_codebook(w, parameters, -1)
        assert (levels.int().diff(dim=-1) > 0).all()

    def test_compiles_in_one_graph(self):
        w, parameters, group_size = ldp_case()
        compiled = torch.compile(ldp_fake_quant, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(w, parameters, group_size), ldp_fake_quant(w, parameters, group_size))
