"""The command `w2a4 eval`, and what `quantize` and `train` do with `--eval`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..hub import sources
from . import options

if TYPE_CHECKING:
    from ..evaluate.data import TextSource
    from ..evaluate.report import Report


@click.command("eval")
@click.argument("model")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE|general|builtin",
    help="Repeatable: .txt, .jsonl (field text), .parquet (column text), or hub:NAME[,CONFIG][:SPLIT]. "
    f"{options.DEFAULT_TEXTS}",
)
@click.option(
    "--reference",
    metavar="MODEL",
    help="The full-precision model, measured after MODEL on the same windows.",
)
@click.option(
    "--seqlen",
    type=options.count(2),
    default=2048,
    show_default=True,
    metavar="N",
    help="Tokens a window.",
)
@options.windows()
@click.option(
    "--tasks",
    metavar="NAME|FILE.yaml,…",
    help="Tasks of lm-eval instead of texts: names, or YAML files of tasks on local data.",
)
@click.option("--limit", type=options.count(1), metavar="N", help="Documents of each task; default all.")
@options.dtype
@options.device
@options.page
@options.json_file
def evaluate_command(
    model: str,
    texts: Sequence[str],
    reference: str | None,
    seqlen: int,
    windows: int,
    tasks: str | None,
    limit: int | None,
    dtype: str | None,
    device: str | None,
    page: Path | None,
    json_file: Path | None,
) -> None:
    """Perplexity of MODEL or DIR on texts, with an interval, and its ratio to full precision.

    With --tasks, the metrics of those tasks instead.
    """
    from ..evaluate import data, overlap, perplexity, quality, report

    if tasks is not None and texts:
        raise click.UsageError("give --text or --tasks, one at a time")
    given = click.get_current_context().get_parameter_source
    if tasks is not None and any(given(name) != ParameterSource.DEFAULT for name in ("seqlen", "windows")):
        raise click.UsageError("--seqlen and --windows are of texts; for --tasks give --limit")
    if tasks is not None and page is not None:
        raise click.UsageError("--report is of texts; for --tasks give --json")
    check_page(page)
    if limit is not None and tasks is None:
        raise click.UsageError("--limit is of --tasks; for texts give --windows")
    for source in (model, reference):
        if source is not None:
            sources.check_source(source)
    if tasks is not None:
        named = [task.strip() for task in tasks.split(",") if task.strip()]
        _evaluate_tasks(model, reference, named, limit, dtype, device, json_file)
        return
    chosen = chosen_texts(texts)
    for text in chosen:
        data.load_text(text, "evaluation")  # reports a missing file before the model is loaded
    measure = functools.partial(perplexity.evaluate, texts=chosen, seqlen=seqlen, windows=windows)
    loaded, tokenizer = options.load_model(model, dtype, device)
    if reference is not None:
        from ..hub.loading import load_tokenizer

        perplexity.check_same_tokens(tokenizer, load_tokenizer(reference), chosen)
    made: Report | None = getattr(loaded, "w2a4_report", None)
    prefix = prefix_of(loaded)
    fitted_on = made.fitted_on if made is not None else {}
    overlap.warn_of_known(chosen, fitted_on)
    measured = quality.marked(measure(loaded, tokenizer), fitted_on)
    name, seconds = report.source_name(model), sum(text["seconds"] for text in measured)
    result: dict[str, Any] = {
        "model": name, "texts": measured, "reference": None, "ratios": None,
        "tokens_per_second": sum(text["tokens"] for text in measured) / seconds,
        "peak_memory_mb": max(text["peak_memory_mb"] for text in measured),
    }  # fmt: skip
    models = {name: measured}
    seen = None if page is None else _spreads(loaded, tokenizer)
    if reference is not None:
        del loaded  # its memory is free for the other model
        original = options.load_model(reference, dtype, device)
        full = measure(*original)
        result["reference"] = {"model": report.source_name(reference), "texts": full}
        result["ratios"] = quality.evaluation(full, measured, fitted_on)["ratios"]
        models = {quality.FULL_PRECISION: full}
        if prefix:
            models[quality.FULL_WITH_PREFIX] = measure(*original, prefix=prefix)
            result["reference"]["behind_prefix"] = models[quality.FULL_WITH_PREFIX]
        models[name] = measured
    click.echo(quality.quality_text(models))
    if made is not None and reference is None:
        click.echo("To have full precision beside it, give --reference MODEL.")
    speed = f"{result['tokens_per_second']:.0f} tokens/s, peak memory {result['peak_memory_mb']:.0f} MB"
    click.echo(speed)
    if page is not None:
        from ..evaluate import page as pages

        _write_page(page, pages.page(f"{name}: evaluation", models, seen, made, facts={"evaluation": speed}))
    options.write_result(json_file, result)


def _evaluate_tasks(
    model: str,
    reference: str | None,
    tasks: Sequence[str],
    limit: int | None,
    dtype: str | None,
    device: str | None,
    json_file: Path | None,
) -> None:
    from ..evaluate import quality, report, zero_shot

    manager = zero_shot.check_tasks(tasks)
    measured = {}
    for source in (model,) if reference is None else (reference, model):
        name = quality.FULL_PRECISION if source == reference else report.source_name(source)
        measured[name] = zero_shot.zero_shot(
            *options.load_model(source, dtype, device), tasks, manager, limit
        )
    click.echo(zero_shot.text(measured))
    options.write_result(json_file, {"tasks": measured})


def prefix_of(model: Any) -> tuple[int, ...]:
    """Ids of the exact prefix of a packed model; none of any other."""
    manifest = getattr(getattr(model.config, "quantization_config", None), "manifest", None)
    return getattr(manifest, "prefix", ())


def chosen_texts(given: Sequence[str]) -> list[TextSource]:
    """The texts that options name; an empty name, or none at all, is `EVALUATION_TEXTS`."""
    from ..evaluate.perplexity import EVALUATION_TEXTS

    named = [EVALUATION_TEXTS if text == "" else (text,) for text in given or ("",)]
    return list(dict.fromkeys(text for texts in named for text in texts))


def scorer(
    texts: Sequence[str], windows: int, fitted: Mapping[str, TextSource]
) -> Callable[..., list[dict[str, Any]]] | None:
    """A function that measures a model and tokenizer on the texts of `--eval`; None without that option.

    Args:
        fitted: what the model will be fitted on, see `overlap.warn_of_overlap`.
    """
    if not texts:
        return None
    from ..evaluate import overlap, perplexity

    chosen = chosen_texts(texts)
    overlap.warn_of_overlap(chosen, fitted)  # also reports a missing file before the model is loaded
    return functools.partial(perplexity.evaluate, texts=chosen, windows=windows)


def check_page(page: Path | None) -> None:
    """Whether `--report` can be heeded, before the work."""
    if page is not None:
        from ..evaluate.page import check_pictures

        check_pictures()


def write_page(
    page: Path | None, model: Any, tokenizer: Any, made: Report, summary: Mapping[str, Any]
) -> None:
    """Write what `--report` of `quantize` and `train` asks for, if it does."""
    if page is None:
        return
    from ..evaluate import page as pages
    from ..evaluate import report

    title = f"{made.source or summary['path']}, {made.recipe.get('name')}"
    seen = _spreads(model, tokenizer)
    _write_page(page, pages.page(title, report.measured_of(made), seen, made, summary))


def _spreads(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Of a family's model on text that is not fitted; nothing of another one."""
    from .. import arch
    from ..evaluate import data
    from ..evaluate.spreads import TOKENS, spreads

    if getattr(model.config, "model_type", None) not in arch.names():
        return []
    ids, _ = data.token_stream(tokenizer, data.load_text("general", "evaluation")[: 12 * TOKENS])
    return spreads(model, ids)


def _write_page(path: Path, text: str) -> None:
    from ..format.files import write_atomically

    write_atomically(path, text)
    click.echo(f"report: {path}")


def show(made: Report) -> None:
    """Print what `--eval` measured, if anything."""
    from ..evaluate import report

    if made.evaluation:
        click.echo(f"{report.quality_of(made)}\n")
