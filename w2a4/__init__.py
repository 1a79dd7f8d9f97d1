"""LLaMA with 2-bit non-uniform weights, 4-bit activations and a 4-bit KV cache.

Importing the package makes the quantiser `w2a4` known to transformers, imported before or later, so that
`AutoModelForCausalLM.from_pretrained` reads packed checkpoints. Names are imported when they are first used,
since torch and transformers take seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import moved
from .errors import (
    CalibrationError,
    CheckpointError,
    RecipeError,
    RotationError,
    TrainingError,
    W2A4Error,
)
from .hub import plugin
from .version import VERSION

if TYPE_CHECKING:
    from . import arch as arch
    from . import evaluate as evaluate
    from . import format as format
    from . import hub as hub
    from . import ops as ops
    from . import quantization as quantization
    from . import recipe as recipe
    from . import runtime as runtime
    from . import train as train
    from .evaluate.report import Report
    from .format.linear import W2A4Linear, W3A4Linear, W4A4Linear, W8Embedding, W8Linear
    from .hub.replace import replace_linears
    from .hub.transformers import W2A4Config
    from .hub.verification import verify
    from .quantization.job import load_model, quantize, rotate, save
    from .recipe import Recipe, RotationConfig, RotationLearning, Training
    from .runtime.engine import Engine, Sampling
    from .runtime.kv_cache import KV4Cache, KV4StaticCache
    from .train.adapters import prepare_for_adapters
    from .train.prepare import convert, prepare

__version__ = VERSION

#: Where public names are; the block above says the same to type checkers.
_NAMES = {
    "Engine": "runtime.engine",
    "KV4Cache": "runtime.kv_cache",
    "KV4StaticCache": "runtime.kv_cache",
    "Recipe": "recipe",
    "Report": "evaluate.report",
    "RotationConfig": "recipe",
    "RotationLearning": "recipe",
    "Sampling": "runtime.engine",
    "Training": "recipe",
    "W2A4Config": "hub.transformers",
    "W2A4Linear": "format.linear",
    "W3A4Linear": "format.linear",
    "W4A4Linear": "format.linear",
    "W8Embedding": "format.linear",
    "W8Linear": "format.linear",
    "convert": "train.prepare",
    "load_model": "quantization.job",
    "prepare": "train.prepare",
    "prepare_for_adapters": "train.adapters",
    "quantize": "quantization.job",
    "replace_linears": "hub.replace",
    "rotate": "quantization.job",
    "save": "quantization.job",
    "verify": "hub.verification",
}
_FOLDERS = ("arch", "evaluate", "format", "hub", "ops", "quantization", "recipe", "runtime", "train")

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "Engine",
    "KV4Cache",
    "KV4StaticCache",
    "Recipe",
    "RecipeError",
    "Report",
    "RotationConfig",
    "RotationError",
    "RotationLearning",
    "Sampling",
    "Training",
    "TrainingError",
    "W2A4Config",
    "W2A4Error",
    "W2A4Linear",
    "W3A4Linear",
    "W4A4Linear",
    "W8Embedding",
    "W8Linear",
    "convert",
    "load_model",
    "prepare",
    "prepare_for_adapters",
    "quantize",
    "replace_linears",
    "rotate",
    "save",
    "verify",
]


if not TYPE_CHECKING:  # or type checkers would take any name for a public one

    def __getattr__(name: str) -> Any:
        if name in _FOLDERS:
            return importlib.import_module(f".{name}", __name__)
        if name not in _NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})


plugin.install()
moved.install()
