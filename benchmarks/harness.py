"""What every benchmark shares: its command line, the check before the clock, the JSON and the table.

A benchmark gives a list of `Case`s. Each is checked first; a case that fails has no time, and the program
exits 1 when it has printed the rest. The JSON is rewritten after every case, so a killed run leaves what
it measured.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.files import commit, now, write_json
from benchmarks.shapes import MODELS
from benchmarks.timing import COLD_FACTOR, Workload, can_be_cold, copies_on, last_level_cache, median_us

#: What the samples of a row may take on the CPU, and with --quick.
ROW_SECONDS, QUICK_SECONDS = 10.0, 1.0


@dataclass(frozen=True)
class Options:
    """What the command line says; empty tuples stand for the benchmark's own choice.

    A shape is what the benchmark's `command` names: `(out, in)` of a linear, or a width alone.
    """

    device: str = "cpu"
    json: Path | None = None
    models: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    tokens: tuple[int, ...] = ()
    threads: int | None = None
    quick: bool = False
    tune: bool = False


@dataclass
class Subject:
    """A case with its data made.

    Attributes:
        ours: what is measured.
        peers: what it is compared with.
        bytes: what one call of ours has to move, at least.
        check: is ours right on this very data? It runs before anything is timed.
    """

    ours: Workload
    peers: list[Workload]
    bytes: int
    check: Callable[[], bool]


@dataclass
class Case:
    """One row, or one a peer and cache. `build` makes the data, late."""

    op: str
    shape: str
    tokens: int
    dtype: str
    build: Callable[[], Subject]


@dataclass
class Row:
    """A measurement as it stands in the JSON.

    Attributes:
        cache: "cold", each call finds its data in memory, or "hot", where the last call left it.
        us: microseconds a call; None if it is not correct.
        ratio: peer_us / us.
        repeats: samples of which `us` and `peer_us` are the medians.
        bytes: that a call has to move.
        gbps: bytes a second, in 10**9.
        bound: microseconds that `bytes` take at the measured bandwidth of a copy.
        note: only in the JSON if there is something to say.
    """

    op: str
    shape: str
    tokens: int
    dtype: str
    cache: str
    us: float | None
    peer: str | None
    peer_us: float | None
    ratio: float | None
    bytes: int
    gbps: float | None
    bound: float | None
    repeats: int | None
    correct: bool
    note: str | None = field(default=None)

    def to_dict(self) -> dict:
        entries = asdict(self)
        if self.note is None:
            del entries["note"]
        return entries


def command(
    description: str, plan: Callable[[Options], list[Case]], shape: str, tunes: bool = False
) -> click.Command:
    """The program of a benchmark.

    Args:
        plan: says which cases the options ask for.
        shape: what --shapes takes, a number for each part between an `x`: "OUTxIN" or "WIDTH".
        tunes: whether it takes --tune.
    """

    @click.command(help="\b\n" + description)
    @click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
    @click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
    @click.option("--models", multiple=True, type=click.Choice(list(MODELS)), help="May be repeated.")
    @click.option(
        "--shapes", callback=partial(parse_shapes, shape), metavar=f"{shape},...", help="Instead of --models."
    )
    @click.option("--tokens", callback=parse_tokens, help="A list such as 1,8,16.")
    @click.option("--threads", type=click.IntRange(min=1), help="Threads of the CPU's ops and peers.")
    @click.option("--quick", is_flag=True, help="Fewer shapes and repeats, and hot only what is never cold.")
    def main(device, json_file, models, shapes, tokens, threads, quick, tune=False):
        options = Options(device, json_file, models, shapes, tokens, threads, quick, tune)
        try:
            rows = run(options, plan)
        except torch.cuda.OutOfMemoryError as error:
            message = str(error).splitlines()[0]
            raise click.ClickException(f"out of GPU memory: {message}; choose fewer --models") from None
        print(table(rows))
        wrong = sorted({f"{row.op} {row.shape}, {row.tokens} tokens" for row in rows if not row.correct})
        if wrong:
            raise click.ClickException(f"wrong results, so no times: {'; '.join(wrong)}")

    if tunes:
        text = "Check and measure every tile first, and keep the fastest of those that are right."
        main.params.append(click.Option(["--tune"], is_flag=True, help=text))
    return main


def parse_tokens(context, parameter, value: str | None) -> tuple[int, ...]:
    """`"1,8,16"` as `(1, 8, 16)`."""
    try:
        tokens = tuple(int(part) for part in value.split(",")) if value else ()
    except ValueError:
        tokens = (0,)
    if any(count < 1 for count in tokens):
        raise click.BadParameter(f"{value!r} is not a list of positive numbers such as 1,8,16")
    return tokens


def parse_shapes(form: str, context, parameter, value: str | None) -> tuple[tuple[int, ...], ...]:
    """`"64x32,96x64"` as `((64, 32), (96, 64))`."""
    parts = value.split(",") if value else []
    if not all(re.fullmatch(re.sub("[A-Z]+", "[1-9][0-9]*", form), part) for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of {form}")
    return tuple(tuple(int(number) for number in part.split("x")) for part in parts)


def run(options: Options, plan: Callable[[Options], list[Case]]) -> list[Row]:
    """Check and time every case.

    Raises:
        click.ClickException: there is no such device, or the JSON cannot be written.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: torch sees no CUDA device here; use --device cpu")
    if options.device == "cuda" and not has_cuda_kernels():
        raise click.ClickException("this build of w2a4 has no CUDA kernels; build it with W2A4_BUILD_CUDA=1 "
                                   "python setup.py build_ext --inplace")  # fmt: skip
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        warn_if_busy()
    torch.manual_seed(0)
    meta = metadata(options.device)
    rows = [copy_row(options.device)]
    write(options.json, meta, rows)
    progress = tqdm(plan(options), unit="case", disable=not sys.stderr.isatty())
    for case in progress:
        progress.set_description(f"{case.op} {case.shape} {case.tokens}")
        for row in measure(case, options, rows[0].gbps):
            rows.append(row)
            write(options.json, meta, rows)
    return rows


