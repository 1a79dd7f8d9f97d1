"""Measures what a GPU's instructions can do, before any kernel is judged by it.

    python -m benchmarks.mma_rate [--json FILE] [--jsonl FILE] [--binary FILE]
    python -m benchmarks.mma_rate --compile-only 80,90,100  # needs no GPU

Rates of binary and int8 mma, prmt and dp4a, bandwidth of a copy and of reading, cost of a launch in a
graph, and whether fragments lie as the PTX ISA says (exit code 1 if not).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import click
from tabulate import tabulate

from benchmarks.files import ROOT, append_line, commit, now, write_json
from benchmarks.gates.sass_gate import need_tool, parse_archs

SOURCE = Path(__file__).with_suffix(".cu")
BINARY = ROOT / "build/mma_rate"


def build(arch: str, folder: Path = BINARY.parent) -> Path:
    """Compile for an architecture such as `sm_90`.

    Raises:
        click.ClickException: nvcc is missing or fails.
    """
    binary = folder / f"{BINARY.name}_{arch}"
    binary.parent.mkdir(parents=True, exist_ok=True)
    command = [need_tool("nvcc"), "-O3", "-std=c++17", f"-arch={arch}", str(SOURCE), "-o", str(binary)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        reason = next((line for line in run.stderr.splitlines() if "rror" in line), run.stderr[-300:])
        raise click.ClickException(f"nvcc cannot compile {SOURCE.name} for {arch}: {reason.strip()}")
    return binary


def this_arch() -> str:
    """Of GPU 0, e.g. `sm_90`.

    Raises:
        click.ClickException: there is no GPU.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        capability = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise click.ClickException("no NVIDIA GPU here (nvidia-smi finds none)") from None
    return f"sm_{capability.strip().replace('.', '')}"


def measure(binary: Path) -> dict:
    """What the program prints.

    Raises:
        click.ClickException: it fails.
    """
    run = subprocess.run([binary], capture_output=True, text=True)
    if run.returncode != 0:
        raise click.ClickException(f"{binary.name} failed: {run.stderr.strip()[-300:]}")
    return json.loads(run.stdout)


def table(result: dict) -> str:
    rates = [(name, rate["per_second"] / 1e9, rate["per_clock_and_multiprocessor"])
             for name, rate in result["rates"].items()]  # fmt: skip
    text = tabulate(rates, ("instruction", "10**9 warps/s", "a clock and multiprocessor"), floatfmt=".3f")
    layouts = ", ".join(f"{name} {'yes' if holds else 'NO'}" for name, holds in result["layouts"].items())
    return (
        f"{result['device']}, {result['multiprocessors']} multiprocessors\n{text}\n"
        f"copy {result['copy_gbps']} GB/s, read {result['read_gbps']} GB/s, "
        f"launch {result['launch_us']} us\nfragments as documented: {layouts}"
    )


@click.command(help="\b\n" + __doc__)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
@click.option("--jsonl", type=click.Path(dir_okay=False, path_type=Path), help="Lines to add the result to.")
@click.option(
    "--binary", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Compiled before."
)
@click.option("--compile-only", "archs", callback=lambda c, p, v: v and parse_archs(c, p, v))
def main(json_file, jsonl, binary, archs):
    if archs:
        for arch in archs:
            print(build(f"sm_{arch}"))
        return
    with tempfile.TemporaryDirectory() as folder:  # the tree may be read-only
        result = measure(binary or build(this_arch(), Path(folder)))
    print(table(result))
    if json_file is not None:
        write_json(json_file, {"meta": {"commit": commit(), "date": now()}, **result})
    if jsonl is not None:
        append_line(jsonl, {"stage": "mma_rate", **result})
    if not all(result["layouts"].values()):
        raise click.ClickException("fragments do not lie as documented: the kernels are wrong on this GPU")


if __name__ == "__main__":
    main()
