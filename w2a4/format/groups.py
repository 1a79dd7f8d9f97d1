"""Groups of inputs that share a scale: what a recipe asks for, and what a layer of some width can have."""

from __future__ import annotations

from ..errors import RecipeError

#: Group sizes `auto` tries, in this order; the first that divides `in_features` is taken.
AUTO_GROUP_SIZES = (128, 64, 32)


def resolve_group_size(in_features: int, group_size: int | str) -> int:
    """Inputs a group really has: `auto` and -1 become numbers, and a number must divide.

    >>> resolve_group_size(576, "auto"), resolve_group_size(1536, "auto"), resolve_group_size(90, -1)
    (64, 128, 90)
    """
    if group_size == "auto":
        return next((g for g in AUTO_GROUP_SIZES if in_features % g == 0), in_features)
    if group_size == -1:
        return in_features
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise RecipeError(f"group_size={group_size!r}: give a number >= 1, -1 (the whole row) or 'auto'")
    if in_features % group_size:
        fits = [g for g in (256, *AUTO_GROUP_SIZES) if in_features % g == 0]
        raise RecipeError(
            f"group_size={group_size} does not divide in_features={in_features}; "
            f"use one of {[*fits, -1]} (-1 is the whole row) or 'auto'"
        )
    return group_size


def resolve_act_group_size(in_features: int, act_group_size: int, group_size: int) -> int:
    """Activations that share a scale, -1 for all: a number must divide, and go with the weights' groups.

    >>> resolve_act_group_size(576, 64, 64), resolve_act_group_size(576, -1, 64)
    (64, -1)
    """
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