def warn_if_busy() -> None:
    """Say so where the CPU has other work: its times mislead then."""
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        say(f"the CPU is busy (load {os.getloadavg()[0]:.1f}): threads that wait for one another then take "
            "whole time slices, so try --threads 1, or a quiet machine")  # fmt: skip


def has_cuda_kernels() -> bool:
    """Are there kernels, or would the ops fall back on the reference?"""
    from w2a4 import ops  # noqa: F401  (registers them)

    return torch._C._dispatch_has_kernel_for_dispatch_key("w2a4::linear_w2a4", "CUDA")


def copy_row(device: str) -> Row:
    """The bandwidth of a copy on this device, bytes read and written: the bound of all other rows.

    On a GPU that of the fastest of several kernels.
    """
    least = 1 << 29 if device == "cuda" else 1 << 26
    count = max(least, COLD_FACTOR * last_level_cache(device) // 2)  # of each of the two buffers
    ways = copies_on(device, 2 * count)
    times, repeats, note = median_us(ways, device, cold=True)
    us, moved = min(times), ways[0].data.bytes
    correct = all(torch.equal(*way.data.take(1)[0]) for way in ways)
    return Row(
        "copy", str(count), 1, "uint8", "cold", us, None, None, None, moved, moved / us / 1e3, us, repeats,
        correct, note,
    )  # fmt: skip


def measure(case: Case, options: Options, copy_gbps: float) -> Iterator[Row]:
    """The rows of one case: cold and hot, unless it is too small for the one or too large for the other.

    On a GPU ours is measured alone first, so that a peer which fails there costs its own rows only.
    """
    subject, device = case.build(), options.device
    bound = subject.bytes / copy_gbps / 1e3
    fixed = dict(op=case.op, shape=case.shape, tokens=case.tokens, dtype=case.dtype, bytes=subject.bytes)
    if not subject.check():
        nothing = dict.fromkeys(("us", "peer", "peer_us", "ratio", "gbps", "repeats"))
        yield Row(**fixed, **nothing, cache="cold", bound=bound, correct=False)
        return
    size = subject.ours.data.bytes
    possible = {"cold": can_be_cold(size, device), "hot": size < last_level_cache(device)}
    caches = [cache for cache, sensible in possible.items() if sensible]
    for cache in caches[: 1 if options.quick else None]:
        seconds = QUICK_SECONDS if options.quick else ROW_SECONDS
        for peers in ([], subject.peers) if device == "cuda" and subject.peers else (subject.peers,):
            loads = [subject.ours, *peers]
            (us, *peer_us), repeats, note = median_us(loads, device, cache == "cold", seconds)
            shared = dict(**fixed, cache=cache, us=us, gbps=subject.bytes / us / 1e3, bound=bound,
                          repeats=repeats, correct=True, note=note)  # fmt: skip
            for peer, theirs in zip(peers, peer_us, strict=True):
                yield Row(**shared, peer=peer.name, peer_us=theirs, ratio=theirs / us)
            if not peers:
                yield Row(**shared, peer=None, peer_us=None, ratio=None)


def write(path: Path | None, meta: dict, rows: list[Row]) -> None:
    """Replace the JSON file in one step."""
    if path is not None:
        write_json(path, {"meta": meta, "rows": [row.to_dict() for row in rows]})


def table(rows: list[Row]) -> str:
    """For people. `x bound` is how many times the bound a call takes; it says little about hot data."""
    lines = []
    for row in rows:
        times = row.us / row.bound if row.us is not None and row.bound and row.cache == "cold" else None
        cache = row.cache + ("*" if row.note else "")
        lines.append((row.op, row.shape, row.tokens, row.dtype, cache, row.us, row.gbps, times, row.peer,
                      row.peer_us, row.ratio, "yes" if row.correct else "NO"))  # fmt: skip
    head = ("op", "shape", "tokens", "dtype", "cache", "us", "GB/s", "x bound", "peer", "peer us", "ratio",
            "correct")  # fmt: skip
    text = tabulate(lines, head, floatfmt=("", "", "", "", "", ".2f", ".1f", ".2f", "", ".2f", ".2f", ""))
    notes = {row.note for row in rows if row.note}
    return text + "".join(f"\n* {note}" for note in notes)


def metadata(device: str) -> dict:
    """Machine, versions and commit."""
    from w2a4 import ops

    packages = ("w2a4", "torch", "transformers", "numpy", "triton")
    versions = {name: _version(name) for name in packages}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda, "build": ops.build_info()}
    gpu = _nvidia_smi() if device == "cuda" else None
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "device": name,
        "driver": gpu and gpu["driver_version"],
        "clocks": gpu and {key: gpu[key] for key in ("clocks.sm", "clocks.max.sm", "clocks.mem")},
        "cpu": f"{_cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "versions": versions,
        "commit": commit(),
        "date": now(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> dict[str, str] | None:
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (part.strip() for part in answer.strip().split(",")), strict=False))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def say(message: str) -> None:
    """Once on stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


def skip(what: str, why: str) -> None:
    """Say once that something is not measured."""
    say(f"{what}: {why}, not measured")
