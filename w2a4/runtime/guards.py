"""Before every forward pass of a rotated or quantised model: its cache, and what it cannot do."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..errors import W2A4Error
from .arguments import CACHE, CACHE_NAMES, NO_WEIGHTS, cache_of
from .attention import NAME
from .kv_cache import KV4Cache, KV4StaticCache, settings_of, static_room
from .kv_store import KVSettings


@functools.cache
def _positional(model_class: type) -> tuple[str, ...]:
    """Names of what can be given to a model by position."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


def before_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: a cache of 4 bits wherever the model would fill one of 16.

    Raises:
        W2A4Error: see `check_attention` and `adopt`.
    """
    if len(args) > 1:
        kwargs, args = kwargs | dict(zip(_positional(type(model)), args, strict=False)), ()
    settings = settings_of(model.model.layers)
    check_attention(model.config, settings[0], kwargs)
    cache = cache_of(kwargs)
    if settings[0].kv_bits != 4:
        if isinstance(cache, KV4Cache):
            KV4Cache.for_model(model)  # says why not
        return args, kwargs
    use_cache = kwargs.get("use_cache")
    use_cache = model.config.use_cache if use_cache is None else use_cache
    if cache is None:
        if not use_cache or model.training:
            return args, kwargs
        cache = KV4Cache(settings)
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES} | {CACHE: cache}
    adopt(cache, settings)
    if isinstance(cache, KV4Cache):
        cache.note_padding(_one_mask(kwargs.get("attention_mask")))
    return args, kwargs


def _one_mask(mask: Any) -> Any:
    """Of the masks that `generate` makes by kind of layer the one that hides least."""
    return mask.get("full_attention", next(iter(mask.values()))) if isinstance(mask, dict) else mask


def check_attention(config: Any, settings: KVSettings, kwargs: dict[str, Any]) -> None:
    """Refuse what only transformers' own attention does, and that attention where it would drop the 4 bits.

    With kv_bits=16 any attention computes the same: R3 turns queries and keys alike.
    """
    own = config._attn_implementation == NAME
    if own and (kwargs.get("output_attentions") or getattr(config, "output_attentions", False)):
        raise W2A4Error(NO_WEIGHTS)
    if not own and is_own(settings):
        raise W2A4Error(no_other_attention(config._attn_implementation))


def is_own(settings: KVSettings) -> bool:
    """Whether no attention but w2a4's computes what a model with these was quantised for."""
    return settings.kv_bits == 4 or settings.prefix is not None


def no_other_attention(asked: Any) -> str:
    return (
        f"attn_implementation={asked!r} knows no 4-bit KV cache and no prefix, which this model was "
        f"quantised for; keep {NAME!r} (model.set_attn_implementation({NAME!r})), or quantise with "
        "kv_bits=16 and prefix_tokens=0"
    )


def adopt(cache: Any, settings: Sequence[KVSettings], room: int | None = None) -> None:
    """Make an empty cache of transformers one of 4 bits, in place: whoever holds it finds it filled.

    One of 16 bits that holds something already goes on as it is, and attention sees its entries in 4 bits.

    Args:
        room: tokens of a static cache, where its layers with windows do not say.

    Raises:
        W2A4Error: a cache of another kind or of another model, or one that is moved off the device.
    """
    if isinstance(cache, KV4Cache):
        own, name = [layer.settings for layer in cache.layers], type(cache).__name__
        if len(own) == len(settings) and all(map(operator.is_, own, settings)):
            return
        if len(own) != len(settings) or own[0] != settings[0]:
            raise W2A4Error(
                f"this {name} has {len(own)} layers with {own[0]}, the model {len(settings)} with "
                f"{settings[0]}; make one with {name}.for_model(model)"
            )
        if not all(one.same(other) for one, other in zip(own, settings, strict=True)):
            raise W2A4Error(
                f"this {name} begins with {own[0].prefix_tokens} prefix tokens of another model, this one "
                f"has {settings[0].prefix_tokens}; make one with {name}.for_model(model)"
            )
        return
    if type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "offloading", False):
        moved = " with offloading" if isinstance(cache, Cache) and getattr(cache, "offloading", False) else ""
        raise W2A4Error(
            f"a cache of type {type(cache).__name__}{moved} does not serve a model with a 4-bit KV cache; "
            "leave it (and cache_implementation) out, or give w2a4.KV4Cache.for_model(model), a "
            "DynamicCache or a StaticCache"
        )
    if int(cache.get_seq_length()):
        return
    if type(cache) is StaticCache:
        room = static_room(cache) or room
        if room is None:
            raise W2A4Error(
                "a StaticCache of a model whose layers all have a sliding window does not say how many "
                "tokens it is for; give w2a4.KV4StaticCache.for_model(model, tokens)"
            )
        made: KV4Cache = KV4StaticCache(settings, room)
    else:
        made = KV4Cache(settings)
    cache.__class__ = type(made)
    vars(cache).update(vars(made))
