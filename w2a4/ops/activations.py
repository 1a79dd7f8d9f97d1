"""Ops on activations: Hadamard transforms and 4-bit quantisation, and what is fused with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import pack, unpack
from .table import fake_of, one_device, op


@op(
    "(Tensor x, Tensor? had_k, int block_size, bool transpose=False) -> Tensor",
    kernels="cpu cuda",
)
def hadamard(x: Tensor, had_k: Tensor | None, block_size: int, transpose: bool = False) -> Tensor:
    """`x @ H` for a block-diagonal Hadamard matrix H of normalised blocks.

    Args:
        x: floating `[..., n]`, n a multiple of `block_size`.
        had_k: +-1 matrix `[K, K]` (int8) of the part that is not a power of two, or None for K = 1.
        block_size: K * 2**m; a block is `kron(had_k, S) / sqrt(block_size)`, S Sylvester's matrix.
        transpose: multiply by H transposed instead.

    Returns:
        `[..., n]` in x's dtype, computed in float64.
    """
    if x.numel() == 0:
        return x.clone()
    k = 1 if had_k is None else had_k.shape[0]
    h = torch.ones(1, 1, dtype=torch.float64) if had_k is None else had_k.double().cpu()
    for _ in range((block_size // k).bit_length() - 1):
        # Each doubling is the new innermost factor: kron(had_k, S) with S = S2 x S2 x ...
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    h = (h.T if transpose else h).to(x.device) / block_size**0.5
    return (x.double().unflatten(-1, (-1, block_size)) @ h).flatten(-2).to(x.dtype)


@fake_of(hadamard)
def _(x, had_k, block_size, transpose=False):
    one_device(x=x, had_k=had_k)
    return x.new_empty(x.shape)


def hadamard_by_doublings(
    x: Tensor, had_k: Tensor | None, block_size: int, transpose: bool = False
) -> Tensor:
    """`hadamard` in x's own dtype, without its matrix: float64 on devices whose kernels hold 32 bits."""
    k = 1 if had_k is None else had_k.shape[0]
    y, width = x.unflatten(-1, (-1, k, block_size // k)), 1
    while width < block_size // k:
        a, b = y.unflatten(-1, (-1, 2, width)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        width *= 2
    if had_k is not None:
        signs = had_k.to(x.device, x.dtype)
        y = (signs if transpose else signs.T) @ y
    return y.reshape(x.shape) / block_size**0.5


@op(
    "(Tensor x, Tensor clip, int group_size=-1) -> (Tensor, Tensor)",
    kernels="cpu cuda",
)
def quantize_a4(x: Tensor, clip: Tensor, group_size: int = -1) -> tuple[Tensor, Tensor]:
    """4-bit quantisation of activations, one scale a token and group.

    Args:
        x: floating `[..., K]`.
        clip: float32 `[1]`; the scale is as `a4_scale` has it.
        group_size: divides K; -1 is the whole token.

    Returns:
        codes uint8 `[..., ceil(K / 2)]` (signed nibbles, see packing), scale float32 `[..., K / group_size]`.
        A group of zeros has scale 1 and codes 0; one with NaN or infinity has that as its scale and codes 0.
    """
    groups = x.float().unflatten(-1, (-1, x.shape[-1] if group_size == -1 else group_size))
    scale = a4_scale(groups, clip)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (groups / scale[..., None]).nan_to_num(0.0).round().clamp(-8, 7).flatten(-2)
    return pack(codes.to(torch.int8), 4), scale


@fake_of(quantize_a4)
def _(x, clip, group_size=-1):
    one_device(x=x, clip=clip)
    return _fake_a4(x, group_size)


def a4_scale(groups: Tensor, clip: Tensor) -> Tensor:
    """Scale of each group of activations, before 0 becomes 1. Differentiable.

    Of the codes -8..7 a positive clip leaves -8 to what is clipped: the scale is `clip * max|x| / 7`. A
    negative one uses all sixteen: the scale is `clip * x / 8` for the x furthest from 0 (of two opposite
    ones the negative), whose code is -8 at clip -1, and it has the sign that takes. Steps are an eighth
    smaller, at no cost later.

    Args:
        groups: float32 `[..., group_size]`.
        clip: float32 `[1]`, in [-1, 1] and not 0.

    Returns:
        float32 `[...]`.
    """
    signed = divide(clip * furthest_from_zero(groups), 8)
    return torch.where(clip < 0, signed, divide(clip * groups.abs().amax(-1), 7))


def furthest_from_zero(x: Tensor) -> Tensor:
    """The number of largest magnitude, of two opposite ones the negative: `[..., n]` to `[...]`."""
    low, high = x.amin(-1), x.amax(-1)
    return torch.where(-low >= high, low, high)


def divide(x: Tensor, divisor: int) -> Tensor:
    """`x / divisor`, rounded once: on CUDA a Python number would be multiplied by its reciprocal."""
    return x / torch.full_like(x, divisor)


def dequantize_a4(codes: Tensor, scale: Tensor, in_features: int) -> Tensor:
    """Float32 `[..., K]` from what `quantize_a4` returns."""
    groups = unpack(codes, 4, in_features, signed=True).float().unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale[..., None]).flatten(-2)


def _fake_a4(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    *tokens, features = x.shape
    groups = 1 if group_size == -1 else features // group_size
    codes = x.new_empty((*tokens, (features + 1) // 2), dtype=torch.uint8)
    return codes, x.new_empty((*tokens, groups), dtype=torch.float32)


@op(
    "(Tensor x, Tensor? had_k, int block_size, Tensor clip, int group_size=-1) -> (Tensor, Tensor)",
    kernels="cpu cuda",
)
def hadamard_a4(
    x: Tensor, had_k: Tensor | None, block_size: int, clip: Tensor, group_size: int = -1
) -> tuple[Tensor, Tensor]:
    """`quantize_a4(hadamard(x))` with the transform rounded to float32 only. Arguments as theirs."""
    return quantize_a4(hadamard(x.double(), had_k, block_size), clip, group_size)


@fake_of(hadamard_a4)
def _(x, had_k, block_size, clip, group_size=-1):
    one_device(x=x, had_k=had_k, clip=clip)
    return _fake_a4(x, group_size)


@op(
    "(Tensor x, Tensor? weight, float eps, Tensor clip, int group_size=-1) -> (Tensor, Tensor)",
    kernels="cpu cuda",
)
def rmsnorm_a4(
    x: Tensor, weight: Tensor | None, eps: float, clip: Tensor, group_size: int = -1
) -> tuple[Tensor, Tensor]:
    """`quantize_a4(weight * x / sqrt(mean(x**2) + eps))`, the norm computed in float64.

    Args:
        x: floating `[..., K]`.
        weight: floating `[K]`, or None for ones.
        eps: added to the mean square.
        clip, group_size: as in `quantize_a4`.
    """
    x = x.double()
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return quantize_a4(normed if weight is None else weight.double() * normed, clip, group_size)


@fake_of(rmsnorm_a4)
def _(x, weight, eps, clip, group_size=-1):
    one_device(x=x, weight=weight, clip=clip)
    return _fake_a4(x, group_size)


@op(
    "(Tensor gate, Tensor up, Tensor? had_k, int block_size, Tensor clip, int group_size=-1) -> (Tensor, "
    "Tensor)",
    kernels="cpu cuda",
)
def silu_mul_hadamard_a4(
    gate: Tensor, up: Tensor, had_k: Tensor | None, block_size: int, clip: Tensor, group_size: int = -1
) -> tuple[Tensor, Tensor]:
    """`quantize_a4(hadamard(silu(gate) * up))`, computed in float64 up to the quantisation.

    Args:
        gate, up: floating `[..., K]`, of one dtype.
        had_k, block_size: as in `hadamard`; block_size 1 is no transform.
        clip, group_size: as in `quantize_a4`.
    """
    return hadamard_a4(F.silu(gate.double()) * up.double(), had_k, block_size, clip, group_size)


@fake_of(silu_mul_hadamard_a4)
def _(gate, up, had_k, block_size, clip, group_size=-1):
    one_device(gate=gate, up=up, had_k=had_k, clip=clip)
    return _fake_a4(gate, group_size)
