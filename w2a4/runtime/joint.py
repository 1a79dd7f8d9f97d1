"""Packed linears that read one input, held as one whose rows are all of theirs.

In a state dict, and so in a checkpoint, each keeps its own name: the module that holds the joint one splits
its rows when it is saved, and joins them when it is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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


def rows_of(parent: nn.Module) -> list[int]:
    """Rows of each part of the joint linear of a module, in order; empty if it has none."""
    return list(parent.joint[1].values()) if "joint" in parent.__dict__ else []


def views(joint: _PackedLinear, rows: list[int]) -> list[_PackedLinear]:
    """Linears of some of the rows each, which read the memory of the joint one; not modules of a model."""
    kept = joint.__dict__.get("_views")
    weight = joint._parameters["weight"]
    if kept is None or kept[0] != (weight.data_ptr(), weight.device):
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
        joint.__dict__["_views"] = kept = (weight.data_ptr(), weight.device), made
    return kept[1]


def _split(parent: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state dict with the parts in place of the joint linear."""
    name, parts = parent.joint
    whole = f"{prefix}{name}."
    for key in [key for key in state if key.startswith(whole)]:
        value, tail = state.pop(key), key.removeprefix(whole)
        if tail not in (*_ROWS, "act_clip"):
            state[key] = value  # of what somebody wrapped it in
            continue
        pieces = value.split(list(parts.values())) if tail in _ROWS else [value.clone() for _ in parts]
        for part, piece in zip(parts, pieces, strict=True):
            state[f"{prefix}{part}.{tail}"] = piece


def _gather(parent: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Join the parts of a state dict that is about to be loaded, where all are there."""
    name, parts = parent.joint
    for tail in (*_ROWS, "act_clip"):
        keys = [f"{prefix}{part}.{tail}" for part in parts]
        found = [state[key] for key in keys if key in state]
        if not found:
            continue
        *_, errors = rest
        own: Tensor | None = parent.get_submodule(name)._parameters.get(tail)
        if len(found) < len(keys):
            found = _completed(own, [state.get(key) for key in keys], parts, tail)
        if tail == "act_clip" and not all(torch.equal(value, found[0]) for value in found):
            errors.append(
                f"{', '.join(keys)} differ, and {', '.join(parts)} are one linear here, which reads its "
                "input once; save a checkpoint with these values and load it with from_pretrained"
            )
        for key in keys:
            state.pop(key, None)
        state[f"{prefix}{name}.{tail}"] = found[0] if tail == "act_clip" else torch.cat(found)


def _completed(own: Tensor, found: list[Tensor | None], parts: dict[str, int], tail: str) -> list[Tensor]:
    """The rows given, and the present ones of parts that are not."""
    present = own.split(list(parts.values())) if tail in _ROWS else [own] * len(parts)
    return [here if value is None else value for here, value in zip(present, found, strict=True)]
