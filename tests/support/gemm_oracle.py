"""The bits of the Triton GEMM, which with one scale a token rounds less often than the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from w2a4.ops import reference
from w2a4.ops.packing import unpack


def gemm(bits: int, args: tuple, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """`gemm_w2a4` or `gemm_w4a4`, whose arguments but for the last one `args` are.

    An fma is a float64 sum rounded to float32: float64 holds the product, and its own rounding of the sum
    matters once in 2**29.
    """
    a_codes, a_scale, weight, *levels, scale, bias, group = args
    if a_scale.shape[-1] != 1:
        return getattr(reference, f"linear_w{bits}a4")(*args, out_dtype)
    out, features = len(scale), scale.shape[1] * group
    a = unpack(a_codes, 4, features, signed=True).double().reshape(-1, features)
    if bits == 4:
        integers = unpack(weight, 4, features, signed=True)
    else:
        codes = unpack(weight, 2, features).long()
        integers = torch.gather(levels[0], 2, codes.unflatten(1, (-1, group))).flatten(1)
    acc = torch.zeros(len(a), out)
    for start in range(0, features, group):
        part = slice(start, start + group)
        exact = (a[:, part] @ integers[:, part].double().T).float().double()
        acc = (acc.double() + exact * scale[:, start // group].double()).float()
    y = acc * a_scale.reshape(-1, 1)
    y = y if bias is None else y + bias.float()
    return y.to(out_dtype).reshape(*a_codes.shape[:-1], out)
