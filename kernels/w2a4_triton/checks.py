"""Checks of arguments: a failure names op and argument, quotes what was given and says what is expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = torch.float32, torch.float16, torch.bfloat16


def require(op: str, ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"w2a4.{op}: {message}")


def expect_tensor(
    op: str, device: torch.device, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple
) -> None:
    """A contiguous tensor of this device, dtype and shape."""
    where = f"{name} is on {tensor.device}, expected {device}; move all arguments to one device"
    require(op, tensor.device == device, where)
    require(op, tensor.dtype == dtype, f"{name} has dtype {tensor.dtype}, expected {dtype}")
    require(op, tensor.shape == shape, f"{name} has shape {[*tensor.shape]}, expected {[*shape]}")
    require(op, tensor.is_contiguous(), f"{name} of shape {[*tensor.shape]} is not contiguous")
