"""Groups of inputs that share a scale, and other numbers of a format that recipes and manifests share."""

from __future__ import annotations

from typing import Any

from ..errors import RecipeError, W2A4Error

#: Group sizes `auto` tries, in this order; the first that divides `in_features` is taken.
AUTO_GROUP_SIZES = (128, 64, 32)

#: What `fine` is, where it divides.
FINE_GROUP = 32

#: Most tokens of a prefix.
MOST_PREFIX = 4


def resolve_group_size(in_features: int, group_size: int | str) -> int:
    """Inputs a group really has: `auto`, `fine` (32) and -1 become numbers, and a number must divide.

    >>> resolve_group_size(576, "auto"), resolve_group_size(1536, "auto"), resolve_group_size(90, -1)
    (64, 128, 90)
    >>> resolve_group_size(1536, "fine"), resolve_group_size(90, "fine")
    (32, 90)
    """
    if group_size in ("auto", "fine"):
        tried = AUTO_GROUP_SIZES if group_size == "auto" else (FINE_GROUP,)
        return next((g for g in tried if in_features % g == 0), in_features)
    if group_size == -1:
        return in_features
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise RecipeError(
            f"group_size={group_size!r}: give a number >= 1, -1 (the whole row), 'auto' or 'fine'"
        )
    if in_features % group_size:
        fits = [g for g in (256, *AUTO_GROUP_SIZES) if in_features % g == 0]
        raise RecipeError(
            f"group_size={group_size} does not divide in_features={in_features}; "
            f"use one of {[*fits, -1]} (-1 is the whole row) or 'auto'"
        )
    return group_size


def resolve_act_group_size(in_features: int, act_group_size: int | str, group_size: int) -> int:
    """Activations that share a scale, -1 for all: a number must divide, and go with the weights' groups.

    >>> resolve_act_group_size(576, "auto", 64), resolve_act_group_size(576, -1, 64)
    (64, -1)
    """
    if act_group_size == "auto":
        act_group_size = group_size
    if act_group_size in (-1, in_features):
        return -1

    def fits(size: int) -> bool:
        return in_features % size == 0 and (group_size % size == 0 or size % group_size == 0)

    if not fits(act_group_size):
        raise RecipeError(
            f"act_group_size={act_group_size} must divide in_features={in_features}, and divide or be a "
            f"multiple of group_size={group_size}; use one of "
            f"{[*filter(fits, (256, *AUTO_GROUP_SIZES)), -1]} (-1 is the whole token)"
        )
    return act_group_size


def check_formats(config: Any, error: type[W2A4Error]) -> None:
    """Raise `error` for a group size, clip or number of bits that no model has.

    Args:
        config: a `Recipe` or a `Manifest`, the types of whose fields are checked already.
    """
    if isinstance(config.group_size, int) and config.group_size != -1 and config.group_size < 4:
        raise error(f"group_size={config.group_size}: give -1, 'auto', 'fine' or a number >= 4")
    if isinstance(config.act_group_size, int) and config.act_group_size != -1 and config.act_group_size < 4:
        raise error(f"act_group_size={config.act_group_size}: give -1, 'auto' or a number >= 4")
    if not 0 < config.kv_clip <= 1:
        raise error(f"kv_clip={config.kv_clip}: give a number in (0, 1]")
    if config.sink_tokens < 0:
        raise error(f"sink_tokens={config.sink_tokens}: give a number >= 0")
    if config.sink_tokens and getattr(config, "prefix", None):
        raise error(
            f"sink_tokens={config.sink_tokens} with a prefix of {len(config.prefix)} tokens: what begins a "
            "text is an ordinary token behind a prefix; set sink_tokens=0"
        )
    if config.weight_bits == 16 and config.act_bits == 4:
        raise error(
            "weight_bits=16 with act_bits=4: activations are quantised where weights are; "
            "set both to 16 or neither"
        )
