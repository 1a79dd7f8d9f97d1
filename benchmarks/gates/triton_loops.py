"""Compiles the Triton kernels' main loops and counts what a step of one takes. Needs triton, no GPU.

    python -m benchmarks.gates.triton_loops [--arch 90] [--json FILE]

A step is a pass of the loop: so many inputs of a GEMM's tile as share their scales, or a tile of keys. Counts
are held tightly to those of `COUNTS` that were taken with the triton that is installed, and loosely where
there are none, since each version schedules otherwise.
`tests/kernels/test_triton_compile.py` checks all of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import triton
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from w2a4.triton_kernels import attention
from w2a4.triton_kernels.gemm import gemm_a4_kernel
from w2a4.triton_kernels.gemm_int8 import PART, STEP, gemm_int8_kernel
from w2a4.triton_kernels.tiles import INT8_TILES, TILES, Tile, fit_k

from benchmarks.files import commit, now, write_json
from benchmarks.gates import residency, sass, sass_gate

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHS = (80, 90, 100)
HEAD_DIMS = (64, 80, 128, 256)

#: Loops may take so many times the instructions, and so many barriers more, with the triton of the counts
#: and with another one.
SLACK, LOOSE = (1.03, 0), (1.5, 6)


class Case(NamedTuple):
    """A kernel as it is launched; what is not named in `types` is a constant."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int


class Compiled(NamedTuple):
    """Layouts (TTGIR) and PTX as text, the machine code, and what a thread and a block take."""

    ttgir: str
    ptx: str
    body: list[sass.Instruction]
    registers: int
    stack: int  # bytes, where spills go
    shared: int  # bytes

    @property
    def opcodes(self) -> set[str]:
        """Without modifiers."""
        return {i.opcode.split(".")[0] for i in self.body}


def compile_case(case: Case, arch: int) -> Compiled:
    """For sm_`arch`, pointers aligned to 16 bytes."""
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, text = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    (body,) = sass.parse_sass(text).values()
    registers, stack = (int(re.search(rf"{name}:(\d+)", resources).group(1)) for name in ("REG", "STACK"))
    ttgir, ptx = compiled.asm["ttgir"], compiled.asm["ptx"]
    return Compiled(ttgir, ptx, body, registers, stack, compiled.metadata.shared)


def gemm_case(bits: int, group: int, tile: Tile, act_group: int = 4096) -> Case:
    """A GEMM on 4096 inputs, with a bias where weights have 2 bits; one token scale, as usual, or more."""
    if tile.int8:
        return int8_case(bits, group, tile, act_group)
    tile = fit_k(tile, group)
    types = dict.fromkeys(["a_ptr", "weight_ptr"], "*u8") | dict.fromkeys(["tokens", "out_features"], "i32")
    types |= dict(a_scale_ptr="*fp32", scale_ptr="*fp16", bias_ptr="*bf16", y_ptr="*bf16")
    types |= dict(levels_ptr="*i32" if bits == 2 else "*fp16")
    constants = dict(BITS=bits, IN=4096, GROUP=group, ACT_GROUP=act_group, HAS_BIAS=bits == 2)
    constants |= dict(BLOCK=min(group, act_group), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k)
    name = f"gemm_w{bits}a4 {tile.m}x{tile.n}"
    return Case(name, gemm_a4_kernel, types, constants, tile.warps, tile.stages)


def int8_case(bits: int, group: int, tile: Tile, act_group: int) -> Case:
    """The GEMM on codes that were decoded before, as `gemm_case`."""
    width = min(tile.m, PART)
    types = dict(a_desc=f"tensordesc<i8[{width}, {STEP}]>", weight_desc=f"tensordesc<i8[{tile.n}, {STEP}]>")
    types |= dict(y_desc=f"tensordesc<bf16[{width}, {tile.n}]>", a_scale_ptr="*fp32", scale_ptr="*fp16")
    types |= dict(bias_ptr="*bf16", tokens="i32", out_features="i32")
    constants = dict(BITS=bits, IN=4096, GROUP=group, ACT_GROUP=act_group, HAS_BIAS=bits == 2)
    constants |= dict(BLOCK_M=tile.m, BLOCK_N=tile.n, STAGES=tile.stages)
    name = f"gemm_int8 {tile.m}x{tile.n}{'' if act_group == 4096 else ' scales'}"
    return Case(name, gemm_int8_kernel, types, constants, tile.warps, tile.stages)


