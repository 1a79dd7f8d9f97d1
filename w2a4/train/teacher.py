"""The teacher as the loss asks it: behind the student's prefix, in memory or as probabilities on disk.

On disk it need not be in memory while the student trains. For every position the k most probable tokens are
stored, six bytes each, and the probability of all others together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

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


class PrefixedTeacher(nn.Module):
    """The full-precision model with the tokens of a prefix before every text, as its student has their keys.

    Args:
        model: unrotated.
        prefix: token ids, one at least.
    """

    def __init__(self, model: nn.Module, prefix: Sequence[int]):
        super().__init__()
        self.model, self.config = model, model.config
        self.register_buffer("prefix", torch.tensor(prefix, device=model.device), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.prefix.device

    def with_prefix(self, ids: Tensor) -> Tensor:
        return torch.cat([self.prefix.expand(len(ids), -1), ids], 1)

    def without_prefix(self, logits: Tensor) -> Tensor:
        return logits[:, len(self.prefix) :]

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Has `logits` of the text's own tokens, `[batch, tokens, vocabulary]` for ids `[batch, tokens]`."""
        logits = self.model(input_ids=self.with_prefix(input_ids), use_cache=use_cache).logits
        return SimpleNamespace(logits=self.without_prefix(logits))


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
