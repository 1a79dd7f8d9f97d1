"""What a model is worth: perplexity by one protocol on several texts, and speed of generation.

Both take any causal language model of transformers, packed or plain. `measured_apart` runs a command
of the command line in a process of its own, so that its peak memory is that of the work alone.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, W2A4Error
from ..ops.devices import peak_memory_mb
from ..runtime.engine import Engine, Sampling, inference
from . import data, quality

#: Positions whose logits exist at one time; 256 x 49,152 in float32 are 50 MB.
LOGITS_CHUNK = 256

#: What is evaluated on where nobody names texts: of two kinds, since a figure on one may flatter.
EVALUATION_TEXTS: tuple[data.TextSource, ...] = ("general", "builtin")

#: `ids -> (start, stop -> logits of those positions)`.
LogitsOf = Callable[[Tensor], Callable[[int, int], Tensor]]

#: Runs the package that is running here, not a folder of that name in the working directory.
_CHILD = f"""import sys
sys.path[:1] = []
sys.path.append({str(Path(__file__).parents[2])!r})
sys.argv[0] = "w2a4"
from w2a4.cli.main import main
main()"""


def perplexity(
    model: Any,
    tokenizer: Any,
    text: data.TextSource = "builtin",
    seqlen: int = 2048,
    windows: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity of one text; `evaluate` has the arguments, what is returned, and the errors.

    A figure on one text may flatter: `evaluate` measures several.
    """
    return evaluate(model, tokenizer, [text], seqlen, windows, progress)[0]


def evaluate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[data.TextSource] = EVALUATION_TEXTS,
    seqlen: int = 2048,
    windows: int | None = None,
    progress: bool = True,
    prefix: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Perplexities of texts, each tokenised once, with BOS once if the tokenizer has one, in windows.

    `exp` of the mean float32 cross-entropy over the `seqlen - 1` predictions of every window; the tail that
    fills no window is dropped. A model with a 4-bit KV cache quantises keys and values here too.

    Args:
        texts: sources of `data.load_text`: its evaluation part of a text that the package has, a file, a data
            set of the hub, a list of documents.
        windows: at most so many of each text, from the start; None is all of them.
        progress: show a bar on stderr.
        prefix: ids of tokens before every window that are not scored: what a full-precision model is to be
            compared with whose quantised form has an exact prefix, which is there by itself.

    Returns:
        for each text perplexity, low and high (95 % bootstrap interval over windows, see
        `quality.interval`), losses (mean cross-entropy of each window, nats a token), seqlen, windows,
        tokens (in the windows), tokens_sha256 (of their ids), bos, text, seconds, tokens_per_second,
        peak_memory_mb.

    Raises:
        CalibrationError: no text, or one that is missing, empty, or shorter than one window.
    """
    if windows is not None and windows < 1:
        raise CalibrationError(f"windows={windows}: give a number >= 1, or none for all")
    if isinstance(texts, (str, Path)) or not texts:
        raise CalibrationError(f"texts={texts!r}: give a list of at least one source, as ['builtin']")
    prepared = []
    for source in texts:
        content = data.load_text(source, "evaluation")
        ids = data.windows(tokenizer, content, seqlen)[:windows]
        prepared.append((data.check_known(ids, model.config.vocab_size), data.describe_text(source, content)))
    with inference(model):
        logits_of = _logits_function(model, prepared[0][0][:1], prefix)
        found = [_measure(model.device, logits_of, ids, text, progress) for ids, text in prepared]
    return [{**result, "bos": tokenizer.bos_token_id is not None} for result in found]


def _measure(
    device: torch.device, logits_of: LogitsOf, ids: Tensor, text: str, progress: bool
) -> dict[str, Any]:
    """What `evaluate` returns of the windows int64 `[windows, seqlen]`, but for `bos`."""
    start = time.perf_counter()
    predictions = ids.shape[1] - 1
    losses = [
        _cross_entropy_sum(logits_of, window[None].to(device)) / predictions
        for window in _progress(ids, f"perplexity on {quality.origin(text)}", progress)
    ]
    seconds = time.perf_counter() - start
    low, high = quality.interval([losses])
    return {
        "perplexity": torch.tensor(losses, dtype=torch.float64).mean().exp().item(),
        "low": low,
        "high": high,
        "losses": losses,
        "seqlen": ids.shape[1],
        "windows": len(ids),
        "tokens": ids.numel(),
        "tokens_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12],
        "text": text,
        "seconds": seconds,
        "tokens_per_second": ids.numel() / seconds,
        "peak_memory_mb": peak_memory_mb(device),
    }


def check_same_tokens(tokenizer: Any, other: Any, texts: Sequence[data.TextSource]) -> None:
    """Two models are compared by the token, so their tokenizers have to cut the texts alike.

    Raises:
        CalibrationError: they do not.
    """
    for source in texts:
        content = data.load_text(source, "evaluation")
        mine, theirs = (data.token_stream(each, content)[0] for each in (tokenizer, other))
        if not torch.equal(mine, theirs):
            raise CalibrationError(
                f"the tokenizers of the two models cut the text {data.source_of(source)!r} into other tokens "
                f"({len(mine)} and {len(theirs)}), so a perplexity of one says nothing of the other; give "
                "the full-precision model that the checkpoint was made of"
            )


def generation_speed(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    streamer: Any = None,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    """Continue a prompt and time it, prefill included.

    Returns:
        prompt, text (the continuation), tokens (new ones), seconds, tokens_per_second, peak_memory_mb.
    """
    if max_new_tokens < 1:
        raise W2A4Error(f"max_new_tokens={max_new_tokens}: give a number >= 1")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise W2A4Error(f"prompt {prompt!r} has no tokens; give some text")
    start = time.perf_counter()
    new = generate(model, inputs, max_new_tokens, streamer, sampling)
    seconds = time.perf_counter() - start
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds,
        "peak_memory_mb": peak_memory_mb(model.device),
    }


def generate(
    model: Any, inputs: Any, max_new_tokens: int, streamer: Any = None, sampling: Sampling | None = None
) -> Tensor:
    """Continuation of tokenised inputs of batch 1 by `Engine`, int64 `[new tokens]`."""
    ids = inputs["input_ids"][0]
    if streamer is None:
        return Engine(model).generate([ids], max_new_tokens, sampling)[0]
    streamer.put(ids[None].cpu())
    on_token = lambda _, token: streamer.put(torch.tensor([token]))  # noqa: E731
    (new,) = Engine(model).generate([ids], max_new_tokens, sampling, on_token=on_token)
    streamer.end()
    return new


def reply(
    model: Any,
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    max_new_tokens: int,
    streamer: Any = None,
    sampling: Sampling | None = None,
) -> str:
    """The model's next turn in a conversation, by the tokenizer's chat template if there is one.

    Without a template the turns are joined by line ends and continued as plain text.

    Args:
        messages: `{"role": "system", "user" or "assistant", "content": …}`, oldest first.

    Raises:
        W2A4Error: the template takes no such conversation; some have no system prompt.
    """
    if tokenizer.chat_template:
        from jinja2 import TemplateError

        try:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise W2A4Error(
                f"the chat template of this model takes no conversation of {roles} ({error}); leave the "
                "system prompt out"
            ) from None
    else:
        prompt = "\n".join(message["content"] for message in messages) + "\n"
    special = not tokenizer.chat_template  # a template writes its own special tokens
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=special)
    new = generate(model, inputs.to(model.device), max_new_tokens, streamer, sampling)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def measured_apart(arguments: Sequence[str]) -> dict[str, Any]:
    """Run `w2a4 ARGUMENTS --json …` in a fresh process; its progress goes to this process's stderr.

    Returns:
        what the command wrote as JSON; its `peak_memory_mb` is that of the fresh process.

    Raises:
        W2A4Error: the command failed; it has said why on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-c", _CHILD, *arguments, "--json", str(out)]
        status = subprocess.run(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL).returncode
        if status:
            raise W2A4Error(
                f"`w2a4 {' '.join(arguments)}` failed with exit code {status}; its message is above"
            )
        return json.loads(out.read_text(encoding="utf-8"))


