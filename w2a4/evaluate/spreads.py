"""How far activations spread at the inputs of linears, before and behind the rotations: what a page draws."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..format.kinds import OnlineKind
from ..format.online import OnlineRotation

#: Ends of the bins of |x| / rms(x) of a token: quarters up to 4, then doubling.
EDGES = (*(i / 4 for i in range(17)), 5.6, 8, 11.3, 16, 22.6, 32, 45, 64, 91, 128)

#: Tokens that are looked at.
TOKENS = 512


@torch.no_grad()
def spreads(model: nn.Module, ids: Tensor) -> list[dict[str, Any]]:
    """Histograms of the inputs of every site of the first, a middle and the last layer.

    Args:
        model: of a family in `arch`, packed, rotated or neither.
        ids: int64 `[tokens]`; the first `TOKENS` are looked at.

    Returns:
        one dict a layer and site: `layer`, `site` (its linears), and `before` and `behind` its rotation,
        each None where there is none, else `counts` by the bins of `EDGES` as shares, and `largest`: the mean
        over tokens of the largest |x| / rms(x).
    """
    family, layers = arch.of_config(model.config), model.model.layers
    manifest = getattr(getattr(model.config, "quantization_config", None), "manifest", None)
    found: list[dict[str, Any]] = []
    hooks = []
    for index in sorted({0, len(layers) // 2, len(layers) - 1}):
        for site, module, of_output in _places(family, layers[index]):
            see = _seer(found, model.config, manifest, index, site)
            if of_output:
                hooks.append(module.register_forward_hook(lambda _, args, out, see=see: see(out)))
            else:
                hooks.append(module.register_forward_pre_hook(lambda _, args, see=see: see(args[0])))
    try:
        model.model(ids[None, :TOKENS].to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _places(family: arch.Architecture, layer: nn.Module) -> Iterator[tuple[arch.Site, nn.Module, bool]]:
    """Sites with the module that shows their input, as its output or its input."""
    for site in family.sites:
        path = site.norm or site.paths[0]
        yield site, layer.get_submodule(path), site.norm is not None


def _seer(
    found: list[dict[str, Any]], config: Any, manifest: Any, index: int, site: arch.Site
) -> Callable[[Tensor], None]:
    def see(x: Tensor) -> None:
        x = x.float().flatten(0, -2)
        entry: dict[str, Any] = {"layer": index, "site": ", ".join(li.name for li in site.linears)}
        before, behind = _sides(x, config, manifest, index, site)
        entry["before"] = None if before is None else _histogram(before)
        entry["behind"] = None if behind is None else _histogram(behind)
        found.append(entry)

    return see


def _sides(
    x: Tensor, config: Any, manifest: Any, index: int, site: arch.Site
) -> tuple[Tensor | None, Tensor | None]:
    """The input of a site before and behind its rotation; x is behind R1 and R2, and before R4."""
    if manifest is None or not hasattr(manifest, "rotation"):
        return x, None
    if site.rotation == "r4":
        return x, None if manifest.r4 is None else manifest.r4.apply(x)
    kind, name = getattr(manifest.rotation, site.rotation), site.rotation
    if kind not in typing.get_args(OnlineKind):  # learned ones are not in a checkpoint
        return None, x
    if kind == "none":
        return x, None
    size = x.shape[-1] if name == "r1" else arch.head_dim(config)
    rotation = OnlineRotation(kind, size, manifest.rotation.seed, name if name == "r1" else f"r2.{index}")
    back = rotation.matrix(torch.float32).to(x.device).T
    return (x.unflatten(-1, (-1, size)) @ back).flatten(-2), x


def _histogram(x: Tensor) -> dict[str, Any]:
    scaled = x.abs() / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    places = torch.bucketize(scaled.flatten().cpu(), torch.tensor(EDGES[1:-1]))
    counts = torch.bincount(places, minlength=len(EDGES) - 1).double()
    return {"counts": (counts / counts.sum()).tolist(), "largest": float(scaled.amax(-1).mean())}
