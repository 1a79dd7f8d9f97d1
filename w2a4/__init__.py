"""LLaMA with 2-bit non-uniform weights, 4-bit activations and a 4-bit KV cache.

Importing the package registers the `w2a4` quantiser, attention and mask with transformers, so that
`AutoModelForCausalLM.from_pretrained` reads packed checkpoints.
"""

from . import moved
from .errors import (
    CalibrationError,
    CheckpointError,
    RecipeError,
    RotationError,
    TrainingError,
    W2A4Error,
)
from .evaluate.report import Report
from .format.linear import W2A4Linear, W4A4Linear, W8Embedding, W8Linear, replace_linears
from .hub import transformers as _hub
from .hub.transformers import W2A4Config
from .hub.verification import verify
from .quantization.job import load_model, quantize, rotate, save
from .recipe import Recipe, RotationConfig, RotationLearning, Training
from .runtime.engine import Engine, Sampling
from .runtime.kv_cache import KV4Cache, KV4StaticCache
from .train.prepare import convert, prepare
from .version import VERSION

__version__ = VERSION

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
    "W4A4Linear",
    "W8Embedding",
    "W8Linear",
    "convert",
    "load_model",
    "prepare",
    "quantize",
    "replace_linears",
    "rotate",
    "save",
    "verify",
]

_hub.register()
moved.install()
