"""LLaMA with 2-bit non-uniform weights, 4-bit activations and a 4-bit KV cache.

Importing the package registers the `w2a4` quantiser, attention and mask with transformers, so that
`AutoModelForCausalLM.from_pretrained` reads packed checkpoints.
"""

from .config import Recipe, RotationConfig, RotationLearning, Training
from .engine import Engine, Sampling
from .errors import (
    CalibrationError,
    CheckpointError,
    RecipeError,
    RotationError,
    TrainingError,
    W2A4Error,
)
from .integrations import hf
from .integrations.hf import W2A4Config
from .integrations.kv_cache import KV4Cache, KV4StaticCache
from .layers import W2A4Linear, W4A4Linear, W8Embedding, W8Linear, replace_linears
from .pipeline import load_model, quantize, rotate, save
from .report import Report
from .training.prepare import convert, prepare
from .verification import verify
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

hf.register()
