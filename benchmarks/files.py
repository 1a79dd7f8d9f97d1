"""Where things are, and result files that are never half-written. Imports no torch."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent


def write_json(path: Path, content: Any) -> None:
    """As JSON, in one step: a reader sees the old file or the new one.

    Raises:
        click.ClickException: the file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Add an object to a file of JSON lines; it is on the disk when this returns, whatever comes then.

    A line that another process was killed in the middle of is closed first.

    Raises:
        click.ClickException: the file cannot be written.
    """
    try:
        with open(path, "ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            whole = end == 0 or os.pread(file.fileno(), 1, end - 1) == b"\n"
            file.write((b"" if whole else b"\n") + json.dumps(_finite(entry)).encode() + b"\n")
            os.fsync(file.fileno())
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None


def read_lines(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Whole lines from byte `start` on, and where the next one begins; a line that is cut off is left out."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read()
    except FileNotFoundError:
        return [], start
    text = text[: text.rfind(b"\n") + 1]
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)], start + len(text)


def _finite(value: Any) -> Any:
    """What JSON holds: no infinity, no NaN, names of paths."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def commit() -> str | None:
    """Of the working tree, with `-dirty` if it has changes; None outside of git."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def now() -> str:
    """UTC, e.g. 2025-01-31T12:00:00+00:00."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
