"""A few minutes of a GPU are enough: everything it is needed for, in one command on a bare machine.

    python -m benchmarks.gpu_run pack --out DIR      on a machine with nvcc: what travels
    python -m benchmarks.gpu_run run --out DIR       at most 9.5 minutes: correct? how fast? beside whom?
        --only gemv,engine                           a part of it
    python -m benchmarks.gpu_run again --out DIR     three minutes: failed tests, tiles, timeline, two wheels
    python -m benchmarks.gpu_run train --out DIR     ten minutes: a small model to W2A4KV4
    python -m benchmarks.gpu_run table FILE          what a results.jsonl says

Results are JSON lines in DIR/results.jsonl, on the disk the moment they exist; all output is in
DIR/stages.log. A stage that fails, hangs or dies costs itself only. `--device cpu` rehearses all of it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.files import commit, now, read_lines
from benchmarks.gpu import again as second_look
from benchmarks.gpu import install as installing
from benchmarks.gpu import payload, plan
from benchmarks.gpu.install import GPU, Carried
from benchmarks.gpu.session import Session, Stage, python
from benchmarks.gpu.summary import summary, trained

#: Minutes of a run; a call has ten.
BUDGET = 9.5

folder_type = click.Path(file_okay=False, path_type=Path)
out_option = click.option("--out", type=folder_type, required=True, help="For results; made if missing.")
carry_option = click.option(
    "--carry", type=folder_type, help="What `pack` made; else w2a4 must be installed."
)
device_option = click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="cpu rehearses."
)


def budget_option(minutes: float):
    return click.option(
        "--budget", type=click.FloatRange(0, 60, min_open=True), default=minutes, show_default=True,
        metavar="MINUTES", help="What does not fit is cut from the end.",
    )  # fmt: skip


def _shapes(context, parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """As they are, if each is OUTxIN."""
    wrong = [value for value in values if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", value)]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not OUTxIN, e.g. 4096x4096")
    return values


def _stages(context, parameter, value: str | None) -> list[str] | None:
    """Names of stages, or None for all; refused before anything is installed."""
    if value is None:
        return None
    names = [name.strip() for name in value.split(",")]
    try:
        plan.chosen(plan.stages(Path(), None, None, "cuda"), names)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from None
    return names


@click.group(help=(__doc__ or "").replace("\n\n    ", "\n\n\b\n    "))
def main() -> None:
    pass


def begin(
    out: Path, carry: Path | None, device: str, minutes: float
) -> tuple[Session, Carried | None, GPU | None]:
    """A session whose stages find the package.

    Raises:
        click.ClickException: there is no GPU, nowhere to write, or no package.
    """
    gpu = installing.gpu_here() if device == "cuda" else None
    if device == "cuda" and gpu is None:
        raise click.ClickException("no NVIDIA GPU here (nvidia-smi finds none), so nothing can be measured; "
                                   "--device cpu rehearses")  # fmt: skip
    carried = Carried.read(carry) if carry is not None else None
    shared = [sys.executable, "-m", "benchmarks.gpu_run", "shared", "--device", device]
    shared += ["--carry", str(carried.folder)] if carried else []
    out = out.resolve()
    try:
        session = Session(out, [*shared, "--out", str(out)], 60 * minutes, installing.environment_of(None))
        of = (carried and carried.commit) or commit()
        session.note(stage="begin", date=now(), commit=of, device=device, gpu=gpu and vars(gpu),
                     python=sys.version.split()[0])  # fmt: skip
    except OSError as error:
        raise click.ClickException(
            f"--out {out}: {error.strerror}; give a folder that can be written"
        ) from None
    session.missing = installing.missing_here(gpu, carried)
    for name, why in session.missing.items():
        click.echo(f"without {name}: {why}")
    if carried:
        installing.install(session, carried, gpu)
    return session, carried, gpu


def end(session: Session) -> None:
    text = summary(session.results)
    session.results.with_name("summary.txt").write_text(text + "\n", encoding="utf-8")
    click.echo("\n" + text)


@main.command()
@out_option
@carry_option
@device_option
@budget_option(BUDGET)
@click.option("--only", metavar="STAGE,...", callback=_stages, help="These stages, in the order of all.")
def run(out: Path, carry: Path | None, device: str, budget: float, only: list[str] | None) -> None:
    """Every kernel, the headline figures, the tests, sanitizers, counters, the peers, training."""
    session, carried, gpu = begin(out, carry, device, budget)
    stages = plan.stages(out.resolve(), carried, gpu and gpu.arch, device)
    session.run(stages if only is None else plan.chosen(stages, only))
    end(session)


@main.command(hidden=True)
@click.argument("names", nargs=-1)
@out_option
@carry_option
@device_option
@click.option("--variant")
def shared(names: tuple[str, ...], out: Path, carry: Path | None, device: str, variant: str | None) -> None:
    """The process of the stages that share one; `run` starts it."""
    from benchmarks.gpu import headline

    headline.work(names, out / "results.jsonl", device, carry, variant)


@main.command()
@out_option
@carry_option
@device_option
@budget_option(3)
@click.option("--from", "before", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="results.jsonl of a run, whose failed tests are repeated.")  # fmt: skip
@click.option("--tune", "shapes", multiple=True, metavar="OUTxIN", callback=_shapes,
              help="Measure every tile of the Triton GEMM on this shape.")  # fmt: skip
@click.option("--timeline", is_flag=True, help="A step of decoding, kernel by kernel.")
@click.option("--a", "first", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A wheel of w2a4, to compare with --b.")  # fmt: skip
@click.option("--b", "second", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Another build of it.")  # fmt: skip
def again(out, carry, device, budget, before, shapes, timeline, first, second) -> None:
    """Failed tests alone, tiles of a shape, a timeline, two wheels: whatever is asked for."""
    if (first is None) != (second is None):
        raise click.ClickException("--a and --b are two wheels that are compared: give both")
    if before is None and not shapes and not timeline and first is None:
        raise click.ClickException("nothing to do: give --from, --tune, --timeline, or --a and --b")
    names = second_look.failed_tests(before) if before else []
    session, _, _ = begin(out, carry, device, budget)
    stages = [second_look.repeat(names, session.results)] if names else []
    stages += second_look.compare(session, (first, second)) if first else []
    stages += [Stage(f"tune:{shape}", 60) for shape in shapes] + [Stage("timeline", 60)] * timeline
    session.run(stages)
    lines, _ = read_lines(session.results)
    click.echo("\n" + second_look.told(lines))


@main.command()
@click.option("--out", type=folder_type, required=True, help="An empty folder that git ignores.")
@click.option("--arch", "archs", multiple=True, default=["90"], type=click.Choice(["80", "90", "100"]),
              show_default=True, help="Of the GPU, may be repeated.")  # fmt: skip
@click.option("--text", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Text that is trained on; else the built-in one.")  # fmt: skip
@click.option("--second", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Another wheel of w2a4, to compare with in `again`.")  # fmt: skip
@click.option("--train", "model", type=click.Path(exists=True, path_type=Path),
              help="A .gguf file or a directory: make the parts for `train` instead.")  # fmt: skip
@click.option("--held-out", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="With --train: text to judge by, beside the built-in one.")  # fmt: skip
@click.option("--tokens", default=8_000_000, type=click.IntRange(1), show_default=True,
              help="With --train: tokens of text, at most.")  # fmt: skip
def pack(out: Path, archs: tuple[str, ...], text, second, model: Path | None, held_out, tokens: int) -> None:
    """Make the folder that travels: the wheel, the peers, a small model, text."""
    from benchmarks.gpu import pack as packing
    from w2a4.errors import W2A4Error

    for_archs = sorted(int(arch) for arch in set(archs))
    if model is not None and not text:
        raise click.ClickException("--train needs text to train on: give --text, which may be repeated")
    try:
        if model is None:
            packed = packing.pack(out, for_archs, text, second)
        else:
            packed = packing.pack_training(out, for_archs, model, text, held_out, tokens)
    except W2A4Error as error:
        raise click.ClickException(str(error)) from None
    click.echo(packing.told(packed))


@main.command()
@out_option
@click.option("--carry", type=folder_type, required=True, help="Where all parts have been copied to.")
@device_option
@budget_option(BUDGET)
@click.option("--own-text", "own_tokens", default=0, type=click.IntRange(0), metavar="TOKENS",
              help="Train on what the teacher writes itself, so many tokens.")  # fmt: skip
@click.option("--seqlen", default=2048, type=click.IntRange(2), show_default=True,
              help="Tokens of a window that perplexity is measured on.")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A recipe field.")
def train(out, carry, device, budget, own_tokens: int, seqlen: int, settings: tuple[str, ...]) -> None:
    """A carried model to W2A4KV4 in bf16, with small checkpoints, and perplexities on texts it never saw."""
    with tempfile.TemporaryDirectory(prefix="w2a4-carried-") as folder:
        payload.join(carry, Path(folder))
        session, _, _ = begin(out, Path(folder), device, budget)
        chosen = [word for setting in settings for word in ("--set", setting)]
        where = ("--carry", folder, "--out", str(session.results.parent), "--device", device)
        limits = ("--seconds", f"{session.left() - 10:.0f}", "--own-text", str(own_tokens))
        limits += ("--seqlen", str(seqlen))
        command = python("-m", "benchmarks.gpu_run", "training", *where, *limits, *chosen)
        session.run([Stage("training", int(session.left()), command)])
    lines, _ = read_lines(session.results)
    click.echo("\n" + trained(lines))


@main.command(hidden=True)
@out_option
@carry_option
@device_option
@click.option("--seconds", type=float)
@click.option("--own-text", "own_tokens", type=int)
@click.option("--seqlen", type=int)
@click.option("--set", "settings", multiple=True)
def training(out, carry, device, seconds, own_tokens, seqlen, settings) -> None:
    """The process that trains; `train` starts it."""
    from benchmarks.gpu import training as trains
    from w2a4.cli.options import parse_settings

    trains.train(carry, out, device, seconds, own_tokens, seqlen, parse_settings(settings))


@main.command()
@click.argument("model")
@click.option("--from", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path),
              required=True, help="Where the trained-N.safetensors are.")  # fmt: skip
@click.option("--out", type=folder_type, required=True, help="A checkpoint that transformers loads.")
def restore(model: str, folder: Path, out: Path) -> None:
    """Put small checkpoints that came back into the MODEL that was trained."""
    from benchmarks.gpu import small
    from w2a4.errors import W2A4Error

    try:
        step = small.restore(model, folder, out)
    except W2A4Error as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: step {step}")


@main.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def table(results: Path) -> None:
    """Stages, targets, what is missing or wrong, and the surprises."""
    click.echo(summary(results))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    main()
