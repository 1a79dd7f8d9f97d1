"""`Engine`: generation for several prompts at once, in a cache of fixed size.

A packed LLaMA's decoder layers are called one after another, without what transformers does around
them for every token (masks, hooks, output objects). The ops and their order are those of the model's own
forward, so the tokens are those of `model.generate`. Any other model goes through its own forward.

On a CUDA device a step of decoding is captured as a CUDA graph and replayed for every token; elsewhere the
same step is run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import W2A4Error
from .integrations.fused import LayerOp, decoder_layer, fused_parts, layer_op
from .integrations.kv_cache import KV4Cache

MAX_BATCH = 16

#: Tokens of a prompt that go through the layers at a time, so that memory does not grow with its length.
PREFILL_CHUNK = 1024

#: Length of the cache where none is asked for, and the model allows it.
DEFAULT_LENGTH = 4096


#: Kinds of RoPE whose angles depend on how long a sequence has become.
DYNAMIC_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token, whatever the rest says.
        top_k: only the k most probable tokens; 0 is all.
        top_p: only the most probable tokens that make up this much together; 1 is all.
        seed: of the draws; None is torch's own.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise W2A4Error(f"temperature={self.temperature}: give a number >= 0; 0 is greedy")
        if self.top_k < 0:
            raise W2A4Error(f"top_k={self.top_k}: give a number >= 0; 0 is all tokens")
        if not 0 < self.top_p <= 1:
            raise W2A4Error(f"top_p={self.top_p}: give a number in (0, 1]; 1 is all tokens")

    def generator(self, device: torch.device) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def pick(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens int64 `[batch]` for logits `[batch, vocabulary]`."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(-1, descending=True)
            share = ordered.softmax(-1)
            beyond = share.cumsum(-1) - share >= self.top_p  # never the first
            logits = logits.scatter(-1, order, ordered.masked_fill(beyond, -torch.inf))
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class Engine:
    """Generates with a model of transformers, packed or plain.

    >>> engine = Engine(model, max_length=2048)
    >>> engine.generate([[1, 450, 7483], [1, 3118]], max_new_tokens=32)
    [tensor([...]), tensor([...])]
    """

    def __init__(self, model: Any, max_length: int | None = None, cuda_graphs: bool = True):
        """
        Args:
            model: a causal language model; its packed KV cache is made here, of fixed size.
            max_length: tokens of a prompt and its continuation; 4096 if the model allows it.
            cuda_graphs: on a CUDA device, replay steps of decoding; else launch kernels one by one.

        Raises:
            W2A4Error: the model's positions end before `max_length`.
        """
        most = model.config.max_position_embeddings
        max_length = min(DEFAULT_LENGTH, most) if max_length is None else max_length
        if not 1 < max_length <= most:
            raise W2A4Error(f"max_length={max_length}: give a number from 2 to {most}, the model's positions")
        self.model, self.max_length, self.cuda_graphs = model, max_length, cuda_graphs
        self._kept: _Packed | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_tokens: Collection[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """Continue prompts, 1 to 16 of them, of any lengths.

        A prompt's greedy continuation does not depend on the others.

        Args:
            prompts: token ids of each.
            max_new_tokens: at most so many for each.
            sampling: greedy if None.
            stop_tokens: a continuation ends with the first of these; None is the model's end tokens.
            on_token: called with (prompt index, token) as tokens come.

        Returns:
            the new tokens of each prompt, int64 `[n]` on the CPU, the stop token included.

        Raises:
            W2A4Error: an empty prompt, an unknown token, or more tokens than the cache holds.
        """
        rows = self._checked(prompts, max_new_tokens)
        sampling = sampling or Sampling()
        stops = set(_end_tokens(self.model) if stop_tokens is None else stop_tokens)
        with inference(self.model):
            lengths = {len(row) for row in rows}
            if len(lengths) > 1 and min(lengths) < _sink_tokens(self.model):
                # Some would go on filling the first entries, which are kept apart, while others do not.
                batches = [[i] for i in range(len(rows))]
            else:
                batches = [[*range(len(rows))]]
            new: list[list[int]] = [[] for _ in rows]
            for indices in batches:
                batch = [rows[i] for i in indices]
                for step in self._steps(batch, max_new_tokens, sampling, stops):
                    for i, token in zip(indices, step, strict=True):
                        if token is not None:
                            new[i].append(token)
                            if on_token is not None:
                                on_token(i, token)
        return [torch.tensor(tokens) for tokens in new]

    def _steps(
        self, rows: list[Tensor], count: int, sampling: Sampling, stops: set[int]
    ) -> Iterator[list[int | None]]:
        """Tokens of one step after another, None for a row that has ended."""
        sequences = self._sequences(rows, count)
        generator = sampling.generator(self.model.device)
        # A GPU works on the next step while this one's tokens are looked at; that step may be in vain.
        ahead = self.model.device.type == "cuda"

        def following(tokens: Tensor) -> Tensor:
            sequences.advance(tokens)
            return sampling.pick(sequences.logits, generator)

        running = [True] * len(rows)
        tokens = sampling.pick(sequences.logits, generator)
        for number in itertools.count(1):
            coming = following(tokens) if ahead and number < count else None
            step = [token if on else None for token, on in zip(tokens.tolist(), running, strict=True)]
            yield step
            running = [on and token not in stops for token, on in zip(step, running, strict=True)]
            if number == count or not any(running):
                return
            tokens = following(tokens) if coming is None else coming

    def _sequences(self, rows: list[Tensor], count: int) -> _Packed | _Plain:
        """The prompts, read."""
        parts = fused_parts(self.model)
        if not parts:
            return _Plain(self.model, rows)
        if not self.cuda_graphs or not ops.has_cuda_kernels(self.model.device):
            capacity = min(self.max_length, max(map(len, rows)) + count)
            return _Packed(self.model, parts, rows, capacity)
        kept = self._kept
        if kept is None or not kept.fits(self.model, parts, rows):
            self._kept = kept = None  # its memory first
            self._kept = kept = _Packed(self.model, parts, rows, self.max_length, graphs=True)
        else:
            kept.begin(rows)
        return kept

    def _checked(self, prompts: Sequence[Sequence[int] | Tensor], max_new_tokens: int) -> list[Tensor]:
        if max_new_tokens < 1:
            raise W2A4Error(f"max_new_tokens={max_new_tokens}: give a number >= 1")
        if not 1 <= len(prompts) <= MAX_BATCH:
            raise W2A4Error(f"{len(prompts)} prompts: give 1 to {MAX_BATCH} at a time")
        rows = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
        vocabulary = self.model.config.vocab_size
        for i, row in enumerate(rows):
            if row.dim() != 1 or not len(row):
                raise W2A4Error(f"prompt {i} has shape {[*row.shape]}; give the ids of one or more tokens")
            if not 0 <= int(row.min()) <= int(row.max()) < vocabulary:
                raise W2A4Error(
                    f"prompt {i} has tokens from {row.min()} to {row.max()}, not all in 0..{vocabulary - 1}"
                )
            if len(row) + max_new_tokens > self.max_length:
                raise W2A4Error(
                    f"prompt {i} has {len(row)} tokens; with max_new_tokens={max_new_tokens} the cache of "
                    f"max_length={self.max_length} is too short: shorten one, or Engine(model, max_length=…)"
                )
        return [row.to(self.model.device) for row in rows]


class _Packed:
    """Sequences of a packed LLaMA in one cache, each from its first place on.

    What a step does depends on nothing that the host knows but a bound on the lengths, so a graph of it
    can be replayed.

    Attributes:
        logits: float `[batch, vocabulary]`, of the token that comes next.
    """

    def __init__(self, model: Any, parts: list[Any], rows: list[Tensor], capacity: int, graphs: bool = False):
        self.decoder, self.head, self.parts = model.model, model.lm_head, parts
        self.places, self.batch = _places(model), len(rows)
        self.cache = KV4Cache.for_model(model, capacity)
        for layer, part in zip(self.cache.layers, parts, strict=True):
            layer.allocate(self.decoder.norm.weight, len(rows), part.kv_heads, part.attn.head_dim)
        self.starts = torch.zeros(len(rows), dtype=torch.long, device=rows[0].device)
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.calls: list[LayerOp] | None = None
        self.graphs: StepGraphs | None = None
        self.begin(rows)
        if graphs and not self._dynamic_rope() and self.length >= _sink_tokens(model):
            self.graphs = StepGraphs(self._step, self.starts, capacity)

    def fits(self, model: Any, parts: list[Any], rows: list[Tensor]) -> bool:
        """Whether `begin` will do for these rows: nothing lies elsewhere than when graphs were captured."""
        same = parts == self.parts and self.places == _places(model) and len(rows) == self.batch
        return same and not _sink_tokens(model)

    def begin(self, rows: list[Tensor]) -> None:
        """Read prompts, in place of what was there before."""
        self.cache.clear()
        lengths = [len(row) for row in rows]
        self.length = max(lengths)
        if len(set(lengths)) == 1:
            self.logits = self._prefill(torch.stack(rows), self.cache)
        else:  # one after another, so that no padding is computed
            views = [self.cache.row(i) for i in range(len(rows))]
            logits = [self._prefill(row[None], view) for row, view in zip(rows, views, strict=True)]
            self.logits = torch.cat(logits)
            self.cache.join(views)
        self.starts.copy_(torch.tensor(lengths))
        self.cache.go_on(self.starts, self.length)

    def advance(self, tokens: Tensor) -> None:
        """Append a token `[batch]` to each sequence."""
        self.length += 1
        if self.graphs is not None:
            self.logits = self.graphs.run(tokens, self.length)
        else:
            self.logits = self._step(tokens, self.length)

    def _step(self, tokens: Tensor, bound: int) -> Tensor:
        """Logits after another token `[batch]` of each sequence, none of which is then longer than bound."""
        self.cache.fill(bound - 1)
        hidden = self.decoder.embed_tokens(tokens[:, None])
        rotary = self._rotary(hidden, self.starts[:, None])
        if self.calls is None:
            # Every step from here on has the same arguments, but for its token and its place.
            calls = [layer_op(part, self.cache, hidden) for part in self.parts]
            self.calls = calls if all(calls) else None
        if self.calls is not None:
            for call in self.calls:
                hidden = call(hidden, rotary, None)
        else:
            for part in self.parts:
                hidden = decoder_layer(part, hidden, rotary, None, self.cache)
        self.starts += 1
        return self._logits(hidden)

    def _prefill(self, ids: Tensor, cache: KV4Cache) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        chunks = zip(ids.split(PREFILL_CHUNK, 1), positions.split(PREFILL_CHUNK, 1), strict=True)
        for chunk, places in chunks:
            hidden = self.decoder.embed_tokens(chunk)
            rotary = self._rotary(hidden, places)
            for part in self.parts:
                hidden = decoder_layer(part, hidden, rotary, None, cache)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.decoder.norm(hidden[:, -1:]))[:, -1]

    def _dynamic_rope(self) -> bool:
        return getattr(self.decoder.rotary_emb, "rope_type", "default") in DYNAMIC_ROPE

    def _rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions, out of a table of all of them where they are fixed."""
        if self._dynamic_rope():
            return self.decoder.rotary_emb(hidden, positions)
        if self.rotary is None:
            capacity = self.cache.layers[0].capacity
            places = torch.arange(capacity, device=positions.device)[None]
            self.rotary = self.decoder.rotary_emb(hidden, places)
        cos, sin = self.rotary
        return cos[0, positions], sin[0, positions]


