"""How full each CUDA kernel keeps a GPU, at the shapes of published models. Needs nvcc and c++, no GPU.

    python -m benchmarks.gates.residency [--arch 80,90] [--model NAME ...] [--json FILE]

Registers and static shared memory come from the compiled kernels (`benchmarks.gates.sass_gate` keeps them in
build/sass), grids and dynamic shared memory from the launch plans in csrc/cuda, which `residency.cpp` asks.
Of these follow thread blocks and warps that a multiprocessor holds at a time, waves, and how much of its ring
of loads a warp has work for. Exits 1 where a kernel falls below its floor, which is what it has today.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from tabulate import tabulate

from benchmarks.files import ROOT, commit, now, write_json
from benchmarks.gates import sass, sass_gate
from benchmarks.shapes import MODELS, Model, group_size
from w2a4.format.hadamard import hadamard_spec

PROBE, CACHE = ROOT / "benchmarks/gates/residency.cpp", ROOT / "build/residency"


@dataclass(frozen=True)
class Device:
    """A GPU that an architecture stands for. A multiprocessor has 65536 registers, 64 warps, 32 blocks."""

    name: str
    processors: int
    shared: int  # bytes of a multiprocessor
    block_shared: int  # that a block may ask for


DEVICES = {
    80: Device("A100", 108, 164 << 10, 163 << 10),
    90: Device("H100", 132, 228 << 10, 227 << 10),
}


def blocks_resident(device: Device, registers: int, threads: int, shared: int) -> int:
    """Thread blocks that a multiprocessor holds at a time; 0 if a block cannot run at all.

    Registers are given out by 256 a warp, to warps by four; shared memory by 128 bytes, and 1 KB of it is
    taken for each block.
    """
    if shared > device.block_shared:
        return 0
    warps = -(-threads // 32)
    room = 65536 // (-(-max(registers, 1) * 32 // 256) * 256) // 4 * 4  # warps
    each = -(-shared // 128) * 128 + 1024
    return min(room // warps, device.shared // each, 64 // warps, 32)


@dataclass(frozen=True)
class Call:
    """A call of an op: what `residency.cpp` reads, and what people do."""

    line: str
    op: str
    shape: str
    tokens: int
    features: int  # of the shape, that shared memory grows with


def calls(model: Model) -> Iterator[Call]:
    """Those of decoding and of prompts, as far as launch plans tell their sizes apart."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    for out, features in sorted({*model.linears().values(), (q + 2 * kv, model.hidden)}):
        for bits, tokens in ((2, 1), (2, 2), (2, 8), (2, 16), (4, 1), (4, 8)):
            line = f"linear_a4 {bits} {tokens} {out} {features} {group_size(features)}"
            yield Call(line, f"linear_w{bits}a4", f"{out}x{features}", tokens, features)
    for tokens in (1, 8):
        shape = f"{model.vocabulary}x{model.hidden}"
        yield Call(f"linear_w8 {tokens} {model.vocabulary} {model.hidden}", "linear_w8", shape, tokens,
                   model.hidden)  # fmt: skip
    r3, r4 = hadamard_spec(model.head_dim), hadamard_spec(model.intermediate)
    for tokens in (1, 8, 2048):
        for op, before, width, k, block in (
            ("rmsnorm_a4", "rmsnorm", model.hidden, 1, 1),
            ("quantize_a4", "nothing", q, 1, 1),
            ("silu_mul_hadamard_a4", "silu_mul", model.intermediate, r4.k, r4.block_size),
        ):
            yield Call(f"quantize_a4 {before} {tokens} {width} {k} {block}", op, str(width), tokens, width)
        line = f"hadamard {tokens} {model.intermediate} {r4.k} {r4.block_size}"
        yield Call(line, "hadamard", str(model.intermediate), tokens, model.intermediate)
        heads = f"{model.heads} {model.kv_heads} {model.head_dim}"
        shape = heads.replace(" ", "x")
        line = f"rope_append_kv4 {tokens} {heads} {r3.k} {r3.block_size}"
        yield Call(line, "rope_append_kv4", shape, tokens, model.head_dim)
    for length in (128, 4096, 32768):
        line = f"attention_kv4 1 {heads} {length}"
        yield Call(line, "attention_kv4", f"{shape} of {length}", 1, model.head_dim)


@dataclass(frozen=True)
class Launch:
    """What a plan launches; the last three are of a warp with the fewest and with the most work."""

    call: Call
    kernel: str
    blocks: int
    threads: int
    shared: int
    planned: int  # blocks a multiprocessor that the grid was made for, 0 if it was not
    least_stages: int
    most_stages: int
    ring: int


@dataclass(frozen=True)
class Floor:
    """Least blocks a multiprocessor, for kernels whose name has `pattern` in it.

    Attributes:
        sm_80, sm_90: on these.
        features: at shapes of at most so many inputs.
    """

    pattern: str
    sm_80: int
    sm_90: int
    features: float = math.inf


