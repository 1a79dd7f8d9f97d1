"""`KVStore`: the keys and values of one attention layer in 4 bits, whoever drives the cache.

The caches of transformers in `kv_cache`, the engine's, and attention without any cache all write through a
store and read its view. Keys are stored after RoPE and R3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import W2A4Error
from ..format.fake_quant import fake_quant_kv4
from ..format.online import OnlineRotation
from .prefix import KVPrefix


@dataclass(frozen=True)
class KVSettings:
    """How one attention layer treats keys and values.

    Attributes:
        kv_bits: 4 or 16.
        kv_clip: see `reference.quantize_kv4`.
        sink_tokens: cache entries at the front kept in 16 bits.
        rotation: R3, applied to queries and keys after RoPE.
        prefix: what the layer sees before every sequence; None is nothing. There are then no sink tokens.
    """

    kv_bits: int = 16
    kv_clip: float = 0.95
    sink_tokens: int = 0
    rotation: OnlineRotation | None = None
    prefix: KVPrefix | None = field(default=None, repr=False, compare=False)

    @property
    def prefix_tokens(self) -> int:
        return 0 if self.prefix is None else self.prefix.tokens

    def same(self, other: KVSettings) -> bool:
        """Whether a cache with one serves a layer with the other."""
        one, two = self.prefix, other.prefix
        return self == other and (one is two or one is not None and one.same(two))

    def rotate(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else self.rotation.apply(x)


@dataclass(frozen=True)
class Padding:
    """Positions before the first token of each sequence of a batch.

    Attributes:
        counts: int64 `[batch]`.
        most: the largest of them.
    """

    counts: Tensor
    most: int

    @classmethod
    def of(cls, mask: Tensor | None) -> Padding | None:
        """What an attention mask hides of all queries at the front; None if that is nothing.

        Args:
            mask: bool `[batch, 1, q_tokens, tokens]` as attention takes it, or `[batch, tokens]`, 0 where
                hidden. A window hides old tokens from some queries, padding is hidden from all.

        Raises:
            W2A4Error: a sequence has no token yet, so that nobody can say where it will begin.
        """
        if mask is None:
            return None
        seen = mask != 0 if mask.dim() == 2 else as_bool(mask)[:, 0].any(1)
        if not bool(seen.any(1).all()):
            raise W2A4Error(
                f"attention_mask hides all {seen.shape[1]} tokens of a sequence, and sink_tokens need its "
                "first one: give prompts whole, in one call"
            )
        counts = seen.int().argmax(1)
        most = int(counts.max())
        return cls(counts, most) if most else None

    @staticmethod
    def same(one: Padding | None, other: Padding | None) -> bool:
        if one is None or other is None:
            return one is other
        return torch.equal(one.counts, other.counts)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Padding:
        return Padding(fn(self.counts), self.most)


def as_bool(mask: Tensor | None) -> Tensor | None:
    """Masks made by transformers are boolean; a user's additive one is translated if it only hides."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    hidden = mask <= -1e4
    if not bool((hidden | (mask == 0)).all()):
        raise W2A4Error("attention_mask adds finite biases to the scores; w2a4 attention takes boolean masks")
    return ~hidden


def sink_of(x: Tensor, settings: KVSettings, padding: Padding | None, start: int = 0) -> Tensor:
    """Those of keys or values from position `start` on that lie among the entries kept beside the codes.

    With padding these reach as far as the last sequence's first tokens. What other sequences have there
    already stands for 4 bits, as it does anywhere else, in float32 so that it is not rounded again.
    """
    x = x[:, :, : max(0, settings.sink_tokens + (padding.most if padding else 0) - start)]
    if padding is None:
        return x
    positions = start + torch.arange(x.shape[2], device=x.device)
    own = (positions < padding.counts[:, None] + settings.sink_tokens)[:, None, :, None]
    return torch.where(own, x.float(), fake_quant_kv4(x.float(), settings.kv_clip))


