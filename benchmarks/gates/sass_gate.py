"""Compiles every CUDA kernel and checks its machine code. Needs nvcc and cuobjdump, no GPU.

    python -m benchmarks.gates.sass_gate [--arch 80,90,100] [--json FILE]

Prints a table and exits 1 on a breach. Results are kept in build/sass by a hash of sources and flags.
The tools are looked for on PATH, in CUDA_HOME/bin, and in an installed triton, which brings cuobjdump.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.files import ROOT, commit, now, write_json
from benchmarks.gates import sass

SOURCES = ROOT / "csrc/cuda"
CACHE = ROOT / "build/sass"
#: As in setup.py.
FLAGS = ("-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas", "-v")


@dataclass(frozen=True)
class Gate:
    """Limits on the kernels whose demangled name has `pattern` in it.

    Attributes:
        mma: tensor-core instruction that the main loop must have, on the architectures `archs`.
        registers: most a lane may use.
        warps: least that a multiprocessor must have room for.
        in_flight: least 16-byte loads under way before the first is needed.
        whole: these loads stand before the main loop, and are counted in the whole kernel.
        side_loads: most loads below 16 bytes in the main loop: levels and scales.
        weights: that a warp consumes with one `mma`.
        limit: most instructions a weight in the main loop.
    """

    pattern: str
    mma: str | None = None
    archs: range = range(80, 130)
    registers: int = 255
    warps: int = 8
    in_flight: int = 0
    whole: bool = False
    side_loads: int = 0
    weights: float | None = None
    limit: float | None = None


#: The first one that matches holds. gemv_bmma: 16 rows by 256 inputs take three m16n8k256 a token, and
#: sm_100 has no such instruction. gemv_imma: 16 rows by 32 inputs take one m16n8k32 for eight tokens.
GATES = (
    # One token: 56 instructions a step of 16 rows x 256 inputs are the products and sums, 16 of them to
    # take 2-bit codes apart, since weights are read as the checkpoint stores them; the rest is loads,
    # scales and the loop, and some 40 that start a tile, which happens once in a tile's stages. An H200 at
    # full bandwidth leaves 1.74 instructions a weight.
    *(
        Gate(rf"\bgemv_bmma_kernel<{tokens}, (true|false)>", mma="BMMA.168256", archs=range(80, 100),
             registers=128, warps=16, in_flight=4, side_loads=4, weights=16 * 256 / 3 / tokens, limit=limit)
        for tokens, limit in ((1, 1.05), (2, 1.25))
    ),
    *(
        Gate(rf"\bgemv_imma_kernel<{bits}, 1, {halves}, (true|false)>", mma="IMMA.16832", registers=128,
             warps=16, in_flight=4, side_loads=12, weights=16 * 32, limit=limit)
        for bits, halves, limit in ((2, 1, 2.6), (2, 2, 2.6), (4, 2, 3.0))
    ),
    # Groups of 64 and 32 inputs: an IMMA a group, more scales, and one block a multiprocessor.
    *(
        Gate(rf"\bgemv_imma_kernel<[24], {groups}, 1, false>", mma="IMMA.16832", in_flight=4, side_loads=32,
             weights=16 * 32 / groups)
        for groups in (2, 4)
    ),
    # Decode on the 4-bit cache. The loop is the one over values: a 32 x 32 piece takes four m16n8k32 for
    # every four query rows. At full bandwidth an H200 leaves 3.5 instructions a code, which keys and values
    # share. A block copies a chunk at once, so what hides the latency is room for four blocks, 32
    # warps, and 128 KB of copies under way.
    Gate(r"\battention_kv4_kernel<1, 4, true>", mma="IMMA.16832", registers=64, warps=32, in_flight=4,
         whole=True, weights=16 * 32 / 2, limit=1.0),
    # Heads of up to 64 elements take two steps of that loop, which is none then.
    Gate(r"\battention_kv4_kernel<1, 2, true>", registers=64, warps=32),
    Gate(r"\battention_kv4_kernel<2, 2, true>", registers=128, warps=16),
    # Heads of up to 256 elements, and up to 8 query rows.
    Gate(r"\battention_kv4_kernel<\d, \d, true>", mma="IMMA.16832", registers=128, warps=16, in_flight=4,
         whole=True),
    # The same of paged caches, whose copies look up blocks.
    Gate(r"\battention_kv4_paged_kernel<1, [24], true>", registers=64, warps=32),
    Gate(r"\battention_kv4_paged_kernel", registers=128, warps=16),
    # lm_head: 32 warps with 1 KB of loads each are what an H200 needs under way.
    Gate(r"\blinear_w8_kernel<.*, true>", registers=64, warps=32),
    # Shapes that no model has: right, not fast.
    Gate(r"\bgemv_imma_kernel<[24], 0, 2, false>"),
    Gate(r"."),
)  # fmt: skip


@dataclass
class Report:
    """One kernel on one architecture. The loop's numbers are None where there is no gate on its loop."""

    kernel: str
    arch: int
    registers: int
    warps: int
    shared: int
    stack: int
    spills: int
    mma: int
    loop: int
    in_flight: int
    per_weight: float | None
    breaches: list[str]


