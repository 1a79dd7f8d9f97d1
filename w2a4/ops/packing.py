"""Bit layouts of packed tensors. Each is drawn once, here; kernels refer to these drawings.

Codes lie along the last dimension, the first code in the lowest bits:

    2 bits, 4 codes a byte          4 bits, 2 codes a byte
    bit  7 6 | 5 4 | 3 2 | 1 0      bit  7 6 5 4 | 3 2 1 0
    code  3  |  2  |  1  |  0       code    1    |    0

A row of 3-bit codes is two planes, one behind the other: the low two bits of all codes as 2-bit codes,
ceil(n / 4) bytes, then the high bit of all, ceil(n / 8) bytes.

    high bits, 8 codes a byte
    bit   7 | 6 | 5 | 4 | 3 | 2 | 1 | 0
    code  7 | 6 | 5 | 4 | 3 | 2 | 1 | 0

Eight codes in three bytes would be as small, but a byte of those holds parts of four codes at shifts of
their own. With planes the low bits lie as 2-bit weights do, so kernels keep the order of activations and
the loads of these, and put one bit of a second, aligned load on top.

The last byte of a row, or of a plane, that codes do not fill is padded with zero bits. Signed 4-bit codes
(-8..7, weights and activations) are two's complement, so a nibble moved to the upper half of a byte
is 16 times its value; unsigned ones (0..15, the KV cache) are stored as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError

#: Bits of a code in each plane of a row, the lowest first.
PLANES = {2: (2,), 3: (2, 1), 4: (4,)}


def packed_width(length: int, bits: int) -> int:
    """Bytes that `length` codes of `bits` bits fill, e.g. `packed_width(5, 2) == 2`."""
    return sum(-(-length * width // 8) for width in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes.

    Args:
        codes: integers `[..., n]`; -8..7 or 0..15 for 4 bits, 0..7 for 3, 0..3 for 2.
        bits: 2, 3 or 4.

    Returns:
        uint8 `[..., packed_width(n, bits)]`.

    Raises:
        ValueError: a code does not fit.
    """
    low, high = {2: (0, 3), 3: (0, 7), 4: (-8, 15)}[bits]
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
        raise ValueError(
            f"codes in {int(codes.min())}..{int(codes.max())} do not fit {bits} bits ({low}..{high})"
        )
    codes, planes = codes.to(torch.int16), []
    for width in PLANES[bits]:
        planes.append(_pack_plane(codes & (2**width - 1), width))
        codes = codes >> width
    return torch.cat(planes, -1)


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    """Codes int16 `[..., n]` of `width` bits as uint8 `[..., ceil(n * width / 8)]`."""
    per_byte = 8 // width
    pad = -codes.shape[-1] % per_byte
    codes = torch.nn.functional.pad(codes, (0, pad)).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(per_byte, dtype=torch.int16, device=codes.device) * width
    return (codes << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, length: int, signed: bool = False) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 `[..., packed_width(length, bits)]`.
        bits: 2, 3 or 4.
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
    widths = PLANES[bits]
    planes = packed.split([-(-length * width // 8) for width in widths], -1)
    codes, shift = _unpack_plane(planes[0], widths[0], length), widths[0]
    for plane, width in zip(planes[1:], widths[1:], strict=True):
        codes = codes | _unpack_plane(plane, width, length) << shift
        shift += width
    return ((codes + 8) & 15) - 8 if signed else codes


def _unpack_plane(packed: Tensor, width: int, length: int) -> Tensor:
    """Inverse of `_pack_plane`: int8 `[..., length]`."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**width - 1)).flatten(-2)[..., :length].to(torch.int8)
