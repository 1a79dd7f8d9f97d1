"""What the kernels are made of: decoding packed codes, rounding, and their plain forms for the interpreter.

Triton's interpreter (TRITON_INTERPRET=1) knows no inline assembly, so whatever uses it has a plain branch
beside it with the same result. The layouts are those drawn in `w2a4/ops/packing.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


def _assembly(text: str) -> tl.constexpr:
    """In one line: torch.compile pastes the string into code of its own, where a newline would end it."""
    return tl.constexpr(" ".join(text.split()))


# Four bytes at a time, from a word of eight 4-bit codes: those in the low nibbles and those in the high
# ones, each moved to the upper half of its byte, where two's complement makes it 16 times the code.
_NIBBLES = _assembly("""
shl.b32 $0, $2, 4;
and.b32 $0, $0, 0xF0F0F0F0;
and.b32 $1, $2, 0xF0F0F0F0;
""")

# From a word of sixteen 2-bit codes ($4) and four int8 levels ($5): prmt reads four selectors from the low
# half of a word, one a nibble, and the codes 0, 2, 4, ... of a word are nibbles already, as are the codes
# 1, 3, 5, ... after a shift by 2. All four bytes of a pack lie in one row, so $6 to $8 repeat $5.
_LEVELS = _assembly("""{
.reg .b32 even, odd;
and.b32 even, $4, 0x33333333;
shr.u32 odd, $4, 2;
and.b32 odd, odd, 0x33333333;
prmt.b32 $0, $5, 0, even;
shr.u32 even, even, 16;
prmt.b32 $1, $5, 0, even;
prmt.b32 $2, $5, 0, odd;
shr.u32 odd, odd, 16;
prmt.b32 $3, $5, 0, odd;
}""")

# Four bytes at a time, from a word of eight 4-bit codes 0 to 15: those in the low nibbles as four 16-bit
# floats in two words, then those in the high ones. A code in the last bits of 1024 (float16) or 128
# (bfloat16) adds itself to it; taking that off again by an fma is exact.
_CODES = """{
.reg .b32 code, next, one, less;
mov.b32 one, ONE;
mov.b32 less, LESS;
and.b32 code, $4, 0x0F0F0F0F;
shr.u32 next, $4, 4;
and.b32 next, next, 0x0F0F0F0F;
prmt.b32 $0, code, BIASES, 0x5150;
prmt.b32 $1, code, BIASES, 0x5352;
prmt.b32 $2, next, BIASES, 0x5150;
prmt.b32 $3, next, BIASES, 0x5352;
fma.rn.TYPE $0, $0, one, less;
fma.rn.TYPE $1, $1, one, less;
fma.rn.TYPE $2, $2, one, less;
fma.rn.TYPE $3, $3, one, less;
}"""


def _codes_in(type: str, one: str, less: str, biases: str) -> str:
    text = _CODES.replace("TYPE", type).replace("BIASES", biases)
    return text.replace("ONE", one).replace("LESS", less)


_CODES_FLOAT16 = _assembly(_codes_in("f16x2", "0x3C003C00", "0xE400E400", "0x64646464"))
_CODES_BFLOAT16 = _assembly(_codes_in("bf16x2", "0x3F803F80", "0xC300C300", "0x43434343"))


@triton.jit
def unpack_nibbles(codes):
    """uint8 `[r, b]` of signed 4-bit codes -> int8 `[r, b]` twice: 16 times codes 0, 2, ... and 1, 3, ..."""
    if INTERPRET:
        even = (codes << 4).to(tl.int8, bitcast=True)
        odd = (codes & 0xF0).to(tl.int8, bitcast=True)
    else:
        even, odd = tl.inline_asm_elementwise(
            _NIBBLES, "=&r,=r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    return even, odd


@triton.jit
def codes_as_floats(codes, DTYPE: tl.constexpr):
    """uint8 `[r, b]` of codes 0 to 15 -> 16-bit floats `[r, b]` twice: codes 0, 2, ... and 1, 3, ..."""
    if INTERPRET:
        even, odd = (codes & 15).to(tl.float32).to(DTYPE), (codes >> 4).to(tl.float32).to(DTYPE)
    elif DTYPE == tl.float16:
        even, odd = tl.inline_asm_elementwise(
            _CODES_FLOAT16, "=&r,=&r,=&r,=&r,r", [codes], dtype=(tl.float16, tl.float16),
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        even, odd = tl.inline_asm_elementwise(
            _CODES_BFLOAT16, "=&r,=&r,=&r,=&r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=4,
        )  # fmt: skip
    return even, odd


@triton.jit
def look_up_levels(codes, levels):
    """uint8 `[r, b]` of 2-bit codes, int32 `[r]` of four int8 levels -> int8 `[r, 2 b]` twice.

    The levels of the codes 0, 2, ... of a row and of its codes 1, 3, ..., as `unpack_nibbles` splits a row.
    """
    codes, levels = tl.broadcast(codes, levels[:, None])
    if INTERPRET:
        first, second = _level(codes, levels), _level(codes >> 2, levels)
        third, fourth = _level(codes >> 4, levels), _level(codes >> 6, levels)
    else:
        even, odd = tl.inline_asm_elementwise(
            _LEVELS, "=&r,=&r,=&r,=&r,r,r,r,r,r", [codes, levels], dtype=(tl.int16, tl.int16),
            is_pure=True, pack=4,
        )  # fmt: skip
        # An int16 holds the levels of two codes; taking it apart and joining it again costs no instruction.
        first, second = even.to(tl.int8), odd.to(tl.int8)
        third, fourth = (even >> 8).to(tl.int8), (odd >> 8).to(tl.int8)
    shape: tl.constexpr = (codes.shape[0], 2 * codes.shape[1])
    return tl.join(first, third).reshape(shape), tl.join(second, fourth).reshape(shape)


@triton.jit
def _level(codes, levels):
    """The level that the two lowest bits of each code pick."""
    shift = (codes & 3).to(tl.int32) * 8
    return (levels >> shift).to(tl.int8)


@triton.jit
def dot(x, y, total):
    """`total + x @ y` of 16-bit floats, in float32; numpy, which interprets, has no bfloat16."""
    if INTERPRET:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total)
    return tl.dot(x, y, total)


@triton.jit
def mul_rn(x, y):
    """`x * y` in float32, rounded: never fused with an addition, whatever the compiler's options are."""
    if INTERPRET:
        return x * y
    return tl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def fma(sums, scale, acc):
    """`acc + float32(sums) * scale`, sums exact integers and scale of their shape or wider, rounded once."""
    x, scale = tl.broadcast(sums.to(tl.float32), scale)
    if INTERPRET:  # older interpreters round the product too; float64 holds it
        return (x.to(tl.float64) * scale.to(tl.float64) + acc.to(tl.float64)).to(tl.float32)
    return tl.fma(x, scale, acc)


