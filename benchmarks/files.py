"""Where things are, and result files that are never half-written. Imports no torch."""

from __future__ import annotations

import datetime
import json
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


def append_line(path: Path, content: Any) -> None:
    """As a line of JSON that is on disk when this returns, whatever becomes of the process then.

    Raises:
        click.ClickException: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None


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