def _logits_function(model: Any, sample: Tensor, prefix: Sequence[int] = ()) -> LogitsOf:
    """The head applied to few positions at a time, of windows behind the tokens of a prefix.

    Models that do more to their logits than a linear head (soft caps, scaling) are found out by a short
    trial and run whole.
    """
    backbone, head = model.base_model, model.get_output_embeddings()

    def behind(ids: Tensor) -> Tensor:
        return torch.cat([ids.new_tensor(prefix).expand(len(ids), -1), ids], 1)

    def in_parts(ids: Tensor) -> Callable[[int, int], Tensor]:
        hidden = backbone(input_ids=behind(ids), use_cache=False).last_hidden_state[:, len(prefix) :]
        return lambda start, stop: head(hidden[:, start:stop])

    def whole(ids: Tensor) -> Callable[[int, int], Tensor]:
        logits = model(input_ids=behind(ids), use_cache=False).logits[:, len(prefix) :]
        return lambda start, stop: logits[:, start:stop]

    if backbone is model or head is None:
        return whole
    trial = sample[:, :8].to(model.device)
    first, second = in_parts(trial)(0, 8), whole(trial)(0, 8)
    same = first.shape == second.shape and torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-3)
    return in_parts if same else whole


def _cross_entropy_sum(logits_of: LogitsOf, ids: Tensor) -> float:
    """Sum of the float32 cross-entropies of the `seqlen - 1` predictions of one window `[1, seqlen]`."""
    logits = logits_of(ids)
    predictions = ids.shape[1] - 1
    total = 0.0
    for start in range(0, predictions, LOGITS_CHUNK):
        stop = min(start + LOGITS_CHUNK, predictions)
        chunk = logits(start, stop)[0].float()
        target = ids[0, start + 1 : stop + 1].to(chunk.device)
        total += torch.nn.functional.cross_entropy(chunk, target, reduction="sum").item()
    return total


def _progress(items: Tensor, label: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=label, unit="window", disable=not show, file=sys.stderr)