class StepGraphs:
    """A step of decoding as CUDA graphs, each captured when it is first needed.

    How many blocks look at the cache is part of a graph, so there is one for every power of two that bounds
    the lengths; the lengths themselves are read on the device.

    Args:
        step: `(tokens int64 [batch], bound) -> logits`; it advances `starts`.
        starts: int64 `[batch]`.
        capacity: the largest bound.
    """

    LEAST = 256

    def __init__(self, step: Callable[[Tensor, int], Tensor], starts: Tensor, capacity: int):
        self.step, self.starts, self.capacity = step, starts, capacity
        self.tokens = torch.empty_like(starts)
        self.captured: dict[int, tuple[Any, Tensor]] = {}
        self.pool: Any = None

    def run(self, tokens: Tensor, length: int) -> Tensor:
        """Logits of the step after which the longest sequence has `length` tokens, valid until the next."""
        bound = min(self.capacity, max(self.LEAST, 1 << (length - 1).bit_length()))
        self.tokens.copy_(tokens)
        if bound not in self.captured:
            self.captured[bound] = self.capture(bound)
        graph, logits = self.captured[bound]
        graph.replay()
        return logits

    def capture(self, bound: int) -> tuple[Any, Tensor]:
        """A graph of the step, which is not run, and its logits."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        starts = self.starts.clone()
        # Once outside: kernels are loaded and libraries get their workspaces then. It writes what the
        # replay will write.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(self.tokens, bound)
        torch.cuda.current_stream().wait_stream(stream)
        self.starts.copy_(starts)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.step(self.tokens, bound)
        return graph, logits


def _places(model: Any) -> list[int]:
    """Where the parameters lie."""
    return [parameter.data_ptr() for parameter in model.parameters()]


class _Plain:
    """Sequences of any causal language model, padded on the left. Attributes: see `_Packed`."""

    def __init__(self, model: Any, rows: list[Tensor]):
        self.model, self.cache = model, None
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
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]


@contextlib.contextmanager
def inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the training mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _end_tokens(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]


def _sink_tokens(model: Any) -> int:
    settings = getattr(next(iter(model.get_decoder().layers)).self_attn, "kv_settings", None)
    return 0 if settings is None else settings.sink_tokens
