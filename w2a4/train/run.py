"""`train`: from a float model to a packed one that was trained as it computes."""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import TrainingError
from ..evaluate.data import TextSource, check_known, token_stream
from ..evaluate.text_checks import warn_of_unknown_text
from ..format.files import read_text, write_json
from ..ops.devices import peak_memory_mb
from ..quantization import job as pipeline
from ..quantization.resume import fingerprint
from ..recipe import Recipe
from . import data, distributed
from .block import BlockTrainer
from .checkpoints import last_checkpoint, remove_partial, trained_state
from .generations import write_generations
from .prepare import check_trainable, convert, prepare, start_recipe
from .teacher import CachedTeacher, PrefixedTeacher, write_top_k
from .trainer import PERPLEXITIES, QATTrainer, training_arguments

#: The text that the teacher writes, in the directory of the run.
GENERATIONS = "generations.jsonl"

#: The layers' errors on the route `block`, beside the finished layers.
ERRORS = "errors.json"


def train(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe | str,
    work: str | Path,
    calibration: TextSource = "general",
    progress: bool = True,
    device: torch.device | None = None,
    score: Callable[..., list[dict[str, Any]]] | None = None,
) -> nn.Module:
    """Prepare, train and pack a model, in place.

    Args:
        model: of a family in `arch`, float; its full-precision copy is the teacher.
        recipe: with `training`, see `recipe.Training`.
        work: a directory for the packed fit and the checkpoints, shared by all processes. If it holds an
            interrupted run of the same model, recipe and text, that run is resumed. Remove it yourself
            when the model is saved.
        calibration: text for the fit that training begins with; the training text is
            `recipe.training.data`.
        progress: show bars.
        device: where to train; None is the model's own. The model moves there; on the route `block` each
            layer does while it trains.
        score: `(model, tokenizer, progress) -> [{"perplexity": …}, …]`, one a text; on the route
            `end_to_end` called before the first step and at every checkpoint, under training's autocast. For
            one process.

    Returns:
        the same model, packed; `model.w2a4_report.training` has losses, tokens and minutes, and with `score`
        `perplexities`, pairs of a step and the perplexities after it, one a text. The main one of several
        processes packs the model; in the others the model is not usable any more.

    Raises:
        W2A4Error: as `prepare`; `TrainingError` for a loss that explodes, or a `work` of another run.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    work = Path(work)
    # Before the directory is claimed, or the corrected recipe would be refused as another one.
    check_trainable(model, recipe)
    if recipe.training.route == "block":
        if distributed.world() > 1:
            raise TrainingError(
                f"training.route=block runs in one process; there are {distributed.world()}: start one, or "
                "set training.route=end_to_end"
            )
        return _train_blocks(model, tokenizer, recipe, work, calibration, progress, device)
    model.to(device or model.device)
    return _train_whole(model, tokenizer, recipe, work, calibration, progress, score)


def _train_blocks(
    model, tokenizer, recipe: Recipe, work: Path, calibration, progress: bool, device
) -> nn.Module:
    start, begun = work / "start", time.perf_counter()
    trainer = BlockTrainer(recipe, recipe.training.steps, start / ERRORS)
    report = pipeline.quantize(
        model, tokenizer, start_recipe(recipe), calibration, progress, start, trainer, device
    )
    report.recipe = recipe.override(rotation=report.recipe["rotation"]).to_dict()
    report.training = {
        "errors": {str(index): errors for index, errors in trainer.errors.items()},
        "steps": recipe.training.steps * len(model.model.layers),
        "minutes": round((time.perf_counter() - begun) / 60, 2),
        "text": report.calibration,
        "peak_memory_mb": report.peak_memory_mb,
    }
    return model


def _train_whole(
    model, tokenizer, recipe: Recipe, work: Path, calibration, progress: bool, score
) -> nn.Module:
    distributed.join(model.device)
    training, main, world = recipe.training, distributed.is_main(), distributed.world()
    progress = progress and main
    args = training_arguments(
        training, work / "checkpoints", world, recipe.rotation.seed, progress, model.device
    )
    set_up = functools.partial(_set_up, model, tokenizer, recipe, work, calibration, progress)
    windows, teacher, described = distributed.main_first(set_up)
    trained = model if world == 1 else distributed.copy_to_shard(model)
    checkpoint = last_checkpoint(work / "checkpoints")
    args.eval_on_start = score is not None and checkpoint is None
    perplexities = None
    if score is not None:
        perplexities = lambda: [one["perplexity"] for one in score(model, tokenizer, progress=False)]  # noqa: E731
    trainer = QATTrainer(trained, teacher, training, args, perplexities, train_dataset=windows)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    facts = _facts(trainer, described, model.device)
    if trained is not model:
        state = trained_state(trainer.model, keep=main)
        if not main:
            return model
        for name in state:
            if name.endswith(".bias"):  # packed layers add it in the model's dtype
                state[name] = state[name].to(model.get_parameter(name).dtype)
        model.load_state_dict(state, strict=False, assign=True)
    return convert(model, facts)


def _facts(trainer: QATTrainer, described: str, device: torch.device) -> dict[str, Any]:
    """What the report says about the training."""
    history, training, steps = trainer.state.log_history, trainer.training, trainer.state.global_step
    facts = {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "steps": steps,
        "tokens": steps * training.batch_size * training.seqlen,
        "minutes": round(trainer.budget.minutes, 2),
        "text": described,
        "peak_memory_mb": peak_memory_mb(device),
    }
    if trainer.perplexities is not None:
        facts["perplexities"] = [(e["step"], e[PERPLEXITIES]) for e in history if PERPLEXITIES in e]
    return facts


def _set_up(
    model, tokenizer, recipe: Recipe, work: Path, calibration, progress: bool
) -> tuple[data.Windows, nn.Module | CachedTeacher | None, str]:
    """Prepare the model; the windows it trains on, its teacher, and a description of the text."""
    training = recipe.training
    own = training.data == "self"
    distilled, stored = training.loss != "cross_entropy", training.teacher_top > 0
    teacher = _teacher(model, exact=stored) if own or distilled else None
    text = data.load_text(recipe, calibration)
    stream = check_known(token_stream(tokenizer, text)[0], model.config.vocab_size)
    if not own:
        data.recipe_windows(recipe, stream)  # a text that is too short is refused before the claim
    if not own and training.data != calibration:  # `prepare` looks at the calibration text
        warn_of_unknown_text(model, tokenizer, training.data)
    _claim(work, recipe, stream, model)
    if own:
        tokens = training.steps * training.batch_size * training.seqlen
        path, seed = work / GENERATIONS, recipe.rotation.seed
        generated = write_generations(teacher, tokenizer, stream, tokens, path, seed, progress)
        stream = token_stream(tokenizer, generated)[0]
    windows = data.recipe_windows(recipe, stream)
    teacher = teacher if distilled else None
    prepare(model, tokenizer, recipe, calibration, progress, resume=work / "start")
    prefix = model.config.quantization_config.manifest.prefix
    if teacher is not None and prefix:
        teacher = PrefixedTeacher(teacher, prefix)
    if teacher is not None and stored:
        teacher = write_top_k(teacher, windows.pieces(), training.teacher_top, work / "teacher", progress)
    if distributed.is_main():
        remove_partial(work / "checkpoints")
    return windows, teacher, data.describe(recipe, calibration, text)


def _teacher(model: nn.Module, exact: bool) -> nn.Module:
    """A frozen copy of the full-precision model, on a GPU in bfloat16 unless it is to be exact."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    return teacher.to(torch.bfloat16) if model.device.type == "cuda" and not exact else teacher


def _claim(work: Path, recipe: Recipe, stream: torch.Tensor, model: nn.Module) -> None:
    """Mark the directory `work` as that of this run, or refuse the directory of another run."""
    key = fingerprint(recipe.to_dict(), {}, stream, model)
    path = work / "run.json"
    if path.is_file():
        try:
            found = json.loads(read_text(path))
            name, before = found["recipe"], found["fingerprint"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise TrainingError(
                f"{path.name} in {str(work)!r}, which identifies the run there, cannot be read ({error}); "
                "remove that file to resume the run with this command, or the directory to train from the "
                "beginning"
            ) from None
        if before != key:
            raise TrainingError(
                f"{str(work)!r} holds a run of {name!r} with another model, recipe or text; "
                "remove it, or give the settings of that run to resume it"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, {"recipe": recipe.name, "fingerprint": key})
