"""The teacher's probabilities on disk, so that the teacher need not be in memory while the student trains.

For every position the k most probable tokens are stored, six bytes each, and the probability of all
others together.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import TrainingError
from ..format.files import write_tensors
from .losses import TopK


class CachedTeacher:
    """Reads what `write_top_k` wrote. Called with pieces int64 `[n]`, returns their `TopK` `[n, seqlen, …]`.

    Args:
        folder: of the files, one a piece.

    Raises:
        TrainingError: on a call, if a file is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, pieces: Tensor) -> TopK:
        found = [self._read(int(piece)) for piece in pieces]
        return TopK(*(torch.stack(values).to(pieces.device) for values in zip(*found, strict=True)))

    def _read(self, piece: int) -> TopK:
        path = self.folder / f"{piece}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                return TopK(*(file.get_tensor(name) for name in TopK._fields))
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the teacher's probabilities in {str(path)!r} cannot be read ({error}); remove that file "
                "and repeat the command, which computes them again"
            ) from None


@torch.inference_mode()
def write_top_k(
    model: nn.Module, pieces: Tensor, k: int, folder: Path, progress: bool = True
) -> CachedTeacher:
    """Write the teacher's k most probable tokens at every position of a text, one file a piece.

    Args:
        model: the full-precision model, in eval mode.
        pieces: int64 `[n, seqlen]`.
        k: tokens a position; cut to the vocabulary.
        folder: pieces that an interrupted run has stored there are kept.
        progress: show a bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    k = min(k, model.config.vocab_size)
    for index, ids in enumerate(tqdm(pieces, "teacher's logits", unit="window", disable=not progress)):
        path = folder / f"{index}.safetensors"
        if path.is_file():
            continue
        logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        write_tensors(path, TopK.of(logits, k)._asdict())
    return CachedTeacher(folder)
