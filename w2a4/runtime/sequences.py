"""What the engine advances step by step: prompts in a cache, and the logits of what comes next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from .arguments import CACHE, cache_name
from .graphs import Captures, PromptGraphs, StepGraphs
from .kv_cache import KV4Cache
from .layer import packed_layers
from .step import LayerOp, step_op

#: Tokens of a prompt that go through the layers at a time, so that memory does not grow with its length; and
#: of all prompts together on a GPU, to which Python cannot tell what to do fast enough in smaller pieces.
PREFILL_CHUNK, CUDA_PREFILL_CHUNK = 1024, 4096

#: Kinds of RoPE whose angles depend on how long a sequence has become.
DYNAMIC_ROPE = ("dynamic", "longrope")


class PackedSequences:
    """Sequences of a packed LLaMA in one cache, each from its first position on.

    What a step does depends on nothing that the host knows but a bound on the lengths, so a graph of it
    can be replayed.

    Attributes:
        prefix: tokens that stand in the cache before every sequence.
        lengths: int64 `[batch]` on the device, tokens of each sequence in the cache, the prefix's among them.
        longest: the most of them, on the host.
        ends: the same of each sequence, on the host.
        logits: float `[batch, vocabulary]`, of the token that comes next.
    """

    def __init__(
        self, model: Any, rows: list[Tensor], capacity: int, layers: list[Any], graphs: bool = False
    ):
        self.decoder, self.head, self.layers = model.model, model.lm_head, layers
        self.addresses, self.batch = _addresses(model), len(rows)
        self.cache = KV4Cache.for_model(model, capacity)
        for store in self.cache.stores:
            head_dim, kv_heads = layers[0].self_attn.head_dim, model.config.num_key_value_heads
            store.allocate(self.decoder.norm.weight, len(rows), kv_heads, head_dim)
        self.prefix = self.cache.stores[0].prefix
        self.lengths = torch.zeros(len(rows), dtype=torch.long, device=rows[0].device)
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.call: LayerOp | None = None
        self.graphs: StepGraphs | None = None
        self.prompts: PromptGraphs | None = None
        captures, graphs = Captures(), graphs and not self._dynamic_rope()
        if graphs and not sink_tokens_of(model):
            self.prompts = PromptGraphs(self._padded, len(rows), capacity, self.lengths.device, captures)
        self.begin(rows)
        if graphs and self.longest >= sink_tokens_of(model):
            room = self.prefix + capacity
            self.graphs = StepGraphs(self._step, [self.lengths], len(rows), room, captures)
            self.tables = _rotation_tables(layers, self.decoder.norm.weight)

    def fits(self, model: Any, rows: list[Tensor]) -> bool:
        """Whether `begin` will do for these rows: nothing lies elsewhere than when graphs were captured."""
        same = packed_layers(model) == self.layers and self.addresses == _addresses(model)
        return same and len(rows) == self.batch and not sink_tokens_of(model)

    def begin(self, rows: list[Tensor]) -> None:
        """Read prompts, in place of what was there before."""
        self.cache.clear()
        lengths = [len(row) for row in rows]
        self.ends = [self.prefix + length for length in lengths]
        self.longest = max(self.ends)
        if len(set(lengths)) == 1:
            ids = torch.stack(rows)
            logits = None if self.prompts is None else self.prompts.run(ids)
            if logits is None:
                self.cache.clear()  # of what could not be captured
                logits = self._prefill(ids, self.cache)
            self.logits = logits
        else:  # one after another, so that no padding is computed
            slots = [self.cache.slot(i) for i in range(len(rows))]
            logits = [self._prefill(row[None], slot) for row, slot in zip(rows, slots, strict=True)]
            self.logits = torch.cat(logits)
            self.cache.join(slots)
        self.lengths.copy_(torch.tensor(lengths) + self.prefix)
        # A replay runs nothing of Python's, and what ran padded counted more tokens.
        self.cache.share(self.lengths, self.longest)

    def advance(self, tokens: Tensor) -> None:
        """Append a token `[batch]` to each sequence."""
        self.longest, self.ends = self.longest + 1, [end + 1 for end in self.ends]
        if self.graphs is not None:
            self.logits = self.graphs.run(tokens, self.longest)
        else:
            self.logits = self._step(tokens, self.longest)

    @staticmethod
    def renews(model: Any) -> bool:
        """Whether sequences of a packed model can be renewed and dropped.

        On a GPU steps are captured; and a text's first tokens may be kept in 16 bits beside the cache.
        """
        return model.device.type == "cpu" and not sink_tokens_of(model)

    def renew(self, place: int, row: Tensor) -> Tensor:
        """Read a prompt `[n]` in place of a sequence. Returns logits `[1, vocabulary]`."""
        logits = self._prefill(row[None], self.cache.slot(place))
        self.ends[place] = self.prefix + len(row)
        self.lengths[place], self.longest = self.ends[place], max(self.ends)
        self.cache.share(self.lengths, self.longest)
        return logits

    def drop(self, place: int) -> None:
        """Forget a sequence; the last one takes its place."""
        last = self.batch = self.batch - 1

        def without(t: Tensor) -> Tensor:
            if place != last and t.stride(0):  # not of what is the same for all
                t[place].copy_(t[last])
            return t[:last]

        self.ends[place] = self.ends[last]
        self.ends.pop()
        if not last:
            return
        self.longest = max(self.ends)
        self.cache.map(without)
        self.lengths = without(self.lengths)
        self.cache.share(self.lengths, self.longest)
        self.call = None

    def _step(self, tokens: Tensor, bound: int) -> Tensor:
        """Logits after another token `[batch]` of each sequence, none of which is then longer than bound."""
        self.cache.fill(bound - 1)
        hidden = self.decoder.embed_tokens(tokens[:, None])
        rotary = self._rotary(hidden, self.lengths[:, None])
        if self.call is None:
            # Every step from here on has the same arguments, but for its token and its position.
            self.call = step_op(self.layers, self.cache.layers, hidden)
        if self.call is not None:
            hidden = self.call(hidden, rotary, None)
        else:
            for layer in self.layers:
                hidden = layer.forward(hidden, position_embeddings=rotary, **{CACHE: self.cache})
        self.lengths += 1
        return self._logits(hidden)

    def _padded(self, ids: Tensor, last: Tensor) -> Tensor:
        """Logits after token `last`, int64 `[1]`, of prompts `[batch, tokens]`; padding is behind it.

        What padding leaves in the cache lies where nothing looks until it has been written again.
        """
        self.cache.clear()
        return self._logits(self._read(ids, self.cache).index_select(1, last))

    def _prefill(self, ids: Tensor, cache: KV4Cache) -> Tensor:
        """Logits after the last token of prompts `[batch, tokens]`."""
        return self._logits(self._read(ids, cache)[:, -1:])

    def _read(self, ids: Tensor, cache: KV4Cache) -> Tensor:
        """Hidden states of the last chunk."""
        places = torch.arange(self.prefix, self.prefix + ids.shape[1], device=ids.device)[None]
        size = max(1, CUDA_PREFILL_CHUNK // len(ids)) if ids.is_cuda else PREFILL_CHUNK
        # Of all positions at once: some kinds of RoPE have angles that depend on the length.
        cos, sin = self._rotary(self.decoder.embed_tokens(ids[:, :1]), places)
        for chunk, *rotary in zip(ids.split(size, 1), cos.split(size, 1), sin.split(size, 1), strict=True):
            hidden = self.decoder.embed_tokens(chunk)
            for layer in self.layers:
                hidden = layer.forward(hidden, position_embeddings=tuple(rotary), **{CACHE: cache})
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """`[batch, vocabulary]` of hidden states `[batch, 1, hidden]`."""
        return self.head(self.decoder.norm(hidden))[:, -1]

    def _dynamic_rope(self) -> bool:
        return getattr(self.decoder.rotary_emb, "rope_type", "default") in DYNAMIC_ROPE

    def _rotary(self, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at places in the cache, out of a table of all of them where they are fixed.

        A text begins at position 0, behind the prefix.
        """
        if self._dynamic_rope():
            return self.decoder.rotary_emb(hidden, places - self.prefix)
        if self.rotary is None:
            capacity = self.cache.layers[0].store.capacity
            every = torch.arange(capacity, device=places.device)[None]
            self.rotary = self.decoder.rotary_emb(hidden, every - self.prefix)
        cos, sin = self.rotary
        return cos[0, places], sin[0, places]


