"""Packed linears that read one input, held as one whose rows are all of theirs.

In a state dict, and so in a checkpoint, each keeps its own name: the module that holds the joint one splits
its rows when it is saved, and joins them when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import W2A4Error
from ..format.linear import _PackedLinear

#: Tensors that have rows; `act_clip` is one for all.
_ROWS = ("weight", "levels", "scale", "bias")


def can_join(linears: list[nn.Module]) -> bool:
    """They are packed alike and quantise their input alike, so that one can stand for all."""

    def settings(linear: _PackedLinear) -> tuple[Any, ...]:
        return (
            type(linear), linear.in_features, linear.group_size, linear.act_bits, linear.act_group_size,
            linear.rotation, linear.bias is None, linear.weight.device, linear.scale.device,
        )  # fmt: skip

    if not all(isinstance(linear, _PackedLinear) for linear in linears) or linears[0].weight.is_meta:
        return False
    first = linears[0]
    same = all(settings(linear) == settings(first) for linear in linears)
    return same and (first.act_bits == 16 or all(torch.equal(li.act_clip, first.act_clip) for li in linears))


def join(parent: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    """Put one linear into `parent` in place of its `parts`, which `can_join`."""
    linears = [parent.get_submodule(part) for part in parts]
    first = linears[0]
    joint = type(first)(
        first.in_features, sum(linear.out_features for linear in linears), first.bias is not None,
        first.group_size, act_bits=first.act_bits, act_group_size=first.act_group_size,
        rotation=first.rotation, device="meta",
    )  # fmt: skip
    with torch.inference_mode(False), torch.no_grad():
        for key in _ROWS:
            if first._parameters.get(key) is not None:
                rows = torch.cat([linear._parameters[key] for linear in linears])
                joint._parameters[key] = nn.Parameter(rows, requires_grad=False)
    if first.act_bits == 4:
        joint._parameters["act_clip"] = first.act_clip
    for part in parts:
        delattr(parent, part)
    parent.add_module(name, joint.train(first.training))
    parent.__dict__["joint"] = name, dict(zip(parts, (li.out_features for li in linears), strict=True))
    parent.register_state_dict_post_hook(_split)
    parent.register_load_state_dict_pre_hook(_gather)


def refuse_part(parent: nn.Module, name: str, value: Any) -> None:
    """Raise W2A4Error where somebody puts a module in place of a part, which nothing would call."""
    joint = parent.__dict__.get("joint")
    if joint is not None and isinstance(value, nn.Module) and name in joint[1]:
        raise W2A4Error(
            f"{name} is a part of {joint[0]} in a packed layer; replace that, whose rows are "
            f"{', '.join(joint[1])} in this order, or replace {name} before quantising"
        )


def split(parent: nn.Module) -> None:
    """Put the parts of a joint linear back in its place, each with its own memory; nothing where none is."""
    joint = parent.__dict__.pop("joint", None)
    if joint is None:
        return
    name, rows = joint
    whole = parent.get_submodule(name)
    delattr(parent, name)
    for part, linear in zip(rows, views(whole, list(rows.values())), strict=True):
        for key, value in linear._parameters.items():
            if value is not None:
                linear._parameters[key] = nn.Parameter(value.detach().clone(), requires_grad=False)
        parent.add_module(part, linear.train(whole.training))


def rows_of(parent: nn.Module) -> list[int]:
    """Rows of each part of the joint linear of a module, in order; empty if it has none."""
    return list(parent.joint[1].values()) if "joint" in parent.__dict__ else []


def views(joint: _PackedLinear, rows: list[int]) -> list[_PackedLinear]:
    """Linears of some of the rows each, which read the memory of the joint one; not modules of a model."""
    kept, own = joint.__dict__.get("_views"), joint._parameters
    key = [(name, p.data_ptr(), p.dtype, p.device) for name, p in own.items() if p is not None]
    if kept is None or kept[0] != key:
        made = []
        for index, outputs in enumerate(rows):
            part = type(joint)(
                joint.in_features, outputs, joint.bias is not None, joint.group_size,
                act_bits=joint.act_bits, act_group_size=joint.act_group_size, device="meta",
            )  # fmt: skip
            for name in _ROWS:
                if joint._parameters.get(name) is not None:
                    part._parameters[name] = joint._parameters[name].split(rows)[index]
            if joint.act_bits == 4:
                part._parameters["act_clip"] = joint._parameters["act_clip"]
            made.append(part)
        joint.__dict__["_views"] = kept = key, made
    return kept[1]


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As the model's own, but parts, see `views`, in place of joint linears: a checkpoint's names."""
    joints: dict[str, tuple[str, dict[str, int]]] = {}
    for name, module in model.named_modules():
        if "joint" in module.__dict__ and isinstance(getattr(module, module.joint[0]), _PackedLinear):
            joints[f"{name}.{module.joint[0]}"] = name, module.joint[1]
        if name in joints:
            parent, rows = joints[name]
            for part, linear in zip(rows, views(module, list(rows.values())), strict=True):
                yield f"{parent}.{part}", linear
        else:
            yield name, module


def _split(parent: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state dict with the parts in place of the joint linear."""
    if "joint" not in parent.__dict__:
        return  # they were split for good
    name, parts = parent.joint
    if not isinstance(parent.get_submodule(name), _PackedLinear):
        return  # wrapped in a module, which has names of its own
    whole = f"{prefix}{name}."
    for key in [key for key in state if key.startswith(whole)]:
        value, tail = state.pop(key), key.removeprefix(whole)
        pieces = value.split(list(parts.values())) if tail in _ROWS else [value.clone() for _ in parts]
        for part, piece in zip(parts, pieces, strict=True):
            state[f"{prefix}{part}.{tail}"] = piece


def _gather(
    parent: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
    unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Join the parts of a state dict that is about to be loaded; rows of parts that are not there stay."""
    if "joint" not in parent.__dict__:
        return
    name, parts = parent.joint
    whole: nn.Module = parent.get_submodule(name)
    if not isinstance(whole, _PackedLinear):
        return  # wrapped in a module, which has names of its own
    for tail, own in whole._parameters.items():
        if own is None or f"{prefix}{name}.{tail}" in state:
            continue
        present = own.split(list(parts.values())) if tail in _ROWS else [own] * len(parts)
        found = []
        for part, here in zip(parts, present, strict=True):
            value = state.pop(key := f"{prefix}{part}.{tail}", None)
            if value is None:
                missing.append(key)
            elif value.shape != here.shape:
                errors.append(f"size mismatch for {key}: {[*value.shape]}, and here it is {[*here.shape]}")
            found.append(here if value is None or value.shape != here.shape else value)
        if tail == "act_clip" and not all(torch.equal(value, found[0]) for value in found):
            errors.append(
                f"{', '.join(f'{prefix}{part}.act_clip' for part in parts)} differ, and these are one linear "
                "here, which reads its input once; save a checkpoint with these values and load it with "
                "from_pretrained"
            )
        state[f"{prefix}{name}.{tail}"] = torch.cat(found) if tail in _ROWS else found[0]
