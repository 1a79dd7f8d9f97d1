"""A GPU that has faulted: after an illegal access and the like every later call of the process fails."""

from __future__ import annotations

import torch

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
