"""The `w2a4` attention of transformers: R3, the 4-bit KV cache, and both ways into it.

With a `KV4Cache` the cache hands over packed keys and values (`PackedKV`); without one, keys and
values arrive as plain tensors, are packed on the spot and go through the same kernel, so that
an evaluation without a cache sees the numbers that decoding will see. Registered through
`AttentionInterface` and `AttentionMaskInterface`; nothing is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import W2A4Error
from ..format.fake_quant import fake_quant_kv4
from ..format.online import OnlineRotation
from ..ops import gradients
from .arguments import check_arguments

NAME = "w2a4"

#: What a backward pass through a 4-bit cache is told.
NO_GRADIENT = (
    "keys and values in a 4-bit KV cache carry no gradient; call the model with use_cache=False to train "
    "or to differentiate, or under torch.no_grad()"
)


@dataclass(frozen=True)
class KVSettings:
    """How one attention layer treats keys and values.

    Attributes:
        kv_bits: 4 or 16.
        kv_clip: see `reference.quantize_kv4`.
        sink_tokens: cache entries at the front kept in 16 bits.
        rotation: R3, applied to queries and keys after RoPE.
    """

    kv_bits: int = 16
    kv_clip: float = 0.95
    sink_tokens: int = 0
    rotation: OnlineRotation | None = None

    def rotate(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else self.rotation.apply(x)


@dataclass
class PackedKV:
    """Keys or values of one layer, packed.

    Attributes:
        codes: uint8 `[batch, kv_heads, capacity, head_dim / 2]`.
        params: float16 `[batch, kv_heads, capacity, 2]`, scale and zero-point.
        length: tokens in use.
        sink: floating `[batch, kv_heads, <= sink_tokens, head_dim]`, or None.
        starts: int64 `[batch]`, tokens of each sequence before the newest, if they are not `length` with
            those; or None.
    """

    codes: Tensor
    params: Tensor
    length: int
    sink: Tensor | None = field(default=None)
    starts: Tensor | None = field(default=None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise W2A4Error(
            f"packed keys or values were taken for a tensor with {name!r}: a KV4Cache serves models that "
            "w2a4 quantised, with their own attention; give any other model a DynamicCache"
        )


def pack_kv(x: Tensor, settings: KVSettings, padding: Padding | None = None) -> PackedKV:
    """Pack keys (already rotated) or values `[batch, kv_heads, tokens, head_dim]`."""
    codes, params = ops.quantize_kv4(x, settings.kv_clip)
    sink = sink_of(x, settings, padding) if settings.sink_tokens else None
    return PackedKV(codes, params, x.shape[2], sink)


@dataclass(frozen=True)
class Padding:
    """Places before the first token of each sequence of a batch.

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
            mask: `[batch, tokens]`, 0 where hidden, or `[batch, 1, q_tokens, tokens]` as attention takes it.

        Raises:
            W2A4Error: a sequence has no token yet, so that nobody can say where it will begin.
        """
        if mask is None:
            return None
        seen = mask != 0 if mask.dim() == 2 else as_bool(mask)[:, 0, -1]
        if not bool(seen.any(1).all()):
            raise W2A4Error(
                f"attention_mask hides all {seen.shape[1]} tokens of a sequence, and sink_tokens need its "
                "first one: give prompts whole, in one call"
            )
        counts = seen.int().argmax(1)
        most = int(counts.max())
        return cls(counts, most) if most else None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Padding:
        return Padding(fn(self.counts), self.most)


def sink_of(x: Tensor, settings: KVSettings, padding: Padding | None, start: int = 0) -> Tensor:
    """Those of keys or values from place `start` on that lie among the entries kept beside the codes.

    With padding these reach as far as the last sequence's first tokens. What other sequences have there
    already stands for 4 bits, as it does anywhere else, in float32 so that it is not rounded again.
    """
    x = x[:, :, : max(0, settings.sink_tokens + (padding.most if padding else 0) - start)]
    if padding is None:
        return x
    places = start + torch.arange(x.shape[2], device=x.device)
    own = (places < padding.counts[:, None] + settings.sink_tokens)[:, None, :, None]
    return torch.where(own, x.float(), fake_quant_kv4(x.float(), settings.kv_clip))


def w2a4_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | PackedKV,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kv_settings: KVSettings | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form transformers calls.

    Args:
        module: the attention layer; its `kv_settings` apply unless given.
        query: `[batch, q_heads, q_tokens, head_dim]`, after RoPE, before R3.
        key, value: the same with kv_heads, or what `KV4Cache.update` returned.
        attention_mask: bool `[batch, 1, q_tokens, kv_tokens]`, True where seen; None is causal, of several
            tokens from the first key on, as transformers means it, of one token all keys.
        sliding_window: keys that a query may see, which the mask says already: transformers leaves a mask out
            only where the window hides nothing.

    Returns:
        `[batch, q_tokens, q_heads, head_dim]`, and no attention weights.
    """
    check_arguments(others)
    settings = kv_settings or module.kv_settings
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = as_bool(attention_mask)
    query = settings.rotate(query)
    if isinstance(key, PackedKV):
        if gradients.wanted(query):
            out = packed_attention(query.detach(), key, value, mask, scaling)
            return gradients.refuse(out, query, NO_GRADIENT), None
        return packed_attention(query, key, value, mask, scaling), None
    tokens = query.shape[2]
    if mask is None and 1 < tokens < key.shape[2]:
        # Without a mask several tokens are the first, and what is behind them in a static cache is empty.
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    key = settings.rotate(key)
    if settings.kv_bits == 4:
        padding = Padding.of(mask) if settings.sink_tokens else None
        if not gradients.wanted(query, key, value):
            packed = (pack_kv(x, settings, padding) for x in (key, value))
            return packed_attention(query, *packed, mask, scaling), None
        key, value = (_fake_quant(x, settings, padding) for x in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None and query.shape[2] > 1,
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def packed_attention(
    query: Tensor, key: PackedKV, value: PackedKV, mask: Tensor | None, scaling: float
) -> Tensor:
    """Attention of rotated queries over packed keys and values; a boolean mask, None is causal."""
    if mask is not None:
        mask = mask[..., : key.length]
    return ops.attention_kv4(
        query, key.codes, key.params, value.codes, value.params, key.length,
        mask, mask is None, scaling, key.sink, value.sink, key.starts,
    )  # fmt: skip


def _fake_quant(x: Tensor, settings: KVSettings, padding: Padding | None) -> Tensor:
    quantized = fake_quant_kv4(x, settings.kv_clip)
    if not settings.sink_tokens:
        return quantized
    sink = sink_of(x, settings, padding)
    return torch.cat([sink.to(x.dtype), quantized[:, :, sink.shape[2] :]], 2)


def as_bool(mask: Tensor | None) -> Tensor | None:
    """Masks made by transformers are boolean; a user's additive one is translated if it only hides."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    hidden = mask <= -1e4
    if not bool((hidden | (mask == 0)).all()):
        raise W2A4Error("attention_mask adds finite biases to the scores; w2a4 attention takes boolean masks")
    return ~hidden


def register() -> None:
    """Make `attn_implementation="w2a4"` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, w2a4_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
