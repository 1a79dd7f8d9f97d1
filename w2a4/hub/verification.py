"""`verify`: whether a checkpoint on disk is whole, consistent, and what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError
from ..format.digests import compare_config, compare_digests
from ..format.headers import shards_of
from ..format.manifest import Replacement
from .checkpoint import check_headers, check_value, packed_tensors, signed_scales
from .consistency import bin_only, check_directory, is_packed
from .replaced import class_of
from .sources import check_source
from .transformers import W2A4Config, prepare_skeleton


def verify(directory: str | Path) -> dict[str, Any]:
    """Check a checkpoint directory without loading it: every tensor is read once, one at a time.

    What is compared: config.json with the tensors' names, shapes and dtypes and with the rotations that it
    rebuilds; values, which are finite, scales and clips not 0 and levels ascending; and every tensor and
    config.json with the digests that w2a4 wrote beside them. Files written before there were digests, or by
    others, have none.

    Args:
        directory: what `w2a4.save`, or any `save_pretrained` of a LLaMA, wrote. If its writer was killed,
            what it had begun is finished first.

    Returns:
        path, packed (by w2a4), files, tensors, bytes (of tensors), compared (tensors that had a digest).

    Raises:
        CheckpointError: the first thing that is wrong.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{str(directory)!r} is no directory; give one that holds a checkpoint")
    check_source(directory)
    if bin_only(directory):
        raise CheckpointError(
            f"{str(directory)!r} holds its weights as .bin, which cannot be verified; save it again with "
            "save_pretrained"
        )
    config = check_directory(directory)
    shards = shards_of(directory)
    compared = 0
    for shard in shards:
        compared += compare_digests(shard) or 0
        compare_config(shard, config)
    packed: set[str] = set()
    signed: set[str] = set()
    if is_packed(config):
        skeleton = _skeleton(directory, config)
        check_headers([str(shard) for shard in shards], skeleton)
        packed, signed = packed_tensors(skeleton), signed_scales(skeleton)
    sizes = [_check_values(shard, packed, signed) for shard in shards]
    return {
        "path": directory.resolve().name, "packed": is_packed(config), "files": [s.name for s in shards],
        "tensors": sum(count for count, _ in sizes), "bytes": sum(size for _, size in sizes),
        "compared": compared,
    }  # fmt: skip


def _skeleton(directory: Path, config: dict[str, Any]) -> nn.Module:
    """The packed model on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    about = {key: value for key, value in config["quantization_config"].items() if key != "quant_method"}
    try:
        quantization = W2A4Config(**about)
        replaced = isinstance(quantization.manifest, Replacement)
        described = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            if replaced:
                model = class_of(quantization.manifest, described)(described)
            else:
                model = AutoModelForCausalLM.from_config(described)
        prepare_skeleton(model, quantization)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"config.json describes no model: {reason}; download it again") from None
    return model


def _check_values(shard: Path, packed: set[str], signed: set[str]) -> tuple[int, int]:
    """Tensors of a shard and their bytes."""
    count = size = 0
    try:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                check_value(name, tensor, name in packed, name in signed)
                count += 1
                size += tensor.nbytes
    except SafetensorError as error:
        raise CheckpointError(f"{shard.name} cannot be read ({error}); copy or download it again") from None
    return count, size


def verdict(result: dict[str, Any]) -> str:
    """A line for people on what `verify` found."""
    what = f"{result['path']}: {result['tensors']} tensors, {result['bytes'] / 1e6:.1f} MB"
    if not result["compared"]:
        return f"{what}; consistent, but there are no digests to compare them with"
    return f"{what}; all as they were written"
