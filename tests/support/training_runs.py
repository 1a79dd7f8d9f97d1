"""A small model, text and recipe to train with, and tokenizers of bytes."""

import torch

import w2a4
from support.packed import SHAPE
from support.tiny_models import tiny_llama
from w2a4.recipe import Training

TRAINING = Training(steps=6, batch_size=4, seqlen=24, micro_batch=2, lr=1e-3, quantizer_lr=2e-3, warmup=0.1)


def stream(tokens=600):
    """Text with something to predict: each token follows from the one before, most of the time."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(3, SHAPE["vocab_size"], (tokens,), generator=generator)
    keep = torch.rand(tokens, generator=generator) < 0.2
    ids = [5]
    for i in range(1, tokens):
        ids.append(int(noise[i]) if keep[i] else (ids[-1] * 7 + 11) % SHAPE["vocab_size"])
    return torch.tensor(ids)


def llama():
    return tiny_llama(dtype=torch.float32, **SHAPE)


class Letters:
    """A tokenizer of bytes, as far as training needs one."""

    bos_token_id = None

    def __call__(self, text, **kwargs):
        if isinstance(text, list):
            return {"input_ids": [self(each)["input_ids"] for each in text]}
        return {"input_ids": [3 + byte % 120 for byte in text.encode()]}


class Writer(Letters):
    """As Letters, and back."""

    eos_token, eos_token_id = "\n", 0

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(int(i) - 3) if i >= 35 else " " for i in ids)


def small_recipe(**changes):
    recipe = w2a4.Recipe.load("w2a4kv4").override(gptq_refine=0, calib_samples=8, calib_seqlen=32)
    changes = {"steps": 3, "batch_size": 2, "seqlen": 16, "lr": 1e-3, "data": "builtin", **changes}
    return recipe.override(**{f"training.{key}": value for key, value in changes.items()})
