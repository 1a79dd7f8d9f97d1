"""The exact prefix of a model: which tokens, and their keys and values at full precision.

What a LLaMA reads first becomes the token that all others attend to, by a massive activation; some models
have more such tokens. With a prefix that takes this part, none of a text's own tokens does, if the prefix is
well chosen: behind SmolLM2's `<|im_start|>` another `<|im_start|>`, as a chat begins with one, is massive
again; behind a line end it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..errors import RecipeError
from ..format.groups import MOST_PREFIX
from ..recipe import Recipe
from ..runtime.arguments import cache_name
from ..runtime.prefix import KVPrefix

#: A token is massive where its hidden state is so many times as long as the window's median.
MASSIVE = 64.0

#: Windows, and tokens of each, that candidates are tried on; and so many of the most frequent tokens are.
WINDOWS, TOKENS, COMMON = 2, 128, 6

#: RoPE whose angles depend on how long a sequence becomes: a key at a fixed position has no fixed angle.
UNFIXED_ROPE = ("dynamic", "longrope")


@torch.no_grad()
def choose_prefix(model: nn.Module, tokenizer: Any, ids: Tensor, recipe: Recipe) -> tuple[int, ...]:
    """Tokens of the prefix that the recipe asks for.

    BOS, the most frequent tokens and those that are massive inside of a text are tried in turn. The one is
    taken behind which the fewest tokens are massive, of windows as they are and of windows that begin with
    BOS, and of such the one behind which the model predicts the windows best; `auto` goes on with a second
    one as long as that leaves fewer.

    Args:
        model: rotated, at full precision.
        tokenizer: for its BOS.
        ids: calibration windows, int64 `[samples, tokens]`.

    Raises:
        RecipeError: a number of tokens for a model whose RoPE has no fixed angles, or as many as it has
            positions.
    """
    wanted = recipe.prefix_tokens
    if wanted == 0 or recipe.sink_tokens:
        return ()
    positions = getattr(model.config, "max_position_embeddings", None)
    if wanted != "auto" and positions is not None and wanted >= positions:
        raise RecipeError(
            f"prefix_tokens={wanted} for a model of max_position_embeddings={positions}: nothing is left for "
            "a text; set prefix_tokens=0"
        )
    kind = _rope_kind(model.config)
    if kind in UNFIXED_ROPE:
        if wanted == "auto":
            return ()
        raise RecipeError(
            f"prefix_tokens={wanted} with RoPE of kind {kind!r}, whose angles depend on a text's length; set "
            "prefix_tokens=0"
        )
    windows = ids[:WINDOWS, :TOKENS].to(model.device)
    bos = getattr(tokenizer, "bos_token_id", None)
    texts = [windows]
    if bos is not None:
        texts.append(torch.cat([windows.new_full((len(windows), 1), bos), windows], 1))
    found = [massive(model, text) for text in texts]
    left, prefix = sum(int(each.sum()) for each in found), ()
    if wanted == "auto" and not left:
        return ()
    inside = windows[:, 1:][found[0][:, 1:]].unique()[:COMMON].tolist()
    common = ids.flatten().bincount().argsort(descending=True, stable=True)[:COMMON].tolist()
    candidates = dict.fromkeys([*([] if bos is None else [bos]), *common, *inside])
    while len(prefix) < (MOST_PREFIX if wanted == "auto" else wanted):
        tried = {token: _score(model, texts, (*prefix, token)) for token in candidates}
        best = min(tried, key=tried.__getitem__)
        if wanted == "auto" and tried[best][0] >= left:
            break
        prefix, left = (*prefix, best), tried[best][0]
        if wanted == "auto" and not left:
            break
    return prefix


def _rope_kind(config: Any) -> str:
    told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return told.get("rope_type", told.get("type", "default"))


def _score(model: nn.Module, texts: list[Tensor], prefix: tuple[int, ...]) -> tuple[int, float]:
    """Massive tokens of texts behind a prefix, and how badly the model predicts the first of them."""
    (where, last), *others = (_read(model, text, prefix) for text in texts)
    pairs = zip(last[:, :-1], texts[0], strict=True)
    losses = [F.cross_entropy(model.lm_head(hidden).float(), ids[1:]) for hidden, ids in pairs]
    return int(sum(found.sum() for found, _ in ((where, last), *others))), float(torch.stack(losses).mean())


def massive(model: nn.Module, ids: Tensor, prefix: Sequence[int] = ()) -> Tensor:
    """Where tokens of windows `[samples, tokens]` behind a prefix are massive in any layer: bool, alike."""
    return _read(model, ids, prefix)[0]


@torch.no_grad()
def _read(model: nn.Module, ids: Tensor, prefix: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`massive`, and what lm_head reads of the windows, `[samples, tokens, hidden]`."""
    before = torch.tensor(prefix, dtype=torch.long, device=ids.device).expand(len(ids), -1)
    largest = torch.zeros(ids.shape, device=ids.device)

    def look(layer: nn.Module, args: Any, out: Any) -> None:
        states = out if isinstance(out, Tensor) else out[0]  # transformers 4.57 returns a tuple
        norms = states.float().norm(dim=-1)[:, len(prefix) :].to(ids.device)
        largest.copy_(largest.maximum(norms / norms.median(1, keepdim=True).values.clamp_min(1e-30)))

    # What transformers' output_hidden_states leaves in the layers would be in the way when they are packed.
    handles = [layer.register_forward_hook(look) for layer in model.model.layers[:-1]]
    try:
        last = model.model(torch.cat([before, ids], 1), use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return largest > MASSIVE, last[:, len(prefix) :]


@torch.no_grad()
def add_prefix(model: nn.Module, tokens: Sequence[int]) -> None:
    """Give every attention layer of a rotated full-precision model the keys and values of a prefix.

    They are those at the positions before 0, so that no position of a text moves.
    """
    if not tokens:
        return
    ids = torch.tensor([tokens], device=model.device)
    positions = torch.arange(-len(tokens), 0, device=model.device)[None]
    cache = DynamicCache()
    model.model(ids, position_ids=positions, use_cache=True, **{cache_name(model.model.forward): cache})
    for layer, kept in zip(model.model.layers, cache.layers, strict=True):
        attention = layer.self_attn
        keys = attention.kv_settings.rotate(kept.keys)
        attention.prefix = KVPrefix.of(keys[0], kept.values[0])
