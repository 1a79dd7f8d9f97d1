"""The command `w2a4`: parse, call, print. Other modules compute what it prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0, 1 for an error a user can act on
(one line, no traceback), 2 for wrong usage, 130 for Ctrl-C. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import TrainingError
from ..format import directories, files
from ..hub import sources
from . import evaluation, options
from .chat import chat, streamer
from .doctor import doctor
from .group import Group
from .verify import verify


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from .. import __version__, ops

        click.echo(f"w2a4 {__version__}\n{ops.build_info()}")
        ctx.exit()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and what was built, and exit.",
)
def main() -> None:
    """Language models with 2-, 3- or 4-bit weights, 4-bit activations and a 4-bit KV cache.

    MODEL is a transformers directory, a hub id, or a .gguf file; DIR is what
    `w2a4 quantize` or `w2a4 train` wrote.
    """


@main.command()
@options.model
@options.out
@options.recipe("w4a4kv4", "Accurate 2-bit weights need training: `w2a4 train`.")
@options.settings
@options.calib
@options.evaluation
@click.option(
    "--resume",
    is_flag=True,
    help="Keep finished layers beside DIR; the same command resumes after an interruption.",
)
@options.device
@options.page
@options.json_file
def quantize(
    model: str,
    out: Path,
    recipe: str,
    settings: Sequence[str],
    calib: str,
    eval_texts: Sequence[str],
    eval_windows: int,
    resume: bool,
    device: str | None,
    page: Path | None,
    json_file: Path | None,
) -> None:
    """Rotate, quantise and pack MODEL into a new directory."""
    _refuse_existing(out)
    evaluation.check_page(page)
    sources.check_source(model)
    parsed = options.parse_recipe(recipe, settings)
    from ..evaluate import data, report
    from ..ops import devices
    from ..quantization import job as pipeline

    data.load_text(calib, "calibration")  # reports a missing file before the model is loaded
    score = evaluation.scorer(eval_texts, eval_windows, {"calibration": calib})
    chosen = devices.pick_device(device)
    # Layers move to the GPU one at a time, unless a step needs the whole model there.
    whole = score is not None or parsed.rotation.to_learn
    loaded, tokenizer = pipeline.load_model(model, device=chosen if whole else "cpu")
    before = score and score(loaded, tokenizer)
    partial = files.beside(out, "partial") if resume else None
    made = pipeline.quantize(loaded, tokenizer, parsed, calibration=calib, resume=partial, device=chosen)
    made.source = report.source_name(model)
    if score is not None:
        made.add_evaluation(before, score(loaded, tokenizer))
    pipeline.save(loaded, tokenizer, out)
    if partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
    summary = report.checkpoint_summary(out)
    click.echo(report.summary_text(summary) + "\n")
    click.echo(report.layers_table(made) + "\n")
    evaluation.show(made)
    click.echo(f"written to {out} in {made.seconds:.0f} s")
    options.write_result(json_file, {**made.to_dict(), "out": str(out), "summary": summary})
    evaluation.write_page(page, loaded, tokenizer, made, summary)


@main.command()
@options.model
@options.out
@options.recipe("w2a4kv4-rcp-quick", "Its `training` part has the settings.")
@options.settings
@options.calib
@click.option(
    "--data",
    metavar="FILE|general|builtin|self",
    help="Text to train on: overrides the recipe's training.data.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    metavar="N",
    help="Minutes to train: overrides training.minutes.",
)
@options.evaluation
@options.device
@options.page
@options.json_file
def train(
    model: str,
    out: Path,
    recipe: str,
    settings: Sequence[str],
    calib: str,
    data: str | None,
    minutes: float | None,
    eval_texts: Sequence[str],
    eval_windows: int,
    device: str | None,
    page: Path | None,
    json_file: Path | None,
) -> None:
    """Rotate MODEL, train it quantised against itself, and pack it into a new directory.

    Checkpoints are kept beside DIR until DIR is written; the same command resumes after an interruption.
    The text that the teacher writes (`--data self`) stays beside DIR; give it as `--data FILE` to reuse it.
    `--eval` needs one process; with the route end_to_end it also measures at every checkpoint.
    `torchrun --nproc-per-node N -m w2a4.cli train …` divides the work among N processes.
    """
    _refuse_existing(out)
    evaluation.check_page(page)
    sources.check_source(model)
    given = {"training.data": data, "training.minutes": minutes}
    parsed = options.parse_recipe(recipe, settings).override(
        **{k: v for k, v in given.items() if v is not None}
    )
    from ..evaluate import report
    from ..ops import devices
    from ..quantization import job as pipeline
    from ..train import distributed
    from ..train.data import check_text, fitted_texts
    from ..train.run import GENERATIONS, train

    check_text(parsed)
    score = evaluation.scorer(eval_texts, eval_windows, fitted_texts(parsed, calib))
    if score is not None and distributed.world() > 1:
        raise TrainingError("--eval runs in one process; measure DIR afterwards with w2a4 eval")
    chosen = devices.pick_device(device)
    loaded, tokenizer = pipeline.load_model(model, device=chosen if score is not None else "cpu")
    before = score and score(loaded, tokenizer)
    work = files.beside(out, "training")
    try:
        train(loaded, tokenizer, parsed, work, calib, device=chosen, score=score)
    except TrainingError:
        if distributed.is_main():
            raise
        # A launcher ends all processes when one exits; the main one must print its error first.
        time.sleep(5)
        raise click.exceptions.Exit(1) from None
    finally:
        distributed.leave()
    if not distributed.is_main():
        return
    made = loaded.w2a4_report
    made.source = report.source_name(model)
    if score is not None:
        made.add_evaluation(before, score(loaded, tokenizer))
    pipeline.save(loaded, tokenizer, out)
    summary = report.checkpoint_summary(out)
    click.echo(report.summary_text(summary) + "\n")
    click.echo(report.training_text(made.training))
    evaluation.show(made)
    written = work / GENERATIONS
    if written.is_file():
        click.echo(f"the teacher's text: {written.replace(out.with_name(f'{out.name}.{GENERATIONS}'))}")
    shutil.rmtree(work, ignore_errors=True)
    click.echo(f"written to {out}")
    options.write_result(json_file, {**made.to_dict(), "out": str(out)})
    evaluation.write_page(page, loaded, tokenizer, made, summary)


@main.command()
@options.model
@options.out
@options.settings
@options.calib
@options.dtype
@options.json_file
def rotate(
    model: str, out: Path, settings: Sequence[str], calib: str, dtype: str | None, json_file: Path | None
) -> None:
    """Fold rotations into MODEL and write it for other quantisers, which need no w2a4.

    R1 and R2 are random Hadamards unless --set says otherwise; R3 and R4, which act at run time, are none.
    """
    _refuse_existing(out)
    sources.check_source(model)
    parsed = options.parse_recipe("w4a4kv4", ["rotation.r3=none", "rotation.r4=none", *settings])
    from ..evaluate import data
    from ..quantization.export import check_exportable, export_rotated

    check_exportable(parsed, options.parse_settings(settings))
    data.load_text(calib, "calibration")  # reports a missing file before the model is loaded
    loaded, tokenizer = options.load_model(model, dtype, "cpu")
    export_rotated(loaded, tokenizer, parsed, out, calib)
    click.echo(f"written to {out}; it is a model of transformers, and computes what {model} does")
    options.write_result(json_file, {"out": str(out), "rotation": dataclasses.asdict(parsed.rotation)})


@main.command()
@click.argument("directory", metavar="DIR")
@options.out
@click.option("--for-vllm", is_flag=True, help="Keep R4, which vLLM applies and transformers does not.")
@click.option(
    "--dtype",
    type=click.Choice(("float16", "float32")),
    default="float16",
    show_default=True,
    help="Dtype of scales and of what is not packed.",
)
@options.json_file
def export(directory: str, out: Path, for_vllm: bool, dtype: str, json_file: Path | None) -> None:
    """Write DIR, of 4-bit weights, as compressed-tensors, which transformers and vLLM read without w2a4.

    The weights stay as they are; activations get that format's quantiser, and the cache 16 bits.
    """
    _refuse_existing(out)
    sources.check_source(directory)
    import torch

    from ..hub.compressed_tensors import check_checkpoint, export_compressed_tensors

    manifest = check_checkpoint(directory, for_vllm)
    loaded, tokenizer = options.load_model(directory, None, "cpu")
    export_compressed_tensors(loaded, tokenizer, out, getattr(torch, dtype), for_vllm)
    readers = "vLLM" if manifest.r4 is not None else "transformers (with compressed-tensors) and vLLM"
    click.echo(f"written to {out}, for {readers}")
    options.write_result(json_file, {"out": str(out), "dtype": dtype, "for": readers})


@main.command("learn-rotation")
@click.argument("model")
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    callback=options.writable,
    metavar="FILE",
    help="New .safetensors file; a report and a plot of the loss are written beside it.",
)
@options.recipe("w4a4kv4", "The rotations are learned for it.")
@options.settings
@options.calib
@click.option(
    "--resume",
    is_flag=True,
    help="Keep the state beside FILE; the same command resumes after an interruption.",
)
@options.device
@options.json_file
def learn_rotation(
    model: str,
    out: Path,
    recipe: str,
    settings: Sequence[str],
    calib: str,
    resume: bool,
    device: str | None,
    json_file: Path | None,
) -> None:
    """Learn the rotations R1 and R2 of MODEL; then quantise with them.

    Learns those that the recipe sets to `learned`, or both if it sets neither.
    """
    sources.check_source(model)
    parsed = options.parse_recipe(recipe, settings)
    from ..evaluate import data, quality
    from ..ops import devices
    from ..quantization import job as pipeline
    from ..quantization.rotation.learn import learn_rotation

    data.load_text(calib, "calibration")  # reports a missing file before the model is loaded
    loaded, tokenizer = pipeline.load_model(model, device=devices.pick_device(device))
    made = learn_rotation(loaded, tokenizer, parsed, calib, out, resume=resume)
    click.echo(
        f"loss {quality.number(made.before)} before, {quality.number(made.after)} after {len(made.losses)} "
        f"steps in {made.seconds:.0f} s; max |RᵀR - I| {max(made.final.values()):.1e}; plot {made.plot}"
    )
    kinds = [f"--set rotation.r{n}=learned" for n in (1, 2) if any(k.startswith(f"R{n}") for k in made.final)]
    click.echo(f"written to {out}; use it with w2a4 quantize {' '.join(kinds)} --set rotation.learned={out}")
    options.write_result(json_file, {**dataclasses.asdict(made), "out": str(out)})


main.add_command(evaluation.evaluate_command)


@main.command()
@click.argument("model", metavar="DIR")
@click.option("--prompt", required=True, metavar="TEXT", help="Text to continue.")
@options.new_tokens
@options.sampling
@options.dtype
@options.device
@options.json_file
def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    sampling: dict[str, Any],
    dtype: str | None,
    device: str | None,
    json_file: Path | None,
) -> None:
    """Continue a prompt."""
    from ..evaluate import perplexity as evaluate
    from ..runtime import engine

    chosen = engine.Sampling(**sampling) if sampling else None
    loaded, tokenizer = options.load_model(model, dtype, device)
    click.echo(prompt, nl=False)
    result = evaluate.generation_speed(loaded, tokenizer, prompt, max_new_tokens, streamer(tokenizer), chosen)
    click.echo(
        f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s, "
        f"peak memory {result['peak_memory_mb']:.0f} MB",
        err=True,
    )
    options.write_result(json_file, result)


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@options.json_file
def info(directory: Path, json_file: Path | None) -> None:
    """Show a checkpoint's bits a weight, bytes by part, rotations, provenance and what was measured of it."""
    from ..evaluate import report

    summary = report.checkpoint_summary(directory)
    click.echo(report.summary_text(summary))
    if summary["quantized"] and (directory / "report.json").is_file():
        made = report.Report.from_json(directory / "report.json")
        click.echo(f"\n{report.layers_table(made)}\n")
        evaluation.show(made)
        summary["evaluation"] = made.evaluation
    options.write_result(json_file, summary)


main.add_command(chat)
main.add_command(verify)
main.add_command(doctor)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("w2a4-demo"),
    callback=options.new_directory,
    show_default=True,
    metavar="DIR",
    help="For the checkpoints.",
)
@click.option("--model", metavar="MODEL", help="Instead of SmolLM2-135M-Instruct.")
@options.windows(4)
@click.option(
    "--seqlen",
    type=options.count(2),
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens a window.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoints of an earlier demo.")
@options.json_file
def demo(
    out: Path, model: str | None, windows: int, seqlen: int, overwrite: bool, json_file: Path | None
) -> None:
    """Quantise a small model, train it at 2 bits, reload, evaluate and compare.

    Each step is a command of w2a4 in its own process, so that its peak memory is that of the step alone.
    """
    from . import demo as steps

    _refuse_existing(out, "or replace an earlier demo with --overwrite", filled=overwrite)
    options.write_result(json_file, {"rows": steps.run(out, model, windows, seqlen)})


def _refuse_existing(out: Path, advice: str = "or remove it first", filled: bool = False) -> None:
    directories.check_out_dir(out, f"give another --out, {advice}", filled)


if __name__ == "__main__":
    main()
