"""Digests of every tensor in a safetensors file's metadata, and what config.json said beside them.

`w2a4.sha256` maps names to the SHA-256 of dtype, shape and bytes; `w2a4.recipe` holds the keys of
config.json that decide what the model computes. Files without them, as written before, are read as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from .files import replacing
from .headers import read_config, safetensors_metadata, shards_of

DIGESTS, CONFIG = "w2a4.sha256", "w2a4.recipe"

#: That digests are taken in: each has one or two gigabytes a second, and a disk not much more together.
MOST_THREADS = 8

_CHUNK = 1 << 22

#: Keys of config.json that decide what is computed, beside `quantization_config`.
_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "dtype",
    "rope_theta", "rope_scaling", "rope_parameters",
)  # fmt: skip

#: Those of some families, kept where a config has them: digests of before say nothing of them.
_FAMILY_KEYS = (
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers",
    "partial_rotary_factor",
)  # fmt: skip

#: Kinds of RoPE whose angles depend on how many positions a model says it has.
_ROPE_OF_LENGTH = ("dynamic", "longrope", "yarn")


def add_digests(directory: Path) -> None:
    """Put digests into the shards of a checkpoint just written."""
    config = json.dumps(_deciding(read_config(directory)), sort_keys=True)
    for shard in shards_of(directory):
        _rewrite(shard, config)


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a config; null where it says nothing, which is not the same as a default."""
    quantization = config.get("quantization_config") or {}
    kept = {key: config.get(key) for key in _KEYS}
    kept |= {key: config[key] for key in _FAMILY_KEYS if config.get(key) is not None}
    if config.get("model_type") != "llama":  # as for these keys: there was no other family
        kept["model_type"] = config.get("model_type")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in _ROPE_OF_LENGTH:
        kept["max_position_embeddings"] = config.get("max_position_embeddings")
    # In format 1 the recipe and the rotations were what a manifest is now.
    parts = ("manifest",) if "manifest" in quantization else ("recipe", "rotation")
    return kept | {key: quantization.get(key) for key in parts}


def _rewrite(shard: Path, config: str) -> None:
    """The same file with a larger header; digests are taken on the way, a header of their length first."""
    with shard.open("rb") as source, replacing(shard) as temporary, temporary.open("wb") as sink:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        metadata = header.setdefault("__metadata__", {"format": "pt"})
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        digests = {name: "0" * 64 for name in tensors}
        for final in (False, True):
            metadata |= {DIGESTS: json.dumps(digests), CONFIG: config}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            sink.seek(0)
            sink.write(len(text).to_bytes(8, "little") + text)
            if final:
                break
            for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
                digests[name] = _digest(source, entry, sink.write)


def _digest(source: BinaryIO, entry: Mapping[str, Any], write: Callable[[bytes], Any] = len) -> str:
    """Of the tensor that begins where `source` stands, which is also given to `write`."""
    begin, end = entry["data_offsets"]
    digest = hashlib.sha256(f"{entry['dtype']} {list(entry['shape'])} ".encode())
    left = end - begin
    while left:
        part = source.read(min(left, _CHUNK))
        if not part:
            raise CheckpointError("the file ends within a tensor; copy or download it again")
        digest.update(part)
        write(part)
        left -= len(part)
    return digest.hexdigest()


def compare_digests(shard: Path) -> int | None:
    """Compare the tensors of a shard with their digests, several at a time.

    Returns:
        tensors compared; None if there are no digests.

    Raises:
        CheckpointError: a tensor differs, or is not among those that were written.
    """
    metadata, entries, start = safetensors_metadata(shard)
    known = _parsed(shard, metadata, DIGESTS)
    if known is None:
        return None
    other = sorted(set(known) ^ set(entries))
    if other:
        raise CheckpointError(
            f"{shard.name}: {other[0]} was {'taken out' if other[0] in known else 'put in'} after it was "
            "written; copy or download it again"
        )

    def is_same(name: str) -> bool:
        with shard.open("rb") as file:
            file.seek(start + entries[name]["data_offsets"][0])
            return _digest(file, entries[name]) == known[name]

    names = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for name, same in zip(names, pool.map(is_same, names), strict=True):
            if not same:
                pool.shutdown(cancel_futures=True)
                raise CheckpointError(
                    f"{shard.name}: {name} is not what was written (its digest differs); copy or "
                    "download it again"
                )
    return len(names)


def compare_config(shard: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if config.json says something else than when the shard was written."""
    metadata, _, _ = safetensors_metadata(shard)
    known = _parsed(shard, metadata, CONFIG)
    found = json.loads(json.dumps(_deciding(config)))
    for key, value in (known or {}).items():
        if found.get(key) != value:
            was, now = _difference(value, found.get(key), key)
            raise CheckpointError(
                f"config.json says {now}; when the tensors were written it said {was}: copy "
                "or download it again"
            )


def _parsed(shard: Path, metadata: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    if key not in metadata:
        return None
    try:
        value = json.loads(metadata[key])
    except (ValueError, TypeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{shard.name}: its metadata {key} is damaged; copy or download it again")
    return value


def _difference(was: Any, now: Any, key: str) -> tuple[str, str]:
    """The first part that differs, named by its path."""
    while isinstance(was, dict) and isinstance(now, dict):
        part = next(k for k in (*was, *now) if was.get(k) != now.get(k) or (k in was) != (k in now))
        was, now, key = was.get(part), now.get(part), f"{key}.{part}"
    return f"{key} = {str(was)[:80]}", f"{key} = {str(now)[:80]}"
