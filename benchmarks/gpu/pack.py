"""What travels to a GPU that is lent for minutes: everything compiled, nothing to fetch.

`pack` makes one folder for `run` and `again`. With a model to train, which is larger than one call may carry,
it makes folders beside it, `part1`, `part2`, …: each travels in a call of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks import mma_rate
from benchmarks.files import ROOT, commit, now, write_json
from benchmarks.gpu import payload
from benchmarks.gpu.install import MANIFEST, copy_sources

#: Bytes of one call, the tree among them, and what is kept free of them.
CALL, SPARE = 64 << 20, 2 << 20
#: Characters of the command of a call.
COMMAND = 2000
#: Packages of PyPI that are compared with, and what each lacks on a machine with torch and transformers.
PEERS = {"humming": ["humming-kernels"], "gemlite": ["gemlite"]}
#: Their wheels are for this.
TAGS = ("--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64",
        "--platform", "manylinux2014_x86_64")  # fmt: skip
#: Folder of a second wheel, whose name may be that of the first.
SECOND = "second"
#: Where the parts of `train` come together.
TOGETHER = "/tmp/w2a4-parts"
#: Characters of text that a small model trains on, and that it is evaluated on.
TEXT, HELD_OUT = 2_000_000, 200_000


@dataclass
class Packed:
    """What was made: folders to carry, in order, and the commands."""

    folders: list[Path]
    commands: list[str]


def pack(
    out: Path, archs: list[int], text: tuple[Path, ...], second: Path | None = None, seed: int = 0
) -> Packed:
    """Make the folder for `run` and `again`.

    Args:
        second: another wheel of w2a4, to compare with in `again`.

    Raises:
        click.ClickException: nvcc is missing, a wheel does not build, or the folder is too large to travel.
    """
    mma_rate.need_tool("nvcc")
    begin(out)
    wheel = build_wheel(out, archs)
    for arch in archs:
        click.echo(f"compiling mma_rate for sm_{arch}")
        shutil.move(mma_rate.build(f"sm_{arch}", out), out / f"mma_rate_sm_{arch}")
    peers = {name: fetch(out, packages) for name, packages in PEERS.items()}
    small_model(out, text, seed)
    if second is not None:
        (out / SECOND).mkdir()
        shutil.copy(second, out / SECOND)
    facts = {"wheel": wheel, "peers": {name: found for name, found in peers.items() if found}, "archs": archs,
             "commit": commit(), "date": now()}  # fmt: skip
    write_json(out / MANIFEST, facts)
    check_size(out)
    return Packed([out], [run_command(out), again_command(out, wheel, second)])


def pack_training(
    out: Path, archs: list[int], model: Path, text: tuple[Path, ...], held_out: tuple[Path, ...], tokens: int
) -> Packed:
    """Make the parts for `train`: a model, the tokens of texts, and texts to judge by.

    Raises:
        click.ClickException: as `pack`.
        W2A4Error: the model or a text cannot be read.
    """
    from benchmarks.gpu import training
    from w2a4.evaluate import data

    begin(out)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        whole = Path(folder)
        wheel = build_wheel(whole, archs)
        if model.is_file():
            shutil.copy(model, whole / "model.gguf")
        else:
            shutil.copytree(model, whole / "model")
        click.echo(f"tokenising {len(text)} texts")
        count = training.tokenise(str(model), list(text), whole, tokens)
        judged = {path.name: data.read_text(path)[:HELD_OUT] for path in held_out}
        judged["builtin"] = data.load_text("builtin", "evaluation")[:HELD_OUT]
        write_json(whole / training.HELD_OUT, judged)
        gguf = fetch(whole, ["gguf"]) if model.is_file() else []
        write_json(whole / MANIFEST, {"wheel": wheel, "peers": {"gguf": gguf} if gguf else {}, "archs": archs,
                                      "commit": commit(), "date": now()})  # fmt: skip
        parts = payload.split(whole, out)
    click.echo(f"{count} tokens of text")
    for part in parts:
        check_size(part)
    return Packed(parts, train_commands(parts))


def train_commands(parts: list[Path]) -> list[str]:
    """One for each part; the machine must still be held when the next one comes."""
    copies = [f"mkdir -p {TOGETHER} && cp {relative(part)}/* {TOGETHER}/" for part in parts]
    last = f'{copies[-1]} && python3 -m benchmarks.gpu_run train --carry {TOGETHER} --out "$OUT"'
    return [checked(command) for command in (*copies[:-1], last)]


def begin(out: Path) -> None:
    """An empty folder; one that `pack` made before is replaced.

    Raises:
        click.ClickException: something else is there, or git would take it for part of the sources.
    """
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise click.ClickException(
            f"--out {out} is not empty and not made by `gpu_run pack`; give another one"
        )
    if out.resolve().is_relative_to(ROOT) and not is_ignored(out):
        raise click.ClickException(
            f"--out {out}: git does not ignore it; give one that it does, e.g. {ROOT.name}/build/gpu"
        )
    shutil.rmtree(out, ignore_errors=True)
    try:
        out.mkdir(parents=True)
        write_json(out / MANIFEST, {})
    except OSError as error:
        raise click.ClickException(f"--out {out}: {error.strerror}") from None


def is_ignored(path: Path) -> bool:
    """Whether git leaves it out of the tree; so too where there is no git."""
    if shutil.which("git") is None:
        return True
    done = subprocess.run(["git", "check-ignore", "-q", str(path.resolve())], cwd=ROOT, capture_output=True)
    return done.returncode != 1


def build_wheel(out: Path, archs: list[int]) -> str:
    """The package with CUDA kernels for these architectures, built against the torch of this Python."""
    names = ";".join(f"{arch // 10}.{arch % 10}" for arch in archs)
    click.echo(f"building the wheel with CUDA kernels for {names} (minutes)")
    environment = os.environ | {"W2A4_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": names}
    with tempfile.TemporaryDirectory() as folder:
        sources = copy_sources(Path(folder) / "sources")
        pip("wheel", str(sources), "--no-deps", "-w", folder, environment=environment)
        (wheel,) = Path(folder).glob("*.whl")
        shutil.copy(wheel, out)
    if "abi3" not in wheel.name:
        raise click.ClickException(f"{wheel.name} is of one Python only: it was built without its extensions")
    return wheel.name


def fetch(out: Path, packages: list[str]) -> list[str]:
    """Names of wheels of PyPI, downloaded or built; none, with a line, where that fails."""
    names = []
    for package in packages:
        with tempfile.TemporaryDirectory() as folder:
            try:
                try:
                    pip("download", "--no-deps", "--only-binary=:all:", *TAGS, "-d", folder, package)
                except click.ClickException:
                    pip("wheel", "--no-deps", "-w", folder, package)  # of sources, for any machine
                (wheel,) = Path(folder).glob("*.whl")
            except (click.ClickException, ValueError) as error:
                click.echo(f"{package} is left out: {getattr(error, 'message', error)}", err=True)
                return []
            shutil.copy(wheel, out)
            names.append(wheel.name)
    return names


def pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """
    Raises:
        click.ClickException: it fails; with the last line that it said.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise click.ClickException(f"pip {arguments[0]} failed: {said[-1] if said else 'it said nothing'}")


