"""`train`: from a float LLaMA to a packed one that was trained as it computes."""

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
from ..evaluate import data
from ..format.files import read_text, write_json
from ..ops.devices import peak_memory_mb
from ..quantization import job as pipeline
from ..quantization.resume import fingerprint
from ..recipe import Recipe
from . import processes
from .block import BlockTrainer
from .checkpoints import drop_parts, last_checkpoint
from .generations import write_generations
from .linear import fake_quant_linears
from .prepare import check_trainable, convert, prepare, start_recipe
from .teacher import CachedTeacher, write_tops
from .trainer import PERPLEXITY, QATTrainer, Windows, training_arguments

#: What the teacher writes, in the directory of the run.
GENERATIONS = "generations.jsonl"

#: The layers' errors on the route `block`, beside the layers that are done.
ERRORS = "errors.json"


def train(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe | str,
    work: str | Path,
    calibration: data.TextSource = "builtin",
    progress: bool = True,
    device: torch.device | None = None,
    score: Callable[..., dict[str, Any]] | None = None,
) -> nn.Module:
    """Prepare, train and pack a LLaMA, in place.

    Args:
        model: LlamaForCausalLM, float; its full-precision copy is the teacher.
        recipe: with `training`, see `config.Training`.
        work: a directory for the start and the checkpoints, which all processes share. If it holds an
            interrupted run of the same model, recipe and text, that is gone on with. Yours to remove when
            the model is saved.
        calibration: text for the fit that training begins with; `recipe.training.data` is trained on.
        progress: show bars.
        device: where to train, the model's own if None: the model goes there, or block by block each layer
            while its turn lasts.
        score: of a model and tokenizer, the `perplexity`; asked end to end before the first step and at every
            checkpoint, under training's autocast. For one process.

    Returns:
        the same model, packed; `model.w2a4_report.training` has losses, tokens and minutes, and with `score`
        `perplexities`, pairs of a step and the perplexity after it. Of several
        processes the main one packs it; in the others it is of no more use.

    Raises:
        W2A4Error: as `prepare`; `TrainingError` for a loss that explodes, or a `work` of another run.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    work = Path(work)
    # Before the directory is claimed, or the corrected recipe would be refused as another one.
    check_trainable(model, recipe)
    if recipe.training.route == "block":
        if processes.world() > 1:
            raise TrainingError(f"training.route=block runs in one process; there are {processes.world()}")
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
    processes.join(model.device)
    training, main, world = recipe.training, processes.is_main(), processes.world()
    progress = progress and main
    args = training_arguments(
        training, work / "checkpoints", world, recipe.rotation.seed, progress, model.device
    )
    begin = functools.partial(_begin, model, tokenizer, recipe, work, calibration, progress)
    windows, teacher, described = processes.main_first(begin)
    sharded = model if world == 1 else _to_shard(model)
    checkpoint = last_checkpoint(work / "checkpoints")
    args.eval_on_start = score is not None and checkpoint is None
    watch = None if score is None else lambda: score(model, tokenizer, progress=False)["perplexity"]
    trainer = QATTrainer(sharded, teacher, training, args, watch, train_dataset=windows)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = trainer.state.log_history
    facts = {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * training.batch_size * training.seqlen,
        "minutes": round(trainer.minutes(), 2),
        "text": described,
        "peak_memory_mb": peak_memory_mb(model.device),
    }
    if score is not None:
        facts["perplexities"] = [(e["step"], e[PERPLEXITY]) for e in history if PERPLEXITY in e]
    if sharded is not model:
        state = trainer.trained_state()
        if not main:
            return model
        for name in state:
            if name.endswith(".bias"):  # packed layers add it in the model's dtype
                state[name] = state[name].to(model.get_parameter(name).dtype)
        model.load_state_dict(state, strict=False, assign=True)
    return convert(model, facts)


def _begin(
    model, tokenizer, recipe: Recipe, work: Path, calibration, progress: bool
) -> tuple[Windows, nn.Module | CachedTeacher | None, str]:
    """Prepare the model; what it trains on, its teacher, and a description of the text."""
    training = recipe.training
    distilled, cached = training.loss != "cross_entropy", training.teacher_top > 0
    teacher = _teacher(model) if (distilled and not cached) or training.data == "self" else None
    text = _text(model, teacher, tokenizer, recipe, work, calibration, progress)
    windows = _windows(recipe, data.token_stream(tokenizer, text)[0])
    if not distilled:
        teacher = None
    elif cached:
        teacher = write_tops(model, windows.pieces(), training.teacher_top, work / "teacher", progress)
    prepare(model, tokenizer, recipe, calibration, progress, resume=work / "start")
    if processes.is_main():
        drop_parts(work / "checkpoints")
    return windows, teacher, _describe(training.data, calibration, text)


def _windows(recipe: Recipe, stream: torch.Tensor) -> Windows:
    training = recipe.training
    count, recut = training.steps * training.batch_size, training.teacher_top == 0
    return Windows(stream, training.seqlen, count, recipe.rotation.seed, recut)


def _to_shard(model: nn.Module) -> nn.Module:
    """The model for FSDP2, which changes modules for good; `model` keeps the rest and awaits trained values.

    Trained parameters become float32: those that are sharded together must have one dtype.
    """
    linears = fake_quant_linears(model)
    trained = [p for linear in linears.values() for p in linear.parameters()]
    copied = {id(p): nn.Parameter(p.detach().float(), p.requires_grad) for p in trained}
    sharded = copy.deepcopy(model, copied)
    for linear in linears.values():
        for name, p in list(linear.named_parameters()):
            setattr(linear, name, nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))
    return sharded


def check_text(recipe: Recipe) -> None:
    """Raise CalibrationError if the text to train on is missing; cheap, for before a model is loaded."""
    if recipe.training.route == "end_to_end" and recipe.training.data != "self":
        data.load_text(recipe.training.data, "calibration")


def _text(model, teacher, tokenizer, recipe: Recipe, work: Path, calibration, progress: bool) -> str:
    """What is trained on, which the teacher may write; `work` is claimed for this run."""
    training = recipe.training
    own = training.data == "self"
    text = data.load_text(calibration if own else training.data, "calibration")
    stream = data.check_known(data.token_stream(tokenizer, text)[0], model.config.vocab_size)
    if not own:
        _windows(recipe, stream)  # a text that is too short is refused before the directory is claimed
    _claim(work, recipe, stream, model)
    if not own:
        return text
    tokens = training.steps * training.batch_size * training.seqlen
    path = work / GENERATIONS
    return write_generations(teacher, tokenizer, stream, tokens, path, recipe.rotation.seed, progress)


def _describe(source: str, calibration: data.TextSource, text: str) -> str:
    if source != "self":
        return data.describe_text(source, text)
    return f"the teacher's own, from {data.source_of(calibration)}"


def _teacher(model: nn.Module) -> nn.Module:
    """The full-precision model, on a GPU in bfloat16."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    return teacher.to(torch.bfloat16) if model.device.type == "cuda" else teacher


def _claim(work: Path, recipe: Recipe, stream: torch.Tensor, model: nn.Module) -> None:
    """Mark `work` as of this run, or refuse one of another."""
    key = fingerprint(recipe.to_dict(), {}, stream, model)
    path = work / "run.json"
    if path.is_file():
        try:
            found = json.loads(read_text(path))
            name, before = found["recipe"], found["fingerprint"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise TrainingError(
                f"{path.name} in {str(work)!r}, which says what run that is, cannot be read ({error}); "
                "remove that file to go on with it by this command, or the directory to train anew"
            ) from None
        if before != key:
            raise TrainingError(
                f"{str(work)!r} holds a run of {name!r} with another model, recipe or text; "
                "remove it, or give the settings of that run to go on with it"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, {"recipe": recipe.name, "fingerprint": key})