@dataclass
class KVSide:
    """Keys or values as a store holds them.

    Attributes:
        codes: uint8 `[batch, kv_heads, capacity, head_dim / 2]`.
        params: float16 `[batch, kv_heads, capacity, 2]`, scale and zero-point.
        sink: floating `[batch, kv_heads, sinks, head_dim]`, which replace the first entries; or None.
    """

    codes: Tensor
    params: Tensor
    sink: Tensor | None = None

    @classmethod
    def empty(cls, like: Tensor, batch: int, heads: int, capacity: int, head_dim: int) -> KVSide:
        """Zeros on the device of `like`."""
        shape = batch, heads, capacity
        with _lasting():
            codes = torch.zeros(*shape, head_dim // 2, dtype=torch.uint8, device=like.device)
            return cls(codes, torch.zeros(*shape, 2, dtype=torch.float16, device=like.device))

    def grown(self, capacity: int, used: int) -> KVSide:
        """The first `used` tokens, with room for `capacity`."""
        batch, heads, _, half = self.codes.shape
        side = KVSide.empty(self.codes, batch, heads, capacity, 2 * half)
        side.codes[:, :, :used], side.params[:, :, :used] = self.codes[:, :, :used], self.params[:, :, :used]
        side.sink = self.sink
        return side

    def map(self, fn: Callable[[Tensor], Tensor]) -> KVSide:
        return KVSide(fn(self.codes), fn(self.params), None if self.sink is None else fn(self.sink))


@dataclass
class PackedKV:
    """Keys or values of one layer as attention reads them.

    Attributes:
        codes, params, sink: see `KVSide`.
        bound: no sequence has more tokens, those of the queries among them; what lies beyond is not read.
        earlier: int64 `[batch]`, tokens of each sequence before those of the queries; None: `bound` less
            these.
        prefix: of these tokens, how many no mask speaks of.
    """

    codes: Tensor
    params: Tensor
    sink: Tensor | None
    bound: int
    earlier: Tensor | None = None
    prefix: int = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise W2A4Error(
            f"packed keys or values were taken for a tensor with {name!r}: a KV4Cache serves models that "
            "w2a4 quantised, with their own attention; give any other model a DynamicCache"
        )


class KVStore:
    """Keys and values of one attention layer in 4 bits; a token costs `head_dim + 8` bytes a KV head.

    The host counts tokens if it can: `bound` is then the longest sequence's length, and `lengths`, if there
    are any, are the caller's, who advances them. A fixed store leaves the host out, so that its steps can be
    compiled or captured: it advances `lengths` itself, and `bound` is the capacity.

    A prefix's tokens are the first of every sequence: every number here counts them, where a cache of
    transformers does not.

    Attributes:
        keys, values: None before there is room for any.
        prefix: the prefix's tokens.
        bound: tokens that no sequence has more of; `prefix` if there are none.
        lengths: int64 `[batch]` on the device, tokens of each sequence; None: `bound` each.
        padding: positions before the sequences' first tokens, where there are sinks; see `note_padding`.
    """

    def __init__(self, settings: KVSettings, capacity: int, fixed: bool = False):
        """
        Args:
            capacity: tokens beside the prefix's that there is room for from the first one on. It then
                doubles, unless `fixed`.
        """
        self.settings, self.fixed, self._grows = settings, fixed, not fixed
        self.prefix = settings.prefix_tokens
        self._first_capacity = self.prefix + capacity
        self.reset()

    def reset(self) -> None:
        """Forget all tokens, and give their memory back."""
        self.keys: KVSide | None = None
        self.values: KVSide | None = None
        self.lengths: Tensor | None = None
        self.padding: Padding | None = None
        self.bound = self.prefix

    def clear(self) -> None:
        """Forget all tokens, but keep the room for them."""
        self.lengths = self.padding = None
        self.bound = self.prefix
        for side in self.sides():
            side.sink = None if side.sink is None else side.sink[:, :, : self.prefix] if self.prefix else None

    def sides(self) -> tuple[KVSide, ...]:
        return () if self.keys is None else (self.keys, self.values)

    @property
    def capacity(self) -> int:
        """Tokens of a sequence that there is room for."""
        return self._first_capacity if self.fixed or self.keys is None else self.keys.codes.shape[2]

    # sinks

    @property
    def sinks(self) -> int:
        """Entries at the front that are kept beside the codes too."""
        return self.prefix or self.settings.sink_tokens + (self.padding.most if self.padding else 0)

    @property
    def kept_sinks(self) -> int:
        """Those of them that are there."""
        return 0 if self.keys is None or self.keys.sink is None else self.keys.sink.shape[2]

    def note_padding(self, mask: Tensor | None) -> None:
        """Heed the mask of the coming call: sinks are the first tokens of each sequence, not its padding.

        Args:
            mask: see `Padding.of`.

        Raises:
            W2A4Error: sinks are partly filled, and the mask hides other positions than it did then.
        """
        if not self.settings.sink_tokens or self.bound and self.kept_sinks >= self.sinks:
            return
        padding = Padding.of(mask)
        if not self.bound:
            self.padding = padding
        elif mask is not None and not Padding.same(padding, self.padding):
            raise W2A4Error(
                "attention_mask hides other positions at the front than in the call before, while "
                "sink_tokens are being filled; give the mask of all tokens with every call"
            )

    def _keep_sinks(self, key: Tensor, value: Tensor) -> None:
        kept = self.kept_sinks
        if kept >= self.sinks:
            return
        if self.fixed and key.shape[2] < self.sinks:
            padded = f" and {self.padding.most} of padding" if self.padding else ""
            raise W2A4Error(
                f"the first call has {key.shape[2]} tokens, and sink_tokens={self.settings.sink_tokens}"
                f"{padded} are kept in 16 bits: give a prompt of as many at least, or a KV4Cache"
            )
        for side, states in ((self.keys, key), (self.values, value)):
            head = sink_of(states, self.settings, self.padding, kept)
            side.sink = head.clone() if side.sink is None else torch.cat([side.sink, head], 2)

    # room

    def allocate(self, like: Tensor, batch: int, kv_heads: int, head_dim: int, tokens: int = 0) -> None:
        """Room for `capacity` tokens of `batch` sequences, or for `tokens` if that is more.

        Args:
            like: on the device that the store shall be on.
        """
        capacity = max(self._first_capacity, self.prefix + tokens) if self._grows else self._first_capacity
        self.keys, self.values = (KVSide.empty(like, batch, kv_heads, capacity, head_dim) for _ in range(2))
        if self.settings.prefix is not None:
            self.keys.sink = self.settings.prefix.for_batch("keys", batch)
            self.values.sink = self.settings.prefix.for_batch("values", batch)
        if not self.fixed:
            return
        with _lasting():
            self.lengths = torch.full((batch,), self.prefix, dtype=torch.long, device=like.device)
        if not torch.compiler.is_compiling():
            for tensor in (self.lengths, *(t for side in self.sides() for t in (side.codes, side.params))):
                torch._dynamo.mark_static_address(tensor)

    def _make_room(self, like: Tensor, batch: int, kv_heads: int, head_dim: int, tokens: int) -> None:
        """For `tokens` more; in a store that cannot grow, the op that writes them refuses too many."""
        if self.keys is None:
            self.allocate(like, batch, kv_heads, head_dim, tokens)
        elif self._grows and self.bound + tokens > self.capacity:
            capacity = max(2 * self.capacity, self.bound + tokens)
            self.keys, self.values = (side.grown(capacity, self.bound) for side in self.sides())

    def reserve(self, like: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor | None, int] | None:
        """Room for the next tokens, for an op that does RoPE, R3 and packing; then `fill`.

        Args:
            like: `[batch, tokens, …]`.

        Returns:
            R3 as ops take it; None if it is of a kind that they do not compute, or tokens are to be kept
            in 16 bits too.
        """
        r3 = OnlineRotation.for_ops(self.settings.rotation, like.device)
        if r3 is None or self.kept_sinks < self.sinks:
            return None
        self._make_room(like, like.shape[0], kv_heads, head_dim, like.shape[1])
        return r3

    # tokens

    def append(self, key: Tensor, value: Tensor) -> tuple[PackedKV, PackedKV]:
        """Quantise and write new tokens.

        Args:
            key, value: floating `[batch, kv_heads, tokens, head_dim]`, keys after RoPE and R3.

        Returns:
            the view that the queries of these tokens read.

        Raises:
            W2A4Error: fewer tokens than sinks, in the first call of a fixed store.
        """
        batch, heads, tokens, head_dim = key.shape
        self._make_room(key, batch, heads, head_dim, tokens)
        self._keep_sinks(key, value)
        start, earlier = self._next(tokens)
        for side, states in ((self.keys, key), (self.values, value)):
            ops.append_kv4(states, side.codes, side.params, start, self.settings.kv_clip, earlier)
        return self._advance(tokens, earlier)

    def append_qkv(
        self, qkv: Tensor, kv_heads: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, PackedKV, PackedKV] | None:
        """As `append`, with RoPE and R3 in the same op.

        Args:
            qkv: `[batch, tokens, (q_heads + 2 * kv_heads) * head_dim]`, queries, keys, values.
            cos, sin: `[batch or 1, tokens, head_dim]`.

        Returns:
            rotated queries, and the view that they read; None where `reserve` gives None.
        """
        r3 = self.reserve(qkv, kv_heads, cos.shape[-1])
        if r3 is None:
            return None
        keys, values, tokens = self.keys, self.values, qkv.shape[1]
        start, earlier = self._next(tokens)
        query = ops.rope_append_kv4(
            qkv, cos, sin, *r3, keys.codes, keys.params, values.codes, values.params, start,
            self.settings.kv_clip, earlier,
        )  # fmt: skip
        return query, *self._advance(tokens, earlier)

    def _next(self, tokens: int) -> tuple[int, Tensor | None]:
        """Where ops write: the most that a sequence may have before `tokens` more, and what each has."""
        if self.fixed:
            return self.capacity - tokens, self.lengths.clone()
        return self.bound, self.lengths

    def _advance(self, tokens: int, earlier: Tensor | None) -> tuple[PackedKV, PackedKV]:
        if self.fixed:
            self.lengths += tokens
        self.bound = self.capacity if self.fixed else self.bound + tokens
        return self.view(earlier)

    def view(self, earlier: Tensor | None = None) -> tuple[PackedKV, PackedKV]:
        """Keys and values as attention reads them.

        Args:
            earlier: see `PackedKV`.
        """
        shared = self.bound, earlier, self.prefix
        keys, values = (PackedKV(s.codes, s.params, s.sink, *shared) for s in self.sides())
        return keys, values

    def fill(self, bound: int) -> None:
        """Say that the longest sequence has `bound` tokens, which an op or a `slot` wrote."""
        self.bound = bound

    def share(self, lengths: Tensor, bound: int) -> None:
        """From here on each sequence has a length of its own, which the caller advances.

        Args:
            lengths: int64 `[batch]`, tokens of each sequence; one tensor can serve many stores.
            bound: the most of them; see `fill`.
        """
        self.lengths, self.bound = lengths, bound

    def slot(self, index: int) -> KVStore:
        """An empty store that writes into sequence `index` of this one, which has room already."""
        own, store = slice(index, index + 1), KVStore(self.settings, self.capacity - self.prefix)
        store._grows = False
        kept = [None if s.sink is None or not self.prefix else s.sink[own] for s in self.sides()]
        store.keys, store.values = (
            KVSide(s.codes[own], s.params[own], sink) for s, sink in zip(self.sides(), kept, strict=True)
        )
        return store

    def join(self, slots: list[KVStore]) -> None:
        """Take over what was written through a `slot` for each sequence."""
        for name in ("keys", "values"):
            sinks = [getattr(slot, name).sink for slot in slots]
            getattr(self, name).sink = None if sinks[0] is None else torch.cat(sinks)
        self.fill(max(slot.bound for slot in slots))

    def crop(self, bound: int) -> None:
        """Forget what lies beyond the first `bound` tokens, the prefix's among them."""
        self.bound = min(self.bound, bound)
        for side in self.sides():
            side.sink = None if side.sink is None else side.sink[:, :, : self.bound]

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, whose first dimension is the batch."""
        if self.keys is not None:
            self.keys, self.values = (side.map(fn) for side in self.sides())
        self.lengths = None if self.lengths is None else fn(self.lengths)
        self.padding = self.padding and self.padding.map(fn)

    def nbytes(self) -> int:
        """Bytes of the tokens in use, without spare capacity."""
        if not self.capacity:
            return 0
        packed = sum(t.nbytes for side in self.sides() for t in (side.codes, side.params))
        sinks = sum(side.sink.nbytes for side in self.sides() if side.sink is not None)
        return round(packed * self.bound / self.capacity) + sinks

    def overflowing(self) -> str | None:
        """`"keys"` or `"values"` if scales or zero-points of these are beyond float16."""
        for name, side in zip(("keys", "values"), self.sides(), strict=False):
            if not bool(side.params[:, :, : self.bound].isfinite().all()):
                return name
        return None


def _lasting() -> contextlib.AbstractContextManager[Any]:
    """For tensors that are written again later, perhaps outside of the inference mode of today."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)