def _rotation_tables(layers: list[Any], like: Tensor) -> list[tuple[Tensor | None, ...]]:
    """What online rotations of these layers read, for hidden states like this tensor."""
    used = {layer.self_attn.kv_settings.rotation for layer in layers}
    used |= {getattr(module, "rotation", None) for layer in layers for module in layer.modules()}
    return [r.tables(like.device, like.dtype) for r in used if r is not None and r.kind != "none"]


def _addresses(model: Any) -> list[int]:
    """Where the parameters lie. Every request asks, and `model.parameters()` takes milliseconds."""
    addresses, rest = [], [model]
    while rest:
        module = rest.pop()
        if module is not None:
            rest.extend(module._modules.values())
            addresses += [each.data_ptr() for each in module._parameters.values() if each is not None]
    return addresses


class StaticSequences:
    """Sequences of one length, of a model with a 16-bit cache, in one of fixed size; see `PackedSequences`.

    For models that transformers can compile, so that they run as CUDA graphs as a packed one does.
    """

    def __init__(self, model: Any, rows: list[Tensor], capacity: int):
        self.model, self.addresses, self.batch = model, _addresses(model), len(rows)
        self.cache = StaticCache(model.config, max_cache_len=capacity)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=rows[0].device)
        self.begin(rows)
        counters = [self.position, *(layer.cumulative_length for layer in self.cache.layers)]
        self.graphs = StepGraphs(self._step, counters, len(rows), capacity)

    @staticmethod
    def serves(model: Any, rows: list[Tensor]) -> bool:
        """transformers 5 counts the tokens of a static cache on the device, which a graph needs; and a graph
        is of one device.
        """
        counted = hasattr(StaticLayer(1), "cumulative_length")
        compiles = counted and getattr(model, "_can_compile_fullgraph", False)
        devices = set((getattr(model, "hf_device_map", None) or {"": 0}).values())
        alone = kv_bits_of(model) == 16 and len(devices) == 1
        return compiles and alone and len({len(row) for row in rows}) == 1

    def fits(self, model: Any, rows: list[Tensor]) -> bool:
        """See `PackedSequences`."""
        return self.addresses == _addresses(model) and len(rows) == self.batch

    def begin(self, rows: list[Tensor]) -> None:
        """See `PackedSequences`."""
        if self.cache.layers[0].is_initialized:
            self.cache.reset()
        ids = torch.stack(rows)
        self.logits = self._forward(ids, torch.arange(ids.shape[1], device=ids.device)[None])
        self.position.fill_(ids.shape[1])

    def advance(self, tokens: Tensor) -> None:
        """Append a token `[batch]` to each sequence."""
        self.logits = self.graphs.run(tokens, self.graphs.capacity)

    def _step(self, tokens: Tensor, bound: int) -> Tensor:
        logits = self._forward(tokens[:, None], self.position)
        self.position += 1
        return logits

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: self.cache},
        )
        return out.logits[:, -1]


