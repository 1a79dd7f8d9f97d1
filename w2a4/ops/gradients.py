"""Gradients that cannot be: packed layers and 4-bit caches round, and say so when somebody asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import W2A4Error


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, source: Tensor, what: str) -> Tensor:
        ctx.what = what
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        raise W2A4Error(ctx.what)


def wanted(*sources: Tensor) -> bool:
    """Autograd would go on to one of these."""
    return torch.is_grad_enabled() and any([source.requires_grad for source in sources])


def refuse(out: Tensor, source: Tensor, what: str) -> Tensor:
    """`out`, of which a backward pass towards `source` raises W2A4Error with this message.

    Nothing is raised before: a forward pass outside of no_grad is no mistake.
    """
    return _Refuse.apply(out.detach(), source, what)
