"""`PackedDecoderLayer`: a decoder layer over packed linears, and the one forward pass that it has.

transformers' loop, torch.compile, the engine and evaluation all call it. Between two packed linears lies a
norm, or an activation, a product and a Hadamard transform; each such stretch and the quantisation behind it
is one op of `w2a4.ops`, and on a CPU the whole layer is one. Where something looks at a module (a hook, an
adapter), that module is called as it is.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from ..arch import Architecture, Site, architecture
from ..errors import ArchitectureError
from ..format.linear import NO_GRADIENT, _PackedLinear
from ..format.online import OnlineRotation
from ..ops import dispatch, gradients
from .arguments import CACHE_NAMES, cache_of, check_arguments
from .attention import NAME, packed_attention, w2a4_attention
from .attention import NO_GRADIENT as NO_CACHE_GRADIENT
from .capturing import has_foreign_forward, is_capturing, is_watched
from .classes import Derived, derived
from .guards import check_attention
from .heads import rope, rotary_of, split_heads
from .joint import can_join, join, refuse_part, rows_of, split, views
from .kv_cache import KV4Cache, KV4Layer
from .kv_store import as_bool
from .step import layer_op

#: Activations of these are computed in float32 by the fused ops.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Names of activation functions that `silu_mul_hadamard_a4` computes.
SILU = ("silu", "swish")


class _Block(Derived):
    """A module that may hold parts as one joint linear."""

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_part(self, name, value)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        refuse_part(self, name, module)
        super().add_module(name, module)


class PackedAttention(_Block):
    """Attention over packed linears; mixed into the class of transformers whose module it replaces."""

    differentiable = False

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None, **others: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """`[batch, tokens, hidden]`, normalised, to what is added to the hidden states.

        Returns:
            that, and the attention weights where another attention than w2a4's gives them.
        """
        x = _outputs(self, self.site_in, hidden_states)
        (o_proj,) = linears_of(self, self.site_out)
        if self.config._attn_implementation != NAME:
            seen, weights = _attended_by_others(self, x, position_embeddings, attention_mask, others)
            return o_proj(seen), weights
        check_arguments(others)
        return o_proj(attended(self, x, position_embeddings, attention_mask, _cache(self, x, others))), None


class PackedMLP(_Block):
    """Gate, up and down over packed linears; mixed into the class of transformers that it replaces."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, tokens, hidden]`, normalised, to what is added to the hidden states."""
        gate, up = _outputs(self, self.site_in, hidden_states).chunk(2, -1)
        (down,) = linears_of(self, self.site_out)
        return down(architecture.activation(self)(gate) * up)


