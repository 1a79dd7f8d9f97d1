"""`Architecture`: the decoder layer of a family as a table of four sites.

A site is a place in a layer where linears read one input. Data passes them in this order:

    x ── norm ── attention_in ── q, k, v ── attention ── attention_out ── + x
    x ── norm ── mlp_in ── act(gate) · up ── mlp_out ── + x

What a linear's output is (`q`, `k`, `v`, `o`, `gate`, `up`, `down`) may be one module or rows of a joint one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..format.groups import resolve_act_group_size, resolve_group_size

#: Where a model of every family has its parts.
LAYERS, EMBEDDING, FINAL_NORM, HEAD = "model.layers", "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True)
class Rows:
    """Rows of a linear that give one output.

    Attributes:
        path: of the linear in its layer.
        output: `q`, `k`, `v`, `o`, `gate`, `up` or `down`.
        start, stop: rows of its weight.
    """

    path: str
    output: str
    start: int
    stop: int


@dataclass(frozen=True)
class Linear:
    """A linear of a decoder layer.

    Attributes:
        path: of the module in its layer, `self_attn.q_proj`.
        outputs: what its rows give, in order; see `Rows`.
    """

    path: str
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """The path of the module that holds it."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class Site:
    """Linears that read one input.

    Attributes:
        linears: in the order of their outputs.
        rotation: of the input: `r1` (residual stream), `r2` (value heads) or `r4` (online).
        norm: path of the RMSNorm before it; None for a site whose output joins the residual stream.
    """

    linears: tuple[Linear, ...]
    rotation: str
    norm: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(linear.path for linear in self.linears)

    @property
    def joins_residual(self) -> bool:
        return self.norm is None


def separate(parent: str, *outputs: str) -> tuple[Linear, ...]:
    """One linear an output, under the names of LLaMA."""
    return tuple(Linear(f"{parent}.{output}_proj", (output,)) for output in outputs)


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        model_type: of its transformers configuration.
        model_class: the name of its transformers class.
        attention_in, attention_out, mlp_in, mlp_out: its sites.
        head_norms: paths of the norms of query and key heads before RoPE, or nothing.
        rereads: transformers' `generate` reads a sequence again where it becomes longer than
            `original_max_position_embeddings`.
    """

    model_type: str
    model_class: str
    attention_in: Site = Site(separate("self_attn", "q", "k", "v"), "r1", "input_layernorm")
    attention_out: Site = Site(separate("self_attn", "o"), "r2")
    mlp_in: Site = Site(separate("mlp", "gate", "up"), "r1", "post_attention_layernorm")
    mlp_out: Site = Site(separate("mlp", "down"), "r4")
    head_norms: tuple[str, ...] = ()
    rereads: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """In the order data reaches them."""
        return self.attention_in, self.attention_out, self.mlp_in, self.mlp_out

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all linears in a layer."""
        return tuple(path for site in self.sites for path in site.paths)

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the norms in a layer whose weights can be folded into linears."""
        return tuple(site.norm for site in self.sites if site.norm is not None)

    def site_of(self, path: str) -> Site:
        """The site of a linear, by its path in the layer or the last part of that."""
        return next(s for s in self.sites if any(path in (li.path, li.name) for li in s.linears))

    def linears(self, layer: nn.Module) -> dict[str, nn.Module]:
        """The linears of a decoder layer by path."""
        return {path: layer.get_submodule(path) for path in self.paths}

    def output_rows(self, config: Any, output: str) -> Rows:
        """The rows that give an output."""
        return next(rows for site in self.sites for rows in self.rows(config, site) if rows.output == output)

    def rows(self, config: Any, site: Site) -> Iterator[Rows]:
        """What the rows of a site's linears give."""
        widths = output_widths(config)
        for linear in site.linears:
            start = 0
            for output in linear.outputs:
                yield Rows(linear.path, output, start, start + widths[output])
                start += widths[output]

    def linear_shapes(self, config: Any) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of every linear of a layer, by path."""
        widths = output_widths(config)
        inputs = {"r1": widths["o"], "r2": widths["q"], "r4": widths["gate"]}
        return {
            linear.path: (sum(widths[output] for output in linear.outputs), inputs[site.rotation])
            for site in self.sites
            for linear in site.linears
        }

    def act_group_size(self, settings: Any, site: Site, head_dim: int, in_features: int) -> int:
        """Activations that share a scale at the input of a site; -1 is the whole token.

        Kernels need groups of weights and of activations of which one divides the other. Where a head (of
        80, 96, 100, …) is neither to the group of the weights, so many heads share a scale as make up whole
        groups.

        Args:
            settings: has the fields `group_size`, `act_group_size` and `o_proj_act` of a `Recipe`.
        """
        group = resolve_group_size(in_features, settings.group_size)
        asked = resolve_act_group_size(in_features, settings.act_group_size, group)
        if site.rotation != "r2" or settings.o_proj_act != "head" or 0 < asked <= head_dim:
            return asked
        if group % head_dim == 0 or head_dim % group == 0:
            return head_dim
        heads = math.lcm(group, head_dim)
        return heads if in_features % heads == 0 else asked


def get(config: Any, name: str) -> Any:
    """A field of a configuration, which may be a mapping; None where it is missing."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def head_dim(config: Any) -> int:
    return get(config, "head_dim") or get(config, "hidden_size") // get(config, "num_attention_heads")


def output_widths(config: Any) -> dict[str, int]:
    """Rows of each output of a layer's linears."""
    heads = get(config, "num_attention_heads")
    q, kv = heads * head_dim(config), (get(config, "num_key_value_heads") or heads) * head_dim(config)
    inner, hidden = get(config, "intermediate_size"), get(config, "hidden_size")
    return {"q": q, "k": kv, "v": kv, "o": hidden, "gate": inner, "up": inner, "down": hidden}


def uses_rope(attention: nn.Module) -> bool:
    """Whether an attention module of transformers turns its queries and keys by position."""
    return bool(getattr(attention, "use_rope", True))


def window(attention: nn.Module) -> int | None:
    """Tokens that a query of this attention module sees, itself included; None is all before it."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    config = attention.config
    types = getattr(config, "layer_types", None)
    if types and types[attention.layer_idx] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def rotary_share(config: Any) -> float:
    """The part of a head that RoPE turns."""
    rope = get(config, "rope_parameters") or {}
    return get(config, "partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0


def activation(mlp: nn.Module) -> nn.Module:
    """The activation function between gate and up."""
    return mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
