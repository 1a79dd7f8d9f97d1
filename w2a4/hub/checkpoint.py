"""What a checkpoint must be: its headers, checked before any tensor is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError, shown
from ..format.digests import compare_config, compare_digests
from ..format.directories import atomic_directory as atomic_directory
from ..format.directories import is_unfinished
from ..format.headers import read_config, shards_of
from ..format.linear import _PackedModule
from .consistency import FLOATS, LIMITS, bin_only, check_any_sizes, check_directory, check_sizes, is_packed
from .replace import tied_parameters

#: safetensors' dtype names of the dtypes the format uses for packed tensors, and of those of buffers.
SAFETENSORS_DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32",
    torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


def packed_tensors(model: nn.Module) -> set[str]:
    """Names of the tensors of a model whose dtype is part of the format."""
    return {
        f"{name}.{tensor}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _PackedModule)
        for tensor in module._format
    }


def signed_scales(model: nn.Module) -> set[str]:
    """Names of the scales that may be negative."""
    modules = model.named_modules(remove_duplicate=False)
    return {f"{name}.scale" for name, module in modules if getattr(module, "_signed_scales", False)}


def check_headers(files: list[str], model: nn.Module) -> None:
    """Compare safetensors headers with the tensors a model expects, before any is read.

    Tensors are compared with their digests, and config.json with what it was when they were written.

    Args:
        files: the shards.
        model: what they are of, on any device. Tensors that are tied may be missing.

    Raises:
        CheckpointError: a shard that cannot be read, a tensor missing, too many, of another shape or dtype,
            or not what was written.
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
    expected, packed = model.state_dict(), packed_tensors(model)
    tied = tied_parameters(model) - packed
    for name, tensor in expected.items():
        if name not in found and name in tied:
            continue
        if name not in found:
            raise CheckpointError(
                f"{name} is missing from the checkpoint; a shard is missing or of another model"
            )
        _check_kind(name, *found[name], tensor, name in packed)
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise CheckpointError(
            f"the checkpoint holds {unknown[0]}, which its config.json does not ask for; one of them is of "
            "another model"
        )
    for file in files:
        compare_digests(Path(file))


def _check_kind(name: str, shape: list[int], dtype: str, tensor: torch.Tensor, packed: bool) -> None:
    wanted = SAFETENSORS_DTYPES.get(tensor.dtype)
    right = dtype == wanted if packed or not tensor.is_floating_point() else dtype in FLOATS
    if list(shape) != list(tensor.shape) or not right:
        raise CheckpointError(
            f"{name} is {dtype} {list(shape)}, expected {wanted or tensor.dtype} {list(tensor.shape)}; "
            "the checkpoint is damaged or of another model"
        )


def check_config(config: Any, any_family: bool = False) -> None:
    """The config of a packed model before anything is built of it: its sizes, and those of its tensors.

    Args:
        config: as transformers has read it; where it comes from a directory, that is looked at.
        any_family: the model is of any class, and some of its linears were replaced.

    Raises:
        CheckpointError: sizes that no model has, or that the tensors do not have.
    """
    if any_family:
        check_any_sizes(config.to_dict())
    else:
        check_sizes({name: getattr(config, name, None) for name in ("model_type", *LIMITS)})
    directory = Path(getattr(config, "_name_or_path", "") or os.devnull)
    if (directory / "config.json").is_file():
        check_config_beside([str(directory / "config.json")], digests=False)


def check_config_beside(files: list[str], digests: bool = True) -> None:
    """The config.json that lies beside the shards against them; see `consistency` and `digests`."""
    directory = Path(os.path.dirname(files[0]))
    if is_unfinished(directory):
        raise CheckpointError(
            f"{str(directory)!r} was being written when its writer was killed; w2a4 verify finishes that"
        )
    if not (directory / "config.json").is_file():
        return
    config = read_config(directory)
    if is_packed(config):
        check_directory(directory)
        for file in files if digests else ():
            compare_config(Path(file), config)


def local_shards(config: Any) -> list[str] | None:
    """The safetensors files that a config was read beside; None where that is no directory or has none."""
    directory = Path(getattr(config, "_name_or_path", "") or os.devnull)
    if not (directory / "config.json").is_file() or bin_only(directory):
        return None
    return list(map(str, shards_of(directory)))


def check_placement(device_map: Any) -> None:
    """Raise CheckpointError if accelerate would offload part of a packed model.

    Args:
        device_map: device by module, as transformers was given it or has made it (`hf_device_map`).
    """
    if not isinstance(device_map, dict):
        return
    places = {name: str(place) for name, place in device_map.items()}
    several = len(set(places.values())) > 1
    for name, place in places.items():
        if place == "disk" or (place == "cpu" and several):
            raise CheckpointError(
                f"device_map keeps {name or 'the model'} on {place}: packed models are not offloaded; give "
                "GPUs everywhere or 'cpu' everywhere, or more max_memory"
            )


def check_parallel(model: nn.Module) -> None:
    """Raise CheckpointError if transformers is to split the linears of a packed model among processes."""
    asked = getattr(model.config, "distributed_config", None)
    if asked is not None:
        raise CheckpointError(
            f"distributed_config={shown(asked)}: the rows and groups of packed linears are not split by "
            "tensor parallelism; leave tp_plan, tp_size and distributed_config out"
        )


@torch.no_grad()
def check_values(model: nn.Module) -> None:
    """Raise CheckpointError if a tensor that is not packed is not finite, or levels do not ascend."""
    packed, signed = packed_tensors(model), signed_scales(model)
    for name, value in model.named_parameters():
        if value.device.type != "meta":
            check_value(name, value, name in packed, name in signed)


def check_value(name: str, value: torch.Tensor, packed: bool, signed: bool) -> None:
    """The same for one tensor; clips and scales of `signed_scales` are not 0 besides, others positive."""
    if value.is_floating_point():
        positive = packed and name.endswith(".scale")
        signed = signed or packed and name.endswith(".act_clip")
        rule = " and not 0" if signed else " and positive" if positive else ""
        for part in value.detach().reshape(-1).split(1 << 24):
            good = torch.isfinite(part)
            if rule:
                good &= (part.abs() if signed else part) > 0
            if not bool(good.all()):
                raise CheckpointError(
                    f"{name} holds {float(part[~good][0])}, but its values are finite{rule}; the checkpoint "
                    "is damaged"
                )
    elif packed and name.endswith(".levels") and not bool((value[..., 1:] >= value[..., :-1]).all()):
        raise CheckpointError(f"{name} does not ascend; the checkpoint is damaged or not of w2a4")
