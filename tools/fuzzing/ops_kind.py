"""Kind `ops`: a sound and a hostile call of an op, against the reference."""

from __future__ import annotations

from . import op_cases
from .outcome import RandomDraw, Silent


def prepare(folder: str) -> None:
    """Nothing to prepare."""


def case(seed: int) -> tuple[str, str]:
    make = op_cases.hostile if seed % 2 else op_cases.sound
    call = make(RandomDraw(seed))
    try:
        result = op_cases.run(call)
    except AssertionError as error:
        raise Silent(f"{call.name}, {call.hostile or 'sound'}: {error}") from error
    return result.partition(":")[0], f"{call.name}, {call.hostile or 'sound'}: {result}"
