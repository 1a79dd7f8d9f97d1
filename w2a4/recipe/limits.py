"""Limits that every part of a recipe shares, and the schema that checks them."""

from __future__ import annotations

from ..errors import RecipeError
from ..format.schema import Schema

#: No number of a recipe is larger: products with a layer's or a step's number still fit 64 bits.
LARGEST = 2**32 - 1

#: Rounds of coordinate descent, of which the first few change nearly all that is to change.
MOST_ROUNDS = 1000

SCHEMA = Schema("recipe", RecipeError, LARGEST)
