"""Classes that stand in for transformers' own: under the same name, and with what pickle needs."""

from __future__ import annotations

import functools
from typing import Any


class Derived:
    """Base of mixins for `derived`: their instances are pickled and copied by the two classes' names.

    Pickle looks a class up by its name, and would find transformers' own.
    """

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _bare, type(self).__bases__, super().__reduce_ex__(protocol)[2]


@functools.cache
def derived(mixin: type, base: type) -> type:
    """`base` with what `mixin` changes, under base's name: device maps, recorded outputs and the
    `architectures` of a checkpoint go by that.
    """
    return type(
        base.__name__, (mixin, base), {"__module__": base.__module__, "__qualname__": base.__qualname__}
    )


def original(cls: type) -> type:
    """The class of transformers that a derived one stands for."""
    return cls.__bases__[1]


def _bare(mixin: type, base: type) -> Any:
    """An instance without any attribute, which pickle then fills."""
    return object.__new__(derived(mixin, base))