#: The first one that matches holds. Where there is less on sm_80, its shared memory is why.
FLOORS = (
    # Bit-planes of the tokens lie in shared memory, so fewer blocks fit where there are more inputs.
    Floor(r"^gemv_bmma_kernel<1, (true|false)>", 2, 3, features=14336),
    Floor(r"^gemv_bmma_kernel<2, (true|false)>", 2, 2, features=5120),
    Floor(r"^gemv_bmma_kernel", 1, 2),
    # __launch_bounds__ ask for two blocks, for one in groups of 64 or 32.
    Floor(r"^gemv_imma_kernel<[24], 1, [12], (true|false)>", 1, 2),
    Floor(r"^gemv_imma_kernel<[24], [24], 1, false>", 2, 2),
    # For four, and four fit on an H100.
    Floor(r"^attention_kv4_kernel<1, [24], true>", 2, 4),
    Floor(r"^attention_kv4_kernel<2, [24], true>", 2, 2),
    Floor(r"^attention_kv4_kernel<2, [24], false>", 1, 2),
    Floor(r"^merge_kv4_kernel", 2, 2),
    # x of a token, or of four, lies in shared memory.
    Floor(r"^linear_w8_kernel<Float16, 1, true>", 4, 6),
    Floor(r"^linear_w8_kernel<Float16, 4, true>", 2, 3, features=4096),
    Floor(r"^linear_w8_kernel<Float16, 4, true>", 2, 2, features=5120),
    Floor(r"^linear_w8_kernel<Float16, 4, true>", 1, 1),
    Floor(r"^quantize_kernel|^quantize_token_kernel<\w+, [12]>|^hadamard_cluster_kernel<.*, 1>", 2, 2),
    # 16 values a thread and more, and weights of a norm; more columns a warp.
    Floor(r"^quantize_token_kernel|^hadamard_cluster_kernel", 1, 1),
    Floor(r"^rope_append_kv4_kernel", 12, 12),
    # 16 numbers of a head, of cos and of sin in registers, and the next head's on their way.
    Floor(r"^rope_append_kv4_wide_kernel", 4, 5),
    # As many warps as there is work for, up to 16: more blocks where they are small, see `planned`.
    Floor(r"^hadamard_kernel|^hadamard_quantize_kernel", 1, 1),
)


@dataclass(frozen=True)
class Row:
    """A launch on one architecture.

    Attributes:
        resident, warps: blocks and warps that a multiprocessor holds.
        waves: how often all multiprocessors are filled.
        tail: share of the places that have work, over whole waves.
    """

    launch: Launch
    arch: int
    registers: int
    shared: int  # static and dynamic
    resident: int
    warps: int
    waves: float
    tail: float
    floor: int
    breaches: tuple[str, ...]


