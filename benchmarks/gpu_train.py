"""A model trained to W2A4KV4 on a GPU, and what decides how good it gets: commands of under ten minutes each.

    python -m benchmarks.gpu_train MODEL --json FILE [--text FILE] [--ablations] [--rotations]
        [--set key=value ...] [--device cuda] [--dry-run]

The first run builds w2a4 and trains `w2a4kv4-rcp` on what the teacher writes, with perplexity on the built-in
text before, at every checkpoint and after, and on the text of --text. It shows what the full-precision model,
the GPTQ fit and the trained model write, and times a step. The teacher's text stays in build/: with it
--ablations compares recipes at equal tokens. --rotations compares learned rotations with ten random ones.
Repeat a command that ran out of time: training and comparisons go on. `--set` reaches every recipe.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from benchmarks import stages
from benchmarks.files import commit, now, write_json
from benchmarks.stages import PARTS, Stage, python
from w2a4.devices import pick_device
from w2a4.errors import W2A4Error

#: What all models continue.
PROMPT = "Python is a programming language that"
TRAINED, FITTED = PARTS / "trained", PARTS / "gptq"
#: What the teacher wrote, and as many of its documents as a short run reads: 1.4 million tokens, where
#: 150 steps of 8 x 1024 take 1.2.
WRITTEN, SHORT, DOCUMENTS = PARTS / "trained.generations.jsonl", PARTS / "short.jsonl", 3000
#: A GPU has the memory; the recipe is made for models of any size.
AT_ONCE = ("--set", "training.micro_batch=-1", "--set", "training.gradient_checkpointing=false")
#: Rows of a grid that share the GPU.
WORKERS = 4
#: Seconds for a whole command.
LIMIT = 570


def training(model: str, text: str | None, device: str, settings: list[str]) -> list[Stage]:
    """The full run, the fit it begins with, and both beside full precision."""
    make = ("--recipe", "w2a4kv4-rcp", *AT_ONCE, *settings, "--device", device)
    watch = ("--eval", "builtin", "--eval-windows", "8")
    plan = [
        command(
            "train", LIMIT, "train", model, "--out", str(TRAINED), *make, *watch, repeated="skip", needed=True
        ),
        command("gptq", 90, "quantize", model, "--out", str(FITTED), *make, *watch, repeated="skip"),
    ]
    for name, path in (("full", model), ("gptq", str(FITTED)), ("trained", str(TRAINED))):
        where = (path, "--device", device)
        plan.append(
            command(f"{name}_writes", 30, "generate", *where, "--prompt", PROMPT, "--max-new-tokens", "64")
        )
        if text is not None:
            plan.append(command(f"{name}_on_text", 30, "eval", *where, "--text", text, "--windows", "8"))
    size = ("30", "8192") if device != "cpu" else ("1", "64")
    step = ("-m", "benchmarks.bench_training", "--layers", size[0], "--tokens", size[1], "--device", device)
    return [*plan, python("step", 60, *step, part=True)]


def command(name: str, budget: int, *arguments: str, **rest: Any) -> Stage:
    return python(name, budget, "-m", "w2a4.cli", *arguments, part=True, **rest)


def comparisons(
    model: str, device: str, settings: list[str], ablations: bool, rotations: bool
) -> list[Stage]:
    """Cells of the grids, some at a time."""
    ran = ("-m", "benchmarks.accuracy", "--model", model, "--device", device, "--workers", str(WORKERS))
    grids = []
    if ablations:
        grids.append(("ablations", "--grid", "ablations", "--set", f"training.data={SHORT}"))
    if rotations:
        grids.append(("hadamard", "--grid", "rotations", "--rows", "hadamard"))
        grids.append(("learned", "--grid", "rotations", "--rows", "learned", "--seeds", "0,1,2"))
    return [
        python(name, LIMIT, *ran, *which, *settings, part=True, repeated="go on") for name, *which in grids
    ]


def shorten(written: Path, short: Path) -> None:
    """Keep the first `DOCUMENTS` lines."""
    if not written.is_file():
        raise click.ClickException(
            f"{written} is not there: run this first without --ablations, until it has trained the model"
        )
    with written.open(encoding="utf-8") as lines, short.open("w", encoding="utf-8") as out:
        out.writelines(itertools.islice(lines, DOCUMENTS))


def summary(result: dict[str, Any]) -> str:
    """Stages, perplexities, the rows of the comparisons, and what the models write."""
    parts, lines = result["parts"], [stages.table(result["stages"])]
    for name in ("train", "gptq"):
        for when, found in (parts.get(name, {}).get("evaluation") or {}).items():
            lines.append(f"{name}, perplexity {when}: {found['perplexity']:.2f}")
    curve = parts.get("train", {}).get("training", {}).get("perplexities", [])
    lines += [tabulate(curve, ("step", "perplexity"), floatfmt=".2f")] * bool(curve)
    for name, part in parts.items():
        if name.endswith("_on_text") and part:
            lines.append(f"{name}: {part['perplexity']:.2f}")
        if name.endswith("_writes") and part:
            lines.append(f"{name}: {part['prompt']}{part['text']}")
        if "cells" in part:
            rows = [(row["row"], row["mean"], row["spread"]) for row in part["summary"]]
            lines.append(tabulate(rows, (name, "ratio", "spread"), floatfmt=".3f"))
    for row in parts.get("step", {}).get("rows", []):
        lines.append(f"step, {row['step']}: {row['ratio']:.2f} times, memory {row['memory_ratio']:.2f} times")
    return "\n\n".join(lines)


@click.command(help="\b\n" + __doc__)
@click.argument("model")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
@click.option("--text", help="Another text to evaluate on.")
@click.option("--ablations", is_flag=True, help="Recipes at equal tokens instead.")
@click.option("--rotations", is_flag=True, help="Learned and random rotations instead.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A recipe field.")
@click.option("--device", default="cuda", show_default=True, help="Or cpu, to rehearse.")
@click.option("--dry-run", is_flag=True, help="Print the stages and do nothing.")
def main(model, path, text, ablations, rotations, settings, device, dry_run):
    chosen = [word for setting in settings for word in ("--set", setting)]
    compare = ablations or rotations
    plan = (
        comparisons(model, device, chosen, ablations, rotations)
        if compare
        else training(model, text, device, chosen)
    )
    plan = [*([stages.build()] if device != "cpu" else []), *plan]
    if dry_run:
        print(stages.plan_table(plan))
        return
    if path is None:
        raise click.ClickException("--json FILE is missing: results go there as they come")
    try:
        pick_device(device)
    except W2A4Error as error:
        raise click.ClickException(str(error)) from None
    if ablations:
        shorten(WRITTEN, SHORT)
    outcomes = stages.run(plan, lambda so_far: write_json(path, merged(so_far, plan)), LIMIT)
    print(summary(merged(outcomes, plan)))
    if any(outcome.status not in ("ok", "skipped") for outcome in outcomes):
        raise click.ClickException(f"not all stages ended well; their output is in {PARTS}")


def merged(outcomes: list[stages.Outcome], plan: list[Stage]) -> dict[str, Any]:
    return {
        "meta": {"commit": commit(), "date": now()},
        "stages": [asdict(outcome) for outcome in outcomes],
        "parts": stages.parts(plan),
    }


if __name__ == "__main__":
    main()
