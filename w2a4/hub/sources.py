"""Where a model comes from: what is on disk is looked at first, before anything is imported or asked for."""

from __future__ import annotations

import difflib
import os
import re
import stat
from pathlib import Path

from ..errors import CheckpointError
from ..format.directories import recover

#: What the hub calls a model: an owner and a name.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

#: Parts of an interrupted download.
_PARTS = ("*.incomplete", "*.part", "*.crdownload", "*.aria2")


def is_gguf(source: str | Path) -> bool:
    """Whether a model is read as GGUF: by the name, unless that is a directory."""
    return str(source).lower().endswith(".gguf") and not os.path.isdir(source)


def check_source(source: str | Path) -> None:
    """Raise CheckpointError unless `source` is a directory, a GGUF file, or the id of a model of the hub.

    Nothing but the disk is looked at. A directory's writer that was killed is finished for.
    """
    text = str(source)
    if os.path.isdir(source):
        recover(source)
        _check_entries(Path(source))
        return
    if is_gguf(source):
        if not os.path.lexists(source):
            raise CheckpointError(f"{text!r} does not exist{_near(text)}; give the path of a .gguf file")
        if not os.path.isfile(source):
            raise CheckpointError(f"{text!r} is no regular file, or a link to nothing; give a .gguf file")
        return
    if os.path.lexists(source):
        raise CheckpointError(
            f"{text!r} is no directory and no .gguf file; give the directory with config.json and the weights"
        )
    # A hub id looks like a relative path: where its first part is a directory here, it is a path.
    if not _HUB_ID.fullmatch(text) or ".." in text or os.path.isdir(text.split("/")[0]):
        raise CheckpointError(
            f"{text!r} does not exist{_near(text)}; give a directory, a .gguf file, or a hub id OWNER/NAME"
        )


def _near(text: str) -> str:
    """Names on disk that were perhaps meant."""
    parent, name = os.path.split(text.rstrip("/"))
    try:
        found = difflib.get_close_matches(name, sorted(os.listdir(parent or "."))[:10_000], n=3, cutoff=0.6)
    except (OSError, ValueError):
        return ""
    return f", but {', '.join(repr(os.path.join(parent, other)) for other in found)} does" if found else ""


def _check_entries(directory: Path) -> None:
    """Nothing that blocks when it is opened, and no part of a download."""
    for name in sorted(os.listdir(directory)):
        path = directory / name
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise CheckpointError(
                f"{str(path)!r} cannot be read ({error.strerror}); copy or download it again, or remove it"
            ) from None
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CheckpointError(f"{str(path)!r} is a FIFO, socket or device, not a file; remove it")
        if any(Path(name).match(pattern) for pattern in _PARTS):
            raise CheckpointError(f"{str(path)!r} is part of a download; finish it, or remove it")
