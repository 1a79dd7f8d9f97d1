"""Checkpoints in the directory of a run: which are whole, and what is said of one that is damaged."""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import TrainingError

WEIGHTS = "model.safetensors"

#: Sizes of a checkpoint's files and the number of processes; written last: without it, or with files of
#: other sizes, a checkpoint is not whole.
WHOLE = "whole.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of an interrupted run; one that is not whole is passed over."""
    whole = [path for path in _checkpoints(folder) if _is_whole(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def drop_parts(folder: Path) -> None:
    """Remove checkpoints that a kill left half-written: Trainer would keep them and remove whole ones."""
    for path in _checkpoints(folder):
        if not _is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def check_processes(checkpoint: Path, world: int) -> None:
    """Raise TrainingError for a checkpoint of another number of processes."""
    before = _marker(checkpoint)["processes"]
    if before != world:
        raise TrainingError(
            f"{str(checkpoint)!r} is of a run with WORLD_SIZE={before}, and this one has {world}; start "
            f"{before} process(es) to go on with it, or remove {str(checkpoint.parent)!r} to train anew"
        )


def check_readable(checkpoint: Path) -> None:
    """Raise TrainingError for a file that Trainer would read and cannot, or would read wrongly.

    torch.save writes zip files, with a checksum of each part that torch.load does not look at.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, error) from None
    for path in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))):
        try:
            with zipfile.ZipFile(path) as archive:
                part = archive.testzip()
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise damaged(path, error) from None
        if part is not None:
            raise damaged(path, f"{part} has another checksum")


def damaged(path: Path, reason: Exception | str) -> TrainingError:
    """The error that a file of a checkpoint makes."""
    told = " ".join(str(reason).split())
    return TrainingError(
        f"{path.name} in {str(path.parent)!r} cannot be read ({told}); remove that directory and repeat the "
        "command, which goes on from the checkpoint before it"
    )


def _checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = _marker(checkpoint)["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _marker(checkpoint: Path) -> dict[str, Any]:
    marker = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
    return {"processes": marker["processes"], "sizes": marker["sizes"]}
