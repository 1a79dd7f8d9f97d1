"""Training text that the teacher writes itself: the distribution a student is to learn.

RCP (arXiv 2502.15779) and LLM-QAT (arXiv 2305.17888) train on the full-precision model's own
continuations, which need no corpus and keep what instruction tuning has put there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

#: Tokens of real text that a continuation begins with, and that it has in all.
PROMPT_TOKENS, LENGTH = 32, 512

#: Continuations written at once.
BATCH = 16


@torch.inference_mode()
def write_generations(
    model: nn.Module,
    tokenizer: Any,
    stream: Tensor,
    tokens: int,
    path: Path,
    seed: int = 0,
    progress: bool = True,
) -> str:
    """Sample continuations of random places of a text until they have `tokens` tokens.

    Args:
        model: the full-precision model, in eval mode.
        stream: int64 `[n]`, the text whose pieces of 32 tokens are the prompts.
        path: JSONL of `{"text": …}`, written after every batch; what an interrupted run left there is
            kept and counted.
        seed: of prompts and samples.

    Returns:
        the text, documents separated by the tokenizer's end of text or an empty line.
    """
    documents = _read(path)
    have = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents)
    with tqdm(
        total=tokens, initial=min(have, tokens), desc="teacher writes", unit="token", disable=not progress
    ) as bar:
        while have < tokens:
            batch = _sample(model, tokenizer, stream, seed * 100_003 + len(documents))
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch]
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            documents += texts
            have += batch.numel()
            bar.update(batch.numel())
    return (tokenizer.eos_token or "\n\n").join(documents)


def _sample(model: nn.Module, tokenizer: Any, stream: Tensor, seed: int) -> Tensor:
    """int64 `[BATCH, LENGTH]`; global random numbers are left as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        starts = torch.randint(max(1, len(stream) - PROMPT_TOKENS), (BATCH, 1))
        prompts = stream[starts + torch.arange(min(PROMPT_TOKENS, len(stream)))].to(model.device)
        return model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0,
            top_p=0.95, min_new_tokens=LENGTH - prompts.shape[1], max_new_tokens=LENGTH - prompts.shape[1],
            pad_token_id=tokenizer.eos_token_id,
        ).cpu()  # fmt: skip


def _read(path: Path) -> list[str]:
    """Documents of earlier runs; a last line that was cut off is dropped, from the file too."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[-1]:
        path.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
    return [json.loads(line)["text"] for line in lines[:-1]]
