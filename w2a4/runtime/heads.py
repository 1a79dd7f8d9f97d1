"""From what q/k/v linears give to what o_proj reads, for every family: head norms, RoPE, R3, attention.

Calibration, the learning of rotations and packed layers that no fused op serves all pass through here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arch import architecture
from .attention import KVSettings, w2a4_attention


def split_heads(attention: nn.Module, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[batch, heads, tokens, head_dim]`, the first two normalised where the family
    does so, of `[batch, tokens, (q_heads + 2 * kv_heads) * head_dim]`.
    """
    heads = qkv.unflatten(-1, (-1, attention.head_dim))
    kv_heads = heads.shape[2] // (attention.num_key_value_groups + 2)
    query, key, value = heads.split_with_sizes([heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)
    if getattr(attention, "q_norm", None) is not None:
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `[batch, heads, tokens, head_dim]`, as transformers computes it.

    cos and sin `[batch or 1, tokens, width]` may be narrower than a head, whose rest then stays as it is.
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def rotary_of(attention: nn.Module, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin for this layer: of angle 0 where it has no RoPE."""
    if architecture.uses_rope(attention):
        return cos_sin
    cos, sin = cos_sin
    return torch.ones_like(cos), torch.zeros_like(sin)


def window_mask(attention: nn.Module, tokens: int, device: torch.device) -> Tensor | None:
    """The mask of a prompt `[1, 1, tokens, tokens]`, True where seen; None where it is causal and no more."""
    width = architecture.window(attention)
    if width is None or tokens <= width:
        return None
    ages = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return ((ages >= 0) & (ages < width))[None, None]


def attend(
    attention: nn.Module, qkv: Tensor, cos_sin: tuple[Tensor, Tensor], settings: KVSettings | None = None
) -> Tensor:
    """Attention of whole prompts without a cache.

    Args:
        attention: an attention module of transformers, or a packed one.
        qkv: `[batch, tokens, (q_heads + 2 * kv_heads) * head_dim]`.
        cos_sin: each `[batch or 1, tokens, width]`.
        settings: of the KV cache; the module's own if None.

    Returns:
        `[batch, tokens, q_heads * head_dim]`, what o_proj reads.
    """
    query, key, value = split_heads(attention, qkv)
    if architecture.uses_rope(attention):
        query, key = rope(query, *cos_sin), rope(key, *cos_sin)
    mask = window_mask(attention, qkv.shape[1], qkv.device)
    out, _ = w2a4_attention(attention, query, key, value, mask, attention.scaling, kv_settings=settings)
    return out.flatten(2)
