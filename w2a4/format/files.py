"""How files come to disk: one writer, and the trial of a place before the work.

A file is written to a temporary sibling that is then renamed, so that a kill leaves the old one or the new
one. What a kill leaves besides is removed by the next write to the same path: a temporary is locked as long
as its writer lives. Whatever is no regular file (a device, a FIFO, the terminal) is written to, not replaced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

try:
    import fcntl
except ImportError:  # not a POSIX system: temporaries of killed processes stay
    fcntl = None

#: What all names begin with that are w2a4's own and never a user's.
OWN = ".w2a4-"

#: Seconds that a FIFO may be without a reader.
_PATIENCE = 10.0

#: Longest name of a file, in bytes, on all common file systems; ours stay below, for suffixes.
_NAME_MAX = 255


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write JSON in one step: `path` is either as it was or complete. Infinity and NaN become null."""
    write_atomically(path, json_text(data))


def json_text(data: Mapping[str, Any]) -> str:
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes; see the module for how.

    Names of files that are not UTF-8 reach text as lone surrogates: they become escapes, as JSON has them.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    if _is_stream(path):
        _append(path, data)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_tensors(path: str | Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None):
    """A safetensors file, whole or not at all.

    Args:
        tensors: on any device, contiguous or not; none may share memory.
        metadata: text by key.
    """
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of the file that `path` is or links to, which takes its place at the end."""
    target = Path(os.path.realpath(path))
    remove_abandoned(target)
    temporary = _sibling(target)
    lock = _locked(temporary, os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    try:
        yield temporary
        _take_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def _take_place(temporary: Path, target: Path) -> None:
    """Rename; where only the file itself may be written (it is mounted alone, say), write into it."""
    with contextlib.suppress(FileNotFoundError):
        temporary.chmod(stat.S_IMODE(target.stat().st_mode))
    try:
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV) or not os.access(target, os.W_OK):
            raise
        with temporary.open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def _is_stream(path: str | Path) -> bool:
    """Whether a path is written to as it is: a device, FIFO or socket, or a descriptor by its name."""
    name = os.path.abspath(path)
    if os.path.dirname(name) in ("/dev", "/dev/fd") or name.startswith("/proc/"):
        return os.path.exists(name)
    return os.path.exists(name) and not os.path.isfile(name)


def _append(path: str | Path, data: bytes) -> None:
    """Behind what is there: `--json /dev/stdout` shares its file with what is printed."""
    descriptor = _opened(path)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)


def _opened(path: str | Path) -> int:
    """A FIFO's reader is waited for, but not for ever: there may be none."""
    for _ in range(int(_PATIENCE / 0.05)):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            time.sleep(0.05)
        else:
            os.set_blocking(descriptor, True)
            return descriptor
    raise CheckpointError(
        f"nobody has read the FIFO {str(path)!r} for {_PATIENCE:g} s; start its reader first"
    )


# Temporaries


def _mark(path: Path) -> str:
    """Tells the temporaries of one name from those of others, and is short where the name is long."""
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]


def _sibling(target: Path) -> Path:
    return target.with_name(f"{OWN}{_mark(target)}-{secrets.token_hex(4)}")


def _locked(path: Path, descriptor: int) -> int:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: nothing is called abandoned there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def is_abandoned(path: Path) -> bool:
    """Whether the writer of a temporary is gone; False where there are no locks to tell."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def remove_abandoned(target: Path) -> None:
    """Remove what killed writers of `target` have left beside it."""
    for stale in target.parent.glob(f"{OWN}{_mark(target)}-*"):
        if is_abandoned(stale):
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)


def temporary_directory(parent: Path, name: str) -> tuple[Path, int]:
    """A new directory and the descriptor whose lock keeps others from calling it abandoned."""
    path = parent / f"{OWN}{name}-{secrets.token_hex(4)}"
    path.mkdir()
    return path, _locked(path, os.open(path, os.O_RDONLY))


def sibling_directory(target: Path) -> tuple[Path, int]:
    """The same beside `target`, under a name that `remove_abandoned` knows."""
    return temporary_directory(target.parent, _mark(target))


# Places


def beside(path: str | Path, purpose: str) -> Path:
    """Where the state of unfinished work on `path` is kept: `.NAME.PURPOSE` beside it.

    Inside it, under a name of w2a4's own, where `path` is a mount point (what lies beside it may not
    outlive the container) or its parent cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK | os.X_OK)):
        return path / f"{OWN}{purpose}"
    name = f".{path.name}.{purpose}"
    if len(os.fsencode(name)) > _NAME_MAX - 16:
        name = f"{OWN}{_mark(path)}.{purpose}"
    return path.parent / name


def try_file(path: str | Path) -> None:
    """Raise CheckpointError unless a file can be written there; leaves everything as it was.

    Devices and FIFOs are asked for their permission only: opening one may block, or take its reader away.
    """
    try:
        if _is_stream(path):
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        target = Path(os.path.realpath(path))
        os.lstat(target.parent / ".")
        with contextlib.suppress(FileNotFoundError):
            os.stat(target)  # a name too long, or a link to itself, is told here
        temporary = _sibling(target)
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {str(path)!r}: {error.strerror}; give a file in a directory that can be written"
        ) from None


def read_text(path: str | Path, limit: int = 16 << 20) -> str:
    """Text of a small regular file.

    Raises:
        CheckpointError: a FIFO or device, which could block without end, or more than `limit` bytes.
        OSError, UnicodeDecodeError: as `Path.read_text`.
    """
    path = Path(path)
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise CheckpointError(f"{str(path)!r} is no regular file; give one")
    if about.st_size > limit:
        raise CheckpointError(
            f"{str(path)!r} has {about.st_size} bytes, more than the {limit} that such a file may have; "
            "copy or download it again"
        )
    return path.read_text(encoding="utf-8")
