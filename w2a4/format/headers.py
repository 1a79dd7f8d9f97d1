"""What a checkpoint says of itself before a tensor is read: config.json, the index, safetensors headers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .directories import recover
from .files import read_text

#: Largest header of a safetensors file and largest config.json, in bytes: more is not read.
MAX_HEADER, MAX_CONFIG = 64 << 20, 1 << 20


def safetensors_header(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to dtype and shape of the tensors in a file, whose length is checked against its header."""
    _, entries, _ = safetensors_metadata(path)
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}


def safetensors_metadata(path: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], int]:
    """Metadata of a file, name to header entry, and where its tensors begin, in bytes."""
    path = Path(path)
    advice = "copy or download it again"
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f"{str(path)!r} is no regular file; {advice}")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= min(size, MAX_HEADER) else None
        metadata = header.pop("__metadata__", None) or {}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for entry in header.values():
            str(entry["dtype"]), tuple(entry["shape"]), metadata.keys()
    except FileNotFoundError:
        raise CheckpointError(f"{path.name!r} is missing in {str(path.parent)!r}; {advice}") from None
    except CheckpointError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
        raise CheckpointError(
            f"{str(path)!r} is no safetensors file or its header is damaged; {advice}"
        ) from None
    if size != 8 + length + end:
        raise CheckpointError(f"{str(path)!r} has {size} bytes, its header says {8 + length + end}; {advice}")
    return metadata, header, 8 + length


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a checkpoint; a writer of the directory that was killed is finished for first."""
    recover(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{str(directory)!r} is no checkpoint directory: it holds no config.json")
    try:
        config = json.loads(read_text(path, MAX_CONFIG))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(path)!r} holds {type(config).__name__}, not a mapping")
    _check_parts(path, config)
    return config


def _check_parts(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the parts of a config.json that w2a4 looks into are mappings."""
    quantization = config.get("quantization_config")
    parts = {"quantization_config": quantization}
    if isinstance(quantization, dict) and quantization.get("quant_method") == "w2a4":
        for key in ("manifest", "recipe", "rotation", "provenance"):
            parts[f"quantization_config.{key}"] = quantization.get(key)
        if isinstance(quantization.get("recipe"), dict):
            parts["quantization_config.recipe.rotation"] = quantization["recipe"].get("rotation")
    for name, part in parts.items():
        if part is not None and not isinstance(part, dict):
            raise CheckpointError(
                f"{str(path)!r} says {name}={str(part)[:60]!r}, not a mapping; it is damaged, copy or "
                "download it again"
            )


def shards_of(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint; those of other formats are told from damage."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        whole = directory / "model.safetensors"
        if not whole.exists() and any(directory.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{str(directory)!r} holds pytorch_model.bin, not model.safetensors; load it and save it "
                "again with save_pretrained"
            )
        return [whole]
    try:
        names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
        return [directory / Path(name).name for name in names]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{str(index)!r} is no safetensors index; copy or download it again") from None
