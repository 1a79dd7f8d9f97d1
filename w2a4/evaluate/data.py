"""Text in, windows of tokens out: what calibration and evaluation read.

A source of text is one of the words `general` and `builtin`, a local file (.txt, .jsonl, .parquet), a data
set of the hub (`hub:NAME[,CONFIG][:SPLIT]`), or a list of documents. Documents are joined by an empty line,
as the raw WikiText-2 split is for perplexity.
"""

from __future__ import annotations

import bz2
import functools
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..recipe import Recipe

Part = Literal["calibration", "evaluation"]
TextSource = str | Path | Sequence[str]

#: The built-in text is cut here: the first 60 % calibrates (57,000 SmolLM2 tokens, without what is
#: repeated later), the rest evaluates (45,000).
BUILTIN_SPLIT = 0.6
SEPARATOR = "\n\n"

#: The general text; `text/README.md` beside it names its sources and licences.
GENERAL = Path(__file__).with_name("text") / "general.jsonl.bz2"

#: A text of more words than `REPEATED_WORDS` says something new in a tenth of its runs of `RUN` words, or is
#: refused for fitting. The first `CHECKED` characters are looked at.
REPEATED_WORDS, RUN, LEAST_NEW, CHECKED = 500, 12, 0.1, 2_000_000

READABLE = (".txt", ".jsonl", ".parquet")

#: Documents tokenised at one time.
DOCUMENTS = 1000

#: How a data set of the hub begins, and as many of its characters as are read.
HUB, HUB_CHARACTERS = "hub:", 100_000_000


@functools.cache
def builtin_text() -> tuple[str, str]:
    """The Python reference in the standard library, cut in two at an empty line.

    The reference repeats itself: paragraphs of the second part are taken out of the first, 16 % of it,
    so that nothing but a stray line is in both.

    Returns:
        calibration text (first part) and evaluation text (last part). They depend on the Python
        version, so `describe_text` names it.
    """
    from pydoc_data.topics import topics

    text = SEPARATOR.join(topics[key] for key in sorted(topics))
    cut = text.index(SEPARATOR, int(len(text) * BUILTIN_SPLIT))
    calibration, evaluation = text[:cut], text[cut + len(SEPARATOR) :]
    seen = set(evaluation.split(SEPARATOR))
    return SEPARATOR.join(part for part in calibration.split(SEPARATOR) if part not in seen), evaluation


@functools.cache
def general_text() -> tuple[str, str]:
    """The packaged general text: prose, fiction, technical text, recipes and code, in English.

    Every prefix of a part is a fair sample of it. No document is in both parts.

    Returns:
        calibration text (1.12 million characters, 264,816 SmolLM2 tokens) and evaluation text (0.19 million
        characters, 45,874 tokens).
    """
    records = [json.loads(line) for line in bz2.decompress(GENERAL.read_bytes()).splitlines()]
    records.sort(key=lambda record: record["position"])
    calibration, evaluation = (
        SEPARATOR.join(record["text"] for record in records if record["part"] == part)
        for part in ("calibration", "evaluation")
    )
    return calibration, evaluation


#: The texts that need no file.
PACKAGED = {"general": general_text, "builtin": builtin_text}