class PackedDecoderLayer(Derived):
    """A decoder layer over packed linears; mixed into the class of transformers whose module it replaces.

    Attributes:
        differentiable: whether it gives gradients to its input and to what is in it, see `differentiate`.
    """

    differentiable = False

    @classmethod
    def of(cls, layer: nn.Module, family: Architecture) -> nn.Module:
        """A layer that takes over the modules of one of transformers, whose linears are packed.

        Raises:
            ArchitectureError: the layer has a module that the family does not know.
        """
        known = {site.norm.partition(".")[0] for site in family.sites if site.norm}
        for name, module in layer.named_children():
            if name not in known | {"self_attn", "mlp"} and not isinstance(module, nn.Dropout):
                raise ArchitectureError(
                    f"a decoder layer has {name}, a {type(module).__name__}, which no {family.model_class} "
                    "of transformers has; remove it, or keep the layer unpacked"
                )
        new = _emptied(cls, layer)
        new.family = family
        for name, module in layer.named_children():
            if name in known:
                new.add_module(name, module)
        new.self_attn = _filled(PackedAttention, layer.self_attn, family.attention_in, family.attention_out)
        new.mlp = _filled(PackedMLP, layer.mlp, family.mlp_in, family.mlp_out)
        return new

    def join(self) -> None:
        """Hold linears that read one input as one, where they are packed alike."""
        for site in (self.family.attention_in, self.family.mlp_in):
            parts = [linear.name for linear in site.linears]
            parent = self.get_submodule(site.linears[0].parent)
            held = all(part in parent._modules for part in parts)
            if len(parts) > 1 and held and can_join([parent.get_submodule(part) for part in parts]):
                join(parent, joint_name(site), tuple(parts))

    def differentiate(self) -> None:
        """Give gradients from now on, roundings passed straight through; linears are one by one again."""
        for site in self.family.sites:
            split(self.get_submodule(site.linears[0].parent))
        for module in self.modules():
            if isinstance(module, _PackedLinear):
                module.differentiable = True
        self.differentiable = self.self_attn.differentiable = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *,
        position_embeddings: tuple[Tensor, Tensor] | None = None, **others: Any,
    ) -> Tensor:  # fmt: skip
        """Hidden states `[batch, tokens, hidden]` behind the layer.

        Args:
            attention_mask: see `w2a4_attention`.
            position_embeddings: cos and sin, each `[batch or 1, tokens, head_dim]`.
            others: the cache, of the whole model, and what transformers hands to every layer.

        Raises:
            W2A4Error: an argument about attention that this package would not heed.
        """
        if not self.differentiable and gradients.wanted(hidden_states) and self._rounds():
            out = self.forward(hidden_states.detach(), attention_mask,
                               position_embeddings=position_embeddings, **others)  # fmt: skip
            return gradients.refuse(out, hidden_states, NO_GRADIENT)
        attn, untouched = self.self_attn, self.untouched()
        own = isinstance(attn, PackedAttention) and attn.config._attn_implementation == NAME
        if isinstance(attn, PackedAttention):
            check_attention(attn.config, attn.kv_settings, others)
        if own:
            check_arguments(others)
            cache = _cache(attn, hidden_states, others)
            if isinstance(cache, KV4Layer):
                cache.store.note_padding(attention_mask)
                call = layer_op(self, cache, hidden_states) if untouched and type(cache) is KV4Layer else None
                if call is not None:
                    return call(hidden_states, position_embeddings, as_bool(attention_mask))
        if own and (untouched or not _is_touched(attn)):
            x = self._normed(self.family.attention_in, hidden_states, untouched)
            seen = attended(attn, x, position_embeddings, attention_mask, cache)
            hidden_states = self._add(self.family.attention_out, seen, hidden_states, untouched)
        else:
            normed = self.get_submodule(self.family.attention_in.norm)(hidden_states)
            out = attn(hidden_states=normed, position_embeddings=position_embeddings,
                       attention_mask=attention_mask, **others)  # fmt: skip
            hidden_states = hidden_states + out[0]
        if isinstance(self.mlp, PackedMLP) and (untouched or not _is_touched(self.mlp)):
            return self._mlp(hidden_states, untouched)
        return hidden_states + self.mlp(self.get_submodule(self.family.mlp_in.norm)(hidden_states))

    def linears(self) -> dict[str, nn.Module]:
        """The layer's linears by path, those of a joint one as views of it."""
        found = {}
        for site in self.family.sites:
            parent = self.get_submodule(site.linears[0].parent)
            modules, rows = linears_of(parent, site), rows_of(parent)
            if len(modules) < len(site.linears):
                modules = views(modules[0], rows)
            found |= dict(zip(site.paths, modules, strict=True))
        return found

    def _rounds(self) -> bool:
        """Something in the layer is rounded to 4 bits on the way, which gives no gradient."""
        settings = getattr(self.self_attn, "kv_settings", None)
        return settings is not None and settings.kv_bits == 4 or any(map(_is_packed_a4, self.modules()))

    def untouched(self) -> bool:
        """Nobody hooked into a module of this layer, or replaced its forward (as accelerate does).

        What sleeps there after a call that asked for hidden states does not count.
        """
        if torch.compiler.is_compiling():
            return not any(_is_touched(module) for module in self._watched())
        watched = self._watched()
        if any([m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in watched]):
            return not any(map(_is_touched, watched))
        return True

    def has_op(self) -> bool:
        """Whether `ops.decoder_layer` computes this layer; asked anew when a module of it was replaced."""
        modules, kept = self._watched(), self.__dict__.get("_has_op")
        if kept is None or kept[0] != modules:
            self.__dict__["_has_op"] = kept = modules, _is_whole(self) and _fits_layer_op(self)
        return kept[1]

    def _watched(self) -> tuple[nn.Module, ...]:
        own = self._modules
        return (*own.values(), *own["self_attn"]._modules.values(), *own["mlp"]._modules.values())

    def _normed(self, site: Site, hidden: Tensor, untouched: bool) -> Tensor:
        """What the linears of a site give for the norm of the hidden states, one behind the other."""
        norm = self.get_submodule(site.norm)
        linears = linears_of(self.get_submodule(site.linears[0].parent), site)
        out = [_normed_linear(norm, linear, hidden, untouched) for linear in linears]
        return out[0] if len(out) == 1 else torch.cat(out, -1)

    def _add(self, site: Site, x: Tensor, hidden: Tensor, untouched: bool) -> Tensor:
        """The site's linear of x, added to the hidden states."""
        (linear,) = linears_of(self.get_submodule(site.linears[0].parent), site)
        if isinstance(linear, _PackedLinear) and (untouched or not _is_touched(linear)):
            return linear.forward(x, hidden)
        return hidden + linear(x)

    def _mlp(self, hidden: Tensor, untouched: bool) -> Tensor:
        """Norm, MLP and what goes around them."""
        mlp, site = self.mlp, self.family.mlp_in
        rows = rows_of(mlp)
        if rows and untouched and hidden.is_cuda and hidden.shape[:-1].numel() > dispatch.GEMV_TOKENS:
            # Halves of what the joint one gives would be copied: 6.7 of 109 ms of a prompt on an H200.
            (joint,), norm = linears_of(mlp, site), self.get_submodule(site.norm)
            codes, scale = _normed_codes(norm, joint, hidden)
            gate, up = (part._linear(codes, scale, hidden.dtype) for part in views(joint, rows))
        else:
            gate, up = self._normed(site, hidden, untouched).chunk(2, -1)
        (down,) = linears_of(mlp, self.family.mlp_out)
        whole = _is_packed_a4(down) and not gradients.wanted(gate, up)
        whole = whole and (untouched or not (_is_touched(down) or _is_touched(mlp)))
        r4 = OnlineRotation.for_ops(down.rotation, gate.device) if whole else None
        if r4 is None or mlp.config.hidden_act not in SILU or gate.dtype not in DTYPES:
            return self._add(self.family.mlp_out, architecture.activation(mlp)(gate) * up, hidden, untouched)
        codes, scale = ops.silu_mul_hadamard_a4(gate, up, *r4, down.act_clip, down.act_group_size)
        return down._linear(codes, scale, gate.dtype, hidden)


