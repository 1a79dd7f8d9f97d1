"""Keyword arguments that transformers hands to models and layers, whose names change between its versions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import __version__
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from ..errors import W2A4Error

#: The cache, by the newest name first: transformers 5.24 renamed it.
CACHE_NAMES = ("cache", "past_key_values")

#: Arguments of a layer that change nothing in what it computes here: positions are in cos and sin, whether a
#: cache is used is seen by the cache, and the rest is for the model around the layer, or for `generate`,
#: whose tokenizers (for `stop_strings` and assistants) come through to here.
WITHOUT_EFFECT = frozenset({
    "position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict",
    "num_items_in_batch", "tokenizer", "assistant_tokenizer",
})  # fmt: skip

NO_WEIGHTS = (
    "output_attentions=True: the attention of w2a4 never has its weights in memory; leave it out, or ask the "
    "original model, or one with kv_bits=16 after model.set_attn_implementation('eager')"
)


def cache_name(forward: Callable[..., Any]) -> str:
    """What this forward of a model or a layer calls the cache."""
    known = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[0])


#: What a LLaMA of this transformers calls the cache.
CACHE = cache_name(LlamaForCausalLM.forward)


def cache_of(arguments: dict[str, Any]) -> Any:
    """The cache among keyword arguments, by whichever name; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse keyword arguments that say something about attention which this package would not heed.

    Raises:
        W2A4Error: one has a value and is not known, as a cache under a new name would be.
    """
    for name, value in arguments.items():
        off = value is None or value is False and name != "is_causal"
        if off or name in CACHE_NAMES or name in WITHOUT_EFFECT:
            continue
        if name == "output_attentions":
            raise W2A4Error(NO_WEIGHTS)
        raise W2A4Error(
            f"transformers {__version__} gives decoder layers {name}={type(value).__name__}, which w2a4 does "
            "not know and will not ignore; leave it out, or use a transformers that pip installs with w2a4"
        )
