"""Decoder layers of a packed LLaMA in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import quantize_a4, rmsnorm_a4, silu_mul_hadamard_a4
from .kv import attention_kv4, rope_append_kv4
from .linear import linear_w2a4, linear_w3a4, linear_w4a4
from .table import fake_of, op


@op(
    "(Tensor x, Tensor cos, Tensor sin, Tensor? mask, Tensor[] norms, float eps, Tensor[] qkv_proj, "
    "Tensor[] o_proj, Tensor[] gate_up_proj, Tensor[] down_proj, int[] group_sizes, int[] act_group_sizes, "
    "Tensor? r3, int r3_block, Tensor? r4, int r4_block, Tensor(a!) k_codes, Tensor(b!) k_params, "
    "Tensor(c!) v_codes, Tensor(d!) v_params, Tensor? k_sink, Tensor? v_sink, SymInt start, float kv_clip, "
    "float scaling, Tensor? starts=None, Tensor? slots=None, Tensor? block_table=None) -> Tensor",
    kernels="cpu",
)
def decoder_layer(
    x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, norms: list[Tensor], eps: float,
    qkv_proj: list[Tensor], o_proj: list[Tensor], gate_up_proj: list[Tensor], down_proj: list[Tensor],
    group_sizes: list[int], act_group_sizes: list[int], r3: Tensor | None, r3_block: int,
    r4: Tensor | None, r4_block: int, k_codes: Tensor, k_params: Tensor, v_codes: Tensor, v_params: Tensor,
    k_sink: Tensor | None, v_sink: Tensor | None, start: int, kv_clip: float, scaling: float,
    starts: Tensor | None = None, slots: Tensor | None = None, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The references of the ops it is made of, one after another. Args: see `ops.decoder_layer`."""
    qkv, o, gate_up, down = (
        _Linear(*each)
        for each in zip(
            (qkv_proj, o_proj, gate_up_proj, down_proj), group_sizes, act_group_sizes, strict=True
        )
    )
    heads = qkv(*rmsnorm_a4(x, norms[0], eps, qkv.clip, qkv.act_group_size), x.dtype)
    caches, length = (k_codes, k_params, v_codes, v_params), start + x.shape[1]
    places = (start, kv_clip, starts) if slots is None else (0, kv_clip, None, slots)
    q = rope_append_kv4(heads, cos, sin, r3, r3_block, *caches, *places)
    context = attention_kv4(
        q, *caches, length, mask, mask is None, scaling, k_sink, v_sink, starts, block_table
    )
    y = o(*quantize_a4(context.flatten(2), o.clip, o.act_group_size), x.dtype) + x
    gate, up = gate_up(*rmsnorm_a4(y, norms[1], eps, gate_up.clip, gate_up.act_group_size), x.dtype).chunk(
        2, -1
    )
    return down(*silu_mul_hadamard_a4(gate, up, r4, r4_block, down.clip, down.act_group_size), x.dtype) + y


class _Linear:
    """A packed linear: weight, scale and act_clip, then levels (int8) and bias (floating) if it has them."""

    def __init__(self, tensors: list[Tensor], group_size: int, act_group_size: int):
        self.weight, self.scale, self.clip, *others = tensors
        self.levels = next((t for t in others if t.dtype == torch.int8), None)
        self.bias = next((t for t in others if t.dtype != torch.int8), None)
        self.group_size, self.act_group_size = group_size, act_group_size

    def __call__(self, codes: Tensor, a_scale: Tensor, dtype: torch.dtype) -> Tensor:
        rest = self.scale, self.bias, self.group_size, dtype
        if self.levels is None:
            return linear_w4a4(codes, a_scale, self.weight, *rest)
        linear = linear_w3a4 if self.levels.shape[-1] == 8 else linear_w2a4
        return linear(codes, a_scale, self.weight, self.levels, *rest)


@fake_of(decoder_layer)
def _(
    x, cos, sin, mask, norms, eps, qkv_proj, o_proj, gate_up_proj, down_proj, group_sizes, act_group_sizes,
    r3, r3_block, r4, r4_block, k_codes, k_params, v_codes, v_params, k_sink, v_sink, start, kv_clip,
    scaling, starts=None, slots=None, block_table=None,
):  # fmt: skip
    return torch.empty_like(x)


@op(
    "(Tensor x, Tensor cos, Tensor sin, Tensor? mask, Tensor[] norms, float eps, Tensor[] qkv_proj, "
    "Tensor[] o_proj, Tensor[] gate_up_proj, Tensor[] down_proj, int[] group_sizes, int[] act_group_sizes, "
    "Tensor? r3, int r3_block, Tensor? r4, int r4_block, Tensor(a!)[] k_codes, Tensor(b!)[] k_params, "
    "Tensor(c!)[] v_codes, Tensor(d!)[] v_params, Tensor[] k_sink, Tensor[] v_sink, SymInt start, "
    "float kv_clip, float scaling, Tensor? starts=None) -> Tensor",
    kernels="cpu",
)
def decoder_layers(
    x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, norms: list[Tensor], eps: float,
    qkv_proj: list[Tensor], o_proj: list[Tensor], gate_up_proj: list[Tensor], down_proj: list[Tensor],
    group_sizes: list[int], act_group_sizes: list[int], r3: Tensor | None, r3_block: int,
    r4: Tensor | None, r4_block: int, k_codes: list[Tensor], k_params: list[Tensor], v_codes: list[Tensor],
    v_params: list[Tensor], k_sink: list[Tensor], v_sink: list[Tensor], start: int, kv_clip: float,
    scaling: float, starts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`decoder_layer` of one layer after another. Args: see `ops.decoder_layers`."""
    layers = len(k_codes)

    def part(each: list, i: int) -> list:
        count = len(each) // layers
        return each[count * i : count * (i + 1)]

    for i in range(layers):
        linears = (part(each, i) for each in (qkv_proj, o_proj, gate_up_proj, down_proj))
        sinks = (part(each, i)[0] if each else None for each in (k_sink, v_sink))
        x = decoder_layer(
            x, cos, sin, mask, part(norms, i), eps, *linears, part(group_sizes, i), part(act_group_sizes, i),
            r3, r3_block, r4, r4_block, k_codes[i], k_params[i], v_codes[i], v_params[i], *sinks, start,
            kv_clip, scaling, starts,
        )  # fmt: skip
    return x


@fake_of(decoder_layers)
def _(
    x, cos, sin, mask, norms, eps, qkv_proj, o_proj, gate_up_proj, down_proj, group_sizes, act_group_sizes,
    r3, r3_block, r4, r4_block, k_codes, k_params, v_codes, v_params, k_sink, v_sink, start, kv_clip,
    scaling, starts=None,
):  # fmt: skip
    return torch.empty_like(x)
