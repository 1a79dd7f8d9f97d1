"""Whether a model knows what it is about to be fitted or trained on."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.engine import inference
from .data import PACKAGED, TextSource, check_known, load_text, source_of, token_stream

#: Tokens that are looked at, and the fewest that tell something.
TOKENS, LEAST = 256, 128

#: Characters that are sure to hold them: of a token, 32.
CHARACTERS = 32 * TOKENS

#: A text is suspicious above this perplexity, or above so many bits a byte: tokenizers cut a language that is
#: strange to them into short pieces, which are easy to guess one by one. English has about 1 bit a byte.
PERPLEXITY, BITS = 500, 2.0

#: The model does not know a suspicious text that has so many times the perplexity, or the bits, of the
#: general one, provided that it knows that.
TIMES_PERPLEXITY, TIMES_BITS = 10, 2.5

#: Models of fewer tokens are toys, or read bytes.
SMALL_VOCABULARY = 1000


class Difficulty(NamedTuple):
    """How hard a text is to a model: perplexity of its tokens, bits a byte, and how many tokens were seen."""

    perplexity: float
    bits: float
    tokens: int


def warn_of_unknown_text(model: Any, tokenizer: Any, source: TextSource | Tensor) -> None:
    """Warn if a model cannot predict a text at all, as of a language that it has not learned.

    Costs a forward pass of `TOKENS` tokens, and another one, on general English text, if the first is
    suspicious. A model that cannot predict that either is taken for untrained. Packaged texts, texts of less
    than `LEAST` tokens and small vocabularies are not looked at.

    Args:
        model: a causal language model of transformers, at full precision.
        tokenizer: of the model; None looks at nothing.
        source: what `load_text` reads, for calibration, or token ids int64 `[samples, tokens]`.

    Raises:
        CalibrationError: the text is missing, empty, or holds tokens that the model does not know.
    """
    vocabulary = model.config.vocab_size
    packaged = isinstance(source, str) and source in PACKAGED
    if vocabulary <= SMALL_VOCABULARY or tokenizer is None or packaged:
        return
    if isinstance(source, Tensor):
        ids, name = source[0], "the calibration tokens"
    else:
        text = load_text(source, "calibration")
        ids, name = token_stream(tokenizer, text[:CHARACTERS])[0], repr(source_of(source))
    if len(ids) < LEAST:
        return
    found = _difficulty(model, tokenizer, ids)
    if found.perplexity <= PERPLEXITY and found.bits <= BITS:
        return
    english = load_text("general", "evaluation")[:CHARACTERS]
    general = _difficulty(model, tokenizer, token_stream(tokenizer, english)[0])
    trained = general.perplexity * 10 < vocabulary
    harder = (
        found.perplexity > TIMES_PERPLEXITY * general.perplexity or found.bits > TIMES_BITS * general.bits
    )
    if trained and harder:
        warnings.warn(
            f"the model's own perplexity on the first {found.tokens} tokens of {name} is "
            f"{found.perplexity:.0f} ({found.bits:.1f} bits a byte), and {general.perplexity:.0f} "
            f"({general.bits:.1f}) on general English text: it cannot predict what it would be fitted to. "
            "Give text of a language and kind that it knows, or 'general'",
            stacklevel=2,
        )


def _difficulty(model: Any, tokenizer: Any, ids: Tensor) -> Difficulty:
    """Of the first `TOKENS` ids, int64 `[tokens]`."""
    ids = check_known(ids[None, :TOKENS], model.config.vocab_size).to(model.device)
    with inference(model):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    if not math.isfinite(loss):
        return Difficulty(math.inf, math.inf, ids.shape[1])
    length = max(len(tokenizer.decode(ids[0, 1:]).encode()), 1)
    return Difficulty(
        math.exp(min(loss, 700)), loss / math.log(2) * (ids.shape[1] - 1) / length, ids.shape[1]
    )
