"""The `w2a4` attention of transformers: R3, the 4-bit KV cache, and both ways into it.

With a `KV4Cache` the cache hands over packed keys and values (`PackedKV`); without one, keys and
values arrive as plain tensors and go into a `KVStore` of this call alone, so that an evaluation without a
cache sees the numbers that decoding will see. Registered through
`AttentionInterface` and `AttentionMaskInterface`; nothing is patched.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..format.fake_quant import fake_quant_kv4
from ..ops import gradients
from .arguments import check_arguments
from .kv_store import KVSettings, KVStore, PackedKV, Padding, as_bool, sink_of
from .prefix import with_prefix

NAME = "w2a4"

#: What a backward pass through a 4-bit cache is told.
NO_GRADIENT = (
    "keys and values in a 4-bit KV cache carry no gradient; call the model with use_cache=False to train "
    "or to differentiate, or under torch.no_grad()"
)


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
            store = KVStore(settings, key.shape[2])
            store.padding = padding
            return packed_attention(query, *store.append(key, value), mask, scaling), None
        key, value = (_fake_quant(x, settings, padding) for x in (key, value))
    if settings.prefix is not None:
        key, value, mask = _behind_prefix(key, value, mask, tokens, settings)
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
        mask = with_prefix(mask, key.prefix)[..., : key.bound]
    return ops.attention_kv4(
        query, key.codes, key.params, value.codes, value.params, key.bound,
        mask, mask is None, scaling, key.sink, value.sink, key.earlier,
    )  # fmt: skip


def _behind_prefix(
    key: Tensor, value: Tensor, mask: Tensor | None, tokens: int, settings: KVSettings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values behind the prefix's, and what `tokens` queries, the last of them, see of these."""
    batch, prefix = len(key), settings.prefix
    key = torch.cat([prefix.for_batch("keys", batch).to(key.dtype), key], 2)
    value = torch.cat([prefix.for_batch("values", batch).to(value.dtype), value], 2)
    if mask is None and tokens > 1:
        seen = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=key.device)
        return key, value, seen.tril(key.shape[2] - tokens)
    return key, value, with_prefix(mask, prefix.tokens)


def _fake_quant(x: Tensor, settings: KVSettings, padding: Padding | None) -> Tensor:
    quantized = fake_quant_kv4(x, settings.kv_clip)
    if not settings.sink_tokens:
        return quantized
    sink = sink_of(x, settings, padding)
    return torch.cat([sink.to(x.dtype), quantized[:, :, sink.shape[2] :]], 2)


def register() -> None:
    """Make `attn_implementation="w2a4"` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, w2a4_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
