"""A run of Cayley SGD that can be resumed and that stops at the first sign of divergence."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from ...errors import RotationError
from ...recipe import RotationLearning
from .cayley import SCHEDULES, CayleySGD, orthogonality_error
from .files import read_metadata, write_tensors
from .fold import ORTHOGONAL_TOLERANCE

#: Loss of a step (counted from 0) at given rotations.
Objective = Callable[[int, dict[str, Tensor]], Tensor]

#: Steps between two writes of the state that a later run resumes from.
SAVE_EVERY = 5

#: A loss this many times the first one (or 1, if 1 is more) has exploded.
EXPLODED = 10.0


class Descent:
    """Minimises an objective over rotations.

    Args:
        rotations: orthogonal `[n, n]` parameters by name, changed in place.
        options: steps, learning rate, schedule, momentum and limit of the gradient.
        out: `<out>.last-good.safetensors` gets the last good rotations if the run diverges.
        partial: file for the state, or None to keep none.
        key: identifies model, recipe and calibration text; a state with another key is refused.

    Attributes:
        losses: one a finished step, before its move.
        drift: one a finished step, max |RᵀR - I| of the worst matrix after its move.
        seconds: of all finished steps, those of interrupted runs included.
    """

    def __init__(
        self,
        rotations: dict[str, nn.Parameter],
        options: RotationLearning,
        out: Path,
        partial: Path | None,
        key: str,
    ):
        self.rotations, self.options, self.out, self.partial, self.key = rotations, options, out, partial, key
        self.optimizer = CayleySGD(rotations.values(), options.lr, options.momentum)
        self.losses: list[float] = []
        self.drift: list[float] = []
        self.seconds = 0.0
        self._good: tuple[int, dict[str, Tensor]] | None = None

    def run(self, objective: Objective, bar: tqdm | None = None) -> None:
        """Do all steps that are left.

        Raises:
            RotationError: the loss is not finite or explodes, or a gradient or a rotation is not finite;
                the message names it, and the file of the last good rotations.
        """
        while len(self.losses) < self.options.steps:
            started = time.perf_counter()
            self._step(objective)
            self.seconds += time.perf_counter() - started
            if len(self.losses) % SAVE_EVERY == 0:
                self._store()
            if bar is not None:
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}", orthogonality=f"{self.drift[-1]:.1e}")
                bar.update()

    def _step(self, objective: Objective) -> None:
        step = len(self.losses)
        loss = objective(step, self.rotations)
        value = loss.item()
        limit = EXPLODED * max(1.0, self.losses[0]) if self.losses else float("inf")
        if not value < limit:
            name, error = self._worst()
            self._stop(step, f"the loss is {value:.4g}; least orthogonal is {name} with {error:.1e}")
        loss.backward()
        self._good = step, {name: r.detach().clone() for name, r in self.rotations.items()}
        for name, r in self.rotations.items():
            if not r.grad.isfinite().all():
                self._stop(step, f"the gradient of {name} is not finite")
        nn.utils.clip_grad_norm_(self.rotations.values(), self.options.max_grad_norm)
        share = SCHEDULES[self.options.schedule](step / self.options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = share * self.options.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        name, error = self._worst()
        if not error <= ORTHOGONAL_TOLERANCE:
            self._stop(step, f"{name} is not orthogonal any more: max |RᵀR - I| = {error:.1e}")
        self.losses.append(value)
        self.drift.append(error)

    def _worst(self) -> tuple[str, float]:
        errors = {name: orthogonality_error(r) for name, r in self.rotations.items()}
        return max(errors.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])

    def _stop(self, step: int, reason: str) -> NoReturn:
        kept = "there are no earlier rotations to keep"
        if self._good is not None:
            path = self.out.with_suffix(".last-good.safetensors")
            write_tensors(path, self._good[1], {"step": self._good[0]})
            kept = f"those before step {self._good[0]} are in {str(path)!r}"
        raise RotationError(
            f"learning rotations failed at step {step}: {reason}; {kept}. Give a smaller "
            f"rotation_learning.lr than {self.options.lr:g}, or another rotation.seed"
        )

    def restore(self) -> int:
        """Load the state that an interrupted run wrote; returns the number of steps it had finished.

        Raises:
            RotationError: the state is of other rotations, or damaged.
        """
        if self.partial is None or not self.partial.exists():
            return 0
        state = read_metadata(self.partial)
        if state.get("key") != self.key:
            raise RotationError(
                f"{str(self.partial)!r} holds the state of learning other rotations (another model, recipe "
                "or calibration); remove it, or repeat the command that wrote it"
            )
        tensors = load_file(self.partial)
        with torch.no_grad():
            for name, r in self.rotations.items():
                r.copy_(tensors[name])
                self.optimizer.state[r]["momentum"] = tensors[f"momentum.{name}"].to(r.device)
        self.losses, self.drift, self.seconds = state["losses"], state["drift"], state["seconds"]
        return len(self.losses)

    def _store(self) -> None:
        if self.partial is None:
            return
        momenta = {
            f"momentum.{name}": self.optimizer.state[r]["momentum"] for name, r in self.rotations.items()
        }
        state = {"key": self.key, "losses": self.losses, "drift": self.drift, "seconds": self.seconds}
        write_tensors(self.partial, {**self.rotations, **momenta}, state)
