"""Builds the extension `w2a4._C`; everything else is in pyproject.toml.

The extension uses LibTorch's stable ABI, so it needs torch's headers but not `import torch`, and
one wheel serves Python >= 3.10 and torch >= 2.11. Environment variables:

    W2A4_BUILD_EXT=0  leave the extension out (everything works, slowly)
    W2A4_TORCH=DIR    site-packages folder of the torch to build against
    MAX_JOBS=N        compile so many files at a time
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from w2a4_build import find_torch, torch_version, wants_extension  # noqa: E402

#: Why there are no CUDA kernels in this build; shown at build time and by `w2a4.ops.build_info()`.
NO_CUDA = "there are no CUDA sources in this version"


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
        version = torch_version(find_torch())
        print(f"w2a4: built w2a4._C (CPU kernels, abi3, torch {version} headers); no CUDA kernels: {NO_CUDA}")

    @staticmethod
    def _compile_in_parallel(compile_all):
        """The compiler's `compile`, one thread a source file."""

        def compile(sources, *args, **kwargs):
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(max(jobs, 1)) as pool:
                objects = pool.map(lambda source: compile_all([source], *args, **kwargs), sources)
                return [name for names in objects for name in names]

        return compile


def extension() -> Extension:
    torch = find_torch()
    if torch is None:
        raise SystemExit(
            "w2a4: no torch to build against; install torch >= 2.11 first, build with isolation "
            "(pip's default), or set W2A4_BUILD_EXT=0 to install without compiled kernels"
        )
    if not (torch / "include/torch/csrc/stable/library.h").is_file():
        raise SystemExit(f"w2a4: torch {torch_version(torch)} in {torch.parent} has no C++ headers")
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.h"))
    link_args = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,-s"]
    return Extension(
        "w2a4._C",
        sources=sources,
        depends=headers,
        include_dirs=["csrc", str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        define_macros=[
            ("Py_LIMITED_API", "0x030A0000"),
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            ("W2A4_NO_CUDA", f'"{NO_CUDA}"'),
        ],
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


if platform.system() == "Windows":
    raise SystemExit("w2a4: Windows is not supported; use Linux, macOS or WSL")
if wants_extension() and "sdist" not in sys.argv and "egg_info" not in sys.argv:
    extensions = [extension()]
elif wants_extension():
    extensions = []
else:
    print("w2a4: W2A4_BUILD_EXT=0, no extension is built; ops run on their slow PyTorch reference")
    extensions = []

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
