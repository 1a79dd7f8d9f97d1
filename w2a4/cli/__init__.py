"""The command `w2a4`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def run() -> None:
    """The command; Ctrl-C is one line also while its modules are imported."""
    # Tensors on the CPU in huge pages where the system has them; torch reads it when it starts. Fresh memory
    # of 100 MB, such as logits need at every step, then costs 0.03 s instead of 0.11 (Linux 6.18, AMD EPYC).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from .main import main

        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, but the end at once where a module is being imported.

    Libraries lose the exception there, take it for another one, or abort. A directory that is being written
    survives this as it survives a kill.
    """
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"interrupted\n")
            os._exit(130)
        caller = caller.f_back
    signal.default_int_handler(number, frame)