def attention_case(head_dim: int, kind: str, arch: int) -> Case:
    """A prompt's attention: causal on float16, "plain" or with "sinks"; or "mask", sinks and starts."""
    mask = kind == "mask"
    element = "*bf16" if mask else "*fp16"
    types = dict.fromkeys(["q_ptr", "k_ptr", "out_ptr", "k_sink_ptr", "v_sink_ptr"], element)
    types |= dict(v_ptr="*fp16", k_factors_ptr="*fp32", mask_ptr="*u8", starts_ptr="*i64", factor="fp32")
    integers = "first kv_heads tokens length rows sinks sink_tokens".split()
    integers += "q_batch q_head q_token mask_batch mask_head mask_query".split()
    types |= dict.fromkeys(integers, "i32")
    block_m, block_n, stages = attention.tile_of(head_dim, mask, arch)
    constants = dict(DIM=head_dim, WIDE=max(32, triton.next_power_of_2(head_dim)), REPEAT=4)
    constants |= dict(CAUSAL=not mask, HAS_MASK=mask, HAS_SINKS=kind != "plain", HAS_STARTS=mask)
    constants |= dict(BLOCK_M=block_m, BLOCK_N=block_n)
    name = f"attention_kv4_prefill {head_dim}{'' if kind == 'plain' else ' ' + kind}"
    kernel = attention.attention_kv4_prefill_kernel
    return Case(name, kernel, types, constants, attention.WARPS, stages)


#: Of heads and what else they have.
ATTENTION = [(head_dim, kind) for head_dim in HEAD_DIMS for kind in ("plain", "mask")] + [(128, "sinks")]


def decode_case(head_dim: int) -> Case:
    """What writes keys and values for a prompt's attention, for queries of float16."""
    types = dict.fromkeys(["k_codes_ptr", "v_codes_ptr"], "*u8") | {"k_factors_ptr": "*fp32"}
    types |= dict.fromkeys(["k_params_ptr", "v_params_ptr", "k_ptr", "v_ptr"], "*fp16")
    types |= dict.fromkeys("first kv_heads tokens length capacity rows sinks".split(), "i32")
    constants = dict(DIM=head_dim, WIDE=max(32, triton.next_power_of_2(head_dim)), HAS_STARTS=True)
    constants |= dict(KEYS=attention.DECODED_KEYS)
    types |= dict(starts_ptr="*i64", factor="fp32")
    return Case(f"decode_kv4 {head_dim}", attention.decode_kv4_kernel, types, constants, 4, 3)


def cases(arch: int) -> Iterator[Case]:
    """Those that `COUNTS` has for sm_`arch`."""
    yield from (gemm_case(bits, 128, tile) for bits in (2, 4) for tile in TILES)
    if arch == 90:
        yield from (gemm_case(2, 128, tile, scales) for scales in (4096, 128) for tile in INT8_TILES)
    yield from (attention_case(*chosen, arch) for chosen in ATTENTION)


@dataclass
class Loop:
    """A main loop.

    Attributes:
        instructions: of them `barriers` for the block, and `promotion` that move exact sums on to floats.
        mma: tensor-core instructions, by the name without modifiers.
        slow: divisions, calls, FP64, and conversions at a quarter of the rate or less.
        local: accesses of local memory.
        blocks: that a multiprocessor holds.
    """

    case: str
    arch: int
    instructions: int
    barriers: int
    promotion: int
    mma: dict[str, int]
    slow: dict[str, int]
    local: int
    registers: int
    blocks: int


