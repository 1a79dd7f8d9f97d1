"""Before every forward pass of a rotated or quantised model: its cache, and what it cannot do."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..errors import W2A4Error
from .arguments import CACHE, CACHE_NAMES, NO_WEIGHTS, cache_of
from .attention import NAME
from .kv_cache import KV4Cache, KV4StaticCache, static_room
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
    settings: KVSettings = model.model.layers[0].self_attn.kv_settings
    check_attention(model.config, settings, kwargs)
    cache, layers = cache_of(kwargs), len(model.model.layers)
    if settings.kv_bits != 4:
        if isinstance(cache, KV4Cache):
            KV4Cache.for_model(model)  # says why not
        return args, kwargs
    use_cache = kwargs.get("use_cache")
    use_cache = model.config.use_cache if use_cache is None else use_cache
    if cache is None:
        if not use_cache or model.training:
            return args, kwargs
        cache = KV4Cache(settings, layers)
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES} | {CACHE: cache}
    adopt(cache, settings, layers)
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
    if not own and settings.kv_bits == 4:
        raise W2A4Error(no_other_attention(config._attn_implementation))


def no_other_attention(asked: Any) -> str:
    return (
        f"attn_implementation={asked!r} knows no 4-bit KV cache, which this model was quantised for; keep "
        f"{NAME!r} (model.set_attn_implementation({NAME!r})), or quantise with kv_bits=16"
    )


def adopt(cache: Any, settings: KVSettings, layers: int, room: int | None = None) -> None:
    """Make an empty cache of transformers one of 4 bits, in place: whoever holds it finds it filled.

    One of 16 bits that holds something already goes on as it is, and attention sees its entries in 4 bits.

    Args:
        room: tokens of a static cache, where its layers with windows do not say.

    Raises:
        W2A4Error: a cache of another kind or of another model, or one that is moved off the device.
    """
    if isinstance(cache, KV4Cache):
        if len(cache.layers) != layers or cache.layers[0].settings != settings:
            name = type(cache).__name__
            raise W2A4Error(
                f"this {name} has {len(cache.layers)} layers with {cache.layers[0].settings}, the model "
                f"{layers} with {settings}; make one with {name}.for_model(model)"
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
        own: KV4Cache = KV4StaticCache(settings, layers, room)
    else:
        own = KV4Cache(settings, layers)
    cache.__class__ = type(own)
    vars(cache).update(vars(own))
