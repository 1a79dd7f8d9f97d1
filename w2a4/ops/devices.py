"""Where a model computes: the device a user names, the current one, and the most memory it has held."""

from __future__ import annotations

import os
import platform
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from ..errors import W2A4Error


def pick_device(name: str | None = None) -> torch.device:
    """A device by its name: `cpu`, `cuda` or `cuda:N`; None is a GPU if there is one, else the CPU.

    Of the processes that a launcher starts, each has its own GPU (LOCAL_RANK).

    Raises:
        W2A4Error: no such device here.
    """
    own = int(os.environ.get("LOCAL_RANK", 0))
    if name is None:
        return torch.device("cuda", own) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise W2A4Error(f"device {name!r}: give cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    index, count = own if device.index is None else device.index, torch.cuda.device_count()
    if index >= count:
        raise W2A4Error(f"device {name!r}: torch {torch.__version__} sees {count} GPUs here; give another")
    return torch.device("cuda", index)


def current(device: torch.device) -> AbstractContextManager:
    """Makes a CUDA device the current one: its streams are then those that torch means."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def peak_memory_mb(device: torch.device | None = None) -> float:
    """The most memory held so far, in MB (10**6 bytes): on a GPU by torch, elsewhere by this process.

    On Linux this is VmHWM, which starts afresh with the program; `ru_maxrss`, the fallback, keeps the
    peak of the process that started it.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024 / 1e6
    except (OSError, AttributeError):
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