def joint_name(site: Site) -> str:
    """`qkv_proj` or `gate_up_proj`, as families call it that have one."""
    return "_".join(linear.outputs[0] for linear in site.linears).replace("q_k_v", "qkv") + "_proj"


def _outputs(parent: nn.Module, site: Site, x: Tensor) -> Tensor:
    """What the linears of a site give for their input, one behind the other."""
    out = [linear(x) for linear in linears_of(parent, site)]
    return out[0] if len(out) == 1 else torch.cat(out, -1)


def linears_of(parent: nn.Module, site: Site) -> list[nn.Module]:
    """The linears of a site: the joint one, or as many as the family has."""
    own = parent._modules
    joint = own.get(joint_name(site)) if "joint" in parent.__dict__ else None
    return [own[linear.name] for linear in site.linears] if joint is None else [joint]


def _emptied(mixin: type, module: nn.Module) -> Any:
    """A module of the derived class with the plain attributes of another and none of its modules."""
    new = object.__new__(derived(mixin, type(module)))
    nn.Module.__init__(new)
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in ("forward", "training"):
            new.__dict__[name] = value
    return new.train(module.training)


def _filled(mixin: type, module: nn.Module, site_in: Site, site_out: Site) -> Any:
    new = _emptied(mixin, module)
    new.site_in, new.site_out = site_in, site_out
    for name, child in module.named_children():
        new.add_module(name, child)
    return new


