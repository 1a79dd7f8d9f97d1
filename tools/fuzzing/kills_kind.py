"""Kind `kills`: SIGKILL at a random moment of `quantize --resume`, the same command again, the same bits.

Kind `disks` (root only): the same on a file system that is full, then again with room.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from . import models
from .outcome import Partial, RandomDraw, Silent

_base = Path()
#: What an uninterrupted run wrote, and how long it took.
_want: dict[str, str] = {}
_seconds = 0.0
SMALL = ("--set", "calib_samples=4", "--set", "calib_seqlen=32", "--recipe", "w2a4kv4")


def prepare(folder: str) -> None:
    global _base, _want, _seconds
    _base = Path(folder)
    models.make(_base)
    whole = _base / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    start = time.monotonic()
    done = _quantize(whole)
    _seconds = time.monotonic() - start
    if done.wait():
        raise RuntimeError(f"an uninterrupted run failed: {done.stderr.read().decode()[-300:]}")
    _seconds = time.monotonic() - start
    _want = _weights(whole)


def _quantize(out: Path, extra: Sequence[str] = ("--resume",)) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "w2a4.cli.main", "quantize", str(_base / "fp"), "--out", str(out)]
    command += ["--calib", str(_base / "text.txt"), *SMALL, *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def _weights(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def _again(out: Path, said: str) -> tuple[str, str]:
    """The same command once more; what lies there is as without an interruption."""
    if out.exists() and any(out.iterdir()):
        if _weights(out) != _want:
            raise Partial(f"{said}: an output that is not whole")
        return "right", f"{said}: whole already"
    again = _quantize(out)
    _, error = again.communicate(timeout=120)
    if again.returncode:
        raise RuntimeError(f"{said}: the same command fails: {error.decode()[-200:]}")
    if _weights(out) != _want:
        raise Silent(f"{said}: other bits than without")
    left = [p.name for p in out.parent.iterdir() if p != out]
    if left:
        raise Partial(f"{said}: {left} is left behind")
    return "right", said


def case(seed: int) -> tuple[str, str]:
    draw = RandomDraw(seed)
    moment = _seconds * draw.number(300, 1050) / 1000
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        process = _quantize(out)
        time.sleep(moment)
        process.kill()
        process.communicate()
        return _again(out, f"killed after {moment:.2f} of {_seconds:.2f} s")


def full_disk(seed: int) -> tuple[str, str]:
    """A tmpfs of random size is the place of the output."""
    size = RandomDraw(seed).number(1, 60) * 4096
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", scratch], check=True)
        try:
            out = Path(scratch) / "out"
            process = _quantize(out)
            _, error = process.communicate(timeout=120)
            lines = error.decode().strip().splitlines() or [""]
            said = f"{size} bytes: {lines[-1]}"
            if process.returncode and (process.returncode != 1 or not lines[-1].startswith("error: ")):
                raise RuntimeError(said)
            subprocess.run(["mount", "-o", "remount,size=100m", scratch], check=True)
            if process.returncode == 0:
                return ("right", said) if _weights(out) == _want else _again(out, said)
            return "refused", _again(out, said)[1]
        finally:
            subprocess.run(["umount", "-l", scratch], check=True)


def can_mount() -> str:
    """Empty, or why no file system can be made here."""
    if os.geteuid() != 0:
        return "kind disks needs root to make small file systems; left out"
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", scratch], capture_output=True
        )
        if done.returncode:
            return f"kind disks needs to mount: {done.stderr.decode().strip()}; left out"
        subprocess.run(["umount", scratch], check=True)
    return ""
