"""Cayley SGD: the step is the Cayley transform, momentum acts, iterates stay orthogonal. Kurtosis."""

import copy

import pytest
import torch

from w2a4.errors import RotationError
from w2a4.format.online import OnlineRotation
from w2a4.quantization.rotation.cayley import (
    SCHEDULES,
    CayleySGD,
    cayley_step,
    kurtosis,
    kurtosis_gap,
    orthogonality_error,
    tangent_skew,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def haar(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return OnlineRotation("random", n, seed, "r1").matrix(dtype)


def noise(n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, n, dtype=torch.float64, generator=generator).to(dtype)


def exact_cayley(r: torch.Tensor, a: torch.Tensor, alpha: float) -> torch.Tensor:
    eye = torch.eye(r.shape[0], dtype=r.dtype)
    return torch.linalg.solve(eye - alpha / 2 * a, (eye + alpha / 2 * a) @ r)


@pytest.mark.parametrize("n", [1, 3, 16, 64])
def test_tangent_skew(n):
    r, direction = haar(n), noise(n, 1)
    a = tangent_skew(r, direction)
    torch.testing.assert_close(a, -a.T, rtol=0, atol=0)
    # At an orthogonal r the projection onto the tangent space is half of (d - r dᵀ r).
    torch.testing.assert_close(a @ r, 0.5 * (direction - r @ direction.T @ r), rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [3, 16, 64])
def test_matches_the_exact_cayley_transform_at_small_steps(n):
    r, direction = haar(n), noise(n, 1)
    a = tangent_skew(r, direction)
    alpha = 0.02 / torch.linalg.matrix_norm(a, 2).item()
    y = cayley_step(r, direction, lr=alpha)
    # The fixed point after 5 iterations leaves terms of order (alpha / 2 * |A|)**7.
    torch.testing.assert_close(y, exact_cayley(r, a, alpha), rtol=0, atol=4 * 0.01**7 + 1e-15)
    assert orthogonality_error(y) <= 1e-13
    assert (y - r).abs().max() > 1e-3


@pytest.mark.parametrize("n, tolerance", [(64, 1e-5), (256, 1e-9)])
def test_matches_the_exact_cayley_transform_at_the_largest_step(n, tolerance):
    """At lr = infinity the step is 2 q / |A|, which holds whatever the gradient's size."""
    r = haar(n)
    for size in (1e-6, 1.0, 1e6):
        direction = size * noise(n, 1)
        a = tangent_skew(r, direction)
        y = cayley_step(r, direction, lr=float("inf"), eps=0.0)
        alpha = (1 / torch.linalg.matrix_norm(a, 1)).item()
        torch.testing.assert_close(y, exact_cayley(r, a, alpha), rtol=0, atol=tolerance)


def test_more_iterations_come_closer():
    r, direction = haar(8), noise(8, 1)
    a = tangent_skew(r, direction)
    exact = exact_cayley(r, a, (1 / torch.linalg.matrix_norm(a, 1)).item())
    errors = [
        (cayley_step(r, direction, float("inf"), iterations=i, eps=0.0) - exact).abs().max()
        for i in (1, 3, 5, 9, 30)
    ]
    assert all(later < earlier / 2 for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-13


def test_no_gradient_no_step():
    r = torch.nn.Parameter(haar(16))
    before = r.detach().clone()
    optimizer = CayleySGD([r])
    optimizer.step()
    assert torch.equal(r, before)
    r.grad = torch.zeros_like(r)
    optimizer.step()
    torch.testing.assert_close(r.detach(), before, rtol=0, atol=1e-14)
    assert r.isfinite().all()


@pytest.mark.parametrize("n", [2, 8, 64, 192])
def test_drift_after_100_steps_in_float32(n):
    r = torch.nn.Parameter(haar(n, dtype=torch.float32))
    before = r.detach().clone()
    optimizer = CayleySGD([r], lr=1.5)
    for step in range(100):
        r.grad = 10 * noise(n, step, torch.float32)
        optimizer.step()
    assert orthogonality_error(r) <= 1e-5
    assert (r - before).abs().max() > 0.05


def test_drift_with_a_gradient_in_one_plane():
    """The worst case for the fixed point: |A| is its spectral norm, so every step is 2 q."""
    r = torch.nn.Parameter(haar(32, dtype=torch.float32))
    optimizer = CayleySGD([r], lr=1.5)
    plane = torch.zeros(32, 32)
    plane[0, 1], plane[1, 0] = 100.0, -100.0
    for _ in range(100):
        r.grad = plane @ r.detach()
        optimizer.step()
    assert orthogonality_error(r) <= 1e-5


def test_momentum_acts():
    gradients = [noise(16, seed) for seed in (1, 2, 3)]

    def run(momentum):
        r = torch.nn.Parameter(haar(16))
        optimizer = CayleySGD([r], lr=0.01, momentum=momentum)
        steps = []
        for gradient in gradients:
            r.grad = gradient.clone()
            optimizer.step()
            steps.append(r.detach().clone())
        return steps, optimizer.state[r]["momentum"]

    (with_first, *with_rest), buffer = run(0.9)
    (without_first, *without_rest), _ = run(0.0)
    assert torch.equal(with_first, without_first)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(with_rest, without_rest, strict=True))
    # A step is the Cayley step along the accumulated direction, of which the tangent part is kept.
    direction, here = torch.zeros(16, 16), haar(16)
    for gradient, there in zip(gradients, [with_first, *with_rest], strict=True):
        direction = 0.9 * direction - gradient
        torch.testing.assert_close(there, cayley_step(here, direction, 0.01), rtol=0, atol=1e-9)
        direction, here = tangent_skew(here, direction) @ here, there
    torch.testing.assert_close(buffer, direction)


def test_momentum_forgets_what_is_not_tangent():
    """Gradients along `symmetric @ r` move nothing, however large, nor do they later."""

    def run(size):
        r = torch.nn.Parameter(haar(16))
        optimizer = CayleySGD([r], lr=0.01)
        for seed in (1, 2, 3):
            symmetric = noise(16, seed + 10) + noise(16, seed + 10).T
            r.grad = noise(16, seed) + size * symmetric @ r.detach()
            optimizer.step()
        return r.detach()

    torch.testing.assert_close(run(100.0), run(0.0), rtol=0, atol=1e-10)


def test_state_survives_a_checkpoint():
    def optimizer_at(r):
        return CayleySGD([r], lr=0.01)

    straight = torch.nn.Parameter(haar(8))
    first = optimizer_at(straight)
    for seed in (1, 2):
        straight.grad = noise(8, seed)
        first.step()
    resumed = torch.nn.Parameter(straight.detach().clone())
    second = optimizer_at(resumed)
    # As through a file: loading alone would share the momentum's memory.
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for r, optimizer in ((straight, first), (resumed, second)):
        r.grad = noise(8, 3)
        optimizer.step()
    assert torch.equal(straight, resumed)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_procrustes(momentum):
    """Finds the rotation between two clouds, from a start of the same determinant."""
    points, target = torch.cat([noise(12, seed) for seed in range(8)]), haar(12, 7)
    start = haar(12, 8)
    if torch.det(start) * torch.det(target) < 0:
        start[0] = -start[0]
    r = torch.nn.Parameter(start)
    optimizer = CayleySGD([r], lr=0.02, momentum=momentum)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (points @ r - points @ target).square().mean() * 12
        loss.backward()
        return loss

    for _ in range(500):
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < 1e-8 * losses[0]
    torch.testing.assert_close(r.detach(), target, rtol=0, atol=1e-3)
    assert orthogonality_error(r) <= 1e-12


def test_lr_scheduler_reaches_zero():
    r = torch.nn.Parameter(haar(8))
    optimizer = CayleySGD([r], lr=1.5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
    for seed in range(4):
        r.grad = noise(8, seed)
        optimizer.step()
        schedule.step()
    before = r.detach().clone()
    r.grad = noise(8, 9)
    optimizer.step()
    # What is left is the Newton-Schulz iteration on the drift of the steps before.
    torch.testing.assert_close(r.detach(), before, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "shape, dtype", [((3, 4), torch.float32), ((4,), torch.float32), ((4, 4), torch.bfloat16)]
)
def test_other_parameters_are_refused(shape, dtype):
    with pytest.raises(RotationError, match="square matrices"):
        CayleySGD([torch.nn.Parameter(torch.zeros(shape, dtype=dtype))])


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"momentum": 1.0}, {"q": 1.0}, {"iterations": 0}])
def test_values_out_of_range(bad):
    key, value = next(iter(bad.items()))
    with pytest.raises(RotationError, match=f"{key}={value}"):
        CayleySGD([torch.nn.Parameter(torch.eye(2))], **bad)


