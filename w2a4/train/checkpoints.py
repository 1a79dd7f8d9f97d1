"""Checkpoints of a run: what is written, which of them are whole, and what is read from one to resume.

A checkpoint is a directory `checkpoint-<step>` with the trained parameters and the minutes spent
(`WEIGHTS`), the files of Hugging Face's Trainer, and last a list of all files (`WHOLE`). A checkpoint
that an interruption cut off has no such list, or files of other sizes, and is passed over.
"""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import TrainingError
from ..format.files import write_json
from .distributed import agree, whole
from .linear import fake_quant_linears

WEIGHTS = "model.safetensors"

#: Sizes in bytes of a checkpoint's files, and the number of processes that wrote them.
WHOLE = "whole.json"

#: One of these is in the RuntimeError that torch.save raises on a full disk.
_FILE_WRITER = ("inline_container", "iostream", "StreamWriter")


def checkpoint_folder(folder: Path, step: int) -> Path:
    """The directory of the checkpoint after `step` steps."""
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def trained_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The trained parameters by name, on the CPU, gathered from all processes, which must all call this.

    Args:
        keep: False returns nothing, as in processes that write nothing.
    """
    state, kept = model.state_dict(), {}
    for name in _trained_names(model):
        tensor = whole(state[name])
        if keep:
            # Linears of one input share a clip, and tensors of a file must not share memory.
            kept[name] = tensor.cpu().clone() if tensor.numel() == 1 else tensor.contiguous().cpu()
    return kept


def save_trained(state: dict[str, Tensor], folder: Path, minutes: float) -> None:
    """Write the trained parameters and the minutes spent."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, {"minutes": f"{minutes:.3f}"})


def mark_whole(checkpoint: Path, world: int) -> None:
    """List the files of a checkpoint of `world` processes; the last file that is written."""
    sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()}
    write_json(checkpoint / WHOLE, {"processes": world, "sizes": sizes})


def write_together(write: Callable[[], None], folder: str, step: int) -> None:
    """Call `write` in all processes; if one of them cannot write, raise TrainingError in all."""
    problem = None
    try:
        write()
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        problem = _write_failure(error)
        if problem is None:
            raise
    problem = agree(problem)
    if problem is not None:
        raise TrainingError(
            f"step {step}: cannot write a checkpoint in {folder!r}: {problem}; "
            "mend that and repeat the command, which resumes from the checkpoint before"
        )


def _write_failure(error: BaseException) -> str | None:
    """Why a file could not be written; None for an error of another kind."""
    if isinstance(error, CheckpointException):  # all processes' errors, each with its stack
        error = next(iter(error.failures.values()))[0]
    message = " ".join(str(error).split())
    if not isinstance(error, RuntimeError):
        return message
    full = any(word in message for word in _FILE_WRITER)
    return f"torch.save could not write, is the disk full? ({message})" if full else None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of an interrupted run, or None."""
    found = [path for path in _checkpoints(folder) if _is_whole(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_partial(folder: Path) -> None:
    """Remove checkpoints that are not whole: Trainer would keep them and remove whole ones instead."""
    for path in _checkpoints(folder):
        if not _is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


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


def check_processes(checkpoint: Path, world: int) -> None:
    """Raise TrainingError for a checkpoint of another number of processes."""
    before = _marker(checkpoint)["processes"]
    if before != world:
        raise TrainingError(
            f"{str(checkpoint)!r} is of a run with WORLD_SIZE={before}, and this one has {world}; start "
            f"{before} process(es) to resume that run, or remove {str(checkpoint.parent)!r} to train from "
            "the beginning"
        )


def check_readable(checkpoint: Path) -> None:
    """Raise TrainingError for a file that Trainer cannot read, or would read wrongly.

    torch.save writes zip files, with a checksum of each part that torch.load does not check.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from None
    for path in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))):
        try:
            with zipfile.ZipFile(path) as archive:
                part = archive.testzip()
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise _damaged(path, error) from None
        if part is not None:
            raise _damaged(path, f"{part} has another checksum")


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Load the trained parameters of a checkpoint.

    Raises:
        TrainingError: the file is damaged, or its parameters are not those of this model.
    """
    try:
        state, names = load_file(checkpoint / WEIGHTS), set(_trained_names(model))
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint / WEIGHTS, error) from None
    strange = sorted(names ^ set(state))
    if strange:
        raise TrainingError(_of_another(checkpoint, f"{strange[0]!r} does not match"))
    try:
        # Each process takes its part of a sharded parameter.
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    except RuntimeError as error:
        raise TrainingError(_of_another(checkpoint, error)) from None


def spent_minutes(checkpoint: Path) -> float:
    """Minutes that the run had spent when it wrote the checkpoint."""
    with safe_open(checkpoint / WEIGHTS, "pt") as file:
        return float((file.metadata() or {}).get("minutes", 0))


def _trained_names(model: nn.Module) -> list[str]:
    linears = fake_quant_linears(model)
    return [f"{name}.{key}" for name, linear in linears.items() for key, _ in linear.named_parameters()]


def _damaged(path: Path, reason: Exception | str) -> TrainingError:
    message = " ".join(str(reason).split())
    return TrainingError(
        f"{path.name} in {str(path.parent)!r} cannot be read ({message}); remove that directory and repeat "
        "the command, which resumes from the checkpoint before"
    )


def _of_another(checkpoint: Path, reason: Exception | str) -> str:
    return (
        f"{str(checkpoint)!r} is of another model or recipe: {reason}; train with those it was written by, "
        "or remove it"
    )
