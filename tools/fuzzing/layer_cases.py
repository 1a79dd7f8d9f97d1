"""Random calls of `decoder_layer` and `decoder_layers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from w2a4.format.hadamard import had_k_matrix
from w2a4.ops.packing import pack

from . import draws
from .draws import Draw, OpCase


def _packed_linear(draw: Draw, features: int, out: int) -> tuple[list[Tensor], int, int]:
    """Tensors as `decoder_layer` takes them, and the groups of weights and of inputs."""
    sizes = [size for size in (1, 2, 8, 16, 32, features) if features % size == 0]
    bits, group = draw.pick((2, 3, 4)), draw.pick(sizes)
    act = draw.pick([-1, *[g for g in (group, 2 * group) if features % g == 0]])
    low, high = (-8, 8) if bits == 4 else (0, 2**bits)
    tensors = [pack(draws.integers(draw, low, high, out, features), bits)]
    tensors += [
        draws.randn(draw, out, features // group, dtype=torch.float16, size=0.05).abs(),
        draws.clip(draw),
    ]
    if bits < 4:
        tensors.append(draws.integers(draw, -128, 128, out, features // group, 2**bits))
    if draw.number(0, 1):
        tensors.append(draws.randn(draw, out, size=0.1))
    return tensors, group, act


def decoder_layer(draw: Draw) -> OpCase:
    batch, tokens, kv_heads = draw.number(0, 2), draw.number(0, 4), draw.number(1, 2)
    q_heads, start, hidden = kv_heads * draw.number(1, 3), draw.number(0, 5), draw.pick((1, 7, 24, 32, 96))
    r3 = draw.pick(((None, 1), (None, 8), (had_k_matrix(12), 24)))
    head_dim = r3[1] * 2 if r3[1] > 1 else 2 * draw.number(1, 20)
    r4 = draws.transform(draw)
    ffn = r4[1] * draw.number(1, 2)
    shapes = (
        (hidden, (q_heads + 2 * kv_heads) * head_dim),
        (q_heads * head_dim, hidden),
        (hidden, 2 * ffn),
        (ffn, hidden),
    )
    linears, groups, acts = zip(*(_packed_linear(draw, *shape) for shape in shapes), strict=True)
    x = draws.randn(draw, batch, tokens, hidden, dtype=draw.pick(draws.FLOATS[:3]), size=1.0)
    angles = draws.randn(draw, draw.pick((1, batch)), tokens, head_dim, dtype=torch.float64, size=1.0)
    rope, length = draw.pick(draws.FLOATS), start + tokens
    mask = None
    if draw.number(0, 2) == 0:
        shape = draw.pick((1, batch)), draw.pick((1, q_heads)), tokens, length
        mask = draws.integers(draw, 0, 2, *shape, dtype=torch.bool)
    caches = [t for _ in range(2) for t in draws.caches(draw, batch, kv_heads, length + 2, head_dim)]
    sinks: list[Any] = [None, None]
    if draw.number(0, 2) == 0:
        count = draw.number(0, 4)
        sinks = [draws.randn(draw, batch, kv_heads, count, head_dim, size=1.0) for _ in range(2)]
    norms = [draws.randn(draw, hidden, size=1.0) for _ in range(2)]
    args = [x, angles.cos().to(rope), angles.sin().to(rope), mask, norms, draw.pick((1e-6, 0.1)),
            *linears, list(groups), list(acts), *r3, *r4, *caches, *sinks, start, 0.95, 0.3,
            draws.starts(draw, batch, start)]  # fmt: skip
    return OpCase("decoder_layer", args, draws.exact, (16, 17, 18, 19), oracle=_layer_of_ops)


def decoder_layers(draw: Draw) -> OpCase:
    """Layers of the same weights, each with caches of its own."""
    args, layers = decoder_layer(draw).args, draw.number(1, 3)
    caches = [[t.clone() for _ in range(layers)] for t in args[16:20]]
    sinks = [[] if t is None else [t] * layers for t in args[20:22]]
    lists = [each * layers for each in args[6:12]]
    args = [*args[:4], args[4] * layers, args[5], *lists, *args[12:16], *caches, *sinks, *args[22:]]
    return OpCase("decoder_layers", args, draws.exact, (16, 17, 18, 19), oracle=_one_after_another)


def _one_after_another(x: Tensor, *args: Any) -> Tensor:
    """`decoder_layers` by `decoder_layer`."""
    layers = len(args[15])

    def part(each: Any, i: int) -> Any:
        size = len(each) // layers
        return each[size * i : size * (i + 1)]

    for i in range(layers):
        lists = [part(each, i) for each in args[5:11]]
        caches, sinks = [each[i] for each in args[15:19]], [each[i] if each else None for each in args[19:21]]
        one = *args[:3], part(args[3], i), args[4], *lists, *args[11:15], *caches, *sinks, *args[21:]
        x = torch.ops.w2a4.decoder_layer(x, *one)
    return x


def paged_decoder_layer(draw: Draw) -> OpCase:
    """As `_decoder_layer`; blocks may be shared by sequences, but no slot by two tokens."""
    case = decoder_layer(draw)
    (batch, tokens), start = case.args[0].shape[:2], case.args[22]
    kv_heads, half = case.args[16].shape[1], case.args[16].shape[3]
    size = draw.pick((1, 3, 16))
    blocks = -(-max(1, batch * tokens) // size) + draw.number(0, 2)
    case.args[16:20] = [t for _ in range(2) for t in draws.caches(draw, blocks, kv_heads, size, 2 * half)]
    first, columns = draw.number(0, blocks * size - batch * tokens), -(-(start + tokens) // size)
    slots = torch.arange(first, first + batch * tokens).flip(0).view(batch, tokens)
    case.args += [slots, draws.integers(draw, 0, blocks, batch, columns, dtype=torch.int32)]
    return case


def _layer_of_ops(
    x, cos, sin, mask, norms, eps, qkv_proj, o_proj, gate_up_proj, down_proj, groups, acts, r3, r3_block, r4,
    r4_block, k_codes, k_params, v_codes, v_params, k_sink, v_sink, start, clip, scaling, starts, slots=None,
    block_table=None,
) -> Tensor:  # fmt: skip
    """`decoder_layer` by the ops that it is made of, one after another, whose bits are promised."""
    op = torch.ops.w2a4
    caches = k_codes, k_params, v_codes, v_params

    def linear(tensors: list[Tensor], group: int, a: tuple[Tensor, Tensor], residual: Tensor | None = None):
        weight, scale, _, *rest = tensors
        levels = [t for t in rest if t.dtype == torch.int8][-1:]
        bias = [t for t in rest if t.dtype != torch.int8][-1:] or [None]
        call = {4: op.linear_w2a4, 8: op.linear_w3a4}[levels[0].shape[-1]] if levels else op.linear_w4a4
        return call(*a, weight, *levels, scale, *bias, group, x.dtype, residual)

    qkv = linear(qkv_proj, groups[0], op.rmsnorm_a4(x, norms[0], eps, qkv_proj[2], acts[0]))
    places = (start, clip, starts) if slots is None else (0, clip, None, slots)
    q = op.rope_append_kv4(qkv, cos, sin, r3, r3_block, *caches, *places)
    length, sinks = start + x.shape[1], (k_sink, v_sink)
    context = op.attention_kv4(q, *caches, length, mask, mask is None, scaling, *sinks, starts, block_table)
    y = linear(o_proj, groups[1], op.quantize_a4(context.flatten(2), o_proj[2], acts[1]), x)
    both = linear(gate_up_proj, groups[2], op.rmsnorm_a4(y, norms[1], eps, gate_up_proj[2], acts[2]))
    gate, up = (half.contiguous() for half in both.chunk(2, -1))
    a = op.silu_mul_hadamard_a4(gate, up, r4, r4_block, down_proj[2], acts[3])
    return linear(down_proj, groups[3], a, y)
