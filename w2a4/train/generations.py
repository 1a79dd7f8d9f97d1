"""Training text that the teacher writes itself: samples of the distribution that a student is to learn.

RCP (arXiv 2502.15779) and LLM-QAT (arXiv 2305.17888) train on the full-precision model's own
continuations: they need no corpus, and keep what the model learned by instruction tuning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import TrainingError
from ..format.files import write_atomically
from ..runtime.engine import Engine, Sampling, end_tokens, inference

#: Tokens of the prompt, from a real text, and of prompt and continuation together.
PROMPT_TOKENS, LENGTH = 32, 512

#: Continuations in a batch: on a CPU, and the most on a GPU, whose memory may hold fewer.
BATCH, GPU_BATCH = 16, 512

#: Top-k, not top-p, which would sort the vocabulary for each token.
SAMPLING = Sampling(temperature=1.0, top_k=256)


def write_generations(
    model: nn.Module,
    tokenizer: Any,
    stream: Tensor,
    tokens: int,
    path: Path,
    seed: int = 0,
    progress: bool = True,
) -> str:
    """Sample continuations of prompts from random positions of a text until they have `tokens` tokens.

    Args:
        model: the full-precision model.
        tokenizer: of the model.
        stream: int64 `[n]`, the text that prompts of `PROMPT_TOKENS` tokens are taken from.
        tokens: at least so many, in whole batches.
        path: JSONL of `{"text": …}`, written after every batch; what an interrupted run wrote there is
            kept and counted.
        seed: of prompts and samples.
        progress: show a bar.

    Returns:
        the text, documents separated by the tokenizer's end of text or an empty line.

    Raises:
        TrainingError: the file is damaged.
    """
    documents = _read(path)
    have = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents)
    engine = Engine(model, max_length=min(LENGTH, model.config.max_position_embeddings))
    size = _batch_size(model)
    with tqdm(
        total=tokens, initial=min(have, tokens), desc="teacher writes", unit="token", disable=not progress
    ) as bar:
        while have < tokens:
            batch = _sample(engine, stream, size, seed * 100_003 + len(documents))
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch]
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            documents += texts
            have += batch.numel()
            bar.update(batch.numel())
    return (tokenizer.eos_token or "\n\n").join(documents)


def _batch_size(model: nn.Module) -> int:
    """The number of continuations whose keys and values take a quarter of the free memory at most."""
    if model.device.type != "cuda":
        return BATCH
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(GPU_BATCH, free // 4 // (LENGTH * numbers * model.dtype.itemsize)))


def _sample(engine: Engine, stream: Tensor, size: int, seed: int) -> Tensor:
    """int64 `[size, max_length]` on the CPU; no continuation ends early."""
    device = engine.model.device
    positions = torch.randint(
        max(1, len(stream) - PROMPT_TOKENS), (size, 1), generator=_generator("cpu", seed)
    )
    prompts = stream[positions + torch.arange(min(PROMPT_TOKENS, len(stream)))].to(device)
    count, generator = engine.max_length - prompts.shape[1], _generator(device, seed)
    ends = torch.tensor(end_tokens(engine.model), dtype=torch.long, device=device)
    with inference(engine.model):
        sequences = engine.sequences(list(prompts), count)
        tokens = [prompts]
        for step in range(count):
            if step > 0:
                sequences.advance(tokens[-1][:, 0])
            logits = sequences.logits.index_fill(1, ends, -torch.inf)
            tokens.append(SAMPLING.pick(logits, generator)[:, None])
        return torch.cat(tokens, 1).cpu()


def _generator(device: torch.device | str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _read(path: Path) -> list[str]:
    """Documents of earlier runs; a last line that was cut off is also removed from the file."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise _damaged(path, error) from None
    if lines[-1]:
        write_atomically(path, "\n".join([*lines[:-1], ""]))
    return [_document(path, number, line) for number, line in enumerate(lines[:-1], 1)]


def _document(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, f"line {number}: {error!r}") from None
    if not isinstance(text, str):
        raise _damaged(path, f"line {number}: its text is not a string")
    return text


def _damaged(path: Path, reason: Exception | str) -> TrainingError:
    return TrainingError(
        f"{path.name} in {str(path.parent)!r}, the teacher's text, cannot be read ({reason}); remove it and "
        "repeat the command, which has the teacher write it again"
    )
