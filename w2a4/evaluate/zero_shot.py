"""Tasks of lm-eval, on models in memory, side by side: what `w2a4 eval --tasks` measures.

A task is a name that lm-eval knows, whose data it downloads, or a YAML file, whose data may be local.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import W2A4Error
from ..format.files import read_text
from .quality import ENDS, RESAMPLES, table


def check_tasks(tasks: Sequence[str]) -> Any:
    """lm-eval's task manager, if it knows these tasks; before a model is loaded.

    Raises:
        W2A4Error: lm-eval is not installed, a file is missing, or no task has that name.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise W2A4Error(f"--tasks needs lm-eval ({error}): pip install lm-eval") from None
    manager = TaskManager()
    for task in tasks:
        if _is_file(task):
            if not Path(task).is_file():
                raise W2A4Error(f"task file {task!r} does not exist; give a YAML file of lm-eval, or a name")
            _loaded(task)
        elif not manager.match_tasks([task]):
            near = [name for name in manager.all_tasks if task.lower() in name.lower()][:5]
            raise W2A4Error(
                f"lm-eval has no task {task!r}; "
                + (f"nearest are {', '.join(near)}" if near else "`lm_eval ls tasks` lists them")
            )
    return manager


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def zero_shot(
    model: Any, tokenizer: Any, tasks: Sequence[str], manager: Any, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Measure a model on tasks.

    Args:
        tasks: names or YAML files.
        manager: of `check_tasks`.
        limit: documents of each task; None is all.

    Returns:
        by task: documents, and `metrics`, by name (`NAME,FILTER` where the task has filters), each with
        `value` and `scores`, one a document (None where the metric is no mean of those).

    Raises:
        W2A4Error: the task's data cannot be had, or the task is not one that lm-eval can run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    with _quiet():
        try:
            found = simple_evaluate(
                model=wrapped, tasks=[_loaded(task) for task in tasks], task_manager=manager, limit=limit,
                bootstrap_iters=0, log_samples=True,
            )  # fmt: skip
        except W2A4Error:
            raise
        except Exception as error:  # what a task says wrongly shows in any part of lm-eval
            first = (str(error).strip().splitlines() or [""])[0]
            kind = type(error).__name__
            raise W2A4Error(f"lm-eval cannot run {', '.join(tasks)}: {kind}: {first}") from None
    return {
        task: {
            "documents": len({sample["doc_id"] for sample in samples}),
            "metrics": dict(_metrics(found["results"][task], samples)),
        }
        for task, samples in found["samples"].items()
    }


def _loaded(task: str) -> Any:
    """What `simple_evaluate` takes for a task: a name, or the mapping in a file.

    Raises:
        W2A4Error: the file is no task, or has code or includes.
    """
    if not _is_file(task):
        return task
    try:
        config = yaml.safe_load(read_text(Path(task)))
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise W2A4Error(
            f"task file {task!r} cannot be read ({first}); a task with code runs by lm_eval --include_path"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("task"), str) or "include" in config:
        raise W2A4Error(
            f"task file {task!r}: give one whole task of lm-eval, a mapping with its name under `task`, "
            "without `include`"
        )
    options = config.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        options["data_files"] = _beside(Path(task).parent, options["data_files"])
    return config


def _beside(folder: Path, files: Any) -> Any:
    """Names of files, single, in a list or by split, as they lie in the folder of the YAML file."""
    if isinstance(files, dict):
        return {split: _beside(folder, names) for split, names in files.items()}
    if isinstance(files, list):
        return [_beside(folder, name) for name in files]
    return str(folder / files) if isinstance(files, str) and "://" not in files else files


def _metrics(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for key, value in results.items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        mine = sorted((s for s in samples if s["filter"] == kind), key=lambda sample: sample["doc_id"])
        scores = [sample.get(name) for sample in mine]
        numbers = bool(scores) and all(isinstance(score, (int, float)) for score in scores)
        # A perplexity's documents have log-likelihoods, and there are metrics of all documents together.
        mean = numbers and math.isclose(sum(scores) / len(scores), value, rel_tol=1e-6, abs_tol=1e-9)
        yield (
            name if kind == "none" else key,
            {"value": float(value), "scores": [float(score) for score in scores] if mean else None},
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval says on INFO what it does at every turn."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def interval(scores: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the mean over documents; None with fewer than two."""
    if len(scores) < 2:
        return None, None
    values = torch.tensor(scores, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = values[drawn].mean(1).quantile(torch.tensor(ENDS, dtype=torch.float64)).tolist()
    return low, high


def text(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A table for people; of models behind the first one, the difference to it on the same documents too."""
    rows = []
    (first, base), *_ = models.items()
    for task, about in base.items():
        for metric in about["metrics"]:
            for name, measured in models.items():
                here = measured[task]["metrics"][metric]
                row = {"task": task, "metric": metric, "model": name, "value": f"{here['value']:.4g}"}
                row["95 %"] = _range(here["scores"])
                if len(models) > 1:
                    other = about["metrics"][metric]["scores"]
                    pairs = zip(here["scores"] or [], other or [], strict=True)
                    row["difference, 95 %"] = None if name == first else _range([a - b for a, b in pairs])
                row["documents"] = str(measured[task]["documents"])
                rows.append(row)
    return table(rows, left=3)


def _range(scores: Sequence[float] | None) -> str | None:
    low, high = interval(scores or [])
    return None if low is None else f"{low:.3f} to {high:.3f}"