def _is_touched(module: nn.Module) -> bool:
    """Somebody's hook or forward is on the module."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if hooks and not all(map(is_capturing, hooks)):
        return True
    return "forward" in module.__dict__ and has_foreign_forward(module)


def _is_packed_a4(linear: nn.Module) -> bool:
    return isinstance(linear, _PackedLinear) and linear.act_bits == 4


def _is_plain_norm(norm: nn.Module) -> bool:
    """An RMSNorm of transformers: `weight * x / sqrt(mean(x²) + variance_epsilon)`."""
    kind = type(norm)
    named = kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.models.")
    return named and norm.weight.dtype in DTYPES


def _normed_linear(norm: nn.Module, linear: nn.Module, x: Tensor, untouched: bool) -> Tensor:
    """`linear(norm(x))`, in two ops where nobody looks in between."""
    fits = _is_packed_a4(linear) and linear.rotation is None and _is_plain_norm(norm) and x.dtype in DTYPES
    if fits and not (linear.differentiable and gradients.wanted(x, norm.weight)):
        if untouched or not (_is_touched(norm) or _is_touched(linear)):
            return linear._linear(*_normed_codes(norm, linear, x), x.dtype)
    return linear(norm(x))


def _normed_codes(norm: nn.Module, linear: _PackedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rmsnorm_a4(x, norm.weight, norm.variance_epsilon, linear.act_clip, linear.act_group_size)


def _cache(attn: nn.Module, x: Tensor, others: dict[str, Any]) -> Any:
    """The layer's part of a 4-bit cache, or `(cache, cache_position)` of another one.

    Without a cache a part that nobody else sees, so that a forward pass rounds where decoding will.
    transformers 4.57 writes into a static cache at `cache_position`, int64 `[tokens]`; version 5 counts.
    """
    cache = cache_of(others)
    if isinstance(cache, KV4Cache):
        return cache.layers[attn.layer_idx]
    if cache is None and attn.kv_settings.kv_bits == 4:
        if attn.differentiable and torch.is_grad_enabled():
            return None  # keys and values are rounded where gradients pass
        return KV4Layer(attn.kv_settings, x.shape[1])
    return None if cache is None else (cache, others.get("cache_position"))


def attended(
    attn: nn.Module, qkv: Tensor, cos_sin: tuple[Tensor, Tensor], attention_mask: Tensor | None, cache: Any
) -> Tensor:
    """Head norms, RoPE, R3, the cache and attention: the input of o_proj.

    Args:
        qkv: `[batch, tokens, (q_heads + 2 * kv_heads) * head_dim]`.
        cos_sin: each `[batch or 1, tokens, head_dim]`, or narrower.
        cache: see `_cache`.

    Returns:
        `[batch, tokens, q_heads * head_dim]`.
    """
    settings, mask, cos_sin = attn.kv_settings, as_bool(attention_mask), rotary_of(attn, cos_sin)
    own = cache if isinstance(cache, KV4Layer) else None
    head_norms = getattr(attn, "q_norm", None) is not None
    if own is not None and gradients.wanted(qkv):
        seen = attended(attn, qkv.detach(), cos_sin, attention_mask, cache)
        return gradients.refuse(seen, qkv, NO_CACHE_GRADIENT)
    if own is not None and not head_norms and cos_sin[0].shape[-1] == attn.head_dim:
        kv_heads = qkv.shape[-1] // attn.head_dim // (attn.num_key_value_groups + 2)
        appended = own.append_qkv(qkv, kv_heads, *cos_sin)
        if appended is not None:
            return packed_attention(*appended, mask, attn.scaling).flatten(-2)
    query, key, value = split_heads(attn, qkv)
    query, key = rope(query, *cos_sin), rope(key, *cos_sin)
    if own is not None:
        # The cache would rotate the keys by itself; here that is done with the queries.
        rotated = settings.rotate(torch.cat((query, key), 1))
        query, key = rotated.split_with_sizes([query.shape[1], key.shape[1]], 1)
        key, value = own.append(key, value)
        return packed_attention(query, key, value, mask, attn.scaling).flatten(-2)
    if cache is not None:
        whole, position = cache
        key, value = whole.update(key, value, attn.layer_idx, {"cache_position": position})
    return w2a4_attention(attn, query, key, value, attention_mask, attn.scaling)[0].flatten(-2)


def _attended_by_others(
    attn: nn.Module, qkv: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Tensor | None, others: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The same by an attention function of transformers, on a 16-bit cache; it leaves R3 out, exactly."""
    query, key, value = split_heads(attn, qkv)
    cos_sin = rotary_of(attn, cos_sin)
    query, key = rope(query, *cos_sin), rope(key, *cos_sin)
    cache = cache_of(others)
    if cache is not None:
        position = {"cache_position": others.get("cache_position")}
        key, value = cache.update(key, value, attn.layer_idx, position)
    eager = vars(sys.modules[type(attn).__module__])["eager_attention_forward"]
    function = ALL_ATTENTION_FUNCTIONS.get(attn.config._attn_implementation, eager)
    others = {name: value for name, value in others.items() if name not in CACHE_NAMES}
    out, weights = function(attn, query, key, value, mask, dropout=0.0, scaling=attn.scaling,
                            sliding_window=architecture.window(attn), **others)  # fmt: skip
    return out.flatten(-2), weights


