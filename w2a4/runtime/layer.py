"""A packed decoder layer in few ops.

Between two packed linears a LLaMA has a norm, or SiLU, a product and a Hadamard transform; each such
stretch and the quantisation behind it is one op of `w2a4.ops`. q/k/v and gate/up read the same codes,
so each of these groups runs as one linear. `fuse` changes the class of decoder layers and nothing
else: their modules, parameters and checkpoints stay, and a layer goes through its modules one by one
wherever something looks at them (hooks, torch.compile) or its parts are not those expected.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .. import ops
from ..format.linear import NO_GRADIENT, _PackedLinear
from ..format.online import OnlineRotation
from ..ops import dispatch, gradients
from .arguments import cache_of, check_arguments
from .attention import NAME, packed_attention, w2a4_attention
from .capturing import has_foreign_forward, is_capturing, is_watched
from .classes import Derived, derived
from .guards import check_attention
from .kv_cache import KV4Cache, KV4Layer, KV4StaticCache
from .kv_store import as_bool

#: Activations of these are computed in float32 by the fused ops.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: `(hidden states, cos and sin, boolean mask or None) -> hidden states`.
LayerOp = Callable[[Tensor, tuple[Tensor, Tensor], Tensor | None], Tensor]

_ORDER = ("weight", "scale", "act_clip", "levels", "bias")


class Joint:
    """Packed linears that read the same input, as one whose rows are all of theirs.

    Their parameters become views into its own, so nothing is held twice. It is made on first use, and
    again when they have moved (to a device, or by loading a state dict).
    """

    def __init__(self, *linears: _PackedLinear) -> None:
        self.linears = linears
        self.linear: _PackedLinear | None = None
        self._places: list[tuple[dict[str, Any], str, int]] = []

    def current(self) -> _PackedLinear:
        for parameters, name, place in self._places:
            if parameters[name].data_ptr() != place:
                break
        else:
            if self.linear is not None:
                return self.linear
        self._make()
        self._places = [
            (linear._parameters, name, linear._parameters[name].data_ptr())
            for linear in self.linears
            for name in _ORDER
            if linear._parameters.get(name) is not None
        ]
        return self.linear

    def _make(self) -> None:
        linears, first = self.linears, self.linears[0]
        joint = type(first)(
            first.in_features, sum(linear.out_features for linear in linears), first.bias is not None,
            first.group_size, act_bits=first.act_bits, act_group_size=first.act_group_size, device="meta",
        )  # fmt: skip
        with torch.inference_mode(False), torch.no_grad():
            for name in ("weight", "levels", "scale", "bias"):
                if first._parameters.get(name) is None:
                    continue
                rows = torch.cat([linear._parameters[name] for linear in linears])
                joint._parameters[name] = nn.Parameter(rows, requires_grad=False)
                parts = rows.split([linear.out_features for linear in linears])
                for linear, part in zip(linears, parts, strict=True):
                    linear._parameters[name].data = part
            joint._parameters["act_clip"] = first.act_clip
        self.linear = joint


def fuse(layers: nn.ModuleList) -> None:
    """Let packed decoder layers of a LLaMA run in few ops, where their parts allow it."""
    for layer in layers:
        if not isinstance(layer, FusedLayer):
            layer.__class__ = derived(FusedLayer, type(layer))
        Place.of(layer)


class Place:
    """A number by which a layer is found again: a constant for compiled graphs, on torch 2.11 too."""

    layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()

    def __init__(self) -> None:
        self.number = max(self.layers, default=-1) + 1

    @classmethod
    def of(cls, layer: nn.Module) -> None:
        """Give a layer one, unless it has its own."""
        place = layer.__dict__.get("_place")
        if place is None or cls.layers.get(place.number) is not layer:
            layer.__dict__["_place"] = place = cls()
            cls.layers[place.number] = layer

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the layer gets its own


class Parts:
    """What the fused forward of a layer needs, looked up once: attributes of modules are slow to get."""

    def __init__(self, layer: nn.Module, modules: tuple[nn.Module, ...]) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.modules, self.attn = modules, attn
        self.hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.attributes = [m.__dict__ for m in modules]
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv, self.gate_up = (attn.q_proj, attn.k_proj, attn.v_proj), (mlp.gate_proj, mlp.up_proj)
        self.o_proj, self.down_proj = attn.o_proj, mlp.down_proj
        self.joint_qkv, self.joint_gate_up = Joint(*self.qkv), Joint(*self.gate_up)
        self.hidden_act = mlp.config.hidden_act
        self._clips: list[tuple[int, int]] | None = None
        if self.fit:
            self.heads = tuple(linear.out_features // attn.head_dim for linear in self.qkv[:2])

    @property
    def fit(self) -> bool:
        """The layer is one that the fused ops compute; asked anew when clips of activations have changed."""
        clips = [linear._parameters.get("act_clip") for linear in (*self.qkv, *self.gate_up)
                 if isinstance(linear, nn.Module)]  # fmt: skip
        state = [(id(c), 0 if c is None or c.is_inference() else c._version) for c in clips]
        if state != self._clips:
            self._clips, self._fits = state, self._fit()
        return self._fits

    def _fit(self) -> bool:
        return (
            all(type(norm) is LlamaRMSNorm and norm.weight.dtype in DTYPES for norm in self.norms)
            and self.hidden_act in ("silu", "swish")
            and all(map(_is_packed_a4, (*self.qkv, *self.gate_up, self.o_proj, self.down_proj)))
            and _share_input(*self.qkv)
            and _share_input(*self.gate_up)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the layer looks up its own

    def serve(self) -> bool:
        """The fused ops compute the layer as it is, and nobody looks at it."""
        own = self.attn.config._attn_implementation == NAME
        return self.fit and own and not self.watched()

    def watched(self) -> bool:
        """Someone hooked into a module, or replaced its forward (as accelerate does).

        What sleeps there after a call that asked for hidden states does not count.
        """
        if any(self.hooks) and not all(is_capturing(hook) for hooks in self.hooks for hook in hooks.values()):
            return True
        if any(["forward" in own for own in self.attributes]):
            return any(map(has_foreign_forward, self.modules))
        return False


#: Of a decoder layer, and of which of its modules.
_LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def _parts(layer: nn.Module) -> Parts | None:
    """Those of the layer, made again when a module was replaced; None if one is wrapped in another."""
    own = layer._modules
    if any(name not in own[part]._modules for part, names in _LINEARS.items() for name in names):
        return None
    modules = (*own.values(), *own["self_attn"]._modules.values(), *own["mlp"]._modules.values())
    parts = layer.__dict__.get("_parts")
    if parts is None or parts.modules != modules:
        layer.__dict__["_parts"] = parts = Parts(layer, modules)
        Place.of(layer)
    return parts


def _is_packed_a4(linear: nn.Module) -> bool:
    return isinstance(linear, _PackedLinear) and linear.act_bits == 4


def _share_input(*linears: _PackedLinear) -> bool:
    """They quantise their input alike, so that it can be done once."""

    def settings(linear: _PackedLinear) -> tuple[Any, ...]:
        return type(linear), linear.group_size, linear.act_group_size, linear.rotation, linear.bias is None

    first = linears[0]
    return first.rotation is None and all(
        settings(linear) == settings(first) and torch.equal(linear.act_clip, first.act_clip)
        for linear in linears
    )


class FusedLayer(Derived):
    """What a decoder layer whose class `fuse` has changed does differently."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            place = self._place
            number = -1 if place is None else place.number  # a copy that never ran has none yet
            if args or type(cache_of(kwargs)) is not KV4StaticCache or not _fits(number):
                return super().forward(hidden_states, *args, **kwargs)
            return _traced_layer(self, hidden_states, **kwargs)
        if args:
            return super().forward(hidden_states, *args, **kwargs)
        parts = _parts(self)
        if parts is None:
            return super().forward(hidden_states, **kwargs)
        if not parts.serve():
            check_attention(parts.attn.config, parts.attn.kv_settings, kwargs)
            return super().forward(hidden_states, **kwargs)
        if gradients.wanted(hidden_states):
            out = _called_layer(parts, hidden_states.detach(), **kwargs)
            return gradients.refuse(out, hidden_states, NO_GRADIENT)
        return _called_layer(parts, hidden_states, **kwargs)


