"""What a checkpoint must be: its headers, checked before any tensor is read."""

from __future__ import annotations

import os  # noqa: F401
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..directories import atomic_directory as atomic_directory
from ..errors import CheckpointError

#: Raised when the layout of tensors or of quantization_config changes incompatibly.
FORMAT_VERSION = 1

#: safetensors' dtype names of the dtypes the format uses for packed tensors.
SAFETENSORS_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}


def check_headers(files: list[str], expected: dict[str, torch.Tensor]) -> None:
    """Compare safetensors headers with the tensors a model expects, before any is read.

    Args:
        files: the shards.
        expected: name to tensor, on any device (`model.state_dict()` of a meta model).

    Raises:
        CheckpointError: a shard that cannot be read, a tensor missing, or of another shape or dtype.
    """
    found: dict[str, tuple[list[int], str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    view = shard.get_slice(name)
                    found[name] = (view.get_shape(), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{Path(file).name} cannot be read ({error}); it is truncated or damaged, "
                "download or write it again"
            ) from None
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(
                f"{name} is missing from the checkpoint; a shard is missing or of another model"
            )
        shape, dtype = found[name]
        wanted = SAFETENSORS_DTYPES.get(tensor.dtype)
        packed = tensor.dtype in (torch.uint8, torch.int8) or name.endswith((".scale", ".act_clip"))
        if list(shape) != list(tensor.shape) or (packed and dtype != wanted):
            raise CheckpointError(
                f"{name} is {dtype} {list(shape)}, expected {wanted or tensor.dtype} {list(tensor.shape)}; "
                "the checkpoint is damaged or of another model"
            )
