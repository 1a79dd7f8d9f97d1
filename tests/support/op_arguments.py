"""What the tests of the ops share: dtypes, a small Hadamard matrix, and calls with one argument wrong."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from w2a4 import ops
from w2a4.ops import reference
from w2a4.ops.packing import pack

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def paley(q: int) -> torch.Tensor:
    """Hadamard matrix of order q + 1, int8, not symmetric, from the squares modulo a prime q = 3 mod 4."""
    squares = {i * i % q for i in range(1, q)}
    h = torch.ones(q + 1, q + 1, dtype=torch.int8)
    for i in range(q):
        h[i + 1, 0] = -1
        for j in range(q):
            h[i + 1, j + 1] = 1 if i == j else (1 if (j - i) % q in squares else -1)
    assert torch.equal(h.int() @ h.int().T, (q + 1) * torch.eye(q + 1, dtype=torch.int32))
    return h


HAD12 = paley(11)


def replaced(args, index, value):
    return [*args[:index], value, *args[index + 1 :]]


def bad_arguments(calls: Iterable[tuple]) -> list:
    """Test parameters of `(op, arguments, message)`; none where this build has no kernels to refuse them."""
    if not ops.build_info().startswith("w2a4._C: CPU"):
        return []
    return [pytest.param(*call, id=f"{call[0]}-{i}") for i, call in enumerate(calls)]


def assert_refused(name: str, args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as error:
        getattr(torch.ops.w2a4, name)(*args)
    assert name in str(error.value)


def opcheck(name: str, args: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.w2a4, name).default, args)


def linear_inputs(bits, tokens, out, features, group, act_group=-1, bias=None):
    """Arguments of the op up to `group_size`; every code occurs, and levels and codes reach their bounds.

    Scales of activations are of either sign, as with a negative clip.
    """
    x = torch.randn(*tokens, features) if isinstance(tokens, tuple) else torch.randn(tokens, features)
    a_codes, a_scale = reference.quantize_a4(x, torch.tensor([-0.6]), act_group)
    group = features if group == -1 else group
    scale = (torch.rand(out, features // group) + 0.1).half()
    bias = None if bias is None else torch.randn(out).to(bias)
    if bits == 4:
        weight = pack(torch.randint(-8, 8, (out, features), dtype=torch.int8), 4)
        scale[torch.rand(scale.shape) < 0.5] *= -1  # of either sign, as fits give them
        return a_codes, a_scale, weight, scale, bias, group
    weight = pack(torch.randint(0, 2**bits, (out, features), dtype=torch.int8), bits)
    levels = torch.randint(-128, 128, (out, features // group, 2**bits), dtype=torch.int8)
    levels[:, :, 0], levels[:, :, -1] = -128, 127
    return a_codes, a_scale, weight, levels, scale, bias, group
