"""What a model's generation config asks for beside end tokens: followed as transformers does, or refused.

The engine draws tokens itself, so it has to do what `model.generate` would do to the logits. What is not
followed is an error that names the key, for the tokens would be others; but how to sample is asked of the
caller, and a config that samples is told in a warning.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
import transformers
from torch import Tensor

from ..errors import W2A4Error, shown

#: Keys that change greedy tokens and are not followed, and values that change nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 0, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None, []),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "stop_strings": (None, []),
    "max_time": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 0, 1),
    "diversity_penalty": (None, 0, 0.0),
    "token_healing": (None, False),
}

Rule = Callable[[Tensor, Tensor], Tensor]


class Constraints:
    """Rules on the next token of each of several sequences.

    Args:
        model: its generation config says which.
        rows: prompts, int64 `[n]` each.
        stops: tokens that end a sequence; those that come too early are ruled out.

    Raises:
        W2A4Error: the generation config asks for something that is not followed.
    """

    def __init__(self, model: Any, rows: list[Tensor], stops: Collection[int]):
        config = getattr(model, "generation_config", None)
        self.ids = list(rows)
        self.rules = [_rules(config, len(row), sorted(stops), row.device) if config else [] for row in rows]

    def __bool__(self) -> bool:
        return any(self.rules)

    def apply(self, logits: Tensor) -> Tensor:
        """Logits `[sequences, vocabulary]` with what is ruled out at minus infinity, others penalised."""
        if not self:
            return logits
        logits = logits.float()
        rows = []
        for ids, scores, rules in zip(self.ids, logits.split(1), self.rules, strict=True):
            for rule in rules:
                scores = rule(ids[None], scores)
            rows.append(scores)
        return torch.cat(rows)

    def append(self, tokens: Tensor) -> None:
        """The next token `[sequences]` of each."""
        if self:
            self.ids = [torch.cat([ids, token]) for ids, token in zip(self.ids, tokens.split(1), strict=True)]

    def put(self, place: int, other: Constraints) -> None:
        """The rules of another sequence, the only one of `other`, in place of those of one."""
        (self.ids[place],), (self.rules[place],) = other.ids, other.rules

    def drop(self, place: int) -> None:
        """Forget a sequence; the last one takes its place."""
        for each in (self.ids, self.rules):
            each[place] = each[-1]
            each.pop()


def check(model: Any, sampled: bool) -> None:
    """Raise W2A4Error for what the generation config asks and the engine does not do.

    Args:
        sampled: whether the caller has said how to sample; else a config that samples is warned of.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    for key, harmless in REFUSED.items():
        value = getattr(config, key, None)
        if not any(value is other or type(value) is type(other) and value == other for other in harmless):
            raise W2A4Error(
                f"generation_config.{key}={value!r} is not followed by the engine, and its tokens would be "
                f"others; set model.generation_config.{key} to {harmless[0]!r}, or use model.generate"
            )
    _rules(config, 1, _end_tokens(config), torch.device("cpu"), trial=model.config.vocab_size)
    if getattr(config, "do_sample", False) and not sampled:
        keys = ("temperature", "top_k", "top_p", "min_p", "typical_p")
        asked = {key: value for key in keys if (value := getattr(config, key, None)) is not None}
        listed = ", ".join(f"{key}={value}" for key, value in asked.items()) or "do_sample"
        warnings.warn(
            f"the generation config samples ({listed}), "
            "but without Sampling(temperature=…) the engine takes the most probable token",
            stacklevel=3,
        )


def _end_tokens(config: Any) -> list[int]:
    end = getattr(config, "eos_token_id", None)
    ends = end if isinstance(end, list) else [] if end is None else [end]
    for token in ends:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise W2A4Error(
                f"generation_config.eos_token_id={shown(end)}: give the id of a token, or a list of ids"
            )
    return sorted(set(ends))


def _rules(config: Any, prompt: int, stops: list[int], device: torch.device, trial: int = 0) -> list[Rule]:
    """In the order of transformers' `generate`.

    Args:
        trial: if not 0, the size of a vocabulary that every rule is tried on: some look at their tokens only
            when they are called.
    """
    rules: list[Rule] = []

    def add(key: str, harmless: tuple[Any, ...], make: Callable[[Any], Rule]) -> None:
        value = getattr(config, key, None)
        if value is None or value in harmless:
            return
        try:
            rules.append(make(value))
            if trial:
                ids = torch.zeros(1, 1, dtype=torch.long, device=device)
                rules[-1](ids, torch.zeros(1, trial, device=device))
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise W2A4Error(f"generation_config.{key}={shown(value)}: {reason}") from None

    add("sequence_bias", ({}, []), lambda v: transformers.SequenceBiasLogitsProcessor(sequence_bias=v))
    add("repetition_penalty", (1,), lambda v: transformers.RepetitionPenaltyLogitsProcessor(penalty=v))
    add("no_repeat_ngram_size", (0,), transformers.NoRepeatNGramLogitsProcessor)
    add("bad_words_ids", ([],), lambda v: transformers.NoBadWordsLogitsProcessor(v, stops or None))
    if stops:
        add("min_length", (0,), lambda v: transformers.MinLengthLogitsProcessor(v, stops, device=device))
        add("min_new_tokens", (0,), lambda v: transformers.MinNewTokensLengthLogitsProcessor(
            prompt, v, stops, device=device))  # fmt: skip
    add("suppress_tokens", ([],), lambda v: transformers.SuppressTokensLogitsProcessor(v, device=device))
    add("begin_suppress_tokens", ([],), lambda v: transformers.SuppressTokensAtBeginLogitsProcessor(
        v, prompt, device=device))  # fmt: skip
    if getattr(config, "remove_invalid_values", False):
        rules.append(transformers.InfNanRemoveLogitsProcessor())
    return rules
