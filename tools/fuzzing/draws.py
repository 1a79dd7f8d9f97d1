"""What random calls of ops are made of, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from w2a4.format.hadamard import had_k_matrix
from w2a4.ops import reference
from w2a4.ops.packing import unpack

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = (1.0, 1.0, 1.0, 1e-3, 1e4, 1e-30)


class Draw(Protocol):
    """Where a case's choices come from."""

    def number(self, least: int, most: int) -> int: ...

    def pick(self, options: Sequence[Any]) -> Any: ...


@dataclass
class OpCase:
    """A call.

    Attributes:
        args: of `torch.ops.w2a4.<name>`; tensors that it writes, or lists of them, are at `written`.
        agree: compares what the op and what the reference gave, and raises AssertionError.
    """

    name: str
    args: list[Any]
    agree: Callable[[Any, Any], None]
    written: tuple[int, ...] = ()
    hostile: str = ""
    oracle: Callable[..., Any] | None = field(default=None, repr=False)

    def reference(self, args: list[Any]) -> Any:
        return (self.oracle or getattr(reference, self.name))(*args)


def exact(got: Any, want: Any) -> None:
    for a, b in zip(listed(got), listed(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5)), (
            f"{int((a != b).sum())} of {a.numel()} elements differ"
        )


def near(rtol: float) -> Callable[[Any, Any], None]:
    """Within `rtol` of the largest magnitude, and a rounding to the dtype."""

    def agree(got: Any, want: Any) -> None:
        for a, b in zip(listed(got), listed(want), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
            most = float(b.double().abs().nan_to_num(0).max()) if b.numel() else 0.0
            limit = (rtol + 4 * torch.finfo(b.dtype).eps * (b.dtype != torch.float64)) * most + 1e-30
            off = (a.double() - b.double()).abs()
            assert torch.equal(a.isfinite(), b.isfinite()), "not finite at other places"
            worst = float(off[b.isfinite()].max()) if b.isfinite().any() else 0.0
            assert worst <= limit, f"off by {worst:g}, {limit:g} allowed"

    return agree


def quantized(features: int) -> Callable[[Any, Any], None]:
    """Codes may differ by a step where what was rounded differs in its last bits."""

    def agree(got: Any, want: Any) -> None:
        near(1e-5)(got[1], want[1])
        codes = [unpack(t, 4, features, signed=True).int() for t in (got[0], want[0])]
        apart = (codes[0] - codes[1]).abs()
        assert not apart.numel() or int(apart.max()) <= 1, f"codes are {int(apart.max())} apart"
        assert apart.float().mean().nan_to_num(0) < 0.05 or apart.numel() < 64, "many codes differ"

    return agree


def cached(head_dim: int) -> Callable[[Any, Any], None]:
    """Queries and written caches: keys pass a transform, values are exact."""

    def agree(got: Any, want: Any) -> None:
        near(1e-5)(got[0], want[0])
        near(2e-3)(got[2], want[2])
        exact(got[3:], want[3:])
        codes = [unpack(t, 4, head_dim).int() for t in (got[1], want[1])]
        assert not codes[0].numel() or int((codes[0] - codes[1]).abs().max()) <= 1, "key codes differ"

    return agree


def summed(first: float, second: float) -> Callable[[Any, Any], None]:
    """Two gradients within these of float32 sums in another order."""

    def agree(got: Any, want: Any) -> None:
        for a, b, limit in zip(got, want, (first, second), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
            off = most(a.double() - b.double())
            assert off <= limit + 1e-30, f"off by {off:g}, {limit:g} allowed"

    return agree


def most(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def listed(value: Any) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


def randn(draw: Draw, *shape: int, dtype: torch.dtype | None = None, size: float | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(draw.number(0, 2**31))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * (
        draw.pick(SIZES) if size is None else size
    )
    return x.to(draw.pick(FLOATS) if dtype is None else dtype)


def integers(draw: Draw, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    generator = torch.Generator().manual_seed(draw.number(0, 2**31))
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def tokens(draw: Draw) -> tuple[int, ...]:
    return draw.pick(((), (1,), (0,), (draw.number(1, 20),), (draw.number(0, 3), draw.number(0, 5))))


def transform(draw: Draw) -> tuple[Tensor | None, int]:
    k = draw.pick((1, 1, 12, 20))
    return had_k_matrix(k), k * 2 ** draw.number(0, 6 if k == 1 else 3)


def group(draw: Draw, features: int) -> int:
    return draw.pick((-1, *[g for g in (1, 2, 5, 16, 32, 64) if features % g == 0]))


def clip(draw: Draw) -> Tensor:
    return torch.tensor([draw.pick((0.9, 1.0, 0.6))])


def signed_clip(draw: Draw) -> Tensor:
    """Also a negative one: for ops that are exact, so that no rounding decides the sign of a scale."""
    return torch.tensor([draw.pick((0.9, 1.0, 0.6, -0.9, -1.0))])


def caches(draw: Draw, batch: int, heads: int, capacity: int, head_dim: int) -> list[Tensor]:
    codes = integers(draw, 0, 256, batch, heads, capacity, head_dim // 2, dtype=torch.uint8)
    params = randn(draw, batch, heads, capacity, 2, dtype=torch.float16, size=1.0)
    if draw.number(0, 1):  # tokens outermost, as views of another layout
        codes, params = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (codes, params))
    return [codes, params]


def starts(draw: Draw, batch: int, most: int) -> Tensor | None:
    if draw.number(0, 2):
        return None
    return torch.tensor([draw.number(0, most) for _ in range(batch)], dtype=torch.long)
