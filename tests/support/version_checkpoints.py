"""Checkpoints that this version of transformers saves, with the logits they have here, for others to load.

    PYTHONPATH=tests python tests/support/version_checkpoints.py FOLDER

`tools/doors.sh` runs it under each version; `test_versions.py` loads what the versions made.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import w2a4
from support.packed import SHAPE, calibration, prompt
from support.tiny_models import LLAMA3_ROPE, tiny_llama

#: Some text, and one of the tokens that is not in the vocabulary of bytes.
TEXT = "a text <|end|> of it"

#: How models are made, by name: their shape, and the recipe (None: rotated only).
KINDS = {
    "w2a4": ({}, {"weight_bits": 2}),
    "w4a4": ({}, {"weight_bits": 4}),
    "rotated": ({}, None),
    "w2a4-llama3": ({"rope_scaling": LLAMA3_ROPE}, {"weight_bits": 2}),
    "rotated-llama3": ({"rope_scaling": LLAMA3_ROPE}, None),
    "w4a4-theta": ({"theta": 500.0}, {"weight_bits": 4}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One of bytes, with an end token and another special one, as chat models have."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:120]
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: 2 + i for i, letter in enumerate(letters)}
    own = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="</s>"))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return fast


def model(name: str) -> torch.nn.Module:
    shape, recipe = KINDS[name]
    shape = {**SHAPE, **shape}
    theta = shape.pop("theta", None)
    if theta is not None:
        newer = int(transformers.__version__.split(".")[0]) >= 5
        rope = {"rope_theta": theta}
        shape |= {"rope_parameters": {"rope_type": "default", **rope}} if newer else rope
    made = tiny_llama(dtype=torch.float32, **shape)
    if recipe is None:
        return w2a4.rotate(made)
    w2a4.quantize(made, None, w2a4.Recipe.load("w2a4kv4").override(**recipe), calibration(), progress=False)
    return made


@torch.inference_mode()
def outputs(made: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits of a prompt that is long enough for llama3's scaling, and tokens generated after a short one."""
    text = made.generate(prompt(2, 7), max_new_tokens=8, do_sample=False, pad_token_id=0)
    return {"logits": made(prompt(2, 90)).logits.contiguous(), "tokens": text.contiguous()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in KINDS:
        made, path = model(name), folder / transformers.__version__ / name
        w2a4.save(made, tokenizer(), path)
        save_file(outputs(made), path / "outputs.bin")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
