"""Plain PyTorch oracle of every op: short, obviously right, bit-exact where the op is.

`reference.<op>` is what the table has for the op of this name. Kernels are tested against these; nothing
here is meant to be fast.
"""

from __future__ import annotations

from .activations import a4_scale, dequantize_a4, divide, hadamard_by_doublings  # noqa: F401
from .kv import dequantize_kv4  # noqa: F401
from .library import OPS
from .packing import unpack  # noqa: F401

globals().update({name: op.reference for name, op in OPS.items()})