def small_model(out: Path, text: tuple[Path, ...], seed: int) -> None:
    """A trained byte-level LLaMA in 16 bits, and text for it: `train.txt`, and other text to evaluate on."""
    import torch

    from benchmarks.experiments import testbed
    from w2a4.evaluate import data

    click.echo("a small trained model (a minute or two, if it is not in the cache)")
    model, tokenizer = testbed.load(seed)
    model.to(torch.float16).save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    given = [data.read_text(path) for path in text]
    train = "\n\n".join(given) if given else data.load_text("builtin", "calibration")
    (out / "train.txt").write_text(train[:TEXT], encoding="utf-8")
    held_out = data.load_text("builtin", "evaluation")
    (out / "held_out.txt").write_text(held_out[:HELD_OUT], encoding="utf-8")


def tree_bytes() -> int:
    """Of the files that travel with the tree: those git tracks, and others that it does not ignore."""
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    return sum((ROOT / name).lstat().st_size for name in done.stdout.splitlines() if (ROOT / name).exists())


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_size(folder: Path) -> None:
    """
    Raises:
        click.ClickException: it and the tree are too large for one call.
    """
    size, tree = folder_bytes(folder), tree_bytes()
    if size + tree > CALL - SPARE:
        raise click.ClickException(
            f"{folder} has {size / 2**20:.1f} MiB and the tree {tree / 2**20:.1f}: over {CALL >> 20} MiB, "
            "what a call may carry; give fewer --arch, or less --text"
        )
    click.echo(
        f"{folder}: {size / 2**20:.1f} MiB, with the tree {(size + tree) / 2**20:.1f} of {CALL >> 20} MiB"
    )


def relative(folder: Path) -> str:
    """As the command names it, from the root of the tree where it lies in it."""
    path = folder.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def run_command(out: Path, rest: str = "") -> str:
    return checked(f'python3 -m benchmarks.gpu_run run --carry {relative(out)} --out "$OUT"{rest}')


def again_command(out: Path, wheel: str, second: Path | None) -> str:
    where = relative(out)
    wheels = f" --a {where}/{wheel} --b {where}/{SECOND}/{second.name}" if second else ""
    return checked(
        f'python3 -m benchmarks.gpu_run again --carry {where} --out "$OUT" --from {where}/results.jsonl '
        f"--tune 4096x4096 --timeline{wheels}"
    )


def checked(command: str) -> str:
    """
    Raises:
        click.ClickException: it is too long to be sent.
    """
    if len(command) > COMMAND:
        raise click.ClickException(
            f"the command has {len(command)} characters, {COMMAND} can be sent: {command}"
        )
    return command


def told(packed: Packed) -> str:
    """What to carry and what to run, for people; where there are parts, a call for each."""
    lines = []
    for i, command in enumerate(packed.commands):
        folder = packed.folders[min(i, len(packed.folders) - 1)]
        lines.append(f"carry {relative(folder)} and run: {command}")
        if " again " in command:
            lines.append(f"  (copy the results.jsonl that came back to {relative(folder)} first)")
    return "\n".join(lines)


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