def examine(case: Case, arch: int, compiled: Compiled) -> Loop:
    loop = sass.main_loop(compiled.body, shortest=True)
    counts = Counter(i.opcode.split(".")[0] for i in loop)
    # sm_100 has the registers and the shared memory of sm_90.
    device = residency.DEVICES.get(arch, residency.DEVICES[90])
    blocks = residency.blocks_resident(device, compiled.registers, 32 * case.warps, compiled.shared)
    promotion = sum(counts[name] for name in ("FMUL", "FMUL2", "I2F", "I2FP", "FADD", "FADD2", "FFMA"))
    mma = {name: counts[name] for name in {i.opcode.split(".")[0] for i in loop if i.is_mma}}
    slow = Counter(opcode.split(".")[0] for opcode in sass.slow_instructions(loop))
    return Loop(
        case.name, arch, len(loop), counts["BAR"], promotion if "gemm" in case.name else 0, mma, dict(slow),
        sass.local_accesses(loop), compiled.registers, blocks,
    )  # fmt: skip


#: Instructions and barriers of a step, and blocks a multiprocessor holds, on sm_80, sm_90 and sm_100, by the
#: triton that compiled; None where a kernel is for others.
Counts = dict[str, tuple[tuple[int, int, int] | None, ...]]
COUNTS: dict[str, Counts] = {
    "3.6.0": {
        "gemm_w2a4 16x64": ((136, 2, 7), (139, 2, 8), (141, 2, 8)),
        "gemm_w2a4 32x64": ((194, 2, 5), (192, 2, 5), (180, 2, 5)),
        "gemm_w2a4 64x64": ((335, 2, 4), (215, 4, 4), (329, 2, 4)),
        "gemm_w2a4 64x128": ((440, 2, 2), (325, 4, 2), (408, 2, 2)),
        "gemm_w2a4 128x64": ((465, 2, 2), (310, 4, 2), (439, 2, 2)),
        "gemm_w2a4 128x128": ((593, 2, 1), (284, 4, 1), (571, 2, 1)),
        "gemm_w4a4 16x64": ((126, 2, 8), (129, 2, 8), (124, 2, 8)),
        "gemm_w4a4 32x64": ((172, 2, 5), (174, 2, 5), (165, 2, 5)),
        "gemm_w4a4 64x64": ((282, 2, 3), (202, 4, 4), (277, 2, 3)),
        "gemm_w4a4 64x128": ((417, 2, 2), (312, 4, 2), (387, 2, 2)),
        "gemm_w4a4 128x64": ((417, 2, 2), (304, 4, 2), (391, 2, 2)),
        "gemm_w4a4 128x128": ((491, 2, 1), (270, 4, 1), (464, 2, 1)),
        "gemm_int8 128x64": (None, (235, 4, 3), None),
        "gemm_int8 128x128": (None, (238, 4, 1), None),
        "gemm_int8 256x64": (None, (405, 4, 2), None),
        "gemm_int8 256x128": (None, (404, 4, 1), None),
        "gemm_int8 128x64 scales": (None, (389, 4, 3), None),
        "gemm_int8 128x128 scales": (None, (392, 4, 1), None),
        "gemm_int8 256x64 scales": (None, (692, 7, 2), None),
        "gemm_int8 256x128 scales": (None, (701, 7, 1), None),
        "attention_kv4_prefill 64": ((433, 2, 1), (621, 2, 1), (460, 5, 1)),
        "attention_kv4_prefill 64 mask": ((940, 11, 1), (758, 11, 1), (555, 11, 2)),
        "attention_kv4_prefill 80": ((591, 2, 1), (691, 2, 1), (524, 5, 1)),
        "attention_kv4_prefill 80 mask": ((1451, 18, 1), (1461, 11, 1), (1011, 14, 1)),
        "attention_kv4_prefill 128": ((591, 2, 1), (691, 2, 1), (524, 5, 1)),
        "attention_kv4_prefill 128 mask": ((1441, 18, 1), (1459, 11, 1), (1009, 14, 1)),
        "attention_kv4_prefill 256": ((613, 9, 1), (442, 2, 1), (483, 5, 1)),
        "attention_kv4_prefill 256 mask": ((917, 13, 1), (813, 9, 1), (620, 9, 1)),
        "attention_kv4_prefill 128 sinks": ((592, 2, 1), (691, 2, 1), (525, 5, 1)),
    },
    "3.9.0": {
        "gemm_w2a4 16x64": ((183, 2, 7), (179, 2, 8), (178, 2, 8)),
        "gemm_w2a4 32x64": ((231, 2, 4), (230, 2, 5), (217, 2, 5)),
        "gemm_w2a4 64x64": ((484, 2, 4), (216, 4, 4), (270, 8, 4)),
        "gemm_w2a4 64x128": ((520, 2, 2), (326, 4, 2), (362, 8, 3)),
        "gemm_w2a4 128x64": ((609, 2, 2), (308, 4, 2), (357, 8, 3)),
        "gemm_w2a4 128x128": ((883, 2, 1), (286, 5, 1), (314, 8, 1)),
        "gemm_w4a4 16x64": ((126, 2, 8), (131, 2, 8), (122, 2, 8)),
        "gemm_w4a4 32x64": ((172, 2, 5), (180, 2, 5), (171, 2, 5)),
        "gemm_w4a4 64x64": ((282, 2, 3), (205, 4, 4), (261, 8, 4)),
        "gemm_w4a4 64x128": ((418, 2, 2), (313, 4, 2), (341, 8, 3)),
        "gemm_w4a4 128x64": ((416, 2, 2), (301, 4, 2), (354, 8, 2)),
        "gemm_w4a4 128x128": ((491, 2, 1), (274, 5, 1), (300, 8, 1)),
        "gemm_int8 128x64": (None, (236, 4, 3), None),
        "gemm_int8 128x128": (None, (239, 4, 1), None),
        "gemm_int8 256x64": (None, (405, 6, 2), None),
        "gemm_int8 256x128": (None, (404, 6, 1), None),
        "gemm_int8 128x64 scales": (None, (391, 5, 3), None),
        "gemm_int8 128x128 scales": (None, (392, 6, 1), None),
        "gemm_int8 256x64 scales": (None, (699, 9, 2), None),
        "gemm_int8 256x128 scales": (None, (702, 10, 1), None),
        "attention_kv4_prefill 64": ((419, 2, 1), (641, 3, 1), (400, 6, 1)),
        "attention_kv4_prefill 64 mask": ((875, 11, 1), (675, 12, 1), (464, 12, 2)),
        "attention_kv4_prefill 80": ((576, 2, 1), (717, 3, 1), (459, 6, 1)),
        "attention_kv4_prefill 80 mask": ((1495, 19, 1), (1390, 12, 1), (928, 13, 1)),
        "attention_kv4_prefill 128": ((574, 2, 1), (717, 3, 1), (459, 6, 1)),
        "attention_kv4_prefill 128 mask": ((1483, 19, 1), (1369, 12, 1), (921, 13, 1)),
        "attention_kv4_prefill 256": ((639, 11, 1), (456, 3, 1), (454, 6, 1)),
        "attention_kv4_prefill 256 mask": ((900, 13, 1), (851, 10, 1), (592, 10, 1)),
        "attention_kv4_prefill 128 sinks": ((574, 2, 1), (717, 3, 1), (466, 6, 1)),
    },
}


