"""What a run trains on: the text, and the windows that steps take from it.

`generations` makes the text that the teacher writes, `teacher` stores the teacher's probabilities of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import CalibrationError
from ..evaluate import data
from ..recipe import Recipe


class Windows(Dataset):
    """Windows of a token stream. Item i does not depend on what was drawn before, so a run can be resumed.

    Every pass over the text cuts it at another offset and shuffles the pieces.

    Args:
        stream: int64 `[tokens]`.
        seqlen: tokens in a window.
        count: windows in all.
        seed: of the offsets and the order.
        recut: False cuts every pass alike, so that the teacher's probabilities of a piece can be stored.

    Raises:
        CalibrationError: the text is shorter than two windows.
    """

    def __init__(self, stream: Tensor, seqlen: int, count: int, seed: int = 0, recut: bool = True):
        if len(stream) < 2 * seqlen:
            raise CalibrationError(
                f"the training text has {len(stream)} tokens; windows of seqlen={seqlen} need at least "
                f"{2 * seqlen}: give a longer text or a smaller training.seqlen"
            )
        self.stream, self.seqlen, self.count, self.seed, self.recut = stream, seqlen, count, seed, recut
        self.in_pass = len(stream) // seqlen - 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` int64 `[seqlen]`, and `piece`, an int64 scalar: the index in `pieces`."""
        number, within = divmod(index, self.in_pass)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + number)
        offset = int(torch.randint(self.seqlen, (1,), generator=generator)) * self.recut
        piece = torch.randperm(self.in_pass, generator=generator)[within]
        start = offset + int(piece) * self.seqlen
        return {"input_ids": self.stream[start : start + self.seqlen], "piece": piece}

    def pieces(self) -> Tensor:
        """The windows of a pass without `recut`, in the order of the text, int64 `[in_pass, seqlen]`."""
        return self.stream[: self.in_pass * self.seqlen].view(-1, self.seqlen)


def recipe_windows(recipe: Recipe, stream: Tensor) -> Windows:
    """The windows of a run of this recipe on the token stream int64 `[tokens]`."""
    training = recipe.training
    count, recut = training.steps * training.batch_size, training.teacher_top == 0
    return Windows(stream, training.seqlen, count, recipe.rotation.seed, recut)


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Items of `Windows` as a batch, each value stacked along a new first dimension."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def check_text(recipe: Recipe) -> None:
    """Raise CalibrationError if the training text is missing; cheap, for before a model is loaded."""
    if recipe.training.route == "end_to_end" and recipe.training.data != "self":
        data.load_text(recipe.training.data, "calibration")


def fitted_texts(recipe: Recipe, calibration: data.TextSource) -> dict[str, data.TextSource]:
    """The texts that a run reads, by what they are for, each once."""
    texts: dict[str, data.TextSource] = {"calibration": calibration}
    training = recipe.training
    if training.route == "end_to_end" and training.data not in ("self", calibration):
        texts["training"] = training.data
    return texts


def load_text(recipe: Recipe, calibration: data.TextSource) -> str:
    """The training text, or for `training.data: self` the calibration text, which gives the prompts."""
    source = recipe.training.data
    return data.load_text(calibration if source == "self" else source, "calibration")


def describe(recipe: Recipe, calibration: data.TextSource, text: str) -> str:
    """A line for the report on the text that `load_text` returned."""
    source = recipe.training.data
    if source != "self":
        return data.describe_text(source, text)
    return f"the teacher's own, from {data.source_of(calibration)}"
