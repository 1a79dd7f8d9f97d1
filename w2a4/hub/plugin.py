"""transformers knows the quantiser w2a4 once both packages are imported, in either order.

transformers looks up a checkpoint's `quant_method` in two tables of `transformers.quantizers.auto`. `install`
enters w2a4 there, at once if that module is loaded, else as soon as it is. The entries are stand-ins, because
`transformers.modeling_utils` loads that module while half loaded itself, and `hub.transformers` needs it
whole. The classes are imported when a checkpoint is read, and replace their stand-ins.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

METHOD = "w2a4"
AUTO = "transformers.quantizers.auto"


class _Config:
    """Stands for `W2A4Config`."""

    @staticmethod
    def from_dict(*args: Any, **kwargs: Any) -> Any:
        return _loaded().W2A4Config.from_dict(*args, **kwargs)


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """Stands for `W2A4Quantizer`."""
    return _loaded().W2A4Quantizer(*args, **kwargs)


def _loaded() -> ModuleType:
    """`hub.transformers`, which enters the classes themselves."""
    return importlib.import_module("w2a4.hub.transformers")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, as the finders behind it do, and lets it be loaded by a `_Loader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO:
            return None
        for finder in [*sys.meta_path]:
            if isinstance(finder, _Finder):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads a module as another loader does, and enters w2a4 behind it."""

    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # for inspect, which reads source by it
        self._loader.exec_module(module)
        _enter(module)


def _enter(auto: ModuleType) -> None:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _Config)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _quantizer)


def install() -> None:
    """Enter w2a4 into transformers' tables as soon as there are any; harmless when done before."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if AUTO in sys.modules:
        # Another thread may be loading it since before the finder was there; this waits for that.
        _enter(importlib.import_module(AUTO))
