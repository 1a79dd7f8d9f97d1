"""Modules that other people's code may import by the names they had before they were sorted into folders."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

#: Old names below `w2a4` and new ones.
MOVED = {
    "calibrate": "quantization.layer", "config": "recipe", "data": "evaluate.data",
    "dispatch": "ops.dispatch",
    "engine": "runtime.engine", "files": "format.files", "fitting.gptq": "quantization.fit.gptq",
    "fitting.lloyd": "format.lloyd", "fitting.rtn": "format.rtn", "fitting.weight": "format.weight",
    "integrations.attention": "runtime.attention", "integrations.checkpoint": "hub.checkpoint",
    "integrations.fused": "runtime.layer", "integrations.hf": "hub.transformers",
    "integrations.kv_cache": "runtime.kv_cache", "layers": "format.linear",
    "learn_rotation": "quantization.rotation.learn", "packing": "ops.packing", "pipeline": "quantization.job",
    "quantizers": "format.fake_quant", "reference": "ops.reference", "report": "evaluate.report",
    "resume": "quantization.resume", "rotation.fuse": "quantization.rotation.fold",
    "rotation.hadamard": "format.hadamard", "rotation.learn": "quantization.rotation.cayley",
    "rotation.online": "format.online", "smooth": "quantization.smooth", "training.linear": "train.linear",
    "training.losses": "train.losses", "training.prepare": "train.prepare", "training.run": "train.run",
    "training.trainer": "train.trainer",
}  # fmt: skip
_FOLDERS = {old.partition(".")[0] for old in MOVED if "." in old}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = name.partition(".")
        if package == "w2a4" and (old in MOVED or old in _FOLDERS):
            return importlib.machinery.ModuleSpec(name, self, is_package=old in _FOLDERS)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        new = MOVED.get(spec.name.partition(".")[2])
        if new is None:
            return None  # an empty package
        warnings.warn(f"{spec.name} is w2a4.{new} now", DeprecationWarning, stacklevel=2)
        return _Alias(spec.name, f"w2a4.{new}")

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Alias(ModuleType):
    """A module whose attributes, to read and to set, are those of another."""

    def __init__(self, name: str, new: str):
        super().__init__(name)
        self.__dict__["_new"] = importlib.import_module(new)

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["_new"], name)

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("__"):  # the import system's own
            self.__dict__[name] = value
        else:
            setattr(self.__dict__["_new"], name, value)


def install() -> None:
    """Find old names behind everything else."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