@triton.jit
def load_once(pointers):
    """Load a vector, one element a thread, for use along one side of a matrix.

    The compiler would load it anew in the layout of the matrix, where every thread holds, and addresses,
    dozens of elements. It moves no load across a reduction, even one of a single element.
    """
    return tl.max(tl.load(pointers[:, None]), axis=1)


@triton.jit
def round_even(x):
    """Nearest integer, ties to even, of a float32 with |x| < 2**22: there, adding 1.5 * 2**23 rounds it."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def rows_of_program(ROWS: tl.constexpr):
    """The rows of this program, some of which may lie behind the last."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def chunk_of_rows(row, rows, start, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Offsets of CHUNK elements from `start` on of each row of SIZE, and which of them exist."""
    within = start + tl.arange(0, CHUNK)
    return row[:, None] * SIZE + within[None, :], (row < rows)[:, None] & (within < SIZE)[None, :]


def launch_rows(kernel, x: Tensor, size: int, *arguments, **constants) -> None:
    """Run a kernel over x in rows of `size`, some 4096 elements at a time, but whole rows a program."""
    rows = x.numel() // size
    if rows == 0:
        return
    chunk = min(triton.next_power_of_2(size), 4096)
    together = 4096 // chunk
    with device_of(x):
        kernel[(triton.cdiv(rows, together),)](
            *arguments, rows, **constants, SIZE=size, ROWS=together, CHUNK=chunk
        )


def device_of(x: Tensor) -> AbstractContextManager:
    """Launches go to the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def wrap_triton(kernel):
    """`torch.library.wrap_triton`, which does not take interpreted kernels in every torch."""
    return kernel if INTERPRET.value else torch.library.wrap_triton(kernel)


def triton_op(name: str):
    """`torch.library.triton_op`; under the interpreter an opaque op, since no compiler sees into that.

    The schema that torch infers from the function is the one of the op in `w2a4.ops.table`.
    """
    register = torch.library.custom_op if INTERPRET.value else torch.library.triton_op
    return register(name, mutates_args=())


def row_op(name: str):
    """Register the CUDA kernel of an op that `w2a4.ops.table` defines; interpreted, the CPU's too."""

    def register(function):
        _library.impl(name, function, "CUDA")
        if INTERPRET.value:
            _library.impl(name, function, "CPU", allow_override=True)
        return function

    return register


_library = torch.library.Library("w2a4", "FRAGMENT")
