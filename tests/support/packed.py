"""Tiny packed models for tests, made once a process."""

import copy
import functools
import json

import torch

import w2a4
from support.tiny_models import tiny_llama

#: hidden 96, three query heads of 32 on one KV head, FFN 176 = 44 * 4: groups of 32 or rows.
SHAPE = dict(
    hidden_size=96,
    intermediate_size=176,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    num_hidden_layers=2,
    vocab_size=131,
    eos_token_id=None,
)


def calibration(samples: int = 8, tokens: int = 32) -> torch.Tensor:
    return torch.randint(
        0, SHAPE["vocab_size"], (samples, tokens), generator=torch.Generator().manual_seed(5)
    )


def prompt(batch: int = 1, tokens: int = 9, seed: int = 6) -> torch.Tensor:
    return torch.randint(
        3, SHAPE["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed)
    )


@functools.cache
def _packed(overrides: str):
    shape, recipe = json.loads(overrides)
    model = tiny_llama(dtype=torch.float32, **{**SHAPE, **shape})
    recipe = w2a4.Recipe.load("w2a4kv4").override(**recipe)
    w2a4.quantize(model, None, recipe, calibration(), progress=False)
    return model


def packed_model(shape: dict | None = None, **recipe):
    """A fresh copy of a quantised tiny LLaMA; keywords override the recipe `w2a4kv4`."""
    return copy.deepcopy(_packed(json.dumps([shape or {}, recipe], sort_keys=True)))


def logits(model, ids):
    """Logits `[batch, tokens, vocabulary]` of a pass without a cache."""
    with torch.inference_mode():
        return model(ids, use_cache=False).logits
