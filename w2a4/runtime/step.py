"""Decoder layers as one op: a layer that nobody looks into, or all those of a step of decoding.

A layer's kernels take some hundred microseconds in a small model. What Python does between two layers, and
what waking torch's threads for each takes, is of that order; `ops.decoder_layers` does both once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import ops
from ..arch import architecture
from ..format.linear import _PackedLinear
from ..format.online import OnlineRotation
from .heads import rotary_of
from .kv_cache import KV4Layer
from .prefix import with_prefix

#: `(hidden states, cos and sin, boolean mask or None) -> hidden states`.
LayerOp = Callable[[Tensor, tuple[Tensor, Tensor], Tensor | None], Tensor]

#: Tensors of a linear in the order of `ops.decoder_layer`.
TENSOR_ORDER = ("weight", "scale", "act_clip", "levels", "bias")


class OpArguments(NamedTuple):
    """What `ops.decoder_layer` takes of an untouched layer and its part of a cache."""

    norms: list[Tensor]
    eps: float
    linears: list[list[Tensor]]  # of qkv_proj, o_proj, gate_up_proj and down_proj
    group_sizes: list[int]
    act_group_sizes: list[int]
    rotations: tuple[tuple[Tensor | None, int], tuple[Tensor | None, int]]  # R3 and R4
    cache: list[Tensor]  # codes and params of keys, then of values
    sinks: list[Tensor | None]  # of keys and of values
    settings: tuple[float, float]  # kv_clip and scaling


def op_arguments(layer: Any, cache: KV4Layer, hidden_states: Tensor) -> OpArguments | None:
    """Those for tokens like these, for which room is made; None if `ops.decoder_layer` is not such a layer's.

    They hold as long as parameters stay where they are and the cache has room.
    """
    if not ops.has_layer_kernel(hidden_states) or not layer.has_op():
        return None
    attn, mlp, own, store = layer.self_attn, layer.mlp, layer._modules, cache.store
    linears = attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj
    r4 = OnlineRotation.for_ops(mlp.down_proj.rotation, hidden_states.device)
    kv_heads = attn.qkv_proj.out_features // attn.head_dim // (attn.num_key_value_groups + 2)
    r3 = None if r4 is None else store.reserve(hidden_states, kv_heads, attn.head_dim)
    if r3 is None or r4 is None:
        return None
    norms, keys, values = [own[name] for name in layer.family.norms], store.keys, store.values
    return OpArguments(
        [norm._parameters["weight"] for norm in norms], norms[0].variance_epsilon,
        [_tensors(linear) for linear in linears], [linear.group_size for linear in linears],
        [linear.act_group_size for linear in linears], (r3, r4),
        [keys.codes, keys.params, values.codes, values.params], [keys.sink, values.sink],
        (store.settings.kv_clip, attn.scaling),
    )  # fmt: skip


def layer_op(layer: Any, cache: KV4Layer, hidden_states: Tensor) -> LayerOp | None:
    """`ops.decoder_layer` for an untouched layer and its part of a cache; see `op_arguments`."""
    found = op_arguments(layer, cache, hidden_states)
    if found is None:
        return None
    norms, eps, linears, sizes, act_sizes, rotations, tensors, sinks, settings = found
    fixed = norms, eps, *linears, sizes, act_sizes, *rotations, *tensors, *sinks
    attn, store, uses_rope = layer.self_attn, cache.store, architecture.uses_rope(layer.self_attn)

    def call(hidden_states: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        rotary = rotary if uses_rope else rotary_of(attn, rotary)
        start = store.bound
        stop = start + hidden_states.shape[1]
        mask = None if mask is None else with_prefix(mask, store.prefix)[..., :stop]
        out = ops.decoder_layer(hidden_states, *rotary, mask, *fixed, start, *settings, store.lengths)
        store.fill(stop)
        return out

    return call


def _tensors(linear: _PackedLinear) -> list[Tensor]:
    """Those of a linear in the order of `ops.decoder_layer`."""
    own = linear._parameters
    return [own[name] for name in TENSOR_ORDER if own.get(name) is not None]


def step_op(layers: Sequence[Any], caches: Sequence[KV4Layer], hidden_states: Tensor) -> LayerOp | None:
    """Untouched layers and their parts of a cache, one behind the other, without a mask.

    Returns:
        a call that computes them with as few ops as it can; None if one of them is not `ops.decoder_layer`'s.
    """
    found = [op_arguments(*pair, hidden_states) for pair in zip(layers, caches, strict=True)]
    if any(each is None for each in found):
        return None
    if not _alike(found) or not all(architecture.uses_rope(layer.self_attn) for layer in layers):
        return _one_by_one(layers, caches, hidden_states)
    sides = [list(tensors) for tensors in zip(*(each.cache for each in found), strict=True)]
    sinks = [
        [] if each[0] is None else each for each in map(list, zip(*(f.sinks for f in found), strict=True))
    ]
    linears = [_flat(each) for each in zip(*(each.linears for each in found), strict=True)]
    first = found[0]
    fixed = (
        _flat(each.norms for each in found), first.eps, *linears, _flat(each.group_sizes for each in found),
        _flat(each.act_group_sizes for each in found), *first.rotations, *sides, *sinks,
    )  # fmt: skip
    stores = [cache.store for cache in caches]

    def call(hidden_states: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        start = stores[0].bound
        out = ops.decoder_layers(
            hidden_states, *rotary, mask, *fixed, start, *first.settings, stores[0].lengths
        )
        for store in stores:
            store.fill(start + hidden_states.shape[1])
        return out

    return call


def _one_by_one(layers: Sequence[Any], caches: Sequence[KV4Layer], hidden_states: Tensor) -> LayerOp | None:
    calls = [layer_op(*pair, hidden_states) for pair in zip(layers, caches, strict=True)]

    def call(hidden_states: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        for each in calls:
            hidden_states = each(hidden_states, rotary, mask)
        return hidden_states

    return call


def _alike(found: list[OpArguments]) -> bool:
    """Whether one call can say what it has to of all layers."""

    def common(each: OpArguments) -> tuple:
        r3, r4 = ((id(had_k), block) for had_k, block in each.rotations)
        kinds = [[tensor.dtype for tensor in linear] for linear in each.linears]
        return each.eps, r3, r4, each.settings, kinds, [sink is None for sink in each.sinks]

    return all(common(each) == common(found[0]) for each in found)


def _flat(lists: Iterable[Iterable]) -> list:
    return [item for each in lists for item in each]
