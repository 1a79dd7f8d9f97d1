"""PEP 517 backend: setuptools' own, plus a requirement on torch only where none is installed.

The extension needs torch's headers. Build isolation hides an installed torch, and asking for it
as a build requirement would download gigabytes of another version. So: look for torch where the
package will run, build against that one, and ask for a torch only if there is none.
"""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that are not wrapped below)

MINIMUM = (2, 11)


def find_torch() -> Path | None:
    """Folder of the torch to build against, or None. Nothing is imported.

    Raises SystemExit if the only one found is too old for the stable ABI, or W2A4_TORCH is wrong.
    """
    override = os.environ.get("W2A4_TORCH")
    folders = [override] if override else [*sys.path, *_target_site_packages()]
    found = [Path(folder) / "torch" for folder in folders]
    found = [torch for torch in found if (torch / "version.py").is_file()]
    if override and not found:
        raise SystemExit(f"w2a4: W2A4_TORCH={override!r} holds no torch; give a site-packages folder")
    if not found:
        return None
    version = torch_version(found[0])
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM:
        raise SystemExit(
            f"w2a4: torch {version} in {found[0].parent} is too old, w2a4 needs torch >= "
            f"{'.'.join(map(str, MINIMUM))}; upgrade it first (pip will not do it for you)"
        )
    return found[0]


def torch_version(torch: Path) -> str:
    """Version of the torch in this folder, e.g. `2.13.0+cpu`."""
    match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (torch / "version.py").read_text())
    return match.group(1) if match else "0.0"


def wants_extension() -> bool:
    """False if the user asked for the pure Python package (slow: the reference kernels)."""
    return os.environ.get("W2A4_BUILD_EXT", "1") != "0"


def _target_site_packages() -> list[str]:
    """Where packages of the target environment lie, though isolation took them off sys.path."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    prefixes = [sys.prefix]
    config = Path(sys.prefix) / "pyvenv.cfg"
    sees_system = sys.prefix == sys.base_prefix or (
        config.is_file() and re.search(r"(?im)^include-system-site-packages\s*=\s*true", config.read_text())
    )
    if sees_system:
        prefixes.append(sys.base_prefix)
    folders += site.getsitepackages(prefixes)
    if sees_system:
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folders))


def _torch_requirement() -> list[str]:
    if not wants_extension() or find_torch() is not None:
        return []
    return [f"torch>={'.'.join(map(str, MINIMUM))}"]


# torch first: a torch that is too old is then the only thing the user reads.


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _torch_requirement() + build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _torch_requirement() + build_meta.get_requires_for_build_editable(config_settings)
