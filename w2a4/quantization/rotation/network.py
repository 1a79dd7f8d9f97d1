"""The model as a function of its rotations, and what learning minimises.

`RotatedNetwork` computes a fake-quantised model at given rotations, with gradients that reach them. The
objectives of `OBJECTIVES` are functions of a step and the rotations, which `descent.Descent` minimises.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import arch
from ...arch.architecture import Rows, Site, activation
from ...arch.forward import decoder_layer
from ...format.fake_quant import fake_quant_a4
from ...format.grid import Uniform
from ...format.groups import resolve_group_size
from ...format.online import OnlineRotation
from ...recipe import Recipe
from ...runtime.attention import KVSettings
from ...runtime.heads import attend
from . import fold
from .cayley import kurtosis_gap
from .descent import Objective

#: Clip of activations where the recipe searches it, and of 4-bit weights: near the best for a Gaussian.
CLIP = 0.9

#: Objective `kurtosis`: windows read, tokens kept of each site's activations, tokens a step.
KURTOSIS_WINDOWS, KURTOSIS_TOKENS, KURTOSIS_BATCH = 16, 2048, 512


def act_group_sizes(model: nn.Module, recipe: Recipe) -> dict[str, int]:
    """Activations that share a scale, by path of a linear in its layer.

    Raises:
        RecipeError: a group size does not divide.
    """
    family, shapes = arch.of_config(model.config), arch.of_config(model.config).linear_shapes(model.config)
    return {
        path: family.act_group_size(recipe, site, arch.head_dim(model.config), shapes[path][1])
        for site in family.sites
        for path in site.paths
    }


class RotatedNetwork:
    """A model as a function of its learned rotations, fake-quantised as a recipe says.

    Weights are a frozen copy with norms, R4 and every rotation that is not learned folded in. Learned
    rotations are applied to the weights in the graph, so that gradients reach them exactly. The backward
    pass computes each layer again, so that memory holds hidden states only.

    Args:
        model: of a family in `arch`, float, unrotated; not changed.
        recipe: rotations that `rotation.r1` and `r2` call learned are arguments of the methods.

    Raises:
        RotationError: see `fold.rotate`.
    """

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.recipe, self.base = recipe, _fixed_part(model, recipe)
        self.family = arch.of_config(model.config)
        r3 = OnlineRotation.from_dict(self.base.config.w2a4_rotation["online"]["r3"])
        self.settings = KVSettings(recipe.kv_bits, recipe.kv_clip, recipe.sink_tokens, r3)
        clip = recipe.signed_clip(CLIP if recipe.act_clip == "search" else recipe.act_clip)
        self.act_clip = torch.tensor([clip], dtype=torch.float32, device=self.base.lm_head.weight.device)
        self.groups = act_group_sizes(self.base, recipe) if recipe.act_bits < 16 else {}

    def loss(self, ids: Tensor, rotations: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the next token, float scalar, for ids int64 `[batch, tokens]`."""
        return self._mean(self._cross_entropy, ids, ids, rotations)

    def divergence(self, ids: Tensor, rotations: dict[str, Tensor]) -> Tensor:
        """Mean Kullback-Leibler divergence of the next token's distribution from the full-precision
        model's, float scalar, for ids int64 `[batch, tokens]`.
        """
        with torch.no_grad():
            hidden = self.base.model(ids, use_cache=False).last_hidden_state
        return self._mean(self._divergence, ids, hidden, rotations)

    def _mean(
        self, function: Callable[..., Tensor], ids: Tensor, targets: Tensor, rotations: dict[str, Tensor]
    ) -> Tensor:
        # One sequence at a time: logits are as wide as the vocabulary.
        pairs = zip(self._hidden(ids, rotations), targets, strict=True)
        return torch.stack([_again(function, *pair, rotations.get("R1")) for pair in pairs]).mean()

    def logits(self, ids: Tensor, rotations: dict[str, Tensor]) -> Tensor:
        """`[batch, tokens, vocab]` in the model's dtype."""
        return self._head(self._hidden(ids, rotations), rotations.get("R1"))

    def _hidden(self, ids: Tensor, rotations: dict[str, Tensor]) -> Tensor:
        decoder = self.base.model
        embedded = decoder.embed_tokens(ids)
        x = _turn(embedded, rotations.get("R1")).to(embedded.dtype)
        cos_sin = decoder.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
        for index, layer in enumerate(decoder.layers):
            x = _again(self._layer, layer, x, cos_sin, rotations.get("R1"), rotations.get(f"R2.{index}"))
        return x

    def _head(self, x: Tensor, r1: Tensor | None) -> Tensor:
        x = _normalize(x, self.base.model.norm)
        return self.base.lm_head(_turn(x, None if r1 is None else r1.T).to(x.dtype))

    def _cross_entropy(self, x: Tensor, ids: Tensor, r1: Tensor | None) -> Tensor:
        return F.cross_entropy(_wide(self._head(x[:-1], r1)), ids[1:])

    def _divergence(self, x: Tensor, teacher: Tensor, r1: Tensor | None) -> Tensor:
        student, target = _wide(self._head(x, r1)), _wide(self.base.lm_head(teacher))
        return F.kl_div(
            student.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True
        )

    def _layer(self, layer: nn.Module, x: Tensor, cos_sin, r1: Tensor | None, r2: Tensor | None) -> Tensor:
        return decoder_layer(self.family, _RotatedLayer(self, layer, cos_sin, r1, r2), x)


