"""What a bare machine has, and this package put beside it. Imports no torch.

A folder that `gpu_run pack` made holds the package as a wheel, which is installed into a folder of its own:
the machine stays as it was. Where the wheel does not serve, it is built there from the sources.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.files import ROOT
from benchmarks.gpu.session import Session, Stage, python

MANIFEST = "manifest.json"
#: Seconds that installing a wheel, and building the package, may take.
INSTALL, BUILD = 60, 150
#: Gigabytes of GPU memory that the 16-bit model of the engine's stage and its cache need.
ENGINE_GB = 24
#: What stages need, the module or program it is, and what is lost without it.
MODULES = {"xdist": "pytest-xdist is not installed", "pytest_timeout": "pytest-timeout is not installed"}
PROGRAMS = ("ncu", "compute-sanitizer", "nvcc")


@dataclass(frozen=True)
class GPU:
    """One as nvidia-smi tells it."""

    name: str
    arch: int
    memory_gb: float
    driver: str


@dataclass
class Carried:
    """A folder of `gpu_run pack`.

    Attributes:
        archs: what the wheel's CUDA kernels are compiled for, e.g. 90.
    """

    folder: Path
    wheel: str = ""
    peers: dict[str, list[str]] = field(default_factory=dict)
    archs: list[int] = field(default_factory=list)
    commit: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Carried:
        """
        Raises:
            click.ClickException: the folder is not one of `pack`, or a part of it did not travel.
        """
        try:
            facts: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            names = [facts["wheel"], *(name for group in facts["peers"].values() for name in group)]
        except (OSError, ValueError, KeyError, AttributeError):
            raise click.ClickException(
                f"--carry {folder}: there is no {MANIFEST} of `gpu_run pack` in it; make the folder with it"
            ) from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise click.ClickException(
                f"--carry {folder}: {missing[0]} did not travel; carry the whole folder"
            )
        known = {name: facts[name] for name in ("wheel", "peers", "archs", "commit") if name in facts}
        return cls(folder.resolve(), **known)

    def binary(self, arch: int) -> Path | None:
        """The compiled `mma_rate` for an architecture."""
        path = self.folder / f"mma_rate_sm_{arch}"
        return path if path.is_file() else None


def gpu_here() -> GPU | None:
    """GPU 0; None if nvidia-smi finds none."""
    fields = "name,compute_cap,memory.total,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        name, capability, memory, driver = (part.strip() for part in found.strip().splitlines()[0].split(","))
        return GPU(name, int(capability.replace(".", "")), float(memory) / 1024, driver)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def missing_here(gpu: GPU | None, carried: Carried | None) -> dict[str, str]:
    """What this machine lacks for some stages, and what is said of it, by the name that stages use."""
    lacks = {name: why for name, why in MODULES.items() if importlib.util.find_spec(name) is None}
    lacks |= {name: f"{name} is not on PATH" for name in PROGRAMS if shutil.which(name) is None}
    if gpu is None:
        lacks["gpu"] = "it needs a GPU, and this is a rehearsal without one"
    elif gpu.memory_gb < ENGINE_GB:
        lacks["memory"] = f"the GPU has {gpu.memory_gb:.0f} GB, and a 7B model in 16 bits needs {ENGINE_GB}"
    for name in ("humming", "gemlite"):
        if importlib.util.find_spec(name) is None and not (carried and carried.peers.get(name)):
            lacks[name] = f"{name} is neither installed nor carried"
    if gpu and carried and not carried.binary(gpu.arch) and "nvcc" in lacks:
        lacks["mma_rate"] = f"mma_rate was not carried for sm_{gpu.arch}, and there is no nvcc to compile it"
    return lacks


def environment_of(site: Path | None) -> dict[str, str]:
    """For a Python that finds the package in `site`, if given, and never in the source tree before it."""
    fixed = {
        "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    folders = [str(folder) for folder in (site, ROOT) if folder is not None]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | fixed | {"PYTHONPATH": path}


def new_site() -> Path:
    """An empty folder to install into."""
    return Path(tempfile.mkdtemp(prefix="w2a4-site-"))


def install(session: Session, carried: Carried, gpu: GPU | None) -> Path:
    """Put the carried package and the peers into a folder, and let the session's stages find it there.

    Raises:
        click.ClickException: the package could be neither installed nor built.
    """
    site = new_site()
    session.environment = environment_of(site)
    fits = gpu is None or gpu.arch in carried.archs
    if not fits:
        why = (
            f"the wheel is for {_names(carried.archs)}, this GPU is sm_{gpu.arch}: building from the sources"
        )
        session.note(stage="install", status="left out", why=why)
    if not (fits and pip_install(session, "install", site, [carried.folder / carried.wheel])):
        if not build(session, site):
            raise click.ClickException(
                f"w2a4 can be neither installed from {carried.wheel} nor built here; {session.log} says why"
            )
    session.rebuild = lambda: build(session, site)
    for name, wheels in carried.peers.items():
        if not pip_install(session, f"install {name}", site, [carried.folder / wheel for wheel in wheels]):
            session.missing[name] = f"{name}'s wheel does not install here"
    return site


def build(session: Session, site: Path) -> bool:
    """The package from a copy of the sources, which may be read-only where they are."""
    with tempfile.TemporaryDirectory(prefix="w2a4-build-") as folder:
        return pip_install(session, "build", site, [copy_sources(Path(folder))], seconds=BUILD)


def copy_sources(folder: Path) -> Path:
    """What the package is built of, without outputs of earlier builds, which setuptools would pack too."""
    copied = folder / "w2a4"
    for name in ("csrc", "w2a4", "kernels", "build_backend"):
        shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".py", ".toml", ".md", ".in", ""):
            shutil.copy(path, copied)
    return copied


def pip_install(session: Session, name: str, site: Path, what: list[Path], seconds: int = INSTALL) -> bool:
    """Put wheels, or a source tree, into a folder; whether that went well."""
    command = python(
        "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-build-isolation",
        "--upgrade", "--target", str(site), *map(str, what),
    )  # fmt: skip
    # A build of what is here: the GPU decides the architecture.
    return session.run_command(Stage(name, seconds, command, {"PYTHONPATH": ""}))


def _names(archs: list[int]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs) or "no GPU"
