"""A folder with one version of transformers that can stand before an environment's own packages.

    python tools/transformers_overlay.py VERSION FOLDER

VERSION is a number, or `oldest` or `newest` of those that pyproject.toml allows. Prints what PYTHONPATH
needs: a folder below FOLDER, or nothing if the environment's own transformers is that version.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

NAME = "transformers"


def allowed() -> Requirement:
    """The requirement in pyproject.toml, as the installed w2a4 records it."""
    needs = map(Requirement, metadata.requires("w2a4") or [])
    return next(need for need in needs if need.name == NAME)


def served() -> list[Version]:
    """Versions that pip finds and pyproject.toml allows, the oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", NAME]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    listed = next(line.partition(":")[2] for line in lines if line.startswith("Available versions:"))
    found = [Version(text.strip()) for text in listed.split(",")]
    return sorted(version for version in found if version in allowed().specifier)


def pip(folder: Path, *requirements: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--upgrade",
        "--target",
        str(folder),
    ]
    subprocess.run([*command, *requirements], check=True, stdout=sys.stderr)


def unmet(folder: Path) -> list[str]:
    """What packages in the folder need and neither it nor the environment has in a fitting version."""
    path = [str(folder), *sys.path]
    wrong = set()
    for package in metadata.distributions(path=path[:1]):
        for need in map(Requirement, package.requires or []):
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            found = next(iter(metadata.distributions(name=need.name, path=path)), None)
            if found is None or found.version not in need.specifier:
                wrong.add(f"{need.name}{need.specifier}")
    return sorted(wrong)


def overlay(version: str, parent: Path) -> str:
    """See the module."""
    if version in ("oldest", "newest"):
        version = str(served()[0 if version == "oldest" else -1])
    if version == metadata.version(NAME):
        return ""
    folder = parent / f"{NAME}-{version}"
    if not folder.is_dir():
        partial = parent / f".{folder.name}"
        wrong = [f"{NAME}=={version}"]
        while wrong:
            pip(partial, *wrong)
            wrong = unmet(partial)
        partial.rename(folder)
    return str(folder)


if __name__ == "__main__":
    print(overlay(sys.argv[1], Path(sys.argv[2]).resolve()))