class _RotatedLayer:
    """The steps of one layer of a `RotatedNetwork` at given rotations."""

    def __init__(
        self, network: RotatedNetwork, layer: nn.Module, cos_sin: tuple[Tensor, Tensor], r1: Tensor | None,
        r2: Tensor | None,
    ):  # fmt: skip
        self.network, self.layer, self.cos_sin = network, layer, cos_sin
        self.inputs = {"r1": r1, "r2": r2, "r4": None}  # R4 is folded
        self.outputs = {"v": r2, "o": r1, "down": r1}

    def attention(self, hidden: Tensor) -> Tensor:
        qkv = self._normed(self.network.family.attention_in, hidden)
        return attend(self.layer.self_attn, qkv, self.cos_sin, self.network.settings)

    def mlp(self, hidden: Tensor) -> Tensor:
        gate, up = self._normed(self.network.family.mlp_in, hidden).chunk(2, -1)
        return activation(self.layer.mlp)(gate) * up

    def add(self, site: Site, x: Tensor, hidden: Tensor) -> Tensor:
        return hidden + self._linears(site, x)

    def _normed(self, site: Site, hidden: Tensor) -> Tensor:
        return self._linears(site, _normalize(hidden, self.layer.get_submodule(site.norm)))

    def _linears(self, site: Site, x: Tensor) -> Tensor:
        """What the linears of a site give for their input, as its packed form reads it."""
        network, rows = self.network, list(self.network.family.rows(self.network.base.config, site))
        r4 = getattr(self.layer.get_submodule(site.paths[0]), "rotation", None)
        x = x if r4 is None else r4.apply(x)
        if network.recipe.act_bits == 4:
            x = fake_quant_a4(x, network.act_clip, network.groups[site.paths[0]])
        out = [self._linear(path, x, site, [r for r in rows if r.path == path]) for path in site.paths]
        return out[0] if len(out) == 1 else torch.cat(out, -1)

    def _linear(self, path: str, x: Tensor, site: Site, rows: list[Rows]) -> Tensor:
        """x through `leftᵀ · W · right` with bias `leftᵀ · b`, where left is of some rows only."""
        linear, recipe = self.layer.get_submodule(path), self.network.recipe
        weight = _turn(linear.weight, self.inputs[site.rotation])
        lefts = [(part.start, part.stop, self.outputs.get(part.output)) for part in rows]
        weight = _cat([_turn(weight[a:b].mT, left).mT for a, b, left in lefts])
        bias = linear.bias
        if bias is not None:
            bias = _cat([_turn(bias[a:b], left) for a, b, left in lefts]).to(x.dtype)
        if recipe.rotation_learning.weights == "recipe":
            weight = _fake_weight(weight, recipe)
        return F.linear(x, weight.to(x.dtype), bias)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fixed_part(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A frozen copy of the model with everything folded in that is not learned."""
    kinds = {name: getattr(recipe.rotation, name) for name in ("r1", "r2")}
    kinds = {name: "none" if kind == "learned" else kind for name, kind in kinds.items()}
    rotation = dataclasses.replace(recipe.rotation, **kinds)
    return fold.rotate(copy.deepcopy(model).eval().requires_grad_(False), rotation)


def _again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """The function's value, computed again in the backward pass; the function must not be random."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _wide(x: Tensor) -> Tensor:
    """In float32, or wider if x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """RMSNorm without its weight, which is folded."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)).to(x.dtype)


def _turn(x: Tensor, r: Tensor | None) -> Tensor:
    """`x @ (I ⊗ R)` along the last dimension, in R's dtype."""
    return x if r is None else (x.to(r.dtype).unflatten(-1, (-1, r.shape[0])) @ r).flatten(-2)


def _fake_weight(weight: Tensor, recipe: Recipe) -> Tensor:
    """Weights `[out, in]` rounded, with the gradient passed straight through.

    Grids are cheap, since every step needs new ones: a codebook has the best levels for a Gaussian of the
    group's mean and deviation, since rotated weights are nearly Gaussian; a uniform grid has a fixed clip.
    """
    if recipe.weight_bits == 16:
        return weight
    group_size = resolve_group_size(weight.shape[1], recipe.group_size)
    if recipe.grid == Uniform(4):  # as activations, with a gradient through the scale
        return fake_quant_a4(
            weight, torch.tensor([CLIP], dtype=torch.float32, device=weight.device), group_size
        )
    groups = weight.detach().float().unflatten(1, (-1, group_size))
    scale, levels = recipe.grid.rough(groups, CLIP)
    rounded = recipe.grid.decode(recipe.grid.nearest(groups, scale, levels), scale, levels).flatten(1)
    return rounded.to(weight.dtype) + (weight - weight.detach())


def network_objective(model: nn.Module, recipe: Recipe, ids: Tensor) -> Objective:
    """Loss of the fake-quantised network on the windows of the step.

    The recipe's seed gives a random order of the windows; all are used before one is used again.
    """
    network, options = RotatedNetwork(model, recipe), recipe.rotation_learning
    generator = torch.Generator().manual_seed(recipe.rotation.seed)
    needed = options.steps * options.batch_size
    rounds = [torch.randperm(len(ids), generator=generator) for _ in range(-(-needed // len(ids)))]
    order = torch.cat(rounds)[:needed].view(options.steps, options.batch_size)
    device = network.act_clip.device
    loss = network.loss if options.objective == "network" else network.divergence
    return lambda step, rotations: loss(ids[order[step]].to(device), rotations)


def kurtosis_objective(model: nn.Module, recipe: Recipe, ids: Tensor) -> Objective:
    """Distance of activations' kurtosis from that of a uniform distribution, summed over all rotations.

    R1 rotates the inputs of q/k/v and of gate/up (mean over both and all layers), an R2 the values of its
    layer. Activations are those of the full-precision model, unrotated.
    """
    sites = _sites(_fixed_part(model, recipe), recipe, ids[:KURTOSIS_WINDOWS])
    seed = recipe.rotation.seed

    def objective(step: int, rotations: dict[str, Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(seed + step)
        pick = torch.randperm(len(sites["R2.0"][0]), generator=generator)[:KURTOSIS_BATCH]
        gaps = [
            torch.stack([kurtosis_gap((x[pick].to(r) @ r).flatten(0, -2)) for x in sites[name]]).mean()
            for name, r in rotations.items()
        ]
        return torch.stack(gaps).sum()

    return objective


@torch.no_grad()
def _sites(base: nn.Module, recipe: Recipe, ids: Tensor) -> dict[str, list[Tensor]]:
    """By matrix, what it turns: for R1 `[tokens, hidden]` twice a layer, for an R2 once
    `[tokens, heads, head_dim]`.
    """
    generator = torch.Generator().manual_seed(recipe.rotation.seed)
    each = min(ids.shape[1], -(-KURTOSIS_TOKENS // len(ids)))
    rows: Tensor
    kept: dict[tuple[str, int], list[Tensor]] = {}

    def keep(name: str, site: int, x: Tensor) -> None:
        kept.setdefault((name, site), []).append(x[0, rows])

    handles = []
    family, width = arch.of_config(base.config), arch.head_dim(base.config)
    values = family.output_rows(base.config, "v")

    def keep_values(i: int, module: nn.Module, args: Any, out: Tensor) -> None:
        keep(f"R2.{i}", 0, out[..., values.start : values.stop].unflatten(-1, (-1, width)))

    for i, layer in enumerate(base.model.layers):
        for offset, site in enumerate((family.attention_in, family.mlp_in)):
            hook = functools.partial(lambda site, module, args: keep("R1", site, args[0]), 2 * i + offset)
            handles.append(layer.get_submodule(site.paths[0]).register_forward_pre_hook(hook))
        hook = functools.partial(keep_values, i)
        handles.append(layer.get_submodule(values.path).register_forward_hook(hook))
    for window in ids.to(base.lm_head.weight.device).split(1):
        rows = torch.randperm(ids.shape[1], generator=generator)[:each]
        base.model(window, use_cache=False)
    for handle in handles:
        handle.remove()
    sites: dict[str, list[Tensor]] = {}
    for (name, _), parts in kept.items():
        sites.setdefault(name, []).append(torch.cat(parts))
    return sites


OBJECTIVES: dict[str, Callable[[nn.Module, Recipe, Tensor], Objective]] = {
    "network": network_objective,
    "distill": network_objective,
    "kurtosis": kurtosis_objective,
}
