"""Every op with a CUDA or Triton kernel once, at a real shape, against the reference.

    python -m benchmarks.smoke [--device cuda|cpu] [--small] [--only NAME,...] [--list] [--jsonl FILE]
        [--isolate] [--limit SECONDS] [--launches]

A case has a line in FILE as soon as it has ended: stage, case, op, shape, tokens, dtype, kernel, correct,
seconds, error. One that raises is wrong, and the next goes on; after a fault of the GPU, from which a process
does not recover, the program exits with 3. --isolate is the caller that then runs what is left in another
process, also after a crash, or when a case took longer than --limit. What has no kernel here is left out: its
line has correct null. --launches only launches each variant of our CUDA kernels on little data, for
compute-sanitizer (`gpu/plan.py` has its command line). --small is for a rehearsal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click
import torch

from benchmarks import isolate, smoke_cases
from benchmarks.faults import FAULT, device_fault, frames
from benchmarks.files import append_line
from benchmarks.smoke_cases import Case
from w2a4.ops import dispatch

#: How Python is told to run this program again.
PROGRAM: tuple[str, ...] = ("-m", "benchmarks.smoke")
#: Seconds of a case, the compiling of its kernel among them.
LIMIT = 30.0


def why_left_out(case: Case, device: str) -> str:
    """Empty, or why a case can not run on a CPU; on a GPU all must."""
    if case.kernel != "triton" or device == "cuda":
        return ""
    return dispatch.why_no_triton(None)


def run_case(case: Case, device: str) -> tuple[dict, bool]:
    """Its line, in which what it raises is told, and whether the GPU has faulted."""
    why = why_left_out(case, device)
    if why:
        return line_of(case, None, 0.0, f"left out: {why}"), False
    begun = time.perf_counter()
    try:
        if case.kernel == "triton":
            require_triton(device)
        call, check = case.build(device)
        correct = bool(check(call()))
        error = None if correct else "not what the reference says"
    except Exception as raised:  # whatever it is, the next case goes on
        correct, error = False, shown(raised)
    fault = device_fault()
    if fault:
        correct, error = False, f"the GPU faulted: {fault}"
    return line_of(case, correct, time.perf_counter() - begun, error), bool(fault)


def line_of(case: Case, correct: bool | None, seconds: float, error: str | None) -> dict:
    return {
        "stage": "smoke", "case": case.name, "op": case.op, "shape": case.shape, "tokens": case.tokens,
        "dtype": case.dtype, "kernel": case.kernel, "correct": correct, "seconds": round(seconds, 3),
        "error": error,
    }  # fmt: skip


def require_triton(device: str) -> None:
    """
    Raises:
        RuntimeError: there are no Triton kernels, which else are loaded by this.
    """
    why = dispatch.why_no_triton(torch.cuda.current_device() if device == "cuda" else None)
    if why:
        raise RuntimeError(f"no Triton kernels: {why}")


def shown(error: Exception) -> str:
    lines, places = str(error).strip().splitlines(), frames(error)
    told = f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]
    return f"{told} (at {places[-1]})" if places else told


def run(cases: list[Case], device: str, path: Path | None) -> bool:
    """Run these in turn; whether none is wrong. Leaves the process after a fault."""
    right = True
    for case in cases:
        isolate.tell(isolate.BEGUN, case.name)
        line, faulted = run_case(case, device)
        if path is not None:
            append_line(path, line)
        right &= line["correct"] is not False
        word = {True: isolate.RIGHT, False: isolate.WRONG, None: isolate.LEFT_OUT}[line["correct"]]
        isolate.tell(word, case.name, f"{line['seconds']:.2f} s", line["error"] or "")
        if faulted:
            print(f"{case.name} faulted: this process can not use the GPU any more", file=sys.stderr)
            sys.stdout.flush()
            os._exit(FAULT)  # nothing that is cleaned up with the GPU can be
    return right


def launch(cases: list[Case], device: str) -> bool:
    """Call each once, and wait for it."""
    right = True
    for case in cases:
        try:
            case.build(device)[0]()
            error = device_fault()
        except RuntimeError as raised:
            error = shown(raised)
        right &= not error
        print(f"{'WRONG' if error else 'ok'} {case.name} {error}".rstrip(), flush=True)
    return right


def select(cases: list[Case], only: str | None) -> list[Case]:
    """
    Raises:
        click.ClickException: a name is that of no case and no op.
    """
    if only is None:
        return cases
    names = only.split(",")
    unknown = [name for name in names if not any(name in (case.name, case.op) for case in cases)]
    if unknown:
        raise click.ClickException(f"--only: no case and no op is called {', '.join(unknown)}; see --list")
    return [case for case in cases if case.name in names or case.op in names]


def check_device(device: str) -> None:
    from benchmarks.harness import has_cuda_kernels

    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: torch sees no CUDA device here; use --device cpu")
    if device == "cuda" and not has_cuda_kernels():
        raise click.ClickException("this build of w2a4 has no CUDA kernels")


def apart(cases: list[Case], options: Mapping[str, object], path: Path | None) -> bool:
    """--isolate. Each process appends its lines; that of a case which took its process along is added."""
    command = [sys.executable, *PROGRAM, "--device", str(options["device"])]
    command += ["--small"] if options["small"] else []
    command += ["--jsonl", str(path)] if path is not None else []
    told = {case.name: case for case in cases}

    def lost(name: str, seconds: float, error: str) -> None:
        if path is not None:
            append_line(path, line_of(told[name], False, seconds, error))

    return isolate.run(command, list(told), float(options["limit"]), lost)


@click.command(help="\b\n" + __doc__)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="Small shapes.")
@click.option("--only", metavar="NAME,...", help="These cases, or all of these ops.")
@click.option("--list", "listed", is_flag=True, help="Print the names of the cases.")
@click.option("--jsonl", type=click.Path(dir_okay=False, path_type=Path), help="Append a line a case.")
@click.option("--isolate", "isolated", is_flag=True, help="In processes of their own.")
@click.option("--limit", default=LIMIT, show_default=True, help="Seconds a case, with --isolate.")
@click.option("--launches", is_flag=True, help="Only launch our kernels, on little data.")
def main(device, small, only, listed, jsonl, isolated, limit, launches):
    cases = select(smoke_cases.launches() if launches else smoke_cases.plan(device, small), only)
    if listed:
        print(*(case.name for case in cases), sep="\n")
        return
    check_device(device)
    torch.manual_seed(0)
    if launches:
        right = launch(cases, device)
    elif isolated:
        right = apart(cases, {"device": device, "small": small, "limit": limit}, jsonl)
    else:
        right = run(cases, device, jsonl)
    if not right:
        raise click.ClickException("not all is right, see above")


if __name__ == "__main__":
    main()
