"""Bit layouts of packed tensors. Each is drawn once, here; kernels refer to these drawings.

Codes lie along the last dimension, the first code in the lowest bits:

    2 bits, 4 codes a byte          4 bits, 2 codes a byte
    bit  7 6 | 5 4 | 3 2 | 1 0      bit  7 6 5 4 | 3 2 1 0
    code  3  |  2  |  1  |  0       code    1    |    0

The last byte of a row whose length does not fill it is padded with zero bits. Signed 4-bit codes
(-8..7, weights and activations) are two's complement, so a nibble moved to the upper half of a byte
is 16 times its value; unsigned ones (0..15, the KV cache) are stored as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError


def packed_width(length: int, bits: int) -> int:
    """Bytes that `length` codes of `bits` bits fill, e.g. `packed_width(5, 2) == 2`."""
    return -(-length * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes.

    Args:
        codes: integers `[..., n]`; -8..7 or 0..15 for 4 bits, 0..3 for 2 bits.
        bits: 2 or 4.

    Returns:
        uint8 `[..., packed_width(n, bits)]`.

    Raises:
        ValueError: a code does not fit.
    """
    low, high = {2: (0, 3), 4: (-8, 15)}[bits]
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
        raise ValueError(
            f"codes in {int(codes.min())}..{int(codes.max())} do not fit {bits} bits ({low}..{high})"
        )
    per_byte = 8 // bits
    codes = codes.to(torch.int16) & (2**bits - 1)
    pad = -codes.shape[-1] % per_byte
    codes = torch.nn.functional.pad(codes, (0, pad)).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(per_byte, dtype=torch.int16, device=codes.device) * bits
    return (codes << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, length: int, signed: bool = False) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 `[..., packed_width(length, bits)]`.
        bits: 2 or 4.
        length: codes in a row, n.
        signed: read 4-bit codes as two's complement.

    Returns:
        int8 `[..., n]`.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_width(length, bits):
        raise CheckpointError(
            f"packed codes are {packed.dtype} {tuple(packed.shape)}; {length} codes of {bits} bits "
            f"need uint8 with a last dimension of {packed_width(length, bits)}"
        )
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :length].to(torch.int8)
    return ((codes + 8) & 15) - 8 if signed else codes
