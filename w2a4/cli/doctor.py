"""`w2a4 doctor`: what this machine has, what was built, which kernels run, whether they are right."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import click
from packaging.requirements import InvalidRequirement, Requirement

from . import options

#: Packages whose versions decide what happens, beside w2a4 itself.
PACKAGES = ("torch", "transformers", "triton", "safetensors", "tokenizers", "accelerate", "numpy")

#: Of the flags that Linux lists for a processor, those that kernels can use, and what others use beside them.
FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8",
         "asimd", "asimddp", "i8mm", "sve")  # fmt: skip


@click.command()
@options.device
@options.json_file
def doctor(device: str | None, json_file: Path | None) -> None:
    """Look over the installation and try every op once; what it prints is what a report of a bug needs.

    Exits 1 if an op gives another result than its reference, or nothing was built.
    """
    from ..ops import devices, selftest

    chosen = devices.pick_device(device)
    found: dict[str, Any] = {"versions": versions(), "machine": machine(), "gpu": gpus(), "built": built()}
    found["environment"] = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("W2A4_", "TRITON_"))}
    found["device"] = str(chosen)
    found["ops"] = {name: each._asdict() for name, each in selftest.run(chosen).items()}
    found["warnings"], found["errors"] = judge(found)
    click.echo(text(found))
    options.write_result(json_file, found)
    if found["errors"]:
        raise SystemExit(1)


def versions() -> dict[str, str]:
    """Of w2a4, Python and `PACKAGES`; empty for one that is not installed."""
    from ..version import VERSION

    found = {"w2a4": VERSION, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def machine() -> dict[str, Any]:
    """The processor, how much of it this process may use, and its memory in GB (10**9 bytes)."""
    import torch

    from ..ops import library

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.platform(),
        "cpu": _proc("cpuinfo", r"(?:model name|Model)\s*:\s*(.+)") or platform.processor() or "unknown",
        "flags": [f for f in FLAGS if f in _proc("cpuinfo", r"(?:flags|Features)\s*:\s*(.+)").split()],
        "instruction_set": getattr(library.cpu_module, "cpu_isa", ""),
        "cores": usable, "threads": torch.get_num_threads(),
        "memory_gb": _gigabytes("MemTotal"), "available_gb": _gigabytes("MemAvailable"),
    }  # fmt: skip


def _proc(name: str, pattern: str) -> str:
    try:
        found = re.search(pattern, Path("/proc", name).read_text())
    except OSError:
        return ""
    return found.group(1).strip() if found else ""


def _gigabytes(field: str) -> float | None:
    kilobytes = _proc("meminfo", rf"{field}:\s*(\d+) kB")
    return round(int(kilobytes) * 1024 / 1e9, 1) if kilobytes else None


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"sm_{about.major}{about.minor}"
        memory = round(about.total_memory / 1e9, 1)
        found.append({"name": about.name, "capability": capability, "memory_gb": memory})
    return found


def built() -> dict[str, str]:
    """What kernels there are of each kind, or why there are none."""
    from ..ops import dispatch, library

    cpu, cuda = library.cpu_module, library.cuda_module
    return {
        "cpu": cpu.build_info if cpu else f"not built; {library.HOW_TO_BUILD}",
        "cuda": cuda.build_info if cuda else f"not loaded: {library.no_cuda}",
        "triton": dispatch.why_no_triton(0 if gpus() else None) or "ready",
    }


def judge(found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What is worth a thought, and what is wrong: a line each, which says what to do."""
    from ..ops import library

    warnings, errors = [], []
    if library.cpu_module is None:
        errors.append(f"nothing was built, so that every op is slow: {library.HOW_TO_BUILD}")
    wrong = [f"{name} ({each['why']})" for name, each in found["ops"].items() if each["right"] is False]
    if wrong:
        errors.append(f"these ops are wrong on {found['device']}, please report it: {', '.join(wrong)}")
    if found["gpu"] and library.cuda_module is None:
        warnings.append(f"there is a GPU, but w2a4's CUDA kernels are not loaded: {library.no_cuda}")
    try:
        needs = [Requirement(each) for each in importlib.metadata.requires("w2a4") or []]
    except (importlib.metadata.PackageNotFoundError, InvalidRequirement):
        needs = []  # a source tree that is not installed
    for need in needs:
        version = found["versions"].get(need.name)
        if version and need.marker is None and not need.specifier.contains(version, prereleases=True):
            warnings.append(f"{need.name} {version} was not tested, install {need.name}{need.specifier}")
    threads, cores = found["machine"]["threads"], found["machine"]["cores"]
    if threads > cores:
        warnings.append(
            f"torch uses {threads} threads on {cores} cores, which wait for each other: set "
            f"OMP_NUM_THREADS={cores}"
        )
    return warnings, errors


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    from tabulate import tabulate

    about, versions = found["machine"], found["versions"]
    flags = " ".join(about["flags"]) or "none that kernels use"
    rows = [
        ("w2a4", f"{versions['w2a4']}, Python {versions['python']}, {about['platform']}"),
        ("packages", ", ".join(f"{name} {versions[name] or 'missing'}" for name in PACKAGES)),
        ("CPU", f"{about['cpu']}; kernels use {about['instruction_set'] or 'nothing'} of: {flags}"),
        ("threads", f"{about['threads']} of torch on {about['cores']} cores"),
        ("memory", f"{about['available_gb']} of {about['memory_gb']} GB available"),
        *[("GPU", f"{gpu['name']}, {gpu['capability']}, {gpu['memory_gb']} GB") for gpu in found["gpu"]],
        *([] if found["gpu"] else [("GPU", "none that torch sees")]),
        *[(f"{kind} kernels", what) for kind, what in found["built"].items()],
        *found["environment"].items(),
    ]
    words = {True: "right", False: "WRONG", None: "not compared"}
    ops = [(name, each["kernel"], words[each["right"]], each["why"]) for name, each in found["ops"].items()]
    compared = sum(each["right"] is not None for each in found["ops"].values())
    verdict = [f"error: {error}" for error in found["errors"]]
    verdict = verdict or [f"All {compared} ops that have a kernel on {found['device']} are right."]
    verdict += [f"warning: {warning}" for warning in found["warnings"]]
    return "\n".join([
        tabulate(rows, tablefmt="plain"), "",
        tabulate(ops, (f"op on {found['device']}", "kernel", "result", "why")), "", *verdict,
    ])  # fmt: skip
