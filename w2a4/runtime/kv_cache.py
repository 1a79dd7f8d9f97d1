"""`KV4Cache`: keys (rotated, after RoPE) and values in 4 bits, for transformers' cache interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from .. import ops
from ..errors import W2A4Error
from ..format.online import OnlineRotation
from .attention import KVSettings, PackedKV, Padding, sink_of

#: Tokens a new layer holds before it first grows; it then doubles.
INITIAL_CAPACITY = 64


class KV4Layer(CacheLayerMixin):
    """One layer of the cache. Grows by doubling; a token costs `head_dim + 8` bytes a KV head.

    Attributes:
        length: tokens in use.
        starts: where each sequence goes on, if not all at `length`; see `KV4Cache.go_on`.
        padding: places before the sequences' first tokens, where there are sinks; see `note_padding`.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, settings: KVSettings, capacity: int = INITIAL_CAPACITY):
        super().__init__()
        self.settings, self.capacity = settings, capacity
        self.length = 0
        self.starts: Tensor | None = None
        self.padding: Padding | None = None

    @property
    def sinks(self) -> int:
        """Entries at the front that are kept beside the codes too."""
        return self.settings.sink_tokens + (self.padding.most if self.padding else 0)

    def note_padding(self, mask: Tensor | None) -> None:
        """Heed the mask of the coming call: sinks are the first tokens of each sequence, not its padding.

        Args:
            mask: see `Padding.of`.

        Raises:
            W2A4Error: sinks are partly filled, and the mask hides other places than it did then.
        """
        if not self.settings.sink_tokens or self.filled():
            return
        padding = Padding.of(mask)
        if self.empty():
            self.padding = padding
        elif mask is not None and not _same(padding, self.padding):
            raise W2A4Error(
                "attention_mask hides other places at the front than in the call before, while sink_tokens "
                "are being filled; give the mask of all tokens with every call"
            )

    def empty(self) -> bool:
        return self.length == 0

    def filled(self) -> bool:
        """All sinks are there."""
        return self.length >= self.sinks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch, heads, _, head_dim = key_states.shape
        self._initialize(key_states, batch, heads, head_dim)

    def _initialize(self, like: Tensor, batch: int, heads: int, head_dim: int) -> None:
        self.dtype, self.device = like.dtype, like.device
        shapes = {"codes": (head_dim // 2, torch.uint8), "params": (2, torch.float16)}
        for side in ("keys", "values"):
            empty = {
                n: torch.empty(batch, heads, 0, w, dtype=t, device=self.device)
                for n, (w, t) in shapes.items()
            }
            setattr(self, side, PackedKV(empty["codes"], empty["params"], 0))
        self.is_initialized = True

    def allocate(self, like: Tensor, batch: int, heads: int, head_dim: int) -> None:
        """Room for `capacity` tokens of `batch` sequences, before there are any."""
        self._initialize(like, batch, heads, head_dim)
        for side in (self.keys, self.values):
            _reserve(side, self.capacity, self.capacity)

    def row(self, index: int) -> KV4Layer:
        """See `KV4Cache.row`; this layer is allocated."""
        view = KV4Layer(self.settings, self.capacity)
        view.dtype, view.device, view.is_initialized = self.dtype, self.device, True
        place = slice(index, index + 1)
        view.keys, view.values = (
            PackedKV(side.codes[place], side.params[place], 0) for side in (self.keys, self.values)
        )
        return view

    def join(self, rows: list[KV4Layer]) -> None:
        """What the rows of this layer keep beside it, which are entries at the front in 16 bits."""
        for name in ("keys", "values"):
            sinks = [getattr(row, name).sink for row in rows]
            getattr(self, name).sink = None if sinks[0] is None else torch.cat(sinks)
        self.fill(max(row.length for row in rows))

    def clear(self) -> None:
        """See `KV4Cache.clear`."""
        self.fill(0)
        self.starts = self.padding = None
        for side in (self.keys, self.values):
            side.sink = side.starts = None

    def fill(self, length: int) -> None:
        """Say that `length` tokens are in use, which were written through `row`, or by an op."""
        self.length = self.keys.length = self.values.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[PackedKV, PackedKV]:
        """Rotate and pack new keys and values `[batch, kv_heads, tokens, head_dim]`; return all so far."""
        return self.append(self.settings.rotate(key_states.detach()), value_states.detach())

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[PackedKV, PackedKV]:
        """As `update`, of keys that are rotated already."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.length + key_states.shape[2]
        for side, states in ((self.keys, key_states), (self.values, value_states)):
            _reserve(side, stop, self.capacity)
            self._append_sink(side, states)
            ops.append_kv4(states, side.codes, side.params, self.length, self.settings.kv_clip, self.starts)
            side.length = stop
        self.length = stop
        return self.keys, self.values

    def append_qkv(
        self, qkv: Tensor, kv_heads: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, PackedKV, PackedKV] | None:
        """RoPE, R3 and packing in one op.

        Args:
            qkv: `[batch, tokens, (q_heads + 2 * kv_heads) * head_dim]`, queries, keys, values.
            cos, sin: `[batch or 1, tokens, head_dim]`.

        Returns:
            rotated queries, all keys and all values so far; None if R3 is of a kind that the op does not
            compute, or tokens are to be kept in 16 bits too.
        """
        r3 = self.reserve(qkv, kv_heads, cos.shape[-1])
        if r3 is None:
            return None
        keys, values = self.keys, self.values
        query = ops.rope_append_kv4(
            qkv, cos, sin, *r3, keys.codes, keys.params, values.codes, values.params, self.length,
            self.settings.kv_clip, self.starts,
        )  # fmt: skip
        self.fill(self.length + qkv.shape[1])
        return query, keys, values

    def reserve(self, like: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor | None, int] | None:
        """Room for the next tokens, for an op that does RoPE, R3 and packing; then `fill`.

        Args:
            like: `[batch, tokens, …]`.

        Returns:
            R3 as ops take it; None if it is of a kind that they do not compute, or tokens are to be kept
            in 16 bits too.
        """
        r3 = OnlineRotation.for_ops(self.settings.rotation, like.device)
        if r3 is None or self.length < self.sinks:
            return None
        if not self.is_initialized:
            self._initialize(like, like.shape[0], kv_heads, head_dim)
        for side in (self.keys, self.values):
            _reserve(side, self.length + like.shape[1], self.capacity)
        return r3

    def get_seq_length(self, *args) -> int:
        return self.length

    def get_mask_sizes(self, query) -> tuple[int, int]:
        """`query` is the number of new tokens (transformers 5) or their positions (4.57)."""
        return self.length + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def nbytes(self) -> int:
        """Bytes of the tokens in use, without spare capacity."""
        if not self.is_initialized or not self.keys.codes.shape[2]:
            return 0
        share = self.length / self.keys.codes.shape[2]
        packed = sum(t.nbytes for side in (self.keys, self.values) for t in (side.codes, side.params))
        sinks = sum(side.sink.nbytes for side in (self.keys, self.values) if side.sink is not None)
        return round(packed * share) + sinks

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.length, self.starts, self.padding = False, 0, None, None

    def crop(self, tokens: int) -> None:
        """Negative: drop that many tokens. Positive (transformers 4.57): keep that many."""
        self.length = max(0, self.length + tokens) if tokens < 0 else min(self.length, tokens or self.length)
        for side in (self.keys, self.values) if self.is_initialized else ():
            side.length = self.length
            if side.sink is not None:
                side.sink = side.sink[:, :, : self.length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        for side in (self.keys, self.values) if self.is_initialized else ():
            side.codes, side.params = fn(side.codes), fn(side.params)
            side.sink = None if side.sink is None else fn(side.sink)
        self.padding = self.padding and self.padding.map(fn)

    def _append_sink(self, side: PackedKV, states: Tensor) -> None:
        if side.length < self.sinks:
            head = sink_of(states, self.settings, self.padding, side.length)
            side.sink = head.clone() if side.sink is None else torch.cat([side.sink, head], 2)


class KV4Cache(Cache):
    """A 4-bit KV cache: `model.generate(..., past_key_values=KV4Cache.for_model(model))`.

    A quantised model makes one by itself; give it one to keep it, or to read `nbytes()`.
    """

    layer_class = KV4Layer

    def __init__(self, settings: KVSettings, num_layers: int, capacity: int = INITIAL_CAPACITY):
        """
        Args:
            capacity: tokens that there is room for from the first one on.
        """
        super().__init__(layers=[self.layer_class(settings, capacity) for _ in range(num_layers)])

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
        return cls(settings, len(layers), capacity)

    def note_padding(self, mask: Tensor | None) -> None:
        """See `KV4Layer.note_padding`."""
        for layer in self.layers:
            layer.note_padding(mask)

    def row(self, index: int) -> KV4Cache:
        """An empty cache that writes into sequence `index` of this one."""
        view = KV4Cache(self.layers[0].settings, 0)
        view.layers = [layer.row(index) for layer in self.layers]
        return view

    def join(self, rows: list[KV4Cache]) -> None:
        """Take over what was written through `row`, of one cache for each sequence."""
        for layer, *parts in zip(self.layers, *(row.layers for row in rows), strict=True):
            layer.join(parts)

    def go_on(self, starts: Tensor, length: int) -> None:
        """From here on each sequence goes on at its own place.

        Args:
            starts: int64 `[batch]`, tokens of each sequence. Who appends tokens adds their number.
            length: the most of them; see `fill`.
        """
        for layer in self.layers:
            layer.starts = layer.keys.starts = layer.values.starts = starts
        self.fill(length)

    def fill(self, length: int) -> None:
        """Say that `length` tokens are in use in every layer."""
        for layer in self.layers:
            layer.fill(length)

    def clear(self) -> None:
        """Forget all tokens, but keep the room for them."""
        for layer in self.layers:
            layer.clear()

    def nbytes(self) -> int:
        """Bytes of all tokens in use."""
        return sum(layer.nbytes() for layer in self.layers)


class KV4StaticLayer(KV4Layer):
    """One layer of `KV4StaticCache`; `starts` says how many tokens each sequence has."""

    is_compileable = True
    is_croppable = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch, heads, tokens, head_dim = key_states.shape
        if tokens < self.sinks:
            padded = f" and {self.padding.most} of padding" if self.padding else ""
            raise W2A4Error(
                f"the first call has {tokens} tokens, and sink_tokens={self.settings.sink_tokens}{padded} "
                "are kept in 16 bits: give a prompt of as many at least, or a KV4Cache"
            )
        self._make(key_states, batch, heads, head_dim)
        for side, states in ((self.keys, key_states), (self.values, value_states)):
            self._append_sink(side, states)

    def _make(self, like: Tensor, batch: int, heads: int, head_dim: int) -> None:
        self.allocate(like, batch, heads, head_dim)
        with _lasting():
            self.starts = torch.zeros(batch, dtype=torch.long, device=self.device)
        if not torch.compiler.is_compiling():
            sides = (self.keys, self.values)
            for tensor in (self.starts, *(t for side in sides for t in (side.codes, side.params))):
                torch._dynamo.mark_static_address(tensor)

    def check_room(self, tokens: int) -> None:
        """Refuse more tokens than there is room for, where their number is known on the host.

        Raises:
            W2A4Error: they do not fit.
        """
        if torch.compiler.is_compiling():
            return  # `check_static` told generate already; a loop of one's own is told by the op
        used = 0
        if self.is_initialized and self.starts.device.type == "cpu":  # a GPU would be waited for
            used = int(self.starts.max())
        if used + tokens > self.capacity:
            raise W2A4Error(too_small("KV4StaticCache", self.capacity, used + tokens))

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[PackedKV, PackedKV]:
        """See `KV4Layer`; what lies beyond the tokens so far is hidden by `starts` of what is returned."""
        self.check_room(key_states.shape[2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        starts, most = self.starts.clone(), self.capacity - key_states.shape[2]
        for side, states in ((self.keys, key_states), (self.values, value_states)):
            ops.append_kv4(states, side.codes, side.params, most, self.settings.kv_clip, starts)
        return self._grown(starts, key_states.shape[2])

    def append_qkv(
        self, qkv: Tensor, kv_heads: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, PackedKV, PackedKV] | None:
        r3 = OnlineRotation.for_ops(self.settings.rotation, qkv.device)
        if r3 is None or self.settings.sink_tokens and not self.is_initialized:
            return None
        self.check_room(qkv.shape[1])
        if not self.is_initialized:
            self._make(qkv, qkv.shape[0], kv_heads, cos.shape[-1])
        keys, values, starts, tokens = self.keys, self.values, self.starts.clone(), qkv.shape[1]
        query = ops.rope_append_kv4(
            qkv, cos, sin, *r3, keys.codes, keys.params, values.codes, values.params,
            self.capacity - tokens, self.settings.kv_clip, starts,
        )  # fmt: skip
        return query, *self._grown(starts, tokens)

    def _grown(self, starts: Tensor, tokens: int) -> tuple[PackedKV, PackedKV]:
        """All keys and values, of which queries at `starts` see what they may."""
        self.starts += tokens
        keys, values = (replace(s, starts=starts, length=self.capacity) for s in (self.keys, self.values))
        return keys, values

    def empty(self) -> bool:
        return not self.is_initialized

    def filled(self) -> bool:
        return self.is_initialized

    def get_seq_length(self, *args) -> Tensor | int:
        return self.starts[0] if self.is_initialized else 0

    def get_mask_sizes(self, query) -> tuple[int, int]:
        return self.capacity, 0

    def get_max_length(self) -> int:
        return self.capacity

    def get_max_cache_shape(self) -> int:
        return self.capacity

    def crop(self, tokens: int) -> None:
        raise W2A4Error("a KV4StaticCache cannot be cropped; use a KV4Cache")

    def _map(self, fn) -> None:
        super()._map(fn)
        self.starts = fn(self.starts)


class KV4StaticCache(KV4Cache):
    """A 4-bit KV cache of fixed size, whose tensors stay where they are: for `torch.compile`.

    `model.generate(..., cache_implementation="static")` makes one by itself.
    """

    layer_class = KV4StaticLayer


def check_static(cache: Any, tokens: int) -> None:
    """Raise W2A4Error if a cache of fixed size has no room for as many tokens in all; others grow."""
    if isinstance(cache, KV4StaticCache):
        room = cache.layers[0].capacity
    elif type(cache) is StaticCache:
        room = cache.layers[0].max_cache_len
    else:
        return
    if tokens > room:
        raise W2A4Error(too_small(type(cache).__name__, room, tokens))


def too_small(name: str, room: int, tokens: int) -> str:
    made = f"max_cache_len={tokens}" if name == "StaticCache" else f"{name}.for_model(model, {tokens})"
    return (
        f"this {name} has room for {room} tokens, and {tokens} were asked for; give {made} or more, a prompt "
        "and max_new_tokens that fit, or a cache that grows"
    )


def _reserve(side: PackedKV, tokens: int, least: int) -> None:
    """Room for `tokens` tokens, and at first for `least`; what is there is copied."""
    capacity = side.codes.shape[2]
    if tokens <= capacity:
        return
    grown = max(least, 2 * capacity, tokens)
    for name in ("codes", "params"):
        old = getattr(side, name)
        with _lasting():
            new = old.new_zeros(*old.shape[:2], grown, old.shape[3])
        new[:, :, : side.length] = old[:, :, : side.length]
        setattr(side, name, new)


def _same(padding: Padding | None, other: Padding | None) -> bool:
    if padding is None or other is None:
        return padding is other
    return torch.equal(padding.counts, other.counts)


def _lasting() -> contextlib.AbstractContextManager[Any]:
    """For tensors that are written again later, perhaps outside of the inference mode of today."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)
