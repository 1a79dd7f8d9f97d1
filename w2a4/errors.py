"""Exceptions a user can act on. The command line prints them without a traceback."""

import reprlib
from typing import Any

#: How values look in messages: no deeper and no longer than this.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40


class W2A4Error(ValueError):
    """A user's mistake or a damaged input: the message quotes the value and says what to do."""


class RotationError(W2A4Error):
    """A model that cannot be rotated, or a rotation that is not one."""


class RecipeError(W2A4Error):
    """An unknown recipe, an unknown key, or a value out of range."""


class CheckpointError(W2A4Error):
    """A checkpoint that is missing, truncated, corrupted or of another format version."""


class ArchitectureError(RotationError, CheckpointError):
    """A model of a family, or with a feature, that is not supported."""


class CalibrationError(W2A4Error):
    """Calibration text that is empty or too short."""


class TrainingError(W2A4Error):
    """A run that blew up, or a checkpoint of another run."""


class BackendError(W2A4Error):
    """W2A4_BACKEND names no back end, or one that can not run a call."""


def shown(value: Any) -> str:
    """A value for a message, cut to a line whatever it holds."""
    return _SHORT.repr(value)
