"""Directories and models of the hub, loaded whole: no tensor is left to chance, and none is left over."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, W2A4Error
from .consistency import PREFIXES, check_directory, check_sizes
from .sources import is_gguf

#: Buffers that old checkpoints hold and models compute for themselves.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.(masked_bias|attn\.bias)$")

#: From names in a checkpoint to those of the model, as transformers takes it.
_MAPPING = {PREFIXES.pattern: ""}


def load_pretrained(source: str | Path, dtype: torch.dtype | str) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a directory or hub id.

    Raises:
        CheckpointError: tensors that are missing, left over, of other shapes, or not to be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        if Path(source).is_dir():
            check_directory(Path(source))
        else:
            check_sizes(AutoConfig.from_pretrained(source).to_dict())
        load = AutoModelForCausalLM.from_pretrained
        model, told = load(source, dtype=dtype, output_loading_info=True)
        if told["missing_keys"] and _all_prefixed(told["unexpected_keys"]):
            del model
            model, told = load(source, dtype=dtype, output_loading_info=True, key_mapping=_MAPPING)
        _check_told(source, told)
        if hasattr(model, "ct_decompress_hook"):
            # Where the whole model is called it does so itself, and not where its parts are.
            model.hf_quantizer.compressor.decompress_model(model)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except W2A4Error:
        raise
    except Exception as error:  # of the hub, of pickles that hold more than tensors, of many tokenizers
        raise CheckpointError(f"cannot load {str(source)!r}: {_reason(error)}") from error
    return model.eval(), tokenizer


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a directory, hub id or .gguf file, without its model.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    path = Path(source)
    where = {"pretrained_model_name_or_path": source}
    if is_gguf(source):
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        return AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # of the hub and of many tokenizers
        raise CheckpointError(f"cannot load the tokenizer of {str(source)!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _all_prefixed(names: Any) -> bool:
    return bool(names) and all(PREFIXES.match(name) for name in names)


def _check_told(source: str | Path, told: dict[str, Any]) -> None:
    """`told` is what transformers says on loading, where it gives random values to what it does not find."""
    missing = sorted(told["missing_keys"])
    unexpected = sorted(name for name in told["unexpected_keys"] if not _COMPUTED.search(name))
    mismatched = sorted(str(entry[0]) for entry in told.get("mismatched_keys") or ())
    for names, what in ((mismatched, "has another shape in"), (missing, "is missing from")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            found = f"; it holds {unexpected[0]} instead" if unexpected else ""
            raise CheckpointError(
                f"{names[0]}{more} {what} {str(source)!r}{found}: merge adapters, or download it again"
            )
    if unexpected:
        raise CheckpointError(
            f"{str(source)!r} holds {unexpected[0]}, which a LLaMA of its config.json does not have; merge "
            "adapters, or save it again without"
        )
