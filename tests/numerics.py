"""The one comparison every test uses: shape, dtype, places of NaN and infinity, worst element."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(
    actual: Tensor, expected: Tensor, atol: float = 0.0, rtol: float = 0.0, what: str = ""
) -> None:
    """`|actual - expected| <= atol + rtol * |expected|` everywhere; exact (bit for bit) by default.

    Fails naming the shapes, dtypes or devices that differ, or the worst element and its place. NaN must
    be at the same places, and infinities equal.
    """
    prefix = f"{what}: " if what else ""
    for name in ("shape", "dtype", "device"):
        left, right = getattr(actual, name), getattr(expected, name)
        assert left == right, f"{prefix}{name} is {left}, expected {right}"
    if actual.numel() == 0:
        return
    if not actual.dtype.is_floating_point:
        actual, expected = actual.to(torch.int64), expected.to(torch.int64)
    nan = actual.isnan() != expected.isnan()
    assert not nan.any(), f"{prefix}NaN at different places, first {_place(nan, actual, expected)}"
    a, e = actual.double(), expected.double()
    infinite = (a.isinf() | e.isinf()) & (a != e)
    assert not infinite.any(), f"{prefix}infinities differ, first {_place(infinite, actual, expected)}"
    error = torch.where(a == e, 0.0, (a - e).abs()).nan_to_num(0.0)
    excess = error - (atol + rtol * e.abs()).nan_to_num(0.0)
    if (excess > 0).any():
        worst = excess == excess.max()
        raise AssertionError(
            f"{prefix}{int((excess > 0).sum())} of {a.numel()} elements differ by more than atol={atol:g} + "
            f"rtol={rtol:g} * |expected|, largest error {float(error.max()):g}, "
            f"worst {_place(worst, actual, expected)}"
        )


def _place(where: Tensor, actual: Tensor, expected: Tensor) -> str:
    index = tuple(int(i) for i in where.nonzero()[0])
    return f"at {list(index)}: {actual[index].item()!r}, expected {expected[index].item()!r}"