def examine(name: str, arch: int, resources: sass.Resources, body: list[sass.Instruction]) -> Report:
    """Measure a kernel and hold it against its gate."""
    gate = next(gate for gate in GATES if re.search(gate.pattern, name))
    gated = gate.mma is not None and arch in gate.archs
    loop = sass.main_loop(body, gate.mma if gated else "")
    count = sum(i.opcode.startswith(gate.mma) for i in loop) if gated else sass.mma_count(loop)
    per_weight = len(loop) * 32 / (count * gate.weights) if gated and count and gate.weights else None
    report = Report(
        short(name), arch, resources.registers, sass.warps_per_multiprocessor(resources.registers),
        resources.shared, resources.stack, resources.spill_stores + resources.spill_loads, count, len(loop),
        sass.loads_in_flight(body if gate.whole else loop), per_weight, [],
    )  # fmt: skip
    report.breaches += body_breaches(report, gate, body)
    if gated:
        report.breaches += loop_breaches(report, gate, loop)
    return report


def body_breaches(report: Report, gate: Gate, body: list[sass.Instruction]) -> list[str]:
    """What holds for every kernel."""
    local = sass.local_accesses(body)
    rules = (
        (report.spills or report.stack or local,
         f"spills {report.spills} bytes, has {report.stack} bytes of stack, accesses them {local} times"),
        (report.registers > gate.registers, f"uses {report.registers} registers, limit {gate.registers}"),
        (report.warps < gate.warps, f"leaves room for {report.warps} warps, planned {gate.warps}"),
        (not body, "has no machine code"),
    )  # fmt: skip
    return [text for broken, text in rules if broken]


def loop_breaches(report: Report, gate: Gate, loop: list[sass.Instruction]) -> list[str]:
    """What holds for the main loop of a kernel on tensor cores."""
    if not report.mma:
        return [f"has no {gate.mma} in a loop"]
    side = [i.opcode for i in sass.side_loads(loop)]
    slow = sass.slow_instructions(loop)
    dear = gate.limit is not None and report.per_weight is not None and report.per_weight > gate.limit
    rules = (
        (len(side) > gate.side_loads,
         f"has {len(side)} loads below 16 bytes in the main loop, limit {gate.side_loads}"),
        (report.in_flight < gate.in_flight,
         f"has {report.in_flight} loads under way before the first is needed, least {gate.in_flight}"),
        (slow, f"has {', '.join(sorted(set(slow)))} in the main loop"),
        (dear, f"takes {report.per_weight or 0:.2f} instructions a weight, limit {gate.limit}"),
    )  # fmt: skip
    return [text for broken, text in rules if broken]


def short(name: str) -> str:
    """`void w2a4::cuda::f<(w2a4::Kind)1>(P)` as `f<1>`."""
    name = re.sub(r"^void |\(anonymous namespace\)::|\([\w:]+\)(?=\d)", "", name)
    return re.sub(r"\b\w+::", "", name).split("(")[0]


def find_tool(name: str) -> str | None:
    """Path of one of CUDA's tools."""
    triton = importlib.util.find_spec("triton")
    folders = [os.environ.get(variable, "") + "/bin" for variable in ("CUDA_HOME", "CUDA_PATH")]
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def need_tool(name: str) -> str:
    path = find_tool(name)
    if path is None:
        raise click.ClickException(f"{name} is neither on PATH nor in CUDA_HOME/bin; install CUDA's toolkit"
                                   f"{', or pip install triton' if name != 'nvcc' else ''}")  # fmt: skip
    return path


def include_dirs() -> list[str]:
    """csrc, and torch's headers; torch is not imported."""
    torch = importlib.util.find_spec("torch")
    folders = [str(Path(torch.origin).parent / "include")] if torch is not None and torch.origin else []
    return [str(ROOT / "csrc"), *folders]