def breaches(loop: Loop, case: Case, version: str = triton.__version__) -> list[str]:
    """What is worse than in `COUNTS`, or must not be in any loop."""
    tight = version in COUNTS
    factor, more = SLACK if tight else LOOSE
    known = [COUNTS[version]] if tight else list(COUNTS.values())
    counts = [count for own in known if (count := own[case.name][ARCHS.index(loop.arch)]) is not None]
    instructions, barriers = (max(count[n] for count in counts) for n in (0, 1))
    blocks = min(count[2] for count in counts) if tight else 1
    # Of every sum that a thread holds: to a float, and an fma with its scale; or the product of two scales,
    # that with the sum, and an addition.
    sums = case.constants["BLOCK_M"] * case.constants.get("BLOCK_N", 1) // (32 * case.warps)
    one_scale = case.constants.get("ACT_GROUP", 4096) == case.constants.get("IN", 4096)
    conversions = sums if loop.arch < 90 and "gemm" in case.name else 0  # there is no I2FP on sm_80
    slow = {name: n for name, n in loop.slow.items() if name != "I2F" or n > conversions}
    expected = tensor_cores(case, loop.arch)
    rules = (
        (loop.instructions > instructions * factor,
         f"takes {loop.instructions} instructions a step, {instructions} before"),
        (loop.barriers > barriers + more, f"has {loop.barriers} barriers a step, {barriers} before"),
        (loop.blocks < blocks, f"leaves room for {loop.blocks} blocks, {blocks} before"),
        (loop.promotion > (2 if one_scale else 4) * sums and "gemm" in case.name,
         f"takes {loop.promotion} instructions to move {sums} sums on"),
        (not expected & set(loop.mma), f"has none of {sorted(expected)} in the loop"),
        (set(loop.mma) - expected, f"has {sorted(loop.mma)} in the loop, expected {sorted(expected)}"),
        (slow, f"has {', '.join(sorted(slow))} in the loop"),
        (loop.local, f"accesses local memory {loop.local} times in the loop"),
    )  # fmt: skip
    return [text for broken, text in rules if broken]


