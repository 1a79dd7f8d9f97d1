"""Compiles the CUDA kernel bodies for the CPU (csrc/simt) and loads them as the module `w2a4_simt`."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

from support.paths import ROOT

FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall",
         "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]  # fmt: skip
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
#: Of the kernel bodies only, and not of the linker: csrc/simt/races.cpp answers what they call.
WATCH = ["-fsanitize=thread"]
CAN_WATCH = sys.platform == "linux"  # where the linker says where a module begins


def build(kind: str = "plain") -> Path:
    """Path of the compiled module; compiled again when a source or a flag has changed.

    Args:
        kind: "plain"; "sanitized" by address and undefined behaviour; "races", which finds accesses that no
            barrier orders.
    """
    import pybind11
    import torch

    sources = sorted((ROOT / "csrc/simt").glob("*.cpp"))
    headers = [path for folder in (".", "cuda", "simt") for path in (ROOT / "csrc" / folder).glob("*.*")]
    compiler = os.environ.get("CXX", "c++")
    flags = FLAGS + {"plain": [], "sanitized": SANITIZE, "races": ["-DW2A4_RACES"]}[kind]
    if os.environ.get("W2A4_WERROR") == "1":  # not where others compile, who have other compilers
        flags.append("-Werror")
    torch_include = Path(torch.__file__).parent / "include"
    includes = [sysconfig.get_path("include"), pybind11.get_include(), str(torch_include)]
    command = [compiler, *flags, *(f"-isystem{folder}" for folder in includes)]
    digest = hashlib.sha256(" ".join([kind, *WATCH, *command]).encode())
    for path in sorted(headers):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "simt" / digest.hexdigest()[:16]
    module = folder / ("w2a4_simt" + sysconfig.get_config_var("EXT_SUFFIX"))
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.stem}.{os.getpid()}.o" for source in sources]
    with ThreadPoolExecutor() as pool:
        watch = [WATCH if kind == "races" and s.name.startswith("bind_") else [] for s in sources]
        jobs = [
            [*command, *extra, "-c", str(source), "-o", str(path)]
            for source, path, extra in zip(sources, objects, watch, strict=True)
        ]
        list(pool.map(_run, jobs))
    unfinished = folder / f"{module.name}.{os.getpid()}"
    _run([compiler, *flags, "-shared", "-o", str(unfinished), *map(str, objects)])
    for path in objects:
        path.unlink()
    unfinished.rename(module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@cache
def load(path: Path | None = None) -> ModuleType:
    """The compiled module; from `path` if it was built before."""
    path = Path(path or build())
    # A name for each, or pybind11 takes the one that is loaded already for this one.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.w2a4_simt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":  # prints the path of the module, e.g. for a debugger
    print(build(*sys.argv[1:]))