def test_schedules():
    ends = {name: [schedule(f) for f in (0.0, 0.5, 1.0)] for name, schedule in SCHEDULES.items()}
    assert ends == {
        "linear": [1.0, 0.5, 0.0],
        "cosine": [1.0, pytest.approx(0.5), pytest.approx(0.0, abs=1e-15)],
        "constant": [1.0, 1.0, 1.0],
    }


def test_kurtosis():
    generator = torch.Generator().manual_seed(0)
    shape = {"dtype": torch.float64, "generator": generator}
    gauss, uniform = torch.randn(4, 50_000, **shape), torch.rand(4, 50_000, **shape)
    torch.testing.assert_close(kurtosis(3 + 2 * gauss), torch.full((4,), 3.0).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(kurtosis(uniform), torch.full((4,), 1.8).double(), rtol=0.02, atol=0)
    signs = torch.tensor([[1.0, -1.0] * 8, [0.0] * 16, [5.0] * 16, [16.0] + [0.0] * 15])
    assert kurtosis(signs).tolist() == pytest.approx([1, 0, 0, 15 + 1 / 15 - 1], rel=1e-5)
    assert kurtosis_gap(uniform) < 0.05 and kurtosis_gap(gauss).item() == pytest.approx(1.2, rel=0.05)
    assert kurtosis_gap(signs[:1]).item() == pytest.approx(0.8)


def test_kurtosis_has_gradients():
    x = noise(6, 0).requires_grad_()
    assert torch.autograd.gradcheck(kurtosis, x)
    flat = torch.zeros(2, 8, requires_grad=True)
    kurtosis(flat).sum().backward()
    assert flat.grad.isfinite().all()
