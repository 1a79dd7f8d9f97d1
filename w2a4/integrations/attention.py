"""The `w2a4` attention of transformers: R3, the 4-bit KV cache, and both ways into it.

With a `KV4Cache` the cache hands over packed keys and values (`PackedKV`); without one, keys and
values arrive as plain tensors, are packed on the spot and go through the same kernel, so that
an evaluation without a cache sees the numbers that decoding will see. Registered through
`AttentionInterface` and `AttentionMaskInterface`; nothing is patched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..quantizers import fake_quant_kv4
from ..rotation.online import OnlineRotation
from .arguments import check_arguments

NAME = "w2a4"


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


def pack_kv(x: Tensor, settings: KVSettings) -> PackedKV:
    """Pack keys (already rotated) or values `[batch, kv_heads, tokens, head_dim]`."""
    codes, params = ops.quantize_kv4(x, settings.kv_clip)
    sink = x[:, :, : settings.sink_tokens] if settings.sink_tokens else None
    return PackedKV(codes, params, x.shape[2], sink)


def w2a4_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | PackedKV,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kv_settings: KVSettings | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form transformers calls.

    Args:
        module: the attention layer; its `kv_settings` apply unless given.
        query: `[batch, q_heads, q_tokens, head_dim]`, after RoPE, before R3.
        key, value: the same with kv_heads, or what `KV4Cache.update` returned.
        attention_mask: bool `[batch, 1, q_tokens, kv_tokens]`, True where seen; None is causal.

    Returns:
        `[batch, q_tokens, q_heads, head_dim]`, and no attention weights.
    """
    check_arguments(others)
    settings = kv_settings or module.kv_settings
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = as_bool(attention_mask)
    query = settings.rotate(query)
    if isinstance(key, PackedKV):
        return packed_attention(query, key, value, mask, scaling), None
    key = settings.rotate(key)
    if settings.kv_bits == 4:
        if not (
            torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        ):
            return packed_attention(
                query, pack_kv(key, settings), pack_kv(value, settings), mask, scaling
            ), None
        key, value = (_fake_quant(x, settings) for x in (key, value))
    if mask is None and query.shape[2] != key.shape[2]:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
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


def _fake_quant(x: Tensor, settings: KVSettings) -> Tensor:
    quantized = fake_quant_kv4(x, settings.kv_clip)
    if not settings.sink_tokens:
        return quantized
    return torch.cat([x[:, :, : settings.sink_tokens], quantized[:, :, settings.sink_tokens :]], 2)


def as_bool(mask: Tensor | None) -> Tensor | None:
    """Masks made by transformers are boolean; a user's additive one is translated if it only hides."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    hidden = mask <= -1e4
    if not bool((hidden | (mask == 0)).all()):
        raise ValueError(
            "attention_mask adds finite biases to the scores; w2a4 attention takes boolean masks"
        )
    return ~hidden


def register() -> None:
    """Make `attn_implementation="w2a4"` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, w2a4_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
