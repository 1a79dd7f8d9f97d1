"""The generation config that travels with a checkpoint: found fit to be saved before any work is done."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers import GenerationConfig

from ..errors import CheckpointError
from ..format.files import write_atomically


def check_generation(model: nn.Module) -> None:
    """Raise CheckpointError if what the model generates with cannot be written as JSON, or read again.

    Nor can a config that asks for attention weights, which the attention of a packed model does not give.
    """
    if getattr(model.config, "output_attentions", None):
        raise CheckpointError(
            "the model's config says output_attentions=True, but w2a4's attention gives no weights and "
            "transformers saves no such config: remove it from config.json, or set "
            "model.config.output_attentions to False"
        )
    config = getattr(model, "generation_config", None)
    if config is not None:
        generation_text(config)
    misplaced = getattr(model.config, "_get_generation_parameters", dict)()
    if misplaced:
        raise CheckpointError(
            f"the model's config holds {misplaced}, which say how to generate, and cannot be saved so: move "
            "them to generation_config.json, or set them to None in model.config"
        )


def generation_text(config: GenerationConfig) -> str:
    """What generation_config.json holds, or CheckpointError if it cannot be written."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = config.to_json_string(use_diff=True)
            json.loads(text)
            return text
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"model.generation_config cannot be saved ({error}): give it plain values, or remove "
            "generation_config.json"
        ) from None


@contextlib.contextmanager
def as_it_came(model: nn.Module, directory: Path) -> Iterator[None]:
    """Save `model` in here: its generation config is written as it is.

    transformers refuses to save what it loads with a warning, such as a temperature without sampling, as
    many models ship it, once anything in it was changed.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        yield
        return
    text = generation_text(config)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config
    write_atomically(directory / "generation_config.json", text)
