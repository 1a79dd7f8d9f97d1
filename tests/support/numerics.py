"""The comparisons tests share: shape, dtype, places of NaN and infinity, worst element; codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from w2a4.ops.packing import unpack

#: Rounding to nearest float32 is off by at most this, relatively.
UNIT = 2.0**-24


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


def assert_quantized(
    got: tuple[Tensor, Tensor], exact: Tensor, error: Tensor, clip: Tensor, group: int = -1
) -> None:
    """`got` is `quantize_a4(exact, clip, group)` of values known to `error`, both float64 of one shape.

    Scales are within the error and their roundings; a code may be one off where the value lies within the
    error of a tie, and few values do.
    """
    codes, scale = got
    features = exact.shape[-1]
    group = features if group == -1 else group
    values, error = exact.unflatten(-1, (-1, group)), error.expand_as(exact).unflatten(-1, (-1, group))
    step = clip.double() / (8 if clip < 0 else 7)
    low, high = values.amin(-1), values.amax(-1)
    want = step * torch.where(-low >= high, low, high)
    if clip > 0:
        want = want.abs()
    else:  # where two numbers are as far from 0 but for the error, either gives the scale its sign
        undecided = (low + high).abs() <= 2 * error.amax(-1)
        want = torch.where(undecided & (want * scale < 0), -want, want)
    want = torch.where(want == 0, 1.0, want)
    # The largest magnitude carries its error; the product with clip and the quotient round once each.
    assert ((scale - want).abs() <= step.abs() * error.amax(-1) + 3 * UNIT * want.abs()).all()
    steps = values / scale.double()[..., None]
    allowed = error / scale.double()[..., None].abs() + 2 * UNIT * steps.abs()
    near_tie = ((steps - steps.floor() - 0.5).abs() <= allowed).flatten(-2)
    found = unpack(codes, 4, features, signed=True)
    wanted = steps.round().clamp(-8, 7).to(torch.int8).flatten(-2)
    assert ((found == wanted) | near_tie & ((found - wanted).abs() <= 1)).all()
    assert near_tie.double().mean() < 0.01 or near_tie.numel() < 200


def _place(where: Tensor, actual: Tensor, expected: Tensor) -> str:
    index = tuple(int(i) for i in where.nonzero()[0])
    return f"at {list(index)}: {actual[index].item()!r}, expected {expected[index].item()!r}"
