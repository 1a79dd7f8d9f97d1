"""Families of models: each is a table of sites in `families/`, from which everything else is derived.

To add a family, add one file there; `docs/porting.md` shows how.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from typing import Any

from ..errors import ArchitectureError
from . import families
from .architecture import Architecture, Linear, Rows, Site, head_dim
from .unsupported import FEATURES, REASONS

__all__ = [
    "Architecture",
    "Linear",
    "Rows",
    "Site",
    "head_dim",
    "names",
    "of_config",
    "of_model",
    "of_model_type",
]


@functools.cache
def names() -> tuple[str, ...]:
    """The `model_type` of every supported family."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(families.__path__)))


@functools.cache
def of_model_type(model_type: Any) -> Architecture:
    """The architecture of a family.

    Raises:
        ArchitectureError: no such family here; the message says what it would need, where that is known.
    """
    if model_type not in names():
        known, reason = ", ".join(names()), REASONS.get(model_type, "")
        near = difflib.get_close_matches(str(model_type), names(), n=1, cutoff=0.75)
        hint = f" ({reason})" if reason else f"; did you mean {near[0]!r}?" if near else ""
        raise ArchitectureError(
            f"model type {str(model_type)[:60]!r} is not supported{hint}; w2a4 reads {known}; "
            "w2a4.replace_linears packs the linears of any model, without rotations and KV cache"
        )
    return importlib.import_module(f".{model_type}", families.__name__).ARCHITECTURE


def of_config(config: Any) -> Architecture:
    """The architecture of a model by its configuration, whose features are checked.

    Raises:
        ArchitectureError: see `of_model_type`; or a feature is on that this package does not compute.
    """
    architecture = of_model_type(getattr(config, "model_type", None))
    for name, what in FEATURES.items():
        if (value := getattr(config, name, None)) not in (None, 0, False):
            raise ArchitectureError(
                f"config.json says {name}={str(value)[:40]}: {what} are not supported; give a model without"
            )
    return architecture


def of_model(model: Any) -> Architecture:
    """The architecture of a causal language model.

    Raises:
        ArchitectureError: see `of_config`; or a model of the family that is not its language model.
    """
    architecture = of_config(getattr(model, "config", None))
    if not is_language_model(model, architecture):
        raise ArchitectureError(
            f"{type(model).__name__} is not a {architecture.model_class}; give the language model as "
            "AutoModelForCausalLM loads it"
        )
    return architecture


def is_language_model(model: Any, architecture: Architecture) -> bool:
    """Whether a model is of the family's transformers class, or of one derived from it."""
    return any(
        kind.__name__ == architecture.model_class and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    )
