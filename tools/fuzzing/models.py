"""A tiny LLaMA with a tokenizer of bytes, float and packed, that cases spoil copies of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

PROMPT = torch.tensor([[256, 72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]])
RECIPES = {"w2": "w2a4kv4", "w4": "w4a4kv4"}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=256,
        eos_token_id=257,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def make(folder: Path) -> None:
    """`fp`, `w2` and `w4` below the folder, text, and the packed models' logits, unless they are there."""
    import w2a4

    if (folder / "ready.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(" ".join(f"Fox {n} jumps over the lazy dog." for n in range(80)))
    tiny().save_pretrained(folder / "fp")
    tokenizer().save_pretrained(folder / "fp")
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    logits = {}
    for name, recipe in RECIPES.items():
        model = tiny()
        w2a4.quantize(model, None, recipe, ids, progress=False)
        w2a4.save(model, tokenizer(), folder / name)
        with torch.no_grad():
            logits[name] = model(PROMPT).logits.flatten().tolist()
    (folder / "ready.json").write_text(json.dumps(logits))


def logits_of(folder: Path, name: str) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "ready.json").read_text())[name])
