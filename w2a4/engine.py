"""`Engine`: generation for several prompts at once, in a cache of fixed size.

A packed LLaMA's decoder layers are called one after another, without what transformers does around
them for every token (masks, hooks, output objects). The ops and their order are those of the model's own
forward, so the tokens are those of `model.generate`. Any other model goes through its own forward.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    def __init__(self, model: Any, max_length: int | None = None):
        """
        Args:
            model: a causal language model; its packed KV cache is made here, of fixed size.
            max_length: tokens of a prompt and its continuation; 4096 if the model allows it.

        Raises:
            W2A4Error: the model's positions end before `max_length`.
        """
        most = model.config.max_position_embeddings
        max_length = min(DEFAULT_LENGTH, most) if max_length is None else max_length
        if not 1 < max_length <= most:
            raise W2A4Error(f"max_length={max_length}: give a number from 2 to {most}, the model's positions")
        self.model, self.max_length = model, max_length

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
            if len({len(row) for row in rows}) > 1 and _keeps_sinks(self.model):
                # The first tokens of sequences of different lengths lie at different places of a cache.
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
        capacity = min(self.max_length, max(map(len, rows)) + count)
        parts = fused_parts(self.model)
        sequences = _Packed(self.model, parts, rows, capacity) if parts else _Plain(self.model, rows)
        generator = sampling.generator(self.model.device)
        running = [True] * len(rows)
        for number in itertools.count(1):
            tokens = sampling.pick(sequences.logits, generator)
            step = [token if on else None for token, on in zip(tokens.tolist(), running, strict=True)]
            yield step
            running = [on and token not in stops for token, on in zip(step, running, strict=True)]
            if number == count or not any(running):
                return
            sequences.advance(tokens)

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
    """Sequences of a packed LLaMA, their ends side by side in one cache.

    Attributes:
        logits: float `[batch, vocabulary]`, of the token that comes next.
    """

    def __init__(self, model: Any, parts: list[Any], rows: list[Tensor], capacity: int):
        self.decoder, self.head, self.parts = model.model, model.lm_head, parts
        self.cache = KV4Cache.for_model(model, capacity)
        self.length = max(map(len, rows))
        # A shorter sequence begins later, so that all have their next token at one place.
        gaps = [self.length - len(row) for row in rows]
        device = rows[0].device
        self.gaps, self.seen = torch.tensor(gaps, device=device)[:, None], None
        self.calls: list[LayerOp] | None = None
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.places = torch.arange(capacity, device=device)[None]
        if any(gaps):
            self.seen = (self.places[0] >= self.gaps)[:, None, None]
            self.logits = torch.cat(self._prefill_apart(rows, gaps))
        else:
            self.logits = self._prefill(torch.stack(rows), self.cache)

    def advance(self, tokens: Tensor) -> None:
        """Append a token `[batch]` to each sequence."""
        positions = self.length - self.gaps
        if self.seen is None:
            positions = positions[:1]
        self.length += 1
        mask = None if self.seen is None else self.seen[..., : self.length]
        self.logits = self._forward(tokens[:, None], positions, self.cache, mask)

    def _prefill_apart(self, rows: list[Tensor], gaps: list[int]) -> list[Tensor]:
        """One after another, so that no padding is computed."""
        for layer, part in zip(self.cache.layers, self.parts, strict=True):
            layer.allocate(self.decoder.norm.weight, len(rows), part.kv_heads, part.attn.head_dim)
        logits = [
            self._prefill(row[None], self.cache.row(i, gap))
            for i, (row, gap) in enumerate(zip(rows, gaps, strict=True))
        ]
        for layer in self.cache.layers:
            layer.fill(self.length)
        return logits

    def _prefill(self, ids: Tensor, cache: KV4Cache) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        chunks = zip(ids.split(PREFILL_CHUNK, 1), positions.split(PREFILL_CHUNK, 1), strict=True)
        for chunk, places in chunks:
            logits = self._forward(chunk, places, cache, None)
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, cache: KV4Cache, mask: Tensor | None) -> Tensor:
        hidden = self.decoder.embed_tokens(ids)
        rotary = self._rotary(hidden, positions)
        if self.calls is None and ids.shape[1] == 1 and cache is self.cache and cache.get_seq_length():
            # Every step from here on has the same arguments, but for its token and its place.
            calls = [layer_op(part, cache, hidden) for part in self.parts]
            self.calls = calls if all(calls) else None
        if self.calls is not None:
            for call in self.calls:
                hidden = call(hidden, rotary, mask)
        else:
            for part in self.parts:
                hidden = decoder_layer(part, hidden, rotary, mask, cache)
        return self.head(self.decoder.norm(hidden[:, -1:]))[:, -1]

    def _rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions, out of a table of all of them where they are fixed."""
        embedding = self.decoder.rotary_emb
        if getattr(embedding, "rope_type", "default") in DYNAMIC_ROPE:
            return embedding(hidden, positions)
        if self.rotary is None:
            self.rotary = embedding(hidden, self.places)
        cos, sin = self.rotary
        return cos[0, positions], sin[0, positions]


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


def _keeps_sinks(model: Any) -> bool:
    settings = getattr(next(iter(model.get_decoder().layers)).self_attn, "kv_settings", None)
    return settings is not None and settings.sink_tokens > 0