class PlainSequences:
    """Sequences of any causal language model, padded on the left. Attributes: see `PackedSequences`."""

    def __init__(self, model: Any, rows: list[Tensor]):
        self.model, self.cache, self.name = model, None, cache_name(model.forward)
        longest = max(map(len, rows))
        padded = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
        gaps = torch.tensor([longest - len(row) for row in rows], device=padded.device)[:, None]
        self.mask = (torch.arange(longest, device=padded.device) >= gaps).long()
        self._forward(padded)

    def advance(self, tokens: Tensor) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self._forward(tokens[:, None])

    def _forward(self, ids: Tensor) -> None:
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        ragged = not bool(self.mask.all())
        out = self.model(
            input_ids=ids, attention_mask=self.mask if ragged else None, position_ids=positions,
            use_cache=True, logits_to_keep=1, **{self.name: self.cache},
        )  # fmt: skip
        self.cache, self.logits = getattr(out, self.name), out.logits[:, -1]


def overflowing_layer(sequences: Any) -> str:
    """What to say of the first layer whose packed keys or values are beyond float16, if there is one."""
    for index, store in enumerate(getattr(sequences.cache, "stores", [])):  # of a packed cache
        if name := store.overflowing():
            return f" (model.layers.{index}: {name} beyond 65504 are more than the 4-bit cache holds)"
    return ""


def _kv_settings(model: Any) -> Any:
    """Those of a rotated or quantised LLaMA, None of other models."""
    layers = getattr(model.get_decoder(), "layers", None)
    return getattr(getattr(layers[0], "self_attn", None), "kv_settings", None) if layers else None


def sink_tokens_of(model: Any) -> int:
    settings = _kv_settings(model)
    return 0 if settings is None else settings.sink_tokens


def kv_bits_of(model: Any) -> int:
    settings = _kv_settings(model)
    return 16 if settings is None else settings.kv_bits
