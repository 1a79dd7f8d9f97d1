"""A rotated model as a plain directory of transformers, for quantisers that know nothing of w2a4."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RotationError
from ..evaluate.data import TextSource
from ..format.directories import atomic_directory, check_out_dir
from ..hub.portable import save_tokenizer, write_config
from ..hub.transformers import check_original
from ..recipe import Recipe
from .job import settled_rotation
from .rotation import fold


@torch.no_grad()
def export_rotated(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    out_dir: str | Path,
    calibration: TextSource | Tensor = "general",
    progress: bool = True,
) -> None:
    """Fold R1 and R2 of a recipe into a model, and write it as it is: nothing but its weights is changed.

    What is written loads without w2a4 and computes what the model does. R3, which a cache is quantised
    behind, is left out.

    Args:
        model: of a family in `arch`, float; rotated in place.
        tokenizer: for calibration text, and written too; None is none where nothing is learned or smoothed.
        recipe: of its fields, `rotation`, `rotation_learning` and `smooth` count.
        out_dir: a new directory.
        calibration: text that `learned` rotations and `smooth` need.

    Raises:
        RotationError: the recipe has an R4, which is computed at run time; or see `rotate`.
        CheckpointError: `out_dir` exists and is not empty.
    """
    check_exportable(recipe)
    check_out_dir(out_dir)
    check_original(model)
    with settled_rotation(model, tokenizer, recipe, calibration, progress) as rotation:
        fold.rotate(model, rotation)
    with atomic_directory(out_dir) as directory:
        model.save_pretrained(directory)
        write_config(directory / "config.json", model.dtype, code=False)
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory)


def check_exportable(recipe: Recipe, named: Iterable[str] = ()) -> None:
    """Raise RotationError if a recipe rotates what other packages would have to, or names what is not heeded.

    Args:
        named: fields that the caller has set.
    """
    heeded = "rotation", "rotation_learning", "smooth", "calib_samples", "calib_seqlen"
    for name in () if recipe.rotation.to_learn else named:  # to learn, all of a recipe counts
        if name.partition(".")[0] not in heeded:
            raise RotationError(
                f"{name}: nothing is quantised here, so this would change nothing; leave it out, or use w2a4 "
                "quantize"
            )
    if recipe.rotation.r4 != "none":
        raise RotationError(
            f"rotation.r4={recipe.rotation.r4!r}: other packages do not turn the input of down_proj at run "
            "time; give rotation.r4=none"
        )
