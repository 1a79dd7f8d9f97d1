"""The teacher's distributions on disk, so that no teacher need be in memory while the student trains.

Of every position the k most probable tokens are kept and the probability of all others together: six
bytes a token kept.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import TrainingError
from ..format.files import write_tensors
from .losses import Tops


class CachedTeacher:
    """Reads what `write_tops` wrote. Call it with pieces int64 `[n]` for their `Tops` `[n, seqlen, …]`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, pieces: Tensor) -> Tops:
        found = [self._read(int(piece)) for piece in pieces]
        return Tops(*(torch.stack(values).to(pieces.device) for values in zip(*found, strict=True)))

    def _read(self, piece: int) -> Tops:
        path = self.folder / f"{piece}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                return Tops(*(file.get_tensor(name) for name in Tops._fields))
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"the teacher's logits in {str(path)!r} cannot be read ({error})") from None


@torch.inference_mode()
def write_tops(
    model: nn.Module, pieces: Tensor, k: int, folder: Path, progress: bool = True
) -> CachedTeacher:
    """Write the teacher's k most probable tokens at every position of a text, a file a piece.

    Args:
        model: the full-precision model, in eval mode.
        pieces: int64 `[n, seqlen]`.
        k: at most the vocabulary.
        folder: pieces that an interrupted run has left there are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    k = min(k, model.config.vocab_size)
    for index, ids in enumerate(tqdm(pieces, "teacher's logits", unit="window", disable=not progress)):
        path = folder / f"{index}.safetensors"
        if path.is_file():
            continue
        logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        tops = {name: value for name, value in Tops.of(logits, k)._asdict().items()}
        write_tensors(path, tops)
    return CachedTeacher(folder)
