"""The time of a training run: minutes spent, the share of the run that is over, when to save and to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

#: Least and most minutes between two checkpoints of a run that is limited in time: writing takes seconds,
#: and an interruption should cost no more than minutes.
SAVE_MINUTES = 1.0, 10.0


class Budget:
    """Counts the minutes of a run, those of its interrupted parts included.

    Args:
        limit: minutes that the run may take; 0 is no limit.

    Attributes:
        minutes: spent up to the last step, the same in all processes.
        before: minutes that interrupted parts of the run have spent.
        started: `time.monotonic()` seconds from which this part counts.
    """

    def __init__(self, limit: float):
        self.limit, self.minutes, self.before, self.started = limit, 0.0, 0.0, time.monotonic()

    def resume(self, minutes: float) -> None:
        """Continue a run that has spent so many minutes."""
        self.before = self.minutes = minutes

    def clock(self) -> float:
        """Minutes spent up to now, by the clock of this process."""
        return self.before + (time.monotonic() - self.started) / 60

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        begun = time.monotonic()
        yield
        self.started += time.monotonic() - begun

    def share(self, step: int, steps: int) -> float:
        """The share of the run that is over, by steps or by time, whichever ends the run first."""
        return max(step / steps, self.minutes / self.limit if self.limit else 0.0)


class SaveAndStop(TrainerCallback):
    """Saves and stops a run that is limited in time, whose steps may never be counted out.

    Args:
        budget: of the run.
        evaluate: also evaluate the model whenever it is saved.
    """

    def __init__(self, budget: Budget, evaluate: bool):
        self.budget, self.evaluate, self.saved = budget, evaluate, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = self.budget.minutes

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = self.budget.minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        limit, minutes = self.budget.limit, self.budget.minutes
        if limit and minutes >= limit:
            control.should_save = control.should_training_stop = True
        elif limit and minutes - self.saved >= save_interval(limit):
            control.should_save = True
        control.should_evaluate = control.should_save and self.evaluate


def save_interval(limit: float) -> float:
    """Minutes between two checkpoints of a run that is limited to `limit` minutes."""
    least, most = SAVE_MINUTES
    return min(max(limit / 10, least), most)
