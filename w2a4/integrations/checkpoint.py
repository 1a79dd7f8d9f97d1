"""Directories that are written whole or not at all, and headers that are checked before loading."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

#: Raised when the layout of tensors or of quantization_config changes incompatibly.
FORMAT_VERSION = 1

#: safetensors' dtype names of the dtypes the format uses for packed tensors.
SAFETENSORS_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place when the block ends without an error.

    Files already in `path` that the block did not write are kept. A kill leaves `path` as it was and
    a folder `.<name>.tmp-*` beside it, which the next write to the same path removes.

    Raises:
        CheckpointError: `path` is a file.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    path = Path(os.path.abspath(path))
    if path.is_file():
        raise CheckpointError(f"{str(path)!r} is a file; give a directory to save into")
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        if path.is_dir():
            _merge(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _merge(temporary: Path, path: Path) -> None:
    """Move files over, config.json last: a checkpoint without it does not load as something else."""
    names = sorted((p.name for p in temporary.iterdir()), key=lambda name: name == "config.json")
    if "config.json" in names:
        (path / "config.json").unlink(missing_ok=True)
        for shard in path.glob("model*.safetensors*"):
            shard.unlink()
    for name in names:
        os.replace(temporary / name, path / name)


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
