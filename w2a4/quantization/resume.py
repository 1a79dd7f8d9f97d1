"""What a killed `w2a4 quantize` leaves behind, so that the next one goes on after the last whole layer.

A directory with `progress.json` (what is being quantised, layers done, their report entries), one
`layer-<i>.safetensors` for each packed layer, and `streams-<i>.safetensors`, the hidden states behind
the last of them. Every file is written whole or not at all, `progress.json` last.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..format.files import read_text, write_json, write_tensors
from .layer import Streams

#: Numbers hashed at once, so that a tensor on a GPU or in use need not be copied whole.
_CHUNK = 1 << 24

#: Keys of a model's config that tell where it came from, not what it computes.
_ORIGIN = ("_name_or_path", "transformers_version", "architectures")


def fingerprint(recipe: dict[str, Any], rotation: dict[str, Any], ids: Tensor, model: nn.Module) -> str:
    """A hash of everything the packed layers depend on: every tensor of the model is part of it.

    A fine-tune may differ from its base in a few matrices of one layer, so that nothing less will do.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _ORIGIN}
    about = [recipe, rotation, config, _file_digest((recipe.get("rotation") or {}).get("learned"))]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in (("", ids), *model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for part in tensor.detach().reshape(-1).split(_CHUNK):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_digest(path: str | None) -> str | None:
    """Of the rotations that a recipe names by their file."""
    if path is None or not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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
            state = self._state()
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
        return self._load(f"layer-{index}.safetensors")

    def streams(self) -> Streams:
        """Hidden states behind the last layer done."""
        tensors = self._load(f"streams-{self.done - 1}.safetensors")
        return Streams(*(list(tensors[kind].split(1)) for kind in ("full", "quantized")))

    def store(self, layer: nn.Module, streams: Streams, entries: list[dict[str, Any]]) -> None:
        """Record the next layer as done."""
        self.entries.append(entries)
        if self.directory is None:
            return
        index = self.done - 1
        kept = {"full": torch.cat(streams.full), "quantized": torch.cat(streams.quantized)}
        write_tensors(self.directory / f"layer-{index}.safetensors", layer.state_dict())
        write_tensors(self.directory / f"streams-{index}.safetensors", kept)
        write_json(self.directory / "progress.json", {"key": self.key, "layers": self.entries})
        for older in self.directory.glob("streams-*.safetensors"):
            if older.name != f"streams-{index}.safetensors":
                older.unlink()

    def _state(self) -> dict[str, Any]:
        try:
            state = json.loads(read_text(self.directory / "progress.json"))
            return {"key": state["key"], "layers": list(state["layers"])}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged("progress.json", error) from None

    def _load(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.directory / name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(name, error) from None

    def _damaged(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{name} in {str(self.directory)!r} cannot be read ({error}); remove that directory and repeat"
        )
