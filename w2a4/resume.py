"""What a killed `w2a4 quantize` leaves behind, so that the next one goes on after the last whole layer.

A directory with `progress.json` (what is being quantised, layers done, their report entries), one
`layer-<i>.safetensors` for each packed layer, and `streams-<i>.safetensors`, the hidden states behind
the last of them. Every file is written whole or not at all, `progress.json` last.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .calibrate import Streams
from .errors import CheckpointError
from .report import write_json


def fingerprint(recipe: dict[str, Any], rotation: dict[str, Any], ids: Tensor, model: nn.Module) -> str:
    """A hash of everything the packed layers depend on; the model stands in by two of its rows."""
    digest = hashlib.sha256(json.dumps([recipe, rotation, list(ids.shape)], sort_keys=True).encode())
    rows = [model.model.layers[-1].mlp.up_proj.weight[0], model.model.embed_tokens.weight[0]]
    for tensor in (ids, *(row.detach().double() for row in rows)):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


class Progress:
    """The directory, for one quantisation.

    Args:
        directory: made if absent; None keeps nothing.
        key: from `fingerprint`.

    Raises:
        CheckpointError: the directory holds another quantisation's progress.
    """

    def __init__(self, directory: Path | None, key: str):
        self.directory, self.key = directory, key
        self.entries: list[list[dict[str, Any]]] = []
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / "progress.json").is_file():
            state = json.loads((directory / "progress.json").read_text())
            if state["key"] != key:
                raise CheckpointError(
                    f"{str(directory)!r} holds the progress of another quantisation (other model, recipe or "
                    "calibration); remove it, or repeat that one"
                )
            self.entries = state["layers"]

    @property
    def done(self) -> int:
        """Layers that need not be quantised again."""
        return len(self.entries)

    def layer(self, index: int) -> dict[str, Tensor]:
        """State of a packed layer."""
        return load_file(self.directory / f"layer-{index}.safetensors")

    def streams(self) -> Streams:
        """Hidden states behind the last layer done."""
        tensors = load_file(self.directory / f"streams-{self.done - 1}.safetensors")
        return Streams(*(list(tensors[kind].split(1)) for kind in ("full", "quantized")))

    def store(self, layer: nn.Module, streams: Streams, entries: list[dict[str, Any]]) -> None:
        """Record the next layer as done."""
        self.entries.append(entries)
        if self.directory is None:
            return
        index = self.done - 1
        kept = {"full": torch.cat(streams.full), "quantized": torch.cat(streams.quantized)}
        self._save(f"layer-{index}.safetensors", {k: v.contiguous() for k, v in layer.state_dict().items()})
        self._save(f"streams-{index}.safetensors", kept)
        write_json(self.directory / "progress.json", {"key": self.key, "layers": self.entries})
        (self.directory / f"streams-{index - 1}.safetensors").unlink(missing_ok=True)

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, self.directory / f".{name}")
        os.replace(self.directory / f".{name}", self.directory / name)