def tensor_cores(case: Case, arch: int) -> set[str]:
    """What ptxas makes of the dots. Which of two sm_100 gets depends on the version of Triton.

    wgmma and tcgen05 take 64 rows at least, of int8 or 16-bit floats.
    """
    kind = "I" if "gemm" in case.name else "H"
    if arch == 80 or case.constants["BLOCK_M"] < 64:
        return {f"{kind}MMA"}
    return {f"{kind}GMMA"} if arch == 90 else {f"{kind}MMA", f"UTC{kind}MMA"}


def table(found: list[tuple[Loop, list[str]]]) -> str:
    head = ("kernel", "sm", "instructions", "of them promotion", "BAR", "tensor cores", "slow", "registers",
            "blocks/SM", "")  # fmt: skip
    lines = [
        (loop.case, loop.arch, loop.instructions, loop.promotion or "", loop.barriers, _counted(loop.mma),
         _counted(loop.slow), loop.registers, loop.blocks, "BREACH" if wrong else "ok")
        for loop, wrong in found
    ]  # fmt: skip
    return tabulate(lines, head)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))


@click.command(help="\b\n" + __doc__)
@click.option("--arch", "archs", default="90", show_default=True, callback=sass_gate.parse_archs)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
def main(archs, json_file):
    if unknown := set(archs) - set(ARCHS):
        raise click.ClickException(f"no counts are known of sm_{min(unknown)}; give any of {list(ARCHS)}")
    todo = [(case, arch) for arch in archs for case in cases(arch)]
    found = []
    for case, arch in tqdm(todo, unit="kernel", disable=not sys.stderr.isatty()):
        loop = examine(case, arch, compile_case(case, arch))
        found.append((loop, breaches(loop, case)))
    if json_file is not None:
        meta = {"triton": triton.__version__, "commit": commit(), "date": now()}
        write_json(json_file, {"meta": meta, "loops": [asdict(loop) for loop, _ in found]})
    print(f"triton {triton.__version__}, counts of {', '.join(COUNTS)}\n{table(found)}")
    if wrong := [f"{loop.case} on sm_{loop.arch} {text}" for loop, texts in found for text in texts]:
        print("\n" + "\n".join(wrong))
        raise click.ClickException(f"{len(wrong)} breaches")


if __name__ == "__main__":
    main()
