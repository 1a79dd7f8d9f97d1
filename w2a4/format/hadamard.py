"""Hadamard matrices: which orders can be built, how, and the transform of a given width.

A width is n = K * 2**m. The power of two is Sylvester's matrix, which the transform never forms; the
K part is a +-1 matrix with H Hᵀ = K I from Paley's two constructions or Williamson's. A checkpoint
stores K, not the matrix, so what `hadamard_k` returns for a given K must never change.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..errors import RotationError
from ..ops import hadamard

#: Largest K part used. The transform does K multiply-adds an element and a kernel keeps the [K, K]
#: signs in fast memory: 64 KB of int8 at 256.
MAX_K = 256

#: Williamson sequences by n (order 4n), one octal digit for each of the positions 1..(n-1)/2. There
#: three of the four symmetric circulants agree: digit d says that circulant d // 2 is the odd one out
#: and, by d % 2, that the three are +1 (0) or -1 (1). Position 0 is +1 in all four.
_WILLIAMSON = {
    23: "55431024166",
    29: "50106155021446",
    39: "4533133215057152014",
    43: "053640041215456223613",
}


@dataclass(frozen=True)
class HadamardSpec:
    """A transform of the last dimension: equal blocks, each `kron(H_K, Sylvester) / sqrt(block_size)`.

    Attributes:
        size: n, the width of the transform.
        block_size: width of one block, divides n; equal to n unless no order was found.
        k: order of the K part, 1 for a pure power of two.
    """

    size: int
    block_size: int
    k: int


@cache
def hadamard_spec(n: int) -> HadamardSpec:
    """The transform of width n with the smallest K that can be built, else block-diagonal.

    Where no K <= MAX_K serves, the blocks are the largest power of two that divides n; a warning
    says so once.

    >>> hadamard_spec(576)
    HadamardSpec(size=576, block_size=576, k=36)

    Raises:
        RotationError: n < 1.
    """
    if n < 1:
        raise RotationError(f"a Hadamard transform of width {n} does not exist; give a width >= 1")
    power = n & -n
    k = n // power
    while k <= min(n, MAX_K):
        if n % k == 0 and _can_build(k):
            return HadamardSpec(n, n, k)
        k *= 2
    warnings.warn(
        f"no Hadamard matrix of order {n} with a K part <= {MAX_K} can be built; using a block-diagonal "
        f"transform of {n // power} blocks of {power}, which spreads an outlier over {power} channels only",
        stacklevel=2,
    )
    return HadamardSpec(n, power, 1)


def hadamard_k(k: int) -> Tensor | None:
    """A +-1 matrix H with H Hᵀ = k I, or None if none of the constructions gives this order.

    Paley I (k - 1 a prime power = 3 mod 4), Paley II (k / 2 - 1 a prime power = 1 mod 4), Williamson
    (k / 4 in a table of short strings), else a Kronecker product of two smaller ones.

    Returns:
        int8 `[k, k]` or None.

    Source: R. Paley, "On orthogonal matrices" (1933); J. Williamson, "Hadamard's determinant theorem
    and the sum of four squares" (1944).
    """
    if not _can_build(k):
        return None
    if k <= 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)[:k, :k].contiguous()
    if (q := k - 1) % 4 == 3 and _prime_power(q):
        matrix = _paley_1(q)
    elif k % 2 == 0 and (q := k // 2 - 1) % 4 == 1 and _prime_power(q):
        matrix = _paley_2(q)
    elif k % 4 == 0 and k // 4 in _WILLIAMSON:
        matrix = _williamson(k // 4)
    else:
        return torch.kron(*(hadamard_k(factor) for factor in _split(k))).contiguous()
    return torch.from_numpy(matrix.astype(np.int8))


@cache
def had_k_matrix(k: int, device: torch.device | str = "cpu") -> Tensor | None:
    """The K part as the kernels take it: int8 `[k, k]` on `device`, or None for k = 1. Cached.

    Raises:
        RotationError: no construction gives order k.
    """
    if k == 1:
        return None
    with torch.inference_mode(False):  # what is kept must serve a backward pass too
        matrix = hadamard_k(k)
        if matrix is None:
            raise RotationError(
                f"no Hadamard matrix of order {k} can be built; take the K of hadamard_spec(n)"
            )
        return matrix.to(device)


def apply_hadamard(x: Tensor, spec: HadamardSpec, transpose: bool = False) -> Tensor:
    """`x @ H`, or `x @ Hᵀ`; H is orthogonal.

    Equivalent to `x @ dense_hadamard(spec).to(x.dtype)`.

    Args:
        x: floating `[..., spec.size]`.

    Returns:
        `[..., spec.size]` in x's dtype.

    Raises:
        RotationError: x has another width.
    """
    if x.shape[-1] != spec.size:
        raise RotationError(
            f"x of shape {tuple(x.shape)} does not fit a Hadamard transform of width {spec.size}"
        )
    return hadamard(x, had_k_matrix(spec.k, x.device), spec.block_size, transpose)


def dense_hadamard(spec: HadamardSpec) -> Tensor:
    """The orthogonal matrix of a transform, float64 `[size, size]`, built without the fast transform."""
    block = torch.ones(1, 1, dtype=torch.float64) if spec.k == 1 else had_k_matrix(spec.k).double()
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range((spec.block_size // spec.k).bit_length() - 1):
        block = torch.kron(block, sylvester)
    block = block / spec.block_size**0.5
    return torch.block_diag(*[block] * (spec.size // spec.block_size))


def _can_build(k: int) -> bool:
    if k in (1, 2):
        return True
    if k < 1 or k % 4:
        return False
    paley_1 = _prime_power(k - 1) is not None
    paley_2 = (k // 2 - 1) % 4 == 1 and _prime_power(k // 2 - 1) is not None
    return paley_1 or paley_2 or k // 4 in _WILLIAMSON or _split(k) is not None


@cache
def _split(k: int) -> tuple[int, int] | None:
    """The split of k into two smaller orders with the smallest first factor."""
    for a in (2, *range(4, int(k**0.5) + 1, 4)):
        if k % a == 0 and _can_build(a) and _can_build(k // a):
            return a, k // a
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """`(p, e)` with q = p**e and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    e, rest = 0, q
    while rest % p == 0:
        rest, e = rest // p, e + 1
    return (p, e) if rest == 1 else None