def _fits_layer_op(layer: Any) -> bool:
    """Packed and joint linears, plain norms, SiLU, RoPE of whole heads or none."""
    attn, mlp = layer.self_attn._modules, layer.mlp._modules
    linears = attn.get("qkv_proj"), attn.get("o_proj"), mlp.get("gate_up_proj"), mlp.get("down_proj")
    return (
        all(map(_is_packed_a4, linears))
        and all(linear.rotation is None for linear in linears[:3])
        and attn.get("q_norm") is None
        and layer.mlp.config.hidden_act in SILU
        and all(_is_plain_norm(layer._modules[name]) for name in layer.family.norms)
        and architecture.rotary_share(layer.self_attn.config) == 1
    )


def _is_whole(layer: Any) -> bool:
    """A packed layer none of whose parts was put into another module."""
    whole = isinstance(layer, PackedDecoderLayer)
    return whole and isinstance(layer.self_attn, PackedAttention) and isinstance(layer.mlp, PackedMLP)


def packed_layers(model: Any, length: int = 0) -> list[Any] | None:
    """The layers of a packed model with a 4-bit KV cache, for who calls them one by one; None for any other.

    Also None where something looks at the model, the decoder or a layer, which only their own forward serves,
    and where a window hides some of `length` tokens, which takes a mask.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not layers or not all(map(_is_whole, layers)):
        return None
    # A class derived from a layer's may have a forward of its own; transformers wraps that of any.
    plain = inspect.unwrap(PackedDecoderLayer.forward)
    if any(inspect.unwrap(type(layer).forward) is not plain for layer in layers):
        return None
    if any(map(is_watched, (model, decoder, *layers))) or not all(layer.untouched() for layer in layers):
        return None
    own = model.config._attn_implementation == NAME and layers[0].self_attn.kv_settings.kv_bits == 4
    windows = [architecture.window(layer.self_attn) for layer in layers]
    if any(window is not None and window < length for window in windows):
        return None
    return list(layers) if own else None
