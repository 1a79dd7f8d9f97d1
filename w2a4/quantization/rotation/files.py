"""Files of rotations: the tensors, their report, and a mark of the model that they were learned on."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import RotationError
from ...format import files

#: How a file ends that torch.save wrote, as SpinQuant does.
PICKLES = (".bin", ".pt", ".pth")

_SPINQUANT = re.compile(r"^model\.layers\.(\d+)\.self_attn\.R2$")

#: Rows of the embedding that `model_mark` reads.
_ROWS = 64


@torch.no_grad()
def model_mark(model: nn.Module) -> str:
    """A digest of signs in the embedding: 16 hexadecimal digits, the same in every dtype of a model."""
    weight = model.get_input_embeddings().weight
    signs = torch.signbit(weight[:: max(1, len(weight) // _ROWS)]).cpu().numpy()
    return hashlib.sha256(np.packbits(signs).tobytes()).hexdigest()[:16]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file, whole or not at all, with JSON as its metadata `w2a4`."""
    files.write_tensors(path, tensors, {"w2a4": json.dumps(metadata)})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """`R1` and `R2.<layer>`: what `write_tensors` wrote, or SpinQuant's R.bin under these names.

    Raises:
        RotationError: not such a file. A pickle with anything but tensors is not opened.
    """
    if path.suffix not in PICKLES:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise RotationError(f"learned={str(path)!r} is not a safetensors file: {error}") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in any way; torch's advice is to trust them
        raise RotationError(
            f"learned={str(path)!r} is not a dict of tensors, as SpinQuant's R.bin is "
            f"({type(error).__name__}); copy or download it again"
        ) from None
    whole = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    )
    if not whole:
        raise RotationError(f"learned={str(path)!r} is not a dict of tensors, as SpinQuant's R.bin is")
    return {_SPINQUANT.sub(r"R2.\1", name): value for name, value in found.items()}


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `write_tensors` wrote; empty for a file of another origin.

    Raises:
        RotationError: not a safetensors file.
    """
    if path.suffix in PICKLES:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("w2a4", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise RotationError(
            f"{str(path)!r} cannot be read ({error}); it is damaged: remove it and learn again"
        ) from None
