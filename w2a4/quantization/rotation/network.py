"""The LLaMA as a function of its rotations, and what learning minimises.

`RotatedNetwork` computes a fake-quantised LLaMA at given rotations, with gradients that reach them. The
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
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ...format.fake_quant import fake_quant_a4
from ...format.groups import resolve_group_size
from ...format.lloyd import fit_levels
from ...format.online import OnlineRotation
from ...format.rtn import nearest
from ...format.weight import QuantizedWeight
from ...hub.transformers import act_group_size, decoder_linears
from ...recipe import Recipe
from ...runtime.attention import KVSettings, w2a4_attention
from . import fold as fuse
from .cayley import kurtosis_gap
from .descent import Objective

#: Clip of activations where the recipe searches it, and of 4-bit weights: near the best for a Gaussian.
CLIP = 0.9

#: Objective `kurtosis`: windows read, tokens kept of each site's activations, tokens a step.
KURTOSIS_WINDOWS, KURTOSIS_TOKENS, KURTOSIS_BATCH = 16, 2048, 512


def act_group_sizes(model: nn.Module, recipe: Recipe) -> dict[str, int]:
    """Activations that share a scale, by linear; raises RecipeError for a group size that does not divide."""
    layer = model.model.layers[0]
    return {
        name: act_group_size(recipe, name, layer.self_attn.head_dim, linear.in_features)
        for name, linear in decoder_linears(layer).items()
    }


class RotatedNetwork:
    """A LLaMA as a function of its learned rotations, fake-quantised as a recipe says.

    Weights are a frozen copy with norms, R4 and every rotation that is not learned folded in. What the
    learned ones make of them is computed in the graph, so gradients reach the rotations exactly.
    Each layer runs again in the backward pass, so that only hidden states are kept.

    Args:
        model: LlamaForCausalLM, float, unrotated; not changed.
        recipe: `rotation.r1` and `r2` say which are learned, i.e. come as arguments.

    Raises:
        RotationError: see `fuse.rotate`.
    """

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.recipe, self.base = recipe, _fixed_part(model, recipe)
        r3 = OnlineRotation.from_dict(self.base.config.w2a4_rotation["online"]["r3"])
        self.settings = KVSettings(recipe.kv_bits, recipe.kv_clip, recipe.sink_tokens, r3)
        clip = CLIP if recipe.act_clip == "search" else recipe.act_clip
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
        llama = self.base.model
        embedded = llama.embed_tokens(ids)
        x = _turn(embedded, rotations.get("R1")).to(embedded.dtype)
        cos_sin = llama.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
        for index, layer in enumerate(llama.layers):
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
        seen = self._activation(_normalize(x, layer.input_layernorm), "q_proj")
        heads = self._activation(self._attend(layer.self_attn, seen, cos_sin, r1, r2), "o_proj")
        x = x + self._linear(layer.self_attn.o_proj, heads, r2, r1)
        seen, mlp = self._activation(_normalize(x, layer.post_attention_layernorm), "gate_proj"), layer.mlp
        inner = mlp.act_fn(self._linear(mlp.gate_proj, seen, r1)) * self._linear(mlp.up_proj, seen, r1)
        r4 = getattr(mlp.down_proj, "rotation", None)
        inner = self._activation(inner if r4 is None else r4.apply(inner), "down_proj")
        return x + self._linear(mlp.down_proj, inner, None, r1)

    def _attend(self, attention: nn.Module, seen: Tensor, cos_sin, r1, r2) -> Tensor:
        linears = (attention.q_proj, None), (attention.k_proj, None), (attention.v_proj, r2)
        q, k, v = (
            self._linear(linear, seen, r1, left).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for linear, left in linears
        )
        q, k = apply_rotary_pos_emb(q, k, *cos_sin)
        out, _ = w2a4_attention(attention, q, k, v, None, attention.scaling, kv_settings=self.settings)
        return out.flatten(2)

    def _activation(self, x: Tensor, linear: str) -> Tensor:
        """The input of a linear, and of those that share it, as its packed form reads it."""
        return x if self.recipe.act_bits == 16 else fake_quant_a4(x, self.act_clip, self.groups[linear])

    def _linear(
        self, linear: nn.Module, x: Tensor, right: Tensor | None, left: Tensor | None = None
    ) -> Tensor:
        """x through `leftᵀ · W · right` with bias `leftᵀ · b`."""
        weight = _turn(_turn(linear.weight, right).mT, left).mT
        bias = None if linear.bias is None else _turn(linear.bias, left).to(x.dtype)
        if self.recipe.rotation_learning.weights == "recipe":
            weight = _fake_weight(weight, self.recipe.weight_bits, self.recipe.group_size)
        return F.linear(x, weight.to(x.dtype), bias)


def _fixed_part(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A frozen copy of the model with everything folded in that is not learned."""
    kinds = {name: getattr(recipe.rotation, name) for name in ("r1", "r2")}
    kinds = {name: "none" if kind == "learned" else kind for name, kind in kinds.items()}
    rotation = dataclasses.replace(recipe.rotation, **kinds)
    return fuse.rotate(copy.deepcopy(model).eval().requires_grad_(False), rotation)


def _again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """The function's value; in the backward pass it is computed again. It must draw nothing at random."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """RMSNorm without its weight, which is folded."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)).to(x.dtype)


def _turn(x: Tensor, r: Tensor | None) -> Tensor:
    """`x @ (I ⊗ R)` along the last dimension, in R's dtype."""
    return x if r is None else (x.to(r.dtype).unflatten(-1, (-1, r.shape[0])) @ r).flatten(-2)


def _fake_weight(weight: Tensor, bits: int, group_size: int | str) -> Tensor:
    """Weights `[out, in]` rounded, with the gradient passed straight through.

    Cheap grids, since every step needs new ones: at 2 bits the levels that suit a Gaussian of the group's
    mean and deviation, which is what rotated weights look like; at 4 bits a fixed clip.
    """
    if bits == 16:
        return weight
    group_size = resolve_group_size(weight.shape[1], group_size)
    if bits == 4:
        return fake_quant_a4(
            weight, torch.tensor([CLIP], dtype=torch.float32, device=weight.device), group_size
        )
    groups = weight.detach().float().unflatten(1, (-1, group_size))
    levels, scale = fit_levels(groups, iterations=0)
    codes = nearest(groups, scale, levels).flatten(1)
    rounded = QuantizedWeight(codes, scale, levels, group_size).dequantize()
    return rounded.to(weight.dtype) + (weight - weight.detach())


def network_objective(model: nn.Module, recipe: Recipe, ids: Tensor) -> Objective:
    """Loss of the fake-quantised network on the windows of the step.

    Windows come in a random order of the recipe's seed, all of them before one comes again.
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
    """Distance of activations' kurtosis from a uniform distribution's.

    R1 turns the inputs of q/k/v and of gate/up (mean over both and all layers), an R2 the values of its
    layer; the sum over all matrices. Activations are those of the full-precision model, unrotated.
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
    for i, layer in enumerate(base.model.layers):
        attention, mlp, width = layer.self_attn, layer.mlp, layer.self_attn.head_dim
        for site, module in ((2 * i, attention.q_proj), (2 * i + 1, mlp.gate_proj)):
            hook = functools.partial(lambda site, module, args: keep("R1", site, args[0]), site)
            handles.append(module.register_forward_pre_hook(hook))
        hook = functools.partial(
            lambda i, width, module, args, out: keep(f"R2.{i}", 0, out.unflatten(-1, (-1, width))), i, width
        )
        handles.append(attention.v_proj.register_forward_hook(hook))
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