def _called_layer(
    parts: Parts,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """`decoder_layer` with arguments as transformers passes them."""
    check_arguments(others)
    cache, place = cache_of(others), others.get("cache_position")
    return decoder_layer(parts, hidden_states, position_embeddings, attention_mask, cache, place)


@torch.compiler.assume_constant_result
def _fits(number: int) -> bool:
    """Whether the fused ops serve the layer of this number; a compiled graph takes the answer for good."""
    layer = Place.layers.get(number)
    parts = None if layer is None else _parts(layer)
    return parts is not None and parts.serve()


def _traced_layer(
    layer: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """`decoder_layer` for torch.compile, which cannot ask where tensors lie: linears one by one."""
    check_arguments(others)
    attn, mlp = layer.self_attn, layer.mlp
    qkv = _norm_linears(layer.input_layernorm, (attn.q_proj, attn.k_proj, attn.v_proj), hidden_states)
    heads = qkv[0].shape[-1] // attn.head_dim, qkv[1].shape[-1] // attn.head_dim
    own_cache = cache_of(others).layers[attn.layer_idx]
    joint = torch.cat(qkv, -1)
    context = _attended(attn, joint, *heads, position_embeddings, attention_mask, own_cache)
    hidden_states = attn.o_proj.forward(context.flatten(-2), hidden_states)
    gate, up = _norm_linears(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), hidden_states)
    return _down(mlp.down_proj, gate, up, hidden_states)


def fused_parts(model: Any) -> list[Parts] | None:
    """Those of all layers of a packed LLaMA with a 4-bit KV cache; None for any other model.

    Also None where something looks at the model, the decoder or a layer, which only their own forward serves.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not layers or not all(isinstance(layer, FusedLayer) for layer in layers):
        return None
    # A class derived from a layer's may have a forward of its own; transformers wraps that of any.
    if any(inspect.unwrap(type(layer).forward) is not inspect.unwrap(FusedLayer.forward) for layer in layers):
        return None
    if any(map(is_watched, (model, decoder, *layers))):
        return None
    parts = [_parts(layer) for layer in layers]
    if None in parts:
        return None
    own = model.config._attn_implementation == NAME and parts[0].attn.kv_settings.kv_bits == 4
    return parts if own and all(part.fit and not part.watched() for part in parts) else None


def decoder_layer(
    parts: Parts,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache: Any = None,
    cache_position: Tensor | None = None,
) -> Tensor:
    """One decoder layer on `[batch, tokens, hidden]`, with the cache of the whole model or none.

    transformers 4.57 writes into a static cache at `cache_position`, int64 `[tokens]`; version 5 counts.
    """
    own_cache = _own_cache(parts.attn, hidden_states, cache)
    if own_cache is not None:
        own_cache.store.note_padding(attention_mask)
    if type(own_cache) is KV4Layer:
        call = layer_op(parts, own_cache, hidden_states)
        if call is not None:
            return call(hidden_states, position_embeddings, as_bool(attention_mask))
    (qkv,) = _norm_linears(parts.norms[0], (parts.joint_qkv.current(),), hidden_states)
    used = cache if own_cache is None else own_cache
    rotary = position_embeddings
    context = _attended(parts.attn, qkv, *parts.heads, rotary, attention_mask, used, cache_position)
    hidden_states = parts.o_proj.forward(context.flatten(-2), hidden_states)
    return _mlp_part(parts, hidden_states)


def _own_cache(attn: nn.Module, x: Tensor, cache: Any) -> KV4Layer | None:
    """The layer's part of a 4-bit cache.

    Without a cache one that nobody else sees, so that a forward pass rounds where decoding will.
    """
    if isinstance(cache, KV4Cache):
        return cache.layers[attn.layer_idx]
    if cache is None and attn.kv_settings.kv_bits == 4:
        return KV4Layer(attn.kv_settings, x.shape[1])
    return None


def layer_op(parts: Parts, own_cache: KV4Layer, hidden_states: Tensor) -> LayerOp | None:
    """`ops.decoder_layer` for this layer and its part of a cache, where it computes such a layer.

    It can be called again as long as parameters stay where they are and the cache has room.
    """
    attn = parts.attn
    r4 = OnlineRotation.for_ops(parts.down_proj.rotation, hidden_states.device)
    if r4 is None or parts.o_proj.rotation is not None or not ops.has_layer_kernel(hidden_states):
        return None
    store = own_cache.store
    r3 = store.reserve(hidden_states, parts.heads[1], attn.head_dim)
    if r3 is None:
        return None
    linears = parts.joint_qkv.current(), parts.o_proj, parts.joint_gate_up.current(), parts.down_proj
    keys, values = store.keys, store.values
    fixed = (
        [norm._parameters["weight"] for norm in parts.norms], parts.norms[0].variance_epsilon,
        *map(_tensors, linears), [linear.group_size for linear in linears],
        [linear.act_group_size for linear in linears], r3, r4, keys.codes, keys.params, values.codes,
        values.params, keys.sink, values.sink,
    )  # fmt: skip
    settings = store.settings.kv_clip, attn.scaling

    def call(hidden_states: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        start = store.bound
        stop = start + hidden_states.shape[1]
        mask = None if mask is None else mask[..., :stop]
        out = ops.decoder_layer(hidden_states, *rotary, mask, *fixed, start, *settings, store.lengths)
        store.fill(stop)
        return out

    return call


def _tensors(linear: _PackedLinear) -> list[Tensor]:
    """Those of a linear in the order of `ops.decoder_layer`."""
    own = linear._parameters
    return [own[name] for name in _ORDER if own.get(name) is not None]


def _attended(
    attn: nn.Module,
    qkv: Tensor,
    q_heads: int,
    kv_heads: int,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    cache: KV4Layer | Cache | None,
    cache_position: Tensor | None = None,
) -> Tensor:
    """RoPE, R3, the cache and attention: `[batch, tokens, q_heads, head_dim]`, the input of o_proj.

    Args:
        cache: the layer's part of a 4-bit cache, or all of another one.
    """
    settings, mask = attn.kv_settings, as_bool(attention_mask)
    own_cache = cache if isinstance(cache, KV4Layer) else None
    appended = None if own_cache is None else own_cache.append_qkv(qkv, kv_heads, *position_embeddings)
    if appended is not None:
        return packed_attention(*appended, mask, attn.scaling)
    heads = qkv.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)  # [batch, heads, tokens, head_dim]
    rotated, value = heads.split_with_sizes([q_heads + kv_heads, kv_heads], 1)
    rotated, sizes = _rope(rotated, *position_embeddings), [q_heads, kv_heads]
    if own_cache is not None:
        # The cache would rotate the keys by itself; here that is done with the queries.
        query, key = settings.rotate(rotated).split_with_sizes(sizes, 1)
        key, value = own_cache.append(key, value)
        return packed_attention(query, key, value, mask, attn.scaling)
    query, key = rotated.split_with_sizes(sizes, 1)
    if cache is not None:
        key, value = cache.update(key, value, attn.layer_idx, {"cache_position": cache_position})
    return w2a4_attention(attn, query, key, value, attention_mask, attn.scaling)[0]


def _mlp_part(parts: Parts, hidden_states: Tensor) -> Tensor:
    """Norm, MLP and what goes around them."""
    joint, linears = parts.joint_gate_up.current(), parts.gate_up
    if hidden_states.is_cuda and hidden_states.shape[:-1].numel() > dispatch.GEMV_TOKENS:
        # Halves of what the joint one gives would be copied: 6.7 of 109 ms of a prompt on an H200.
        gate, up = _norm_linears(parts.norms[1], linears, hidden_states)
    else:
        (both,) = _norm_linears(parts.norms[1], (joint,), hidden_states)
        gate, up = both.chunk(2, -1)
    return _down(parts.down_proj, gate, up, hidden_states)


def _norm_linears(norm: LlamaRMSNorm, linears: tuple[_PackedLinear, ...], x: Tensor) -> list[Tensor]:
    """What linears that quantise their input alike give for the norm of x."""
    first = linears[0]
    codes, scale = ops.rmsnorm_a4(x, norm.weight, norm.variance_epsilon, first.act_clip, first.act_group_size)
    return [linear._linear(codes, scale, x.dtype) for linear in linears]


def _down(down: _PackedLinear, gate: Tensor, up: Tensor, residual: Tensor) -> Tensor:
    """`down(silu(gate) * up) + residual`."""
    r4 = OnlineRotation.for_ops(down.rotation, gate.device)
    if r4 is None:
        return down.forward(torch.nn.functional.silu(gate) * up, residual)
    codes, scale = ops.silu_mul_hadamard_a4(gate, up, *r4, down.act_clip, down.act_group_size)
    return down._linear(codes, scale, gate.dtype, residual)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `[batch, heads, tokens, head_dim]` as transformers does it."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