def examine(launch: Launch, arch: int, resources: sass.Resources) -> Row:
    """What follows of a launch's sizes, held against its floor."""
    device, shared, registers = DEVICES[arch], launch.shared + resources.shared, resources.registers
    resident = blocks_resident(device, registers, launch.threads, shared)
    waves = launch.blocks / max(resident * device.processors, 1)
    floor = floor_of(launch, arch)
    rules = (
        (resident == 0, f"cannot run: {launch.threads} threads, {registers} registers, {shared} bytes"),
        (0 < resident < floor, f"has {resident} blocks a multiprocessor, floor {floor}"),
        (0 < resident < launch.planned,
         f"has {resident} blocks a multiprocessor, and its grid is made for {launch.planned}"),
    )  # fmt: skip
    breaches = tuple(text for broken, text in rules if broken)
    warps, tail = resident * -(-launch.threads // 32), waves / math.ceil(waves or 1)
    return Row(launch, arch, registers, shared, resident, warps, waves, tail, floor, breaches)


def floor_of(launch: Launch, arch: int) -> int:
    """Least blocks a multiprocessor.

    Raises:
        click.ClickException: none is declared, of a kernel that is new here.
    """
    for floor in FLOORS:
        if re.search(floor.pattern, launch.kernel) and launch.call.features <= floor.features:
            return getattr(floor, f"sm_{arch}")
    raise click.ClickException(f"{launch.kernel} has no floor; add what it has today to FLOORS")


def probe() -> Path:
    """`residency.cpp`, compiled; again when a source has changed."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise click.ClickException(f"{compiler} is not on PATH; install a C++17 compiler, or set CXX")
    headers = [path for folder in ("", "cuda", "simt") for path in (ROOT / "csrc" / folder).glob("*.*")]
    digest = hashlib.sha256(compiler.encode())
    for path in sorted({PROBE, *headers}):
        digest.update(path.read_bytes())
    program = CACHE / digest.hexdigest()[:16]
    if not program.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = program.with_suffix(f".{os.getpid()}")
        includes = [f"-isystem{folder}" for folder in sass_gate.include_dirs()]
        sources = [str(PROBE), str(ROOT / "csrc/simt/simt.cpp")]
        run = subprocess.run(
            [compiler, "-std=c++17", "-O0", *includes, *sources, "-o", str(part)],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode:
            raise click.ClickException(f"{compiler} cannot compile {PROBE.name}: {run.stderr.strip()[-400:]}")
        part.rename(program)
    return program


def plan(asked: list[Call], arch: int) -> list[Launch]:
    """What serves each call."""
    device = DEVICES[arch]
    arguments = map(str, (arch, device.processors, device.block_shared))
    text = "\n".join(call.line for call in asked)
    run = subprocess.run([probe(), *arguments], input=text, capture_output=True, text=True)
    if run.returncode:
        raise click.ClickException(f"a launch plan for sm_{arch} refuses a call: {run.stderr.strip()}")
    found = []
    for line in run.stdout.splitlines():
        number, kernel, *rest = line.split("\t")
        found.append(Launch(asked[int(number)], kernel_of(kernel), *map(int, rest)))
    return found


def kernel_of(constant: str) -> str:
    """The short name of the kernel that a std::integral_constant is of."""
    return sass_gate.short(re.sub(r"^.*?&\(?(.*?)\)?>$", r"\1", constant))


def kernel_resources(arch: int) -> dict[str, sass.Resources]:
    """By short name, of every kernel."""
    found = {}
    for source in sorted(sass_gate.SOURCES.glob("*.cu")):
        kernels = sass.parse_ptxas(sass_gate.compile_source(source, arch)[0])
        names = sass_gate.demangle(list(kernels))
        found |= {sass_gate.short(names[name]): kernels[name] for name in kernels}
    return found


def rows(models: Iterable[str], arch: int) -> list[Row]:
    """Every different launch of these models."""
    asked = list(dict.fromkeys(call for name in models for call in calls(MODELS[name])))
    resources = kernel_resources(arch)
    return [examine(launch, arch, resources[launch.kernel]) for launch in plan(asked, arch)]


def launch_table(found: list[Row]) -> str:
    head = ("op", "shape", "tokens", "kernel", "registers", "KB", "blocks/SM", "warps/SM", "grid", "waves",
            "tail", "stages", "ring", "")  # fmt: skip
    lines = []
    for row in found:
        launch, call = row.launch, row.launch.call
        stages = f"{launch.least_stages}-{launch.most_stages}" if launch.ring else ""
        lines.append((
            call.op, call.shape, call.tokens, launch.kernel, row.registers, row.shared / 1024, row.resident,
            row.warps, launch.blocks, row.waves, row.tail, stages, launch.ring or "",
            "BREACH" if row.breaches else "ok",
        ))  # fmt: skip
    return tabulate(lines, head, floatfmt=".2f")


def kernel_table(found: list[Row]) -> str:
    """Each kernel over all of its launches: the least and the most."""
    kernels: dict[tuple[str, int], list[Row]] = {}
    for row in found:
        kernels.setdefault((row.launch.kernel, row.arch), []).append(row)
    lines = []
    for (kernel, arch), own in sorted(kernels.items()):
        resident, floors = [row.resident for row in own], sorted({row.floor for row in own})
        warps, most = [row.warps for row in own], max(row.shared for row in own)
        lines.append((
            kernel, arch, own[0].registers, most / 1024, f"{min(resident)}-{max(resident)}",
            ", ".join(map(str, floors)), min(warps), len(own),
        ))  # fmt: skip
    head = ("kernel", "sm", "registers", "most KB", "blocks/SM", "floors", "least warps/SM", "launches")
    return tabulate(lines, head, floatfmt=".1f", disable_numparse=[4, 5])


def summary(found: list[Row]) -> list[str]:
    """Every breach in a line, with the shapes that it was found at."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in found:
        call = row.launch.call
        for breach in row.breaches:
            place = f"{call.op} {call.shape}, {call.tokens} tokens"
            where.setdefault((row.launch.kernel, f"{breach} (sm_{row.arch})"), []).append(place)
    return [f"{kernel} {breach}: {'; '.join(places)}" for (kernel, breach), places in where.items()]


@click.command(help="\b\n" + __doc__)
@click.option("--arch", "archs", default="80,90", show_default=True, callback=sass_gate.parse_archs)
@click.option("--model", "shown", multiple=True, type=click.Choice(list(MODELS)),
              default=("llama-2-7b", "llama-3-8b"), show_default=True,
              help="Whose launches are listed, on the last architecture; all are checked.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
def main(archs, shown, json_file):
    if unknown := set(archs) - set(DEVICES):
        raise click.ClickException(f"no limits are known of sm_{min(unknown)}; give any of {list(DEVICES)}")
    found = [row for arch in archs for row in rows(MODELS, arch)]
    if json_file is not None:
        meta = {"commit": commit(), "date": now(), "devices": {a: asdict(DEVICES[a]) for a in archs}}
        write_json(json_file, {"meta": meta, "launches": [asdict(row) for row in found]})
    listed = {call for name in shown for call in calls(MODELS[name])}
    device = DEVICES[archs[-1]]
    print(f"{' and '.join(shown)} on {device.name}, sm_{archs[-1]}, {device.processors} multiprocessors")
    print(launch_table([row for row in found if row.launch.call in listed and row.arch == archs[-1]]))
    print(f"\nall models\n{kernel_table(found)}")
    if breaches := summary(found):
        print("\n" + "\n".join(breaches))
        raise click.ClickException(f"{len(breaches)} breaches")


if __name__ == "__main__":
    main()