def fingerprint(arch: int, source: Path, command: list[str]) -> str:
    """Of everything that the machine code of a source depends on."""
    digest = hashlib.sha256(repr((arch, source.name, command, _version("nvcc"))).encode())
    headers = {path for suffix in ("h", "cuh") for path in (ROOT / "csrc").glob(f"**/*.{suffix}")}
    for path in sorted(headers | {source}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _version(tool: str) -> str:
    run = subprocess.run([need_tool(tool), "--version"], capture_output=True, text=True, check=False)
    return run.stdout.strip().splitlines()[-1] if run.stdout else ""


def compile_source(source: Path, arch: int) -> tuple[str, str]:
    """ptxas's log and the machine code of one file, from the cache where nothing changed."""
    command = [need_tool("nvcc"), "-cubin", f"-arch=sm_{arch}", *FLAGS, *(f"-I{d}" for d in include_dirs())]
    name = f"{source.stem}-sm_{arch}"
    kept = CACHE / f"{name}-{fingerprint(arch, source, command)}.json"
    if kept.is_file():
        return tuple(json.loads(kept.read_text()))
    kept.parent.mkdir(parents=True, exist_ok=True)
    for stale in CACHE.glob(f"{name}-*"):
        stale.unlink(missing_ok=True)
    cubin = kept.with_suffix(".cubin")
    run = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
    if run.returncode != 0:
        reason = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr[-300:])
        raise click.ClickException(f"nvcc cannot compile {source.name} for sm_{arch}: {reason.strip()}")
    result = run.stderr, disassemble(cubin)
    cubin.unlink()
    write_json(kept, result)
    return result


def disassemble(cubin: Path) -> str:
    """Machine code as text, by cuobjdump, else nvdisasm."""
    tool, flag = find_tool("cuobjdump"), "--dump-sass"
    if tool is None:
        tool, flag = find_tool("nvdisasm") or need_tool("cuobjdump"), "-c"
    path = os.pathsep.join((os.environ.get("PATH", ""), str(Path(tool).parent)))  # cuobjdump calls nvdisasm
    run = subprocess.run(
        [tool, flag, str(cubin)], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    if run.returncode != 0:
        raise click.ClickException(f"{tool} failed: {run.stderr.strip()[-300:]}")
    without_encodings = re.sub(r"[ \t]*/\* 0x[0-9a-f]+ \*/", "", run.stdout)
    return re.sub(r"\n{2,}", "\n", without_encodings)


def demangle(names: list[str]) -> dict[str, str]:
    tool = find_tool("cu++filt") or need_tool("c++filt")
    run = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, run.stdout.splitlines(), strict=True))


def reports(sources: list[Path], archs: list[int]) -> list[Report]:
    """Compile everything, several files at a time, and examine every kernel."""
    jobs = [(source, arch) for source in sources for arch in archs]
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: compile_source(*job), jobs)
        progress = tqdm(results, total=len(jobs), unit="file", disable=not sys.stderr.isatty())
        for (_, arch), (log, text) in zip(jobs, progress, strict=True):
            resources, bodies = sass.parse_ptxas(log), sass.parse_sass(text)
            names = demangle(list(resources))
            found += [examine(names[k], arch, resources[k], bodies.get(k, [])) for k in resources]
    return sorted(found, key=lambda report: (report.kernel, report.arch))


def check_launches(sources: list[Path]) -> list[str]:
    return [f"{path.name}: {breach}" for path in sources for breach in sass.launch_breaches(path.read_text())]


def parse_archs(context, parameter, value: str) -> list[int]:
    if not re.fullmatch(r"\d{2,3}(,\d{2,3})*", value):
        raise click.BadParameter(f"{value!r} is not a list such as 80,90,100")
    return [int(part) for part in value.split(",")]


def table(found: list[Report]) -> str:
    head = ("kernel", "sm", "registers", "warps", "shared", "stack", "spills", "mma", "loop", "in flight",
            "instructions/weight", "")  # fmt: skip
    lines = [(*list(asdict(report).values())[:-1], "BREACH" if report.breaches else "ok") for report in found]
    return tabulate(lines, head, floatfmt=".2f")


def summary(found: list[Report]) -> list[str]:
    """Every breach in a line, with the architectures that it was found on."""
    archs: dict[tuple[str, str], list[int]] = {}
    for report in found:
        for breach in report.breaches:
            archs.setdefault((report.kernel, breach), []).append(report.arch)
    return [
        f"{kernel} {breach} (sm_{', sm_'.join(map(str, where))})" for (kernel, breach), where in archs.items()
    ]


@click.command(help="\b\n" + __doc__)
@click.option("--arch", "archs", default="80,90,100", show_default=True, callback=parse_archs)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
def main(archs, json_file):
    files = sorted(path for path in SOURCES.glob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
    sources = [path for path in files if path.suffix == ".cu"]
    if not sources:
        raise click.ClickException(f"there are no CUDA sources in {SOURCES}")
    launches, found = check_launches(files), reports(sources, archs)
    if json_file is not None:
        meta = {"nvcc": _version("nvcc"), "flags": FLAGS, "commit": commit(), "date": now()}
        kernels = [asdict(report) for report in found]
        write_json(json_file, {"meta": meta, "kernels": kernels, "launches": launches})
    print(table(found))
    breaches = summary(found) + launches
    if breaches:
        print("\n" + "\n".join(breaches))
        raise click.ClickException(f"{len(breaches)} breaches")


if __name__ == "__main__":
    main()
