"""Arguments of kernels that csrc/simt runs: arrays of any alignment, with guards around them."""

import importlib.util

import numpy as np
import pytest
import torch

HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
NAMES = {F32: "float32", HALF: "float16", BF16: "bfloat16", torch.float64: "float64"}
SMALL, LARGE = 99 << 10, 227 << 10  # bytes of shared memory a block may have: sm_86, sm_90

#: A mark, since tests on a GPU take this module's helpers where nothing can be compiled.
NEEDS_PYBIND11 = pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="needs pybind11")


def numpy_of(x):
    return x.numpy() if x.dtype.itemsize != 2 else x.view(torch.int16).numpy().view(np.uint16)


def signs_of(had_k):
    return None if had_k is None else had_k.numpy()


def guarded(shape, dtype, offset=0):
    """A poisoned tensor, `offset` elements after a multiple of 16 bytes, and a check of its surroundings."""
    count = int(np.prod(shape))
    buffer = torch.frombuffer(bytearray(b"\xa5" * (count + 64) * dtype.itemsize), dtype=dtype)
    start = (-buffer.data_ptr() % 16 + 16) // dtype.itemsize + offset

    def intact():
        outside = torch.cat([buffer[:start], buffer[start + count :]])
        return bool((numpy_of(outside).view(np.uint8) == 0xA5).all())

    return buffer[start : start + count].view(shape), intact


def aligned(x, offset=0):
    """A copy of x whose data starts `offset` elements after a multiple of 16 bytes."""
    buffer = torch.empty(x.numel() + 64, dtype=x.dtype)
    start = -buffer.data_ptr() % 16 // x.dtype.itemsize + offset
    buffer[start : start + x.numel()] = x.flatten()
    return buffer[start : start + x.numel()].view(x.shape)
