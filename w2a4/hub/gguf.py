"""GGUF files of the architectures that transformers reads: all of a file is used, or it is refused.

transformers unpacks the weights. `gguf_header` checks the file first, and gives what the configuration has
to say of attention and RoPE.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import arch
from ..errors import CheckpointError, W2A4Error
from .gguf_header import Header, check_gguf
from .gguf_rope import set_rope

#: One load at a time changes what the package gguf gives to transformers.
_PARSING = threading.Lock()


def load_gguf(path: Path) -> tuple[nn.Module, Any]:
    """Model in float32 and tokenizer.

    Raises:
        CheckpointError: not GGUF, truncated, part of a split file, of an architecture that is not read, or
            with a tensor or key that w2a4 does not read.
    """
    header = check_gguf(path)
    try:
        with _parsed_once(path, header.reader):
            loaded, tokenizer = _load(path, header)
    except W2A4Error:
        raise
    except Exception as error:  # of the readers of many tensor types and tokenizers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot load {path.name!r}: {reason}") from error
    # transformers refuses to save models that came from GGUF: move the weights to a fresh one.
    config = copy.deepcopy(loaded.config)
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    config.dtype = torch.float32
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True, strict=True)
    model.tie_weights()
    # Buffers that are not part of the state, such as RoPE's frequencies, are still on meta.
    model.model.rotary_emb = type(loaded.model.rotary_emb)(config)
    model.generation_config = loaded.generation_config
    model.config._name_or_path = path.name
    return model.eval(), tokenizer


@contextmanager
def _parsed_once(path: Path, reader: Any) -> Iterator[None]:
    """Give transformers, which opens the file for configuration, weights and tokenizer, what is parsed.

    A vocabulary of 49,152 words takes seconds each time, and so does the table of names, which it makes for
    every module: SmolLM2-135M loads in 14 s instead of 41 (one core of an AMD EPYC).
    """
    import gguf

    with _PARSING:
        original = gguf.GGUFReader, gguf.get_tensor_name_map

        def open_reader(file: Any, *arguments: Any, **options: Any) -> Any:
            same = Path(file).resolve() == path.resolve() and not arguments and not options
            return reader if same else original[0](file, *arguments, **options)

        gguf.GGUFReader, gguf.get_tensor_name_map = open_reader, functools.cache(original[1])
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = original


def _load(path: Path, header: Header) -> tuple[nn.Module, Any]:
    """As transformers loads it, but every parameter comes from the file, and every tensor goes into one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    loaded, told = AutoModelForCausalLM.from_pretrained(
        **where, config=_config(where, header), dtype=torch.float32, output_loading_info=True
    )
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    missing = sorted(set(told["missing_keys"]) - ({"lm_head.weight"} if tied else set()))
    if missing:
        raise CheckpointError(
            f"transformers found no tensor in {path.name} for {missing[0]}; give the transformers directory "
            "of the model, or another version of transformers or gguf"
        )
    taken = len(loaded.state_dict()) - tied
    if taken != header.tensors:
        raise CheckpointError(
            f"{path.name} holds {header.tensors} tensors and {type(loaded).__name__} takes {taken}; give the "
            "transformers directory of the model"
        )
    return loaded, AutoTokenizer.from_pretrained(**where)


def _config(where: dict[str, str], header: Header) -> Any:
    """The configuration as transformers reads it, with what it passes over or leaves to a default."""
    from transformers import AutoConfig

    told = AutoConfig.from_pretrained(**where).to_dict()
    # A LLaMA by the name of "mistral" would get a window of 4096 tokens that the file does not ask for.
    for key in ("model_type", "architectures", "sliding_window"):
        told.pop(key, None)
    config = AutoConfig.for_model(header.layout.model_type, **told)
    config.num_key_value_heads = header.kv_heads
    if hasattr(config, "head_dim") or arch.head_dim(config) != header.head_dim:
        config.head_dim = header.head_dim
    if header.window is not None or hasattr(config, "sliding_window"):
        config.sliding_window = header.window
    set_rope(config, header.rope)
    return config
