"""Training in several processes: which one goes first, errors that reach all, and sharding by FSDP2.

`torchrun` or `accelerate launch` starts the processes and sets WORLD_SIZE and RANK. In a single process
`join`, `leave`, `main_first` and `agree` do nothing of this.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ..errors import TrainingError
from ..format.linear import W8Embedding
from .linear import fake_quant_linears

Result = TypeVar("Result")

#: What accelerate reads; settings that the launcher made stay.
_SHARDING = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}

#: Every process prepares a whole model. FSDP 2 shards each parameter by itself, so that trained and frozen
#: ones may stand in one module.
_REQUIRED = {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def join(device: torch.device) -> None:
    """Connect to the other processes and ask accelerate for FSDP2.

    Args:
        device: one of the kind to train on.
    """
    if world() == 1:
        return
    os.environ.update({**_SHARDING, **{k: os.environ[k] for k in _SHARDING if k in os.environ}, **_REQUIRED})
    PartialState(cpu=device.type == "cpu")
    _patient_group()


def leave() -> None:
    """Disconnect from the other processes."""
    if world() > 1 and dist.is_initialized():
        _patient_group.cache_clear()
        dist.destroy_process_group()


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    """Waits hours while the main process prepares; other groups give up after minutes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def main_first(function: Callable[[], Result]) -> Result:
    """Call `function` in the main process, then in the others, which find the files that it wrote.

    Raises:
        Exception: in the main process, what `function` raises there.
        TrainingError: in the other processes, with the message of that exception.
    """
    if world() == 1:
        return function()
    result, problem = None, None
    if is_main():
        try:
            result = function()
        except Exception as error:
            problem = error
    message = [None if problem is None else f"{type(problem).__name__}: {problem}"]
    dist.broadcast_object_list(message, 0, _patient_group())
    if problem is not None:
        raise problem
    if message[0] is not None:
        raise TrainingError(message[0])
    if not is_main():
        result = function()
    dist.barrier(_patient_group())
    return result


def agree(problem: str | None) -> str | None:
    """The problem of the first process that has one; all processes must call this."""
    if world() == 1:
        return problem
    problems: list[str | None] = [None] * world()
    dist.all_gather_object(problems, problem, _patient_group())
    return next((each for each in problems if each is not None), None)


def set_up_fsdp(state: Any) -> bool:
    """Adapt accelerate's settings for FSDP; whether parameters will be sharded.

    Args:
        state: `AcceleratorState`.
    """
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if wanted and state.distributed_type == DistributedType.MULTI_CPU:
        # accelerate leaves FSDP to accelerators; PyTorch has FSDP on CPUs, over gloo.
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return False
    # Parameters are gathered unrounded: codes and levels are computed from them. Autocast does the rest.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return True


def exclude_packed(accelerator: Accelerator, model: nn.Module) -> None:
    """Keep the packed embedding out of FSDP.

    It is small and not trained; FSDP of torch 2.11 would treat its integers as floating parameters.
    """
    packed = [module for module in model.modules() if isinstance(module, W8Embedding)]
    accelerator.state.fsdp_plugin.ignored_modules = packed


def copy_to_shard(model: nn.Module) -> nn.Module:
    """A copy of a prepared model for FSDP2, which changes modules for good.

    `model` keeps all but the trained values, which are on the meta device until they are loaded again.
    Trained parameters of the copy are float32: those that are sharded together must have one dtype.
    """
    linears = fake_quant_linears(model)
    trained = [p for linear in linears.values() for p in linear.parameters()]
    copied = {id(p): nn.Parameter(p.detach().float(), p.requires_grad) for p in trained}
    sharded = copy.deepcopy(model, copied)
    for linear in linears.values():
        for name, p in list(linear.named_parameters()):
            setattr(linear, name, nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))
    return sharded


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that other processes hold; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_optimizer(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, model: nn.Module, folder: str
) -> None:
    """Write a sharded optimiser without the weights, which Trainer would write a second time."""
    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)
