"""What a model is worth: perplexity by one protocol, and speed of generation.

Both take any causal language model of transformers, packed or plain. `measured_apart` runs a command
of the command line in a process of its own, so that its peak memory is that of the work alone.
"""

from __future__ import annotations

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
from . import data

#: Positions whose logits exist at one time; 256 x 49,152 in float32 are 50 MB.
LOGITS_CHUNK = 256


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
    """Perplexity of a text, tokenised once, with BOS once if the tokenizer has one, in windows side by side.

    `exp` of the mean float32 cross-entropy over the `seqlen - 1` predictions of every window; the tail that
    fills no window is dropped. A model with a 4-bit KV cache quantises keys and values here too.

    Args:
        text: `builtin`, a .txt, .jsonl or .parquet file, or a list of documents.
        windows: at most so many, from the start; None is all of them.
        progress: show a bar on stderr.

    Returns:
        perplexity, seqlen, windows, tokens (in the windows), bos, text, seconds, tokens_per_second,
        peak_memory_mb.

    Raises:
        CalibrationError: the text is missing, empty, or shorter than one window.
    """
    if windows is not None and windows < 1:
        raise CalibrationError(f"windows={windows}: give a number >= 1, or none for all")
    content = data.load_text(text, "evaluation")
    ids = data.check_known(data.windows(tokenizer, content, seqlen)[:windows], model.config.vocab_size)
    start = time.perf_counter()
    total = 0.0
    with inference(model):
        logits_of = _logits_function(model, ids[:1])
        for window in _progress(ids, "perplexity", progress):
            total += _cross_entropy_sum(logits_of, window[None].to(model.device))
    seconds = time.perf_counter() - start
    mean = total / (len(ids) * (seqlen - 1))
    return {
        "perplexity": torch.tensor(mean, dtype=torch.float64).exp().item(),
        "seqlen": seqlen,
        "windows": len(ids),
        "tokens": ids.numel(),
        "bos": tokenizer.bos_token_id is not None,
        "text": data.describe_text(text, content),
        "seconds": seconds,
        "tokens_per_second": ids.numel() / seconds,
        "peak_memory_mb": peak_memory_mb(model.device),
    }


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
        messages: `{"role": "user" or "assistant", "content": …}`, oldest first.
    """
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
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


def _logits_function(model: Any, sample: Tensor) -> Callable[[Tensor], Callable[[int, int], Tensor]]:
    """`ids -> (start, stop -> logits of those positions)`, the head applied to few positions at a time.

    Models that do more to their logits than a linear head (soft caps, scaling) are found out by a short
    trial and run whole.
    """
    backbone, head = model.base_model, model.get_output_embeddings()

    def in_parts(ids: Tensor) -> Callable[[int, int], Tensor]:
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
        return lambda start, stop: head(hidden[:, start:stop])

    def whole(ids: Tensor) -> Callable[[int, int], Tensor]:
        logits = model(input_ids=ids, use_cache=False).logits
        return lambda start, stop: logits[:, start:stop]

    if backbone is model or head is None:
        return whole
    trial = sample[:, :8].to(model.device)
    first, second = in_parts(trial)(0, 8), whole(trial)(0, 8)
    same = first.shape == second.shape and torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-3)
    return in_parts if same else whole


def _cross_entropy_sum(logits_of: Callable[[Tensor], Callable[[int, int], Tensor]], ids: Tensor) -> float:
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
