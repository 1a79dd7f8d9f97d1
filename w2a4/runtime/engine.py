"""`Engine`: generation for several prompts at once, in a cache of fixed size.

A packed LLaMA's decoder layers are called one after another, without what transformers does around
them for every token (masks, hooks, output objects). The ops and their order are those of the model's own
forward, so the tokens are those of `model.generate`. Any other model goes through its own forward.

On a CUDA device a step of decoding is captured as a CUDA graph and replayed for every token, and so are short
prompts from the second of about a length on, see `graphs`; elsewhere the same is run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import arch, ops
from ..errors import W2A4Error, shown
from . import constraints
from .layer import packed_layers
from .queue import Pick, continued
from .sequences import PackedSequences, PlainSequences, StaticSequences, overflowing_layer, sink_tokens_of

#: Sequences that are continued side by side.
MAX_BATCH = 16

#: Tokens among which the likeliest are looked for first: to sort a vocabulary takes a CPU as long as a small
#: model's forward pass.
CANDIDATES = 512

#: Length of the cache where none is asked for, and the model allows it.
DEFAULT_LENGTH = 4096


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
        if not (_is_number(self.temperature) and 0 <= self.temperature < float("inf")):
            raise W2A4Error(f"temperature={self.temperature!r}: give a number >= 0; 0 is greedy")
        if not (_is_integer(self.top_k) and self.top_k >= 0):
            raise W2A4Error(f"top_k={self.top_k!r}: give an integer >= 0; 0 is all tokens")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise W2A4Error(f"top_p={self.top_p!r}: give a number in (0, 1]; 1 is all tokens")
        if self.seed is not None and not (_is_integer(self.seed) and -(2**63) <= self.seed < 2**63):
            raise W2A4Error(f"seed={self.seed!r}: give an integer from {-(2**63)} to {2**63 - 1}")

    def generator(self, device: torch.device) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def pick(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens int64 `[batch]` for logits `[batch, vocabulary]`."""
        if self.temperature == 0:
            return _argmax(logits)
        # Differences from the largest, which stays 0 at any temperature, so that nothing overflows.
        logits = logits.float() - logits.amax(-1, keepdim=True)
        logits = logits / min(max(self.temperature, 1e-30), 1e30)
        if 0 < self.top_k < logits.shape[-1]:
            logits, places = logits.topk(self.top_k)
            total = logits.logsumexp(-1, keepdim=True)
        elif self.top_p < 1:
            total = logits.logsumexp(-1, keepdim=True)
            logits, places = self._likeliest(logits, total)
        else:
            return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        share = (logits - total).exp()
        if self.top_p < 1:
            share = share.masked_fill(share.cumsum(-1) - share >= self.top_p, 0)  # never the first
        return places.gather(-1, torch.multinomial(share, 1, generator=generator))[:, 0]

    def _likeliest(self, logits: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Those that make up `top_p` and perhaps others behind them, in falling order; their places."""
        if logits.is_cpu:  # a GPU would have to be waited for
            best, places = logits.topk(min(CANDIDATES, logits.shape[-1]))
            if bool(((best - total).exp().sum(-1) >= self.top_p).all()):
                return best, places
        return logits.sort(-1, descending=True)


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
            cuda_graphs: on a CUDA device, replay steps of decoding and short prompts; else launch kernels one
                by one.

        Raises:
            W2A4Error: the model's positions end before `max_length`.
        """
        if hasattr(model, "get_base_model"):  # of PEFT, whose adapters lie in that
            model = model.get_base_model()
        most = model.config.max_position_embeddings
        max_length = min(DEFAULT_LENGTH, most) if max_length is None else max_length
        if not (_is_integer(max_length) and 1 < max_length <= most):
            raise W2A4Error(
                f"max_length={max_length!r}: give a number from 2 to {most}, the model's positions"
            )
        self.model, self.max_length, self.cuda_graphs = model, max_length, cuda_graphs
        self._kept: PackedSequences | StaticSequences | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_tokens: Collection[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """Continue prompts of any number and lengths, at most 16 side by side.

        Where a packed model's sequence ends on a CPU, the next prompt takes its place at once; elsewhere 16
        prompts follow 16. A prompt's greedy continuation does not depend on the others. Rules on the next
        token that the model's generation config has are followed, see `constraints`.

        Args:
            prompts: token ids of each.
            max_new_tokens: at most so many for each.
            sampling: greedy if None.
            stop_tokens: a continuation ends with the first of these; None is the model's end tokens.
            on_token: called with (prompt index, token) as tokens come.

        Returns:
            the new tokens of each prompt, int64 `[n]` on the CPU, the stop token included.

        Raises:
            W2A4Error: an empty prompt, an unknown token, more tokens than the cache holds, a generation
                config that asks for what is not followed, or logits that are not finite.
        """
        rows = self._checked(prompts, max_new_tokens)
        constraints.check(self.model, sampling is not None)
        sampling = sampling or Sampling()
        if not isinstance(sampling, Sampling):
            raise W2A4Error(f"sampling={shown(sampling)}: give a Sampling, or None for greedy")
        stops = set(end_tokens(self.model)) if stop_tokens is None else _tokens(stop_tokens)
        new: list[list[int]] = [[] for _ in rows]
        with inference(self.model):
            for index, token in self._continued(rows, max_new_tokens, sampling, stops):
                new[index].append(token)
                if on_token is not None:
                    on_token(index, token)
        return [torch.tensor(tokens) for tokens in new]

    def _continued(
        self, rows: list[Tensor], count: int, sampling: Sampling, stops: set[int]
    ) -> Iterator[tuple[int, int]]:
        """Tokens of all prompts as they come: (prompt index, token)."""
        generator = sampling.generator(self.model.device)

        def pick(logits: Tensor, rules: constraints.Constraints) -> Tensor:
            tokens = sampling.pick(rules.apply(logits), generator)
            rules.append(tokens)
            return tokens

        def pick_finite(logits: Tensor, rules: constraints.Constraints) -> Tensor:
            _check_finite(logits, sequences)
            return pick(logits, rules)

        side_by_side = rows[:MAX_BATCH]
        captured = self.cuda_graphs and ops.has_cuda_kernels(self.model.device)
        packed = packed_layers(self.model, self.max_length)
        if packed and not captured and PackedSequences.renews(self.model):
            room = max(map(len, rows)) - max(map(len, side_by_side)) + count
            sequences = self.sequences(side_by_side, room)
            yield from continued(self.model, sequences, rows, count, stops, pick_finite)
            return
        size, lengths = MAX_BATCH, {len(row) for row in rows}
        if len(lengths) > 1 and min(lengths) < sink_tokens_of(self.model):
            # Some would go on filling the first entries, which are kept apart, while others do not.
            size = 1
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            for step in self._steps(batch, count, pick, stops):
                yield from ((start + i, token) for i, token in enumerate(step) if token is not None)

    def _steps(
        self, rows: list[Tensor], count: int, choose: Pick, stops: set[int]
    ) -> Iterator[list[int | None]]:
        """Tokens of one step after another, None for a row that has ended."""
        sequences, rules = self.sequences(rows, count), constraints.Constraints(self.model, rows, stops)
        # A GPU works on the next step while this one's tokens are looked at; that step may be in vain.
        ahead = self.model.device.type == "cuda"

        def pick() -> Tensor:
            return choose(sequences.logits, rules)

        def following(tokens: Tensor) -> Tensor:
            sequences.advance(tokens)
            if not ahead:  # a GPU would have to be waited for
                _check_finite(sequences.logits, sequences)
            return pick()

        running = [True] * len(rows)
        _check_finite(sequences.logits, sequences)
        tokens = pick()
        for number in itertools.count(1):
            coming = following(tokens) if ahead and number < count else None
            step = [token if on else None for token, on in zip(tokens.tolist(), running, strict=True)]
            yield step
            running = [on and token not in stops for token, on in zip(step, running, strict=True)]
            if number >= count or not any(running):
                return
            tokens = following(tokens) if coming is None else coming

    def sequences(self, rows: list[Tensor], count: int) -> PackedSequences | StaticSequences | PlainSequences:
        """Prompts as this engine reads and continues them, with room for `count` tokens more.

        `generate` drives them; under `inference`, so can others that want the logits of every step.
        """
        layers, device = packed_layers(self.model, self.max_length), self.model.device
        rows = [row.to(device) for row in rows]  # of other callers than `generate`, wherever they lie
        make: Callable[[], PackedSequences | StaticSequences]
        if layers and self.cuda_graphs and ops.has_cuda_kernels(device):
            make = functools.partial(PackedSequences, self.model, rows, self.max_length, layers, graphs=True)
        elif layers:
            return PackedSequences(
                self.model, rows, min(self.max_length, max(map(len, rows)) + count), layers
            )
        elif self.cuda_graphs and device.type == "cuda" and StaticSequences.serves(self.model, rows):
            make = functools.partial(StaticSequences, self.model, rows, self.max_length)
        else:
            return PlainSequences(self.model, rows)
        if self._kept is not None and self._kept.fits(self.model, rows):
            self._kept.begin(rows)
        else:
            self._kept = None  # its memory first
            self._kept = make()
        return self._kept

    def _checked(self, prompts: Sequence[Sequence[int] | Tensor], max_new_tokens: int) -> list[Tensor]:
        if not (_is_integer(max_new_tokens) and max_new_tokens >= 1):
            raise W2A4Error(f"max_new_tokens={max_new_tokens!r}: give an integer >= 1")
        if not isinstance(prompts, (Sequence, Tensor)):
            raise W2A4Error(f"prompts={shown(prompts)}: give a list of prompts, each the ids of tokens")
        if not len(prompts):
            raise W2A4Error("0 prompts: give one or more")
        rows = [_ids(i, prompt) for i, prompt in enumerate(prompts)]
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
            self._check_rereading(i, len(row), max_new_tokens)
        return [row.to(self.model.device) for row in rows]

    def _check_rereading(self, number: int, length: int, count: int) -> None:
        """Refuse what `generate` would begin anew: angles of longrope change where a sequence grows long."""
        config = self.model.config
        if config.model_type not in arch.names() or not arch.of_model_type(config.model_type).rereads:
            return
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        most = getattr(config, "original_max_position_embeddings", None)
        if rope.get("rope_type", rope.get("type")) == "longrope" and most and length <= most < length + count:
            raise W2A4Error(
                f"prompt {number} has {length} tokens and would pass {most}, where a {config.model_type} is "
                f"read again with other angles; give max_new_tokens <= {most - length}, a prompt that is "
                "longer already, or use model.generate"
            )


def _ids(number: int, prompt: Sequence[int] | Tensor) -> Tensor:
    """A prompt as int64."""
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise W2A4Error(
            f"prompt {number} is {str(prompt)[:60]!r}; give the ids of one or more tokens"
        ) from None
    if ids.is_meta or ids.layout != torch.strided:
        raise W2A4Error(
            f"prompt {number} is a {'meta' if ids.is_meta else 'sparse'} tensor; give its token ids"
        )
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise W2A4Error(f"prompt {number} holds numbers of {ids.dtype}; give token ids, which are integers")
    return ids.long()


def _tokens(stop_tokens: Collection[int]) -> set[int]:
    """Those that end a text, as they come out of `tolist`."""
    found = (
        torch.as_tensor(stop_tokens).flatten().tolist() if isinstance(stop_tokens, Tensor) else stop_tokens
    )
    if not (isinstance(found, Collection) and all(isinstance(token, Integral) for token in found)):
        raise W2A4Error(f"stop_tokens={shown(stop_tokens)}: give a list of token ids, or None")
    return {int(token) for token in found}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _is_numpy(logits: Tensor) -> bool:
    """On a CPU numpy is ten times as fast as torch here, and wakes no threads."""
    return logits.is_cpu and logits.dtype == torch.float32


def _argmax(logits: Tensor) -> Tensor:
    return torch.from_numpy(logits.detach().numpy().argmax(-1)) if _is_numpy(logits) else logits.argmax(-1)


def _check_finite(logits: Tensor, sequences: Any) -> None:
    """Raise W2A4Error for logits that no token can be drawn from, and name a layer whose cache overflowed."""
    if bool(np.isnan(logits.numpy().max()) if _is_numpy(logits) else logits.isnan().any()):
        raise W2A4Error(
            f"the logits hold NaN{overflowing_layer(sequences)}: activations overflow {logits.dtype}, "
            "or the weights are damaged; load the model in float32 or bfloat16"
        )


@contextlib.contextmanager
def inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the training mode comes back afterwards."""
    was_training = model.training
    if any(module.training for module in model.modules()):  # to say so to every module takes milliseconds
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()


def end_tokens(model: Any) -> list[int]:
    """Tokens that the model ends a text with."""
    end = model.generation_config.eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]
