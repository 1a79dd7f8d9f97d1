"""`KV4Cache` and `KV4StaticCache`: what transformers calls a cache, on top of a `KVStore` a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from ..errors import W2A4Error
from .kv_store import KVSettings, KVSide, KVStore, PackedKV

#: Tokens a new layer holds before it first grows; it then doubles.
INITIAL_CAPACITY = 64


def settings_of(layers: Iterable[Any]) -> list[KVSettings]:
    """Those of every layer of a rotated or quantised model; its attention may lie in another module."""
    found: list[KVSettings] = []
    for layer in layers:
        attention = layer.self_attn
        own = vars(attention).get("kv_settings") or next(
            (vars(part)["kv_settings"] for part in attention.modules() if "kv_settings" in vars(part)), None
        )
        found.append(own or found[0])
    return found


class KV4Layer(CacheLayerMixin):
    """One layer of the cache.

    Attributes:
        store: the keys and values.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, settings: KVSettings, capacity: int = INITIAL_CAPACITY):
        # Not that of transformers, which sets what the store has.
        self.store = self._new_store(settings, capacity)

    def _new_store(self, settings: KVSettings, capacity: int) -> KVStore:
        return KVStore(settings, capacity)

    @property
    def settings(self) -> KVSettings:
        return self.store.settings

    @property
    def keys(self) -> KVSide | None:
        return self.store.keys

    @property
    def values(self) -> KVSide | None:
        return self.store.values

    @property
    def is_initialized(self) -> bool:
        return self.store.keys is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch, heads, tokens, head_dim = key_states.shape
        self.store.allocate(key_states, batch, heads, head_dim, tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[PackedKV, PackedKV]:
        """Rotate and pack new keys and values `[batch, kv_heads, tokens, head_dim]`; return all so far."""
        return self.append(self.settings.rotate(key_states.detach()), value_states.detach())

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[PackedKV, PackedKV]:
        """See `KVStore.append`."""
        self.check_room(key_states.shape[2])
        return self.store.append(key_states, value_states)

    def append_qkv(
        self, qkv: Tensor, kv_heads: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, PackedKV, PackedKV] | None:
        """See `KVStore.append_qkv`."""
        self.check_room(qkv.shape[1])
        return self.store.append_qkv(qkv, kv_heads, cos, sin)

    def check_room(self, tokens: int) -> None:
        """Refuse more tokens than there is room for, where their number is known on the host."""

    def get_seq_length(self, *args) -> Tensor | int:
        return self.store.bound - self.store.prefix

    def get_mask_sizes(self, query) -> tuple[int, int]:
        """`query` is the number of new tokens (transformers 5) or their positions (4.57)."""
        return self.get_seq_length() + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return self.get_max_length()

    def nbytes(self) -> int:
        """See `KVStore.nbytes`."""
        return self.store.nbytes()

    def reset(self) -> None:
        self.store.reset()

    def crop(self, tokens: int) -> None:
        """Negative: drop that many tokens. Positive (transformers 4.57): keep that many."""
        length = self.get_seq_length()
        self.store.crop(self.store.prefix + (max(0, length + tokens) if tokens < 0 else tokens or length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.map(lambda t: t[indices])

    def offload(self) -> None:
        if self.is_initialized:
            self.device = self.keys.codes.device
            self.store.map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.store.map(lambda t: t.to(self.device, non_blocking=True))


class KV4Cache(Cache):
    """A 4-bit KV cache: `model.generate(..., past_key_values=KV4Cache.for_model(model))`.

    A quantised model makes one by itself; give it one to keep it, or to read `nbytes()`.
    """

    layer_class = KV4Layer

    def __init__(self, settings: Sequence[KVSettings], capacity: int = INITIAL_CAPACITY):
        """
        Args:
            settings: those of every layer, see `settings_of`.
            capacity: tokens that there is room for from the first one on.
        """
        super().__init__(layers=[self.layer_class(each, capacity) for each in settings])

    @classmethod
    def for_model(cls, model, capacity: int = INITIAL_CAPACITY) -> KV4Cache:
        """An empty cache for a model with a 4-bit KV cache; W2A4Error for any other."""
        layers = getattr(model.get_decoder(), "layers", None) or [model]
        settings = getattr(getattr(layers[0], "self_attn", None), "kv_settings", None)
        if settings is None or settings.kv_bits != 4:
            what = "was not quantised by w2a4" if settings is None else f"has kv_bits={settings.kv_bits}"
            raise W2A4Error(
                f"{type(model).__name__} {what}, so that a {cls.__name__} would change what it computes; "
                "give it a DynamicCache or a StaticCache of transformers"
            )
        return cls(settings_of(layers), capacity)

    @property
    def stores(self) -> list[KVStore]:
        return [layer.store for layer in self.layers]

    def note_padding(self, mask: Tensor | None) -> None:
        """See `KVStore.note_padding`."""
        for store in self.stores:
            store.note_padding(mask)

    def slot(self, index: int) -> KV4Cache:
        """See `KVStore.slot`."""
        cache = KV4Cache([layer.settings for layer in self.layers])
        for layer, store in zip(cache.layers, self.stores, strict=True):
            layer.store = store.slot(index)
        return cache

    def join(self, slots: list[KV4Cache]) -> None:
        """See `KVStore.join`."""
        for store, *parts in zip(self.stores, *(slot.stores for slot in slots), strict=True):
            store.join(parts)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """See `KVStore.map`."""
        for store in self.stores:
            store.map(fn)

    def share(self, lengths: Tensor, bound: int) -> None:
        """See `KVStore.share`."""
        for store in self.stores:
            store.share(lengths, bound)

    def fill(self, bound: int) -> None:
        """See `KVStore.fill`."""
        for store in self.stores:
            store.fill(bound)

    def clear(self) -> None:
        """Forget all tokens, but keep the room for them."""
        for store in self.stores:
            store.clear()

    def nbytes(self) -> int:
        """Bytes of all tokens in use; of a cache of fixed size, of all its room."""
        return sum(layer.nbytes() for layer in self.layers)


class KV4StaticLayer(KV4Layer):
    """One layer of `KV4StaticCache`."""

    is_compileable = True
    is_croppable = False

    def _new_store(self, settings: KVSettings, capacity: int) -> KVStore:
        return KVStore(settings, capacity, fixed=True)

    def check_room(self, tokens: int) -> None:
        """See `KV4Layer`.

        Raises:
            W2A4Error: they do not fit.
        """
        if torch.compiler.is_compiling():
            return  # `check_static` told generate already; a loop of one's own is told by the op
        used, lengths = 0, self.store.lengths
        if lengths is not None and lengths.device.type == "cpu":  # a GPU would be waited for
            used = int(lengths.max()) - self.store.prefix
        if used + tokens > self.get_max_length():
            raise W2A4Error(too_small("KV4StaticCache", self.get_max_length(), used + tokens))

    def get_seq_length(self, *args) -> Tensor | int:
        if not self.is_initialized:
            return 0
        length = self.store.lengths[0]
        return length - self.store.prefix if self.store.prefix else length

    def get_mask_sizes(self, query) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_max_length(self) -> int:
        return self.store.capacity - self.store.prefix

    def crop(self, tokens: int) -> None:
        raise W2A4Error("a KV4StaticCache cannot be cropped; use a KV4Cache")


class KV4StaticCache(KV4Cache):
    """A 4-bit KV cache of fixed size, whose tensors stay where they are: for `torch.compile`.

    `model.generate(..., cache_implementation="static")` makes one by itself.
    """

    layer_class = KV4StaticLayer


def check_static(cache: Any, tokens: int) -> None:
    """Raise W2A4Error if a cache of fixed size has no room for as many tokens in all; others grow."""
    if isinstance(cache, KV4StaticCache):
        room = cache.layers[0].get_max_length()
    elif type(cache) is StaticCache:
        room = static_room(cache)
    else:
        return
    if room is not None and tokens > room:
        raise W2A4Error(too_small(type(cache).__name__, room, tokens))


def static_room(cache: StaticCache) -> int | None:
    """Tokens that a static cache has room for; None if all its layers keep those of a window only."""
    return max((layer.max_cache_len for layer in cache.layers if not layer.is_sliding), default=None)


def too_small(name: str, room: int, tokens: int) -> str:
    made = f"max_cache_len={tokens}" if name == "StaticCache" else f"{name}.for_model(model, {tokens})"
    return (
        f"this {name} has room for {room} tokens, and {tokens} were asked for; give {made} or more, a prompt "
        "and max_new_tokens that fit, or a cache that grows"
    )
