"""Cayley SGD, whose iterates are all orthogonal, and the kurtosis of activations as an objective.

Source: J. Li, L. Fuxin, S. Todorovic, "Efficient Riemannian optimization on the Stiefel manifold via
the Cayley transform" (arXiv 2002.01113), as SpinQuant (arXiv 2405.16406) uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ...errors import RotationError

#: Kurtosis of a uniform distribution, which a uniform quantiser fits best; a Gaussian's is 3.
UNIFORM_KURTOSIS = 1.8

#: Share of the first learning rate that is left after a fraction f of the steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda f: 1 - f,
    "cosine": lambda f: (1 + math.cos(math.pi * f)) / 2,
    "constant": lambda f: 1.0,
}


def tangent_skew(r: Tensor, direction: Tensor) -> Tensor:
    """The skew A for which `A @ r` is half of `direction` projected onto the tangent space at r.

    Args:
        r: orthogonal float `[n, n]`.
        direction: of descent, e.g. the negative gradient, `[n, n]`.

    Returns:
        `[n, n]`, A = -Aᵀ.
    """
    a = direction @ r.T - 0.5 * r @ (r.T @ direction @ r.T)
    return a - a.T


def cayley_step(
    r: Tensor, direction: Tensor, lr: float, q: float = 0.5, iterations: int = 5, eps: float = 1e-8
) -> Tensor:
    """One step from r along `direction` that stays orthogonal, without a matrix inverse.

    The Cayley transform `(I - a/2 A)⁻¹ (I + a/2 A) r` with A = `tangent_skew(r, direction)` is the fixed
    point of `y <- r + a/2 A (r + y)`. With a <= 2 q / |A| an iteration shrinks the error by q or better;
    |A| is the largest column sum of magnitudes, which bounds the spectral norm.

    Args:
        r: orthogonal float `[n, n]`.
        direction: `[n, n]`.
        lr: the largest a.
        q: bound on the contraction, in (0, 1).
        iterations: of the fixed point.
        eps: keeps a finite at |A| = 0.

    Returns:
        `[n, n]`, a new tensor.
    """
    return _move(r, tangent_skew(r, direction), lr, q, iterations, eps)


def _move(r: Tensor, a: Tensor, lr: float, q: float, iterations: int, eps: float) -> Tensor:
    """`cayley_step` along a skew matrix."""
    # A tensor, not a float: no synchronisation with the device.
    alpha = (2 * q / (torch.linalg.matrix_norm(a, 1) + eps)).clamp(max=lr)
    half = alpha / 2 * a
    y = r + 2 * half @ r
    for _ in range(iterations):
        y = r + half @ (r + y)
    return y


class CayleySGD(torch.optim.Optimizer):
    """SGD with momentum on orthogonal matrices: `m <- momentum * m - grad`, then `cayley_step` along m.

    The momentum keeps only its part in the tangent space. The other part is the change of the loss off the
    rotations; it can be many times larger, and would move the matrix as soon as the tangent space changes.
    After each step two Newton-Schulz iterations remove the `RᵀR - I` that rounding and the truncated fixed
    point leave (up to 1e-2 if A acts in one plane), so that errors do not add up over a run.

    Args:
        params: orthogonal float `[n, n]` parameters, or groups of them.
        lr, q, iterations, eps: see `cayley_step`.
        momentum: share of the last step's direction kept, in [0, 1).

    Raises:
        RotationError: a parameter is not a square matrix in float32 or float64, or a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.5,
        momentum: float = 0.9,
        q: float = 0.5,
        iterations: int = 5,
        eps: float = 1e-8,
    ):
        if lr < 0 or not 0 <= momentum < 1 or not 0 < q < 1 or iterations < 1:
            raise RotationError(
                f"lr={lr}, momentum={momentum}, q={q}, iterations={iterations}: "
                "give lr >= 0, momentum in [0, 1), q in (0, 1) and iterations >= 1"
            )
        defaults = {"lr": lr, "momentum": momentum, "q": q, "iterations": iterations, "eps": eps}
        super().__init__(params, defaults)
        for r in (r for group in self.param_groups for r in group["params"]):
            if r.ndim != 2 or r.shape[0] != r.shape[1] or r.dtype not in (torch.float32, torch.float64):
                raise RotationError(
                    f"CayleySGD got a parameter {tuple(r.shape)} of {r.dtype}; it takes square matrices in "
                    "float32 or float64; give other parameters to another optimiser"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move every parameter that has a gradient; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for r in group["params"]:
                if r.grad is None:
                    continue
                state = self.state[r]
                if not state:
                    state["momentum"] = torch.zeros_like(r)
                a = tangent_skew(r, state["momentum"].mul_(group["momentum"]).sub_(r.grad))
                state["momentum"].copy_(a @ r)
                y = _move(r, a, group["lr"], group["q"], group["iterations"], group["eps"])
                for _ in range(2):
                    y = 1.5 * y - 0.5 * y @ (y.T @ y)
                r.copy_(y)
        return loss


def orthogonality_error(r: Tensor) -> float:
    """max |RᵀR - I|, computed in float64."""
    r = r.detach().double()
    return (r.T @ r - torch.eye(r.shape[0], dtype=r.dtype, device=r.device)).abs().max().item()


def kurtosis(x: Tensor) -> Tensor:
    """Fourth central moment over the squared variance of each row; heavy tails have a large one.

    Args:
        x: floating `[..., n]`.

    Returns:
        `[...]`, at least 1; 0 for a constant row.
    """
    squares = (x - x.mean(-1, keepdim=True)).square()
    return squares.square().mean(-1) / squares.mean(-1).clamp_min(1e-12).square()


def kurtosis_gap(x: Tensor) -> Tensor:
    """How far the rows' mean kurtosis is from a uniform distribution's.

    By rows, since each row has its own quantisation scale.

    Args:
        x: floating `[rows, n]`.

    Returns:
        scalar, >= 0.

    Source: KurTail, M. Akhondzadeh et al. (arXiv 2503.01483).
    """
    return (kurtosis(x).mean() - UNIFORM_KURTOSIS).abs()
