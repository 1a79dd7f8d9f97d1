"""Directories that are written whole or not at all, and the trial of one before the work.

The new contents are written beside the directory and take its place in one rename. Where that cannot be
(it is a mount point, the working directory, or its parent cannot be written) they are written inside it
under `.w2a4-new-*`, which becomes `.w2a4-commit` when it is whole; from then on the files are moved into
place one by one, and whoever comes next, writer or reader, finishes that if the mover was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError
from .files import OWN, is_abandoned, remove_abandoned, sibling_directory, temporary_directory

#: Whole new contents on their way into the directory that holds them, and the names of all of them.
COMMIT, NAMES = f"{OWN}commit", f"{OWN}names.json"

#: Nobody's files: what an empty file system comes with.
_NOBODYS = ("lost+found",)

#: Files of an older checkpoint that must not stay beside a new one.
_STALE = ("model*.safetensors*", "pytorch_model*.bin*")

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100

#: How often a directory is tried that another process removes meanwhile.
TRIES = 8

#: The umask is read by setting it, which two threads must not do at once.
_UMASK = threading.Lock()

#: Temporary directories of this process: a directory inside of one needs no other.
_staged: set[Path] = set()


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `path` when the block ends without an error.

    Files already in `path` that the block did not write are kept. A kill leaves `path` as it was, or new
    (see `recover` for directories that cannot be replaced), and perhaps a folder `.w2a4-*` that the next
    write removes.

    Raises:
        CheckpointError: `path` is a file.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    path = Path(os.path.realpath(path))
    if path in _staged:
        yield path
        return
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a file; give a directory to save into")
    made = _make(path.parent)
    staging, lock = None, -1
    try:
        recover(path)
        remove_abandoned(path)
        staging, lock = _stage(path)
        _staged.add(staging)
        yield staging
        _commit(staging, path)
        made = []
    finally:
        if staging is not None:
            _staged.discard(staging)
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)
        _unmake(made)


def recover(path: str | Path) -> None:
    """Finish what a killed writer has begun inside a directory, and remove what it has left there.

    Raises:
        CheckpointError: it cannot be finished, on a read-only disk for instance.
    """
    path = Path(path)
    if not path.is_dir():
        return
    try:
        for stale in path.glob(f"{OWN}new-*"):
            if is_abandoned(stale):
                shutil.rmtree(stale, ignore_errors=True)
        if (path / COMMIT).is_dir() and is_abandoned(path / COMMIT):
            _move_in(path)
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} was being written when its writer was killed, and that cannot be finished "
            f"({error.strerror}): make it writable, or write it again"
        ) from None


def is_unfinished(path: str | Path) -> bool:
    """Whether new files are on their way into a directory, so that it holds neither old state nor new."""
    return (Path(path) / COMMIT).is_dir()


def check_out_dir(
    path: str | Path, advice: str = "give another --out, or remove it first", filled: bool = False
) -> None:
    """Raise CheckpointError unless a new checkpoint can be written there; leaves everything as it was.

    It is tried: directories are made and files written in them, then removed again.

    Args:
        filled: it may hold something already.
    """
    shown = repr(str(path))
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"the name {shown} is not UTF-8, which tokenizers cannot write to; give another directory"
        ) from None
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{shown} exists already and is a file; {advice}")
        recover(target)
        if not filled and target.is_dir() and any(not _is_own(entry) for entry in os.listdir(target)):
            raise CheckpointError(
                f"{shown} exists and is not empty; what exists already is not replaced: {advice}"
            )
        _try(target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {shown}: {error.strerror}; give a directory that can be written"
        ) from None


def _is_own(name: str) -> bool:
    return name.startswith(OWN) or name in _NOBODYS


def _try(target: Path) -> None:
    """Write a file where a checkpoint is to go, and remove it.

    Other processes of one run do so at the same time, and each takes away the directories that it made.
    """
    for attempt in range(TRIES):
        try:
            return _try_once(target)
        except FileNotFoundError:
            if attempt == TRIES - 1:
                raise
            time.sleep(random.uniform(0, 0.01 * 2**attempt))


def _try_once(target: Path) -> None:
    made = _make(target)
    try:
        staging, lock = _stage(target)
        try:
            (staging / "model-00001-of-00001.safetensors").write_bytes(b"\0")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)
    finally:
        _unmake(made)


def _make(path: Path) -> list[Path]:
    """Make a directory and its parents; those that were not there before."""
    made: list[Path] = []
    try:
        for parent in (*reversed(path.parents), path):
            if not parent.is_dir():
                parent.mkdir(exist_ok=True)
                made.append(parent)
    except OSError:
        _unmake(made)
        raise
    return made


def _unmake(made: list[Path]) -> None:
    for path in reversed(made):
        with contextlib.suppress(OSError):
            path.rmdir()


def _stage(path: Path) -> tuple[Path, int]:
    """Where the new contents are written, beside `path` if it can be replaced from there, and its lock."""
    inside = path.is_dir() and holds_working_directory(path)
    if not inside:
        try:
            staging, lock = sibling_directory(path)
        except OSError:
            if not path.is_dir():
                raise
        else:
            if not path.is_dir() or _one_mount(path, staging):
                staging.chmod(0o777 & ~_umask())
                return staging, lock
            staging.rmdir()
            os.close(lock)
    return temporary_directory(path, "new")


def holds_working_directory(path: Path) -> bool:
    """Replacing the directory that a shell stands in would leave that shell in one that is gone."""
    try:
        here = Path(os.path.realpath(os.getcwd()))
    except OSError:
        return False
    return path == here or path in here.parents


def _one_mount(path: Path, staging: Path) -> bool:
    """Whether files can be renamed between the two. Device numbers do not tell: a mount may be a bind."""
    probe, lock = temporary_directory(staging, "probe")
    try:
        moved = path / probe.name
        os.rename(probe, moved)
        moved.rmdir()
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return False
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        os.close(lock)
    return True


def _umask() -> int:
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask


def _readable(directory: Path) -> None:
    """Let those read files who may read new ones: safetensors lets nobody but their owner."""
    mode = 0o666 & ~_umask()
    for file in directory.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with contextlib.suppress(OSError):  # a file system that knows no modes, or another owner
                file.chmod(stat.S_IMODE(file.stat().st_mode) | mode)


def _commit(staging: Path, path: Path) -> None:
    _readable(staging)
    if staging.parent != path:
        if not path.is_dir():
            os.replace(staging, path)
            return
        written = set(os.listdir(staging))
        if _keep(path, staging, written) and _exchange(staging, path):
            return
        for name in set(os.listdir(staging)) - written:
            kept = staging / name
            shutil.rmtree(kept) if kept.is_dir() and not kept.is_symlink() else kept.unlink()
        inside = path / f"{OWN}new-{staging.name[len(OWN) :]}"
        os.rename(staging, inside)
        staging = inside
    (staging / NAMES).write_text(json.dumps(sorted(set(os.listdir(staging)) - {NAMES})))
    try:
        os.rename(staging, path / COMMIT)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _move_in(path)


def _keep(path: Path, staging: Path, written: set[str]) -> bool:
    """Link into `staging` what `path` holds besides, and take over owner and mode; False if not possible."""
    stale = {p.name for pattern in _STALE for p in path.glob(pattern)} if "config.json" in written else set()
    try:
        for name in sorted(set(os.listdir(path)) - written - stale):
            source, target = path / name, staging / name
            if source.is_dir() and not source.is_symlink():
                shutil.copytree(source, target, symlinks=True, copy_function=_link)
            else:
                _link(source, target)
        about, mine = path.stat(), staging.stat()
        if (about.st_uid, about.st_gid) != (mine.st_uid, mine.st_gid):
            os.chown(staging, about.st_uid, about.st_gid)
        staging.chmod(stat.S_IMODE(about.st_mode))
    except (OSError, shutil.Error):
        return False
    return True


def _link(source: str | Path, target: str | Path) -> None:
    os.link(source, target, follow_symlinks=False)


def _exchange(staging: Path, path: Path) -> bool:
    """Swap two directories in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE) == 0


def _move_in(path: Path) -> None:
    """Move the files of `COMMIT` over; config.json last: a checkpoint without it does not load.

    Can be begun again wherever it was interrupted.
    """
    commit = path / COMMIT
    try:
        listed = json.loads((commit / NAMES).read_text(encoding="utf-8"))
    except FileNotFoundError:  # killed after all was moved
        listed = []
    left = [name for name in listed if (commit / name).exists()]
    if "config.json" in left:
        (path / "config.json").unlink(missing_ok=True)
        for pattern in _STALE:
            for shard in path.glob(pattern):
                if shard.name not in listed:
                    shard.unlink()
    for name in sorted(left, key=lambda name: name == "config.json"):
        if (commit / name).is_dir():
            shutil.rmtree(path / name, ignore_errors=True)
        os.replace(commit / name, path / name)
    (commit / NAMES).unlink(missing_ok=True)
    commit.rmdir()
