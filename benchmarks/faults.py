"""What went wrong: where an error was raised, and whether the GPU has faulted.

After an illegal access and the like every later call of the process fails.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

#: Folders of our files.
OURS = ("w2a4", "benchmarks", "tests")

#: Exit code of a process that is left because of it.
FAULT = 3


def device_fault() -> str:
    """What is wrong with the GPU for good, in a line, or nothing. Waits for what runs there."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def frames(error: BaseException, most: int = 6) -> list[str]:
    """Where an error began: the last frames of our files, and the one that raised it with its line.

    A run on a lent machine comes once, so its results must do without the traceback on a terminal.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    stack = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in stack if set(OURS) & set(Path(frame.filename).parts[:-1])]
    chosen = ours[-most:]
    if stack and stack[-1] not in chosen:
        chosen.append(stack[-1])
    places = [f"{_short(frame.filename)}:{frame.lineno} in {frame.name}" for frame in chosen]
    return [*places[:-1], f"{places[-1]}: {chosen[-1].line}"] if places else []


def _short(filename: str) -> str:
    """From the last of our folders on, or the last parts of another project's file."""
    parts = Path(filename).parts
    first = max((n for n, part in enumerate(parts[:-1]) if part in OURS), default=max(len(parts) - 3, 0))
    return "/".join(parts[first:])
