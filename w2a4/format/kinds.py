"""Names of rotations, apart from the code that builds them, which imports torch."""

from __future__ import annotations

from typing import Literal

#: Rotations that a seed determines, so that they can be rebuilt when a model is loaded.
OnlineKind = Literal["none", "hadamard", "random_hadamard", "random"]

#: Rotations that are folded into weights may also be `learned`.
RotationKind = Literal["none", "hadamard", "random_hadamard", "random", "learned"]