def _field_powers(p: int, e: int) -> np.ndarray:
    """All non-zero elements of GF(p**e) as successive powers of one generator: ints `[q - 1, e]`.

    An element is its coefficients mod p, lowest first. The generator is x modulo the first monic
    polynomial x**e - c(x), in counting order, of which x is a primitive root; for e = 1 that is the
    smallest primitive root of p.
    """
    q = p**e
    for number in range(1, q):
        feedback = np.array([number // p**i % p for i in range(e)])
        element, powers = np.eye(1, e, dtype=int)[0], []
        while True:
            powers.append(element)
            # Times x: shift up, and replace the x**e that falls out by c(x).
            element = (np.concatenate([[0], element[:-1]]) + element[-1] * feedback) % p
            if (element == powers[0]).all() or len(powers) == q:
                break
        if len(powers) == q - 1:
            return np.array(powers)
    raise AssertionError(f"GF({q}) has no generator: {p} is not prime")


def _quadratic_residues(q: int) -> np.ndarray:
    """Jacobsthal's matrix Q[i, j] = chi(a_i - a_j) over GF(q): 1 for a square, -1 for none, 0 for 0."""
    p, e = _prime_power(q)
    weights = p ** np.arange(e)
    chi = np.zeros(q, dtype=int)
    chi[_field_powers(p, e) @ weights] = np.resize([1, -1], q - 1)
    digits = np.arange(q)[:, None] // weights % p
    return chi[(digits[:, None] - digits[None, :]) % p @ weights]


def _paley_1(q: int) -> np.ndarray:
    """Order q + 1: I + S with S the skew border of Q. Not symmetric."""
    skew = np.zeros((q + 1, q + 1), dtype=int)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _quadratic_residues(q)
    return skew + np.eye(q + 1, dtype=int)


def _paley_2(q: int) -> np.ndarray:
    """Order 2 (q + 1): each entry of the symmetric border of Q becomes a 2 x 2 block."""
    border = np.zeros((q + 1, q + 1), dtype=int)
    border[0, 1:], border[1:, 0], border[1:, 1:] = 1, 1, _quadratic_residues(q)
    return np.kron(border, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1, dtype=int), [[1, -1], [-1, -1]])


def _williamson(n: int) -> np.ndarray:
    """Order 4n from four symmetric circulants with A² + B² + C² + D² = 4n I, in the quaternion array."""
    rows = np.ones((4, n), dtype=int)
    for position, digit in enumerate(map(int, _WILLIAMSON[n]), start=1):
        three = -1 if digit % 2 else 1
        column = np.where(np.arange(4) == digit // 2, -three, three)
        rows[:, position] = rows[:, n - position] = column
    a, b, c, d = rows[:, (np.arange(n)[None, :] - np.arange(n)[:, None]) % n]
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])
