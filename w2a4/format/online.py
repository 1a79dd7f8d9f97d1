"""`OnlineRotation`: a rotation that a few integers describe, applied to activations or folded into weights.

No module holds a table: signs and matrices are rebuilt from the seed, once per device and dtype.
"""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RotationError, shown
from ..ops import hadamard, hadamard_a4, quantize_a4
from .hadamard import HadamardSpec, dense_hadamard, had_k_matrix, hadamard_spec
from .kinds import OnlineKind


@dataclass(frozen=True)
class OnlineRotation:
    """`x @ R` for an orthogonal R of one of the kinds that a seed determines.

    Attributes:
        kind: `none`, `hadamard` (R = H), `random_hadamard` (R = diag(signs) H) or `random` (Haar).
        size: width of R.
        seed, name: what the random kinds are drawn from; `name` (`r3`, `r4`, `r2.5`) keeps the
            rotations of one seed apart.
        block_size, k: the Hadamard part, see `HadamardSpec`; 0 means what `hadamard_spec` chooses.
            Recorded in a checkpoint, so that another choice in a later version does not break it.
    """

    kind: OnlineKind
    size: int
    seed: int = 0
    name: str = "r4"
    block_size: int = 0
    k: int = 0

    def __post_init__(self) -> None:
        kinds = typing.get_args(OnlineKind)
        if self.kind not in kinds:
            raise RotationError(f"rotation {self.name}: kind={self.kind!r}; give one of {', '.join(kinds)}")
        if self.size < 1:
            raise RotationError(f"rotation {self.name}: size={self.size}; give a width >= 1")
        if "hadamard" in self.kind:
            if not self.block_size:
                spec = hadamard_spec(self.size)
                object.__setattr__(self, "block_size", spec.block_size)
                object.__setattr__(self, "k", spec.k)
            power, rest = divmod(self.block_size, self.k) if self.k > 0 else (0, 1)
            if rest or power < 1 or power & (power - 1) or self.size % self.block_size:
                raise RotationError(
                    f"rotation {self.name}: block_size={self.block_size}, k={self.k} do not fit "
                    f"size={self.size}; block_size must divide size and be k times a power of two"
                )

    @classmethod
    def in_blocks(cls, kind: OnlineKind, size: int, seed: int, name: str, blocks: int) -> OnlineRotation:
        """One whose Hadamard part is as many equal blocks on a diagonal.

        Raises:
            RotationError: `blocks` does not divide `size`.
        """
        if blocks == 1:
            return cls(kind, size, seed, name)
        if blocks < 1 or size % blocks:
            raise RotationError(
                f"rotation {name}: {blocks} equal blocks do not make up a width of {size}; give a divisor"
            )
        spec = hadamard_spec(size // blocks)
        return cls(kind, size, seed, name, spec.block_size, spec.k)

    @property
    def spec(self) -> HadamardSpec:
        """The Hadamard part of the two Hadamard kinds."""
        return HadamardSpec(self.size, self.block_size, self.k)

    def apply(self, x: Tensor) -> Tensor:
        """`x @ R`, equivalent to `x @ self.matrix(x.dtype)`.

        Args:
            x: floating `[..., size]`.

        Returns:
            `[..., size]` in x's dtype.

        Raises:
            RotationError: x has another width.
        """
        if x.shape[-1] != self.size:
            raise RotationError(
                f"x of shape {tuple(x.shape)} does not fit rotation {self.name} of width {self.size}"
            )
        if self.kind == "none":
            return x
        table, had_k = self.tables(x.device, x.dtype)
        if self.kind == "random":
            with torch.autocast(x.device.type, enabled=False):  # what follows rounds to few bits
                return x @ table
        return hadamard(x if table is None else x * table, had_k, self.block_size)

    def quantize(self, x: Tensor, clip: Tensor, group_size: int = -1) -> tuple[Tensor, Tensor]:
        """`quantize_a4(x @ R, clip, group_size)`, in one op for the Hadamard kinds."""
        if "hadamard" not in self.kind or x.shape[-1] != self.size:
            return quantize_a4(self.apply(x), clip, group_size)
        signs, had_k = self.tables(x.device, x.dtype)
        return hadamard_a4(x if signs is None else x * signs, had_k, self.block_size, clip, group_size)

    def had_k(self, device: torch.device) -> Tensor | None:
        """The K part of the Hadamard kinds, as the ops take it."""
        return _had_k(self.k, device)

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """What `apply` and `quantize` read. Their cache may drop it, so a CUDA graph has to keep it."""
        return _tables(self.kind, self.name, self.seed, self.size, self.k, device, dtype)

    @staticmethod
    def for_ops(rotation: OnlineRotation | None, device: torch.device) -> tuple[Tensor | None, int] | None:
        """had_k and block_size by which the fused ops do a rotation; None if they cannot."""
        if rotation is None or rotation.kind == "none":
            return None, 1
        return (rotation.had_k(device), rotation.block_size) if rotation.kind == "hadamard" else None

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """R as a dense `[size, size]`, computed in float64 and cast once."""
        if self.kind == "none":
            return torch.eye(self.size, dtype=dtype)
        if self.kind == "random":
            return _haar(self.name, self.seed, self.size).to(dtype)
        dense = dense_hadamard(self.spec)
        if self.kind == "random_hadamard":
            dense = _signs(self.name, self.seed, self.size)[:, None] * dense
        return dense.to(dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON with everything needed to rebuild the rotation."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OnlineRotation:
        """Inverse of `to_dict`. Raises RotationError for a missing, unknown or mistyped entry."""
        fields = {f.name: int if f.name not in ("kind", "name") else str for f in dataclasses.fields(cls)}
        if not isinstance(data, dict):
            raise RotationError(f"rotation {shown(data)} is not a mapping; it needs {', '.join(fields)}")
        wrong = sorted(set(fields) ^ set(data)) or [k for k, t in fields.items() if type(data[k]) is not t]
        if wrong:
            raise RotationError(
                f"rotation {shown(data)}: entry {shown(wrong[0])} is missing, unknown or mistyped; it needs "
                + ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
            )
        return cls(**data)


class RotatedLinear(nn.Linear):
    """A linear layer whose weight expects rotated inputs: `linear(rotation.apply(x))`.

    `weight` is `W @ R` (float `[out, in]`), so the result is that of W on x.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rotation: OnlineRotation,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.rotation = rotation

    @classmethod
    def from_linear(cls, linear: nn.Linear, rotation: OnlineRotation) -> RotatedLinear:
        """Take over the parameters of `linear`, whose weight is rotated already."""
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, rotation=rotation, device="meta"
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in x's dtype."""
        return F.linear(self.rotation.apply(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rotation={self.rotation.kind}"


@torch.compiler.assume_constant_result
def _had_k(k: int, device: torch.device) -> Tensor | None:
    """A constant of a compiled graph, as `_tables` are."""
    return had_k_matrix(k, device)


@torch.compiler.assume_constant_result
def _tables(
    kind: str, name: str, seed: int, size: int, k: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What `apply` needs: signs `[size]` of a random Hadamard or the matrix `[size, size]` of a random
    rotation, and the K part of a Hadamard.

    A compiled graph takes them as constants: the tracer can follow neither the cache nor the hash. Nor does
    that of torch 2.11 know a rotation for a constant, so its fields are given.
    """
    return _cached_tables(kind, name, seed, size, k, device, dtype)


@lru_cache(maxsize=16)
def _cached_tables(
    kind: str, name: str, seed: int, size: int, k: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    with torch.inference_mode(False):  # what is kept must serve a backward pass too
        if kind == "random":
            return _haar(name, seed, size).to(device=device, dtype=dtype), None
        signs = _signs(name, seed, size) if kind == "random_hadamard" else None
        return None if signs is None else signs.to(device=device, dtype=dtype), had_k_matrix(k, device)


def _bytes(name: str, seed: int, count: int) -> bytes:
    """Random bytes that depend on the name and the seed only, on every machine and library version."""
    return hashlib.shake_256(f"w2a4/{name}/{seed}".encode()).digest(count)


def _signs(name: str, seed: int, size: int) -> Tensor:
    """+-1, float64 `[size]`: bit i, lowest of a byte first, set means -1."""
    bits = np.unpackbits(np.frombuffer(_bytes(name, seed, -(-size // 8)), dtype=np.uint8), bitorder="little")
    return torch.from_numpy(1.0 - 2.0 * bits[:size])


def _haar(name: str, seed: int, size: int) -> Tensor:
    """A Haar-distributed orthogonal matrix, float64 `[size, size]`.

    The QR decomposition of a Gaussian matrix is unique, and Q is Haar, once R's diagonal is positive.
    """
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(_bytes(name, seed, 16), "little")))
    q, r = np.linalg.qr(generator.standard_normal((size, size)))
    return torch.from_numpy(q * np.where(np.diag(r) < 0, -1.0, 1.0))
