"""Bit layouts: every code at every place, every row length, and what does not fit."""

import pytest
import torch

from support.numerics import assert_close
from w2a4.errors import CheckpointError
from w2a4.ops.packing import pack, packed_width, unpack

RANGES = {
    "2": (2, False, 0, 3),
    "3": (3, False, 0, 7),
    "unsigned 4": (4, False, 0, 15),
    "signed 4": (4, True, -8, 7),
}


@pytest.mark.parametrize("kind", [kind for kind in RANGES if kind != "3"])
def test_every_byte_is_every_tuple_of_codes(kind):
    bits, signed, low, high = RANGES[kind]
    codes = torch.arange(low, high + 1, dtype=torch.int8)
    rows = torch.cartesian_prod(*[codes] * (8 // bits))
    packed = pack(rows, bits)
    assert packed.shape == (256, 1) and packed.unique().numel() == 256
    assert_close(unpack(packed, bits, 8 // bits, signed), rows)


def test_layout_is_the_one_drawn():
    assert pack(torch.tensor([3, 2, 1, 0]), 2).tolist() == [0b00_01_10_11]
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([-1, -8]), 4).tolist() == [0x8F]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 4])
    assert pack(codes, 3).tolist() == [0b11_10_01_00, 0b11_10_01_00, 0b00, 0b1111_0000, 0b1]
    codes = torch.randint(0, 8, (3, 21))
    low, high = pack(codes, 3).split([6, 3], -1)
    assert_close(low, pack(codes & 3, 2))
    top = high.repeat_interleave(8, 1)[:, :21] >> torch.arange(21) % 8 & 1
    assert_close(unpack(low, 2, 21) + 4 * top.char(), codes.char())


@pytest.mark.parametrize("length,width", [(0, 0), (1, 2), (4, 2), (5, 3), (8, 3), (9, 5), (128, 48)])
def test_width_of_three_bits(length, width):
    assert packed_width(length, 3) == width == pack(torch.zeros(length, dtype=torch.int8), 3).numel()


@pytest.mark.parametrize("length", range(34))
@pytest.mark.parametrize("kind", RANGES)
def test_round_trip_of_every_length(kind, length):
    bits, signed, low, high = RANGES[kind]
    codes = torch.randint(low, high + 1, (3, length), dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, packed_width(length, bits))
    assert_close(unpack(packed, bits, length, signed), codes)
    last = bits if bits != 3 else 1  # of the last plane
    if length * last % 8:
        assert int((packed[:, -1] >> (length * last % 8)).max()) == 0, "padding is not zero"


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0), (2, 0, 7)])
def test_empty(shape):
    codes = torch.zeros(shape, dtype=torch.int8)
    assert_close(unpack(pack(codes, 2), 2, shape[-1]), codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_codes_of_any_integer_dtype(dtype):
    codes = torch.arange(4, dtype=dtype)
    assert_close(pack(codes, 2), torch.tensor([0b11_10_01_00], dtype=torch.uint8))


@pytest.mark.parametrize("bits,bad", [(2, 4), (2, -1), (3, 8), (3, -1), (4, 16), (4, -9)])
def test_code_that_does_not_fit(bits, bad):
    with pytest.raises(ValueError, match=f"{bad}.*{bits} bits"):
        pack(torch.tensor([0, bad]), bits)


def test_unpack_of_wrong_width_or_dtype():
    with pytest.raises(CheckpointError, match="9 codes of 2 bits.*3"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 2, 9)
    with pytest.raises(CheckpointError, match="int8"):
        unpack(torch.zeros(2, 4, dtype=torch.int8), 4, 8)
