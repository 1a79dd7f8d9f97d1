"""Several processes at one training: who goes first, and errors that all of them learn of.

`torchrun` or `accelerate launch` starts them and sets WORLD_SIZE and RANK; without, all this does nothing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from ..errors import TrainingError

Result = TypeVar("Result")

#: What accelerate reads; a launcher's own settings win.
_SHARDING = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}

#: Every process prepares a whole model by itself, and FSDP2's parameters stay apart, trained or frozen.
_REQUIRED = {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def join(device: torch.device) -> None:
    """Meet the other processes, if there are any, to shard parameters by FSDP2, on devices of this kind."""
    if world() == 1:
        return
    os.environ.update({**_SHARDING, **{k: os.environ[k] for k in _SHARDING if k in os.environ}, **_REQUIRED})
    PartialState(cpu=device.type == "cpu")
    _patient_group()


def leave() -> None:
    """Part from the others."""
    if world() > 1 and dist.is_initialized():
        _patient_group.cache_clear()
        dist.destroy_process_group()


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    """For waits of hours, while the main process prepares: the other groups give up after minutes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def main_first(work: Callable[[], Result]) -> Result:
    """Do `work` in the main process, then in the others, which find its files.

    Raises:
        Exception: what `work` raises in the main process; `TrainingError` with its message in the others.
    """
    if world() == 1:
        return work()
    done, problem = None, None
    if is_main():
        try:
            done = work()
        except Exception as error:
            problem = error
    told = [None if problem is None else f"{type(problem).__name__}: {problem}"]
    dist.broadcast_object_list(told, 0, _patient_group())
    if problem is not None:
        raise problem
    if told[0] is not None:
        raise TrainingError(told[0])
    if not is_main():
        done = work()
    dist.barrier(_patient_group())
    return done


def agree(problem: str | None) -> str | None:
    """The problem of the first process that has one; all processes must ask."""
    if world() == 1:
        return problem
    told: list[str | None] = [None] * world()
    dist.all_gather_object(told, problem, _patient_group())
    return next((each for each in told if each is not None), None)
