"""The forward pass of a decoder layer, written once for all that compute one of their own.

Packed layers, calibration and the learning of rotations differ in what a step does, not in their order.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from .architecture import Architecture, Site

X = TypeVar("X")


class Steps(Protocol[X]):
    """What a layer is made of. X is the hidden states in whatever form: a tensor, or many."""

    def attention(self, hidden: X) -> X:
        """Norm, q/k/v and attention: what o_proj reads."""

    def mlp(self, hidden: X) -> X:
        """Norm, gate and up, and `act(gate) * up`: what down_proj reads."""

    def add(self, site: Site, x: X, hidden: X) -> X:
        """The site's linear of x, added to the hidden states."""


def decoder_layer(family: Architecture, steps: Steps[X], hidden: X) -> X:
    """Hidden states behind a layer, of those before it."""
    hidden = steps.add(family.attention_out, steps.attention(hidden), hidden)
    return steps.add(family.mlp_out, steps.mlp(hidden), hidden)
