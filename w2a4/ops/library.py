"""Defines the ops of the table, loads the compiled kernels, and runs the reference where there are none."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from . import activations, dispatch, fitting, kv, layer, linear, training  # noqa: F401  (they fill the table)
from .table import OPS

HOW_TO_BUILD = "build it with `pip install .` or `python setup.py build_ext --inplace`"

# Fallback: a device without compiled kernels runs the reference.
_warned: set[str] = set()


def _warn_slow(name: str, device: str) -> None:
    """Once a device, or once an op where the device has kernels for others."""
    has_kernels = device == "cpu" or (device == "cuda" and cuda_module is not None)
    key = f"{device} {name}" if has_kernels else device
    if cpu_module is None or key in _warned:
        return
    _warned.add(key)
    if has_kernels:
        message = f"w2a4.{name} has no {device} kernel: it runs on its slow PyTorch reference"
    elif device == "cuda":
        message = (
            f"w2a4's CUDA kernels are not loaded ({no_cuda}): ops run on their slow PyTorch reference; "
            "to build them, put nvcc on PATH and run W2A4_BUILD_CUDA=1 pip install ."
        )
    else:
        message = f"w2a4 has no kernels for {device!r}: ops run on their slow PyTorch reference there"
    warnings.warn(message, stacklevel=3)


def _fallback(name: str, reference: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        _warn_slow(name, args[0].device.type)
        return reference(*args, **kwargs)

    return run


def _define() -> torch.library.Library:
    """All ops but those that Triton's modules define, with fake and fallback."""
    library = torch.library.Library("w2a4", "DEF")
    for op in OPS.values():
        if not op.is_triton_only:
            library.define(op.name + op.schema)
            library.impl(op.name, _fallback(op.name, op.reference), "CompositeExplicitAutograd")
            torch.library.register_fake(f"w2a4::{op.name}", op.fake, lib=library)
    return library


def _another_version(module: str, what: str) -> ImportError:
    return ImportError(f"w2a4.{module} is of another version: it {what}; {HOW_TO_BUILD}")


def _refuse_own_schemas() -> None:
    """Raise ImportError for a w2a4._C of the time when it defined the ops: loading it would end the process.

    An op defined twice is an exception that nobody can catch, since it is thrown while the library is opened.
    """
    package = __package__.rpartition(".")[0]
    if f"{package}._C" in sys.modules:
        return
    spec = PathFinder.find_spec(f"{package}._C", sys.modules[package].__path__)
    if spec is not None and spec.origin and b"quantize_a4(Tensor x" in Path(spec.origin).read_bytes():
        raise _another_version("_C", "defines the ops itself")


def _check_kernels(module: ModuleType, name: str, kind: str) -> None:
    """Raise ImportError unless a module has registered the kernels that the table says, with its types.

    torch does not compare them: a kernel that takes other arguments than it is given reads beyond its stack.
    """
    wanted = {op.signature for op in OPS.values() if kind in op.kernels}
    there = set(getattr(module, "signatures", "").splitlines())
    if wanted - there:
        raise _another_version(name, f"lacks {', '.join(sorted(wanted - there))}")
    if there - wanted:
        raise _another_version(name, f"has {', '.join(sorted(there - wanted))} besides")


def _load_cpu() -> ModuleType | None:
    """The module that registers the CPU kernels, or None, with a warning."""
    _refuse_own_schemas()
    try:
        from .. import _C
    except ImportError as error:
        warnings.warn(
            f"w2a4._C is missing ({error}): ops run on their slow PyTorch reference; {HOW_TO_BUILD}",
            stacklevel=3,
        )
        return None
    _check_kernels(_C, "_C", "cpu")
    return _C


def _load_cuda() -> tuple[ModuleType | None, str]:
    """The module that registers the CUDA kernels, or None and why it is not there."""
    if cpu_module is None:
        return None, "w2a4._C is missing"
    if torch.version.cuda is None:
        return None, cpu_module.no_cuda or "this torch is built without CUDA"
    try:
        from .. import _cuda
    except ImportError as error:
        return None, cpu_module.no_cuda or str(error)
    _check_kernels(_cuda, "_cuda", "cuda")
    return _cuda, ""


_library = _define()
cpu_module = _load_cpu()
cuda_module, no_cuda = _load_cuda()

#: What the functions of `w2a4.ops` call: `registered.<op>.default(...)`.
registered = torch.ops.w2a4
if dispatch.backend == "reference":
    registered = SimpleNamespace(**{name: SimpleNamespace(default=op.reference) for name, op in OPS.items()})


def build_info() -> str:
    """One line: which kernels were built, with what, and why others were not."""
    if cpu_module is None:
        return f"w2a4._C: not built; {HOW_TO_BUILD}"
    cuda = cuda_module.build_info if cuda_module else f"w2a4._cuda: not loaded ({no_cuda})"
    return f"{cpu_module.build_info}; {cuda}"
