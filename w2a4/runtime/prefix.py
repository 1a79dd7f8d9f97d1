"""`KVPrefix`: keys and values of tokens that stand before every sequence, by the full-precision model.

Every head attends to the first token of a text, whose hidden state is one massive activation and whose value
is nearly zero; rounding breaks both. A quantised model with a prefix need not compute that token: its keys
and values lie in the checkpoint, in 16 bits, at the positions before 0 (IntactKV, arXiv 2403.01241;
PrefixQuant, arXiv 2410.05265). What a text begins with is then an ordinary token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..format.linear import _PackedModule


class KVPrefix(_PackedModule):
    """What one attention layer sees before every sequence.

    Attributes:
        keys: float16 `[kv_heads, tokens, head_dim]`, after RoPE at the positions -tokens to -1, and R3.
        values: float16 `[kv_heads, tokens, head_dim]`.
    """

    def __init__(self, kv_heads: int, tokens: int, head_dim: int):
        super().__init__()
        for name in ("keys", "values"):
            self._declare(name, (kv_heads, tokens, head_dim), torch.float16)

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> KVPrefix:
        """From floating `[kv_heads, tokens, head_dim]`."""
        prefix = cls(*keys.shape).to(keys.device)
        prefix._set("keys", keys)
        prefix._set("values", values)
        return prefix

    @property
    def tokens(self) -> int:
        return self._parameters["keys"].shape[1]

    def same(self, other: KVPrefix | None) -> bool:
        """Whether a cache that begins with one may be read by a layer with the other."""
        if self is other:
            return True
        own, theirs = self._parameters, {} if other is None else other._parameters
        return bool(theirs) and all(torch.equal(own[n], theirs[n].to(own[n].device)) for n in own)

    def for_batch(self, name: str, batch: int) -> Tensor:
        """`keys` or `values` as `[batch, kv_heads, tokens, head_dim]`, not copied."""
        return self._parameters[name].detach()[None].expand(batch, -1, -1, -1)


def with_prefix(mask: Tensor | None, tokens: int) -> Tensor | None:
    """A boolean mask `[…, keys]` of a sequence's own keys, and True for the prefix's `tokens` before them."""
    return mask if mask is None or not tokens else F.pad(mask, (tokens, 0), value=True)
