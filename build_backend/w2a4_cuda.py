"""What the build needs to know about CUDA: where nvcc is, what it can compile for, and whether to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from w2a4_build import torch_version

#: Architectures that a build without a GPU compiles for, as far as nvcc knows them.
ARCHS = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Nvcc:
    """An nvcc, its version (e.g. `13.0`) and the architectures to compile for (e.g. 90)."""

    path: str
    version: str
    archs: tuple[int, ...]
    ptx: int | None  # newer devices compile this architecture's PTX when they load it

    def flags(self) -> list[str]:
        """The `-gencode` flags."""
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{self.ptx},code=compute_{self.ptx}")
        return flags

    def names(self) -> str:
        """For people, e.g. `sm_80 sm_90 compute_90`."""
        return " ".join([f"sm_{a}" for a in self.archs] + ([f"compute_{self.ptx}"] if self.ptx else []))


def choose_cuda(torch: Path) -> tuple[Nvcc | None, str]:
    """nvcc to build with, or None and the reason why no CUDA kernels are built.

    W2A4_BUILD_CUDA=1 builds them whatever torch is installed, and fails without nvcc; 0 does not.
    """
    wanted = os.environ.get("W2A4_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"w2a4: W2A4_BUILD_CUDA={wanted!r}; give 0 or 1")
    if wanted == "0":
        return None, "W2A4_BUILD_CUDA=0"
    if not wanted and not torch_cuda(torch):
        return None, f"torch {torch_version(torch)} is built without CUDA"
    path = find_nvcc()
    if path is None:
        if wanted:
            raise SystemExit("w2a4: W2A4_BUILD_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME/bin")
        return None, "there is no nvcc on PATH or in CUDA_HOME/bin"
    known = [int(a) for a in re.findall(r"compute_(\d+)", _output([path, "--list-gpu-arch"]))]
    archs, ptx = wanted_archs(known)
    if not archs and not ptx:
        raise SystemExit(f"w2a4: {path} knows none of the architectures asked for; it knows {known}")
    release = re.search(r"release (\d+\.\d+)", _output([path, "--version"]))
    return Nvcc(path, release.group(1) if release else "?", tuple(archs), ptx), ""


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, else the one on PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        candidate = Path(os.environ.get(variable, "")) / "bin" / "nvcc"
        if os.environ.get(variable) and candidate.is_file():
            return str(candidate)
    return shutil.which("nvcc")


def torch_cuda(torch: Path) -> str | None:
    """CUDA version that the torch in this folder was built with, or None."""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)", (torch / "version.py").read_text(), re.M)
    return match.group(1) if match else None


def wanted_archs(known: list[int]) -> tuple[list[int], int | None]:
    """TORCH_CUDA_ARCH_LIST if set, else those of the GPUs here, else ARCHS; as far as nvcc knows them."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked:
        entries = re.findall(r"(\d+)\.(\d+)[a-z]?(\+PTX)?", asked)
        archs = sorted({int(major + minor) for major, minor, _ in entries})
        ptx = [int(major + minor) for major, minor, plus in entries if plus]
        too_old = [a for a in archs if a < ARCHS[0]]
        if not entries or too_old:
            raise SystemExit(
                f"w2a4: TORCH_CUDA_ARCH_LIST={asked!r}; give versions >= 8.0, e.g. '8.0;9.0+PTX'"
            )
        return [a for a in archs if a in known], max(ptx) if ptx else None
    here = _archs_here()
    if here and all(a in known for a in here):
        return here, None
    archs = [a for a in ARCHS if a in known]
    return archs, archs[-1] if archs else None


def _archs_here() -> list[int]:
    if shutil.which("nvidia-smi") is None:
        return []
    listed = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", listed, re.M)})


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
