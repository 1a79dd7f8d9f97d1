"""Builds the extensions `w2a4._C` (CPU) and `w2a4._cuda`; everything else is in pyproject.toml.

They use LibTorch's stable ABI, so they need torch's headers but not `import torch`, and one wheel
serves Python >= 3.10 and torch >= 2.11. Environment variables:

    W2A4_BUILD_EXT=0   leave the extensions out (everything works, slowly)
    W2A4_BUILD_CUDA=1  build w2a4._cuda even for a torch without CUDA; 0: leave it out
    TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'  what w2a4._cuda is compiled for
    W2A4_TORCH=DIR     site-packages folder of the torch to build against
    MAX_JOBS=N         compile so many files, and architectures of each, at a time
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from w2a4_build import find_torch, torch_version, wants_extension  # noqa: E402
from w2a4_cuda import Nvcc, choose_cuda  # noqa: E402

MACROS = [("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")]


class CudaExtension(Extension):
    """An extension that nvcc compiles and links; it finds the CUDA runtime and links it statically."""

    nvcc: Nvcc


class BuildExtension(build_ext):
    """`build_ext` that compiles in parallel, says what it built, and fails in one line."""

    def build_extensions(self) -> None:
        self.compiler.compile = self._compile_in_parallel(self.compiler.compile)
        try:
            super().build_extensions()
        except BaseError as error:
            raise SystemExit(
                f"w2a4: compiling the CPU kernels failed ({error}); install a C++17 compiler "
                "(g++ >= 9 or clang >= 12), or set W2A4_BUILD_EXT=0 to install without compiled kernels"
            ) from None
        built = [ext.nvcc for ext in self.extensions if isinstance(ext, CudaExtension)]
        cuda = (
            f"w2a4._cuda (nvcc {built[0].version} for {built[0].names()})"
            if built
            else f"no CUDA kernels: {choose_cuda(find_torch())[1]}"
        )
        version = torch_version(find_torch())
        print(f"w2a4: built w2a4._C (CPU kernels, abi3, torch {version} headers); {cuda}")

    def build_extension(self, ext: Extension) -> None:
        if isinstance(ext, CudaExtension):
            self._build_cuda(ext)
        else:
            super().build_extension(ext)

    def _build_cuda(self, ext: CudaExtension) -> None:
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        objects = [folder / (source.replace(os.sep, "_") + ".o") for source in ext.sources]
        compile = [ext.nvcc.path, "-c", "-std=c++17", "-O3", *ext.nvcc.flags(), *ext.extra_compile_args]
        compile += [f"-I{path}" for path in [*ext.include_dirs, *self.compiler.include_dirs]]
        compile += [f"-D{name}={value}" if value else f"-D{name}" for name, value in ext.define_macros]
        jobs = max(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1), 1)
        compile += [f"--threads={jobs}"]  # architectures of one file at a time
        print(f"w2a4: compiling the CUDA kernels for {ext.nvcc.names()} (minutes)", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            commands = [
                [*compile, source, "-o", str(path)] for source, path in zip(ext.sources, objects, strict=True)
            ]
            list(pool.map(self._run, commands))
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{path}" for path in ext.library_dirs] + [f"-l{name}" for name in ext.libraries]
        link = [ext.nvcc.path, "-shared", "-cudart", "static", *ext.extra_link_args]
        self._run([*link, "-o", str(module), *map(str, objects), *libraries])

    @staticmethod
    def _run(command: list[str]) -> None:
        if subprocess.run(command).returncode:
            raise SystemExit(
                f"w2a4: compiling the CUDA kernels failed ({' '.join(command)}); set W2A4_BUILD_CUDA=0 to "
                "install without them"
            )

    @staticmethod
    def _compile_in_parallel(compile_all):
        """The compiler's `compile`, one thread a source file."""

        def compile(sources, *args, **kwargs):
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(max(jobs, 1)) as pool:
                objects = pool.map(lambda source: compile_all([source], *args, **kwargs), sources)
                return [name for names in objects for name in names]

        return compile


def extensions() -> list[Extension]:
    torch = find_torch()
    if torch is None:
        raise SystemExit(
            "w2a4: no torch to build against; install torch >= 2.11 first, build with isolation "
            "(pip's default), or set W2A4_BUILD_EXT=0 to install without compiled kernels"
        )
    if not (torch / "include/torch/csrc/stable/library.h").is_file():
        raise SystemExit(f"w2a4: torch {torch_version(torch)} in {torch.parent} has no C++ headers")
    nvcc, no_cuda = choose_cuda(torch)
    return [cpu_extension(torch, no_cuda)] + ([cuda_extension(torch, nvcc)] if nvcc else [])


def sources(*patterns: str) -> list[str]:
    found = {path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def cpu_extension(torch: Path, no_cuda: str) -> Extension:
    link_args = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,-s"]
    return Extension(
        "w2a4._C",
        sources=sources("*.cpp", "cpu/*.cpp"),
        depends=sources("*.h", "cpu/*.h"),
        include_dirs=["csrc", str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        define_macros=[*MACROS, ("W2A4_NO_CUDA", f'"{no_cuda}"')],
        extra_compile_args=[
            "-std=c++17", "-O3", "-g0", "-fvisibility=hidden",
            # Results are bit-identical to the reference: no fused multiply-add, no reordering.
            # errno and traps are not part of a result, and let loops be vectorised.
            "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
            "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi", "-Wno-unknown-pragmas",
        ],
        extra_link_args=link_args,
        py_limited_api=True,
        language="c++",
    )  # fmt: skip


def cuda_extension(torch: Path, nvcc: Nvcc) -> CudaExtension:
    extension = CudaExtension(
        "w2a4._cuda",
        sources=sources("entry_a4.cpp", "entry_kv4.cpp", "entry_w8.cpp", "cuda/*.cpp", "cuda/*.cu"),
        depends=sources("*.h", "cuda/*.h", "cuda/*.cuh"),
        include_dirs=["csrc", str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu", "dl"],
        define_macros=[
            *MACROS, ("W2A4_CUDA", None), ("USE_CUDA", None),
            ("W2A4_NVCC", f'"{nvcc.version}"'), ("W2A4_ARCHS", f'"{nvcc.names()}"'),
        ],
        extra_compile_args=["-Xcompiler=-fPIC,-fvisibility=hidden,-g0,-Wall", "-diag-suppress=20012"],
        extra_link_args=["-Xlinker=-s"],
        py_limited_api=True,
        language="c++",
    )  # fmt: skip
    extension.nvcc = nvcc
    return extension


if platform.system() == "Windows":
    raise SystemExit("w2a4: Windows is not supported; use Linux, macOS or WSL")
if wants_extension() and "sdist" not in sys.argv and "egg_info" not in sys.argv:
    modules = extensions()
elif wants_extension():
    modules = []
else:
    print("w2a4: W2A4_BUILD_EXT=0, no extension is built; ops run on their slow PyTorch reference")
    modules = []

setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
