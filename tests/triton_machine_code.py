"""Compiles a Triton kernel for a GPU that need not be there, and reads what came out."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Compiled(NamedTuple):
    """Layouts (TTGIR) and PTX as text; instructions of the SASS; bytes of stack, where spills go."""

    ttgir: str
    ptx: str
    opcodes: list[str]
    stack: int


def compile_kernel(
    kernel, arch: int, types: dict[str, str], constants: dict, warps: int, stages: int, path: Path
) -> Compiled:
    """`kernel` for sm_`arch`, its arguments of these `types`, pointers aligned to 16 bytes."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    path.write_bytes(compiled.asm["cubin"])
    resources, sass = (
        subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True).stdout
        for flag in ("--dump-resource-usage", "--dump-sass")
    )
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z0-9_]+)", sass, re.M)
    stack = int(re.search(r"STACK:(\d+)", resources).group(1))
    return Compiled(compiled.asm["ttgir"], compiled.asm["ptx"], opcodes, stack)