def read_text(source: str | Path) -> str:
    """A file or data set as one string: .txt as it is, what has records by their field `text`.

    Raises:
        CalibrationError: no such file or data set, another kind of file, no `text` in it, or nothing in it.
    """
    if str(source).startswith(HUB):
        return _read_hub(str(source))
    path = Path(source)
    if not path.is_file():
        raise CalibrationError(
            f"text file {str(source)!r} does not exist; give a local {', '.join(READABLE)} file, "
            "'general', 'builtin', or hub:NAME for a data set of the hub"
        )
    readers = {".txt": _read_utf8, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise CalibrationError(
            f"text file {str(source)!r} ends in {path.suffix!r}; give {', '.join(READABLE)}"
        )
    text = _checked(readers[path.suffix](path), str(source))
    if not text.strip():
        raise CalibrationError(f"text file {str(source)!r} is empty; give one with some text")
    return text


def load_text(source: TextSource, part: Part) -> str:
    """The text behind a source.

    Args:
        source: `general`, `builtin`, a path or data set for `read_text`, or a list of documents.
        part: which part of a packaged text is wanted; what is fitted is never evaluated.

    Raises:
        CalibrationError: as `read_text`, or a text to calibrate with repeats itself nearly throughout.
    """
    if isinstance(source, (str, Path)) and str(source) in PACKAGED:
        calibration, evaluation = PACKAGED[str(source)]()
        return calibration if part == "calibration" else evaluation
    if isinstance(source, (str, Path)):
        text, name = read_text(source), source_of(source)
    else:
        text, name = SEPARATOR.join(source), f"{len(source)} {part} documents"
        if not _checked(text, name).strip():
            raise CalibrationError(f"the {name} given are empty; give some text")
    if part == "calibration":
        _check_new(text, name)
    return text


def _check_new(text: str, name: str) -> None:
    """Raise CalibrationError for a text that repeats itself nearly throughout."""
    words = text[:CHECKED].split()
    if len(words) <= REPEATED_WORDS:
        return
    runs = len(words) - RUN + 1
    distinct = len(set(zip(*(words[start:] for start in range(RUN)), strict=False)))
    if distinct < LEAST_NEW * runs:
        raise CalibrationError(
            f"the text of {name!r} repeats itself: only {distinct} of its {runs} runs of {RUN} words are "
            "distinct; give a text with more in it, or 'general'"
        )


def _checked(text: str, name: str) -> str:
    """The text itself, if it can be written as UTF-8: JSON may hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"the text of {name!r} holds half a surrogate pair, {text[error.start]!a}, which no tokenizer "
            "reads; write it anew with errors='replace'"
        ) from None
    return text


def describe_text(source: TextSource, text: str) -> str:
    """One line for a report: where the text came from and its hash, without local directories.

    >>> describe_text("/data/wiki.txt", "abc")
    'wiki.txt, 3 characters, sha256 ba7816bf8f01'
    """
    origin = source_of(source)
    if origin == "builtin":
        origin += f" (pydoc_data.topics of Python {platform.python_version()})"
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
    return f"{origin}, {len(text)} characters, sha256 {digest}"


def source_of(source: TextSource) -> str:
    """What to call a source, without local directories.

    >>> source_of("/data/wiki.txt"), source_of("hub:Salesforce/wikitext,wikitext-2-raw-v1:test")
    ('wiki.txt', 'hub:Salesforce/wikitext,wikitext-2-raw-v1:test')
    """
    if not isinstance(source, (str, Path)):
        return f"{len(source)} documents"
    return str(source) if str(source).startswith(HUB) else Path(source).name


def token_stream(tokenizer: Any, text: str) -> tuple[Tensor, bool]:
    """Token ids of a text, tokenised once, with BOS once at the front if the tokenizer has one.

    "Has one" means `bos_token_id` is set, whether or not the tokenizer adds it by itself. What stands between
    ends of text is tokenised side by side, which is faster than one long piece.

    Returns:
        int64 `[tokens]`, and whether it begins with BOS.
    """
    bos, end = tokenizer.bos_token_id, getattr(tokenizer, "eos_token", None)
    documents = text.split(end) if end else [text]
    between = torch.tensor([tokenizer.eos_token_id] if len(documents) > 1 else [], dtype=torch.long)
    parts = []
    for start in range(0, len(documents), DOCUMENTS):
        batch = documents[start : start + DOCUMENTS]
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            parts += [torch.tensor(ids, dtype=torch.long), between]
    stream = torch.cat(parts[:-1])
    if bos is not None and stream[:1].tolist() != [bos]:
        stream = torch.cat([torch.tensor([bos]), stream])
    return stream, bos is not None


def windows(tokenizer: Any, text: str, seqlen: int) -> Tensor:
    """Non-overlapping windows of a text's `token_stream`; the tail that fills none is dropped.

    Returns:
        int64 `[n, seqlen]`, n at least 1.

    Raises:
        CalibrationError: the text does not fill one window.
    """
    if seqlen < 2:
        raise CalibrationError(f"seqlen={seqlen}: a window needs at least 2 tokens")
    ids, _ = token_stream(tokenizer, text)
    count = len(ids) // seqlen
    if count == 0:
        raise CalibrationError(
            f"the text has {len(ids)} tokens and one window needs seqlen={seqlen}; "
            "give a longer text or a smaller seqlen"
        )
    return ids[: count * seqlen].view(count, seqlen)


def calibration_windows(tokenizer: Any, text: str, samples: int, seqlen: int, seed: int = 0) -> Tensor:
    """`samples` windows spread evenly over a text: one from each of as many equal stretches.

    Args:
        seed: places each window in its stretch, independent of torch's global generator.

    Returns:
        int64 `[samples, seqlen]`, no two windows overlapping.

    Raises:
        CalibrationError: the text is shorter than `samples * seqlen` tokens.
    """
    ids, _ = token_stream(tokenizer, text)
    stretch = len(ids) // samples
    if stretch < seqlen:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens; calib_samples={samples} windows of "
            f"calib_seqlen={seqlen} need {samples * seqlen}: give a longer text or fewer, shorter windows"
        )
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.randint(stretch - seqlen + 1, (samples,), generator=generator)
    starts = torch.arange(samples) * stretch + jitter
    return ids[starts[:, None] + torch.arange(seqlen)]


def check_token_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """The ids themselves.

    Raises:
        CalibrationError: not int64 `[samples, tokens]`, none, or one that the model does not know.
    """
    if ids.dim() != 2 or not ids.numel() or ids.dtype != torch.long:
        raise CalibrationError(
            f"calibration has shape {tuple(ids.shape)} and dtype {ids.dtype}; "
            "give int64 token ids [samples, tokens]"
        )
    return check_known(ids, vocab_size)


def check_known(ids: Tensor, vocab_size: int) -> Tensor:
    """The ids themselves.

    Raises:
        CalibrationError: the model has no embedding of one, as of what was added to its tokenizer only.
    """
    for token in (int(ids.max()), int(ids.min())) if ids.numel() else ():
        if not 0 <= token < vocab_size:
            raise CalibrationError(
                f"the text holds token {token}, and the model knows 0..{vocab_size - 1}: give the tokenizer "
                "that belongs to it, or resize the model's embeddings first"
            )
    return ids


def calibration_ids(
    tokenizer: Any, calibration: TextSource | Tensor, recipe: Recipe, vocab_size: int
) -> tuple[Tensor, str]:
    """What a model is quantised on.

    Args:
        calibration: text for `calibration_windows` as the recipe says, or token ids `[samples, tokens]`.

    Returns:
        token ids int64 `[samples, tokens]`, and a line on where they come from.

    Raises:
        CalibrationError: too little text, or token ids that do not fit.
    """
    if isinstance(calibration, Tensor):
        ids = check_token_ids(calibration, vocab_size)
        return ids, f"{ids.shape[0]} x {ids.shape[1]} tokens"
    text = load_text(calibration, "calibration")
    ids = calibration_windows(
        tokenizer, text, recipe.calib_samples, recipe.calib_seqlen, recipe.rotation.seed
    )
    return check_known(ids, vocab_size), describe_text(calibration, text)


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"text file {str(path)!r} is not UTF-8: {error}") from None


def _read_jsonl(path: Path) -> str:
    documents = []
    for number, line in enumerate(_read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CalibrationError(
                f"{str(path)!r} line {number}: {line[:60]!r} is not a JSON object with a field 'text'"
            ) from None
        if not isinstance(documents[-1], str):
            raise CalibrationError(
                f"{str(path)!r} line {number}: the field 'text' is {documents[-1]!r:.60}, not a string"
            )
    return SEPARATOR.join(documents)


def _read_parquet(path: Path) -> str:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise CalibrationError(
            f"reading {str(path)!r} needs pyarrow: pip install pyarrow, or give a .txt or .jsonl file"
        ) from None
    try:
        column = parquet.read_table(path, columns=["text"]).column("text")
    except Exception as error:  # pyarrow's own errors share no base with a missing column's KeyError
        raise CalibrationError(f"{str(path)!r} is no parquet file with a column 'text': {error}") from None
    return SEPARATOR.join(text for text in column.to_pylist() if text is not None)


@functools.lru_cache(maxsize=2)
def _read_hub(source: str) -> str:
    """The first documents of a data set, as the package `datasets` streams it."""
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"reading {source!r} needs the package datasets: pip install datasets, or give a file"
        ) from None
    name, _, split = source.removeprefix(HUB).partition(":")
    name, _, config = name.partition(",")
    documents, characters = [], 0
    try:
        for record in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
            documents.append(record["text"])
            characters += len(documents[-1])
            if characters >= HUB_CHARACTERS:
                break
    except KeyError:
        raise CalibrationError(
            f"data set {source!r} has no field 'text'; save one that has to a file"
        ) from None
    except Exception as error:  # of the network, the hub, or one of many readers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"cannot read {source!r} (hub:NAME[,CONFIG][:SPLIT]): {reason}") from None
    if not characters:
        raise CalibrationError(f"data set {source!r} is empty; give one with some text")
    return SEPARATOR.join(documents)
