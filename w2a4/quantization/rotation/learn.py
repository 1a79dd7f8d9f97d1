"""`learn_rotation`: learn R1 and R2 that reduce the error of quantisation, report and write them.

`network` computes the objectives: the cross-entropy of the fake-quantised network (SpinQuant,
arXiv 2405.16406), its divergence from the full-precision one, or the kurtosis of activations (KurTail,
arXiv 2503.01483), which needs no backward pass through the model. `descent` minimises them by Cayley SGD.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...errors import CalibrationError, RotationError
from ...evaluate.data import (
    TextSource,
    calibration_ids,
    check_known,
    check_token_ids,
    describe_text,
    load_text,
    windows,
)
from ...evaluate.report import source_name, versions
from ...format.files import try_file, write_atomically, write_json
from ...format.online import OnlineRotation
from ...hub.transformers import check_original
from ...ops.devices import peak_memory_mb
from ...recipe import Recipe
from ..resume import fingerprint
from ..smooth import smooth
from . import fold
from .cayley import orthogonality_error
from .descent import Descent
from .files import model_mark, read_metadata, write_tensors
from .network import OBJECTIVES, act_group_sizes

#: Recipe fields that learning depends on; the others may change between learning and quantising.
RECIPE_FIELDS = (
    "rotation", "rotation_learning", "weight_bits", "weight_grid", "group_size", "act_bits", "act_clip",
    "act_codes", "act_group_size", "o_proj_act", "kv_bits", "kv_clip", "sink_tokens",
)  # fmt: skip

#: Recipe fields that learning depends on besides, if the model is smoothed first.
SMOOTHING_FIELDS = ("smooth", "calib_samples", "calib_seqlen")


@dataclass
class RotationReport:
    """How rotations were learned; also written as JSON beside them.

    Attributes:
        recipe: the fields of `RECIPE_FIELDS`, and of `SMOOTHING_FIELDS` if the model was smoothed.
        source: the model, see `report.source_name`.
        calibration: see `data.describe_text`.
        seed: of the rotations to start from and of the order of the text.
        losses: one a step, before its move, each on the windows of its step.
        orthogonality: one a step, max |RᵀR - I| over all matrices after its move.
        before, after: loss of the first and of the learned rotations, on the windows of the first step.
        final: max |RᵀR - I| of every matrix written.
        seconds: of all steps, those of interrupted runs included.
        peak_memory_mb: of the process, see `devices.peak_memory_mb`.
        resumed_at: steps that an interrupted run had finished.
        plot: file name of the loss plot, or why there is none.
    """

    recipe: dict[str, Any]
    source: str = ""
    calibration: str = ""
    seed: int = 0
    losses: list[float] = field(default_factory=list)
    orthogonality: list[float] = field(default_factory=list)
    before: float = 0.0
    after: float = 0.0
    final: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    resumed_at: int = 0
    plot: str = ""
    versions: dict[str, str] = field(default_factory=versions)


def learn_rotation(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe | str,
    calibration: TextSource | Tensor = "general",
    out: str | Path = "rotation.safetensors",
    progress: bool = True,
    resume: bool = True,
) -> RotationReport:
    """Learn R1 and the R2 of every layer for a LLaMA and a recipe, and write them to a file.

    The model does not change; learning works on a copy in the same dtype, smoothed if the recipe has
    `smooth`, with rotations in float32.

    Args:
        model: of a family in `arch`, float, unrotated.
        tokenizer: for the calibration text.
        recipe: a `Recipe`, the name of one, or a YAML file. Learns those of R1 and R2 that it sets to
            `learned`, or both if it sets neither; `rotation_learning` has the settings.
        calibration: `general`, `builtin`, a text file, a list of documents, or token ids int64
            `[samples, tokens]`, cut to `seqlen`.
        out: `.safetensors`; gets `R1` float32 `[hidden, hidden]` and `R2.<layer>` `[head_dim, head_dim]`,
            with the report as metadata. The report as `.json` and, with matplotlib, a plot as `.png` are
            written beside it. A file that the same call wrote before is not learned again.
        progress: show a bar.
        resume: write the state to `.<out>.partial` every few steps, and resume from it if it exists.

    Returns:
        the losses, times and other facts, see `RotationReport`.

    Raises:
        RotationError: not a float model of a family in `arch`, a state or file of other rotations, nothing
            that is quantised, or a loss that explodes; rotations from before that are kept in
            `<out>.last-good.safetensors`.
        CalibrationError: too little text, or token ids that do not fit.
    """
    out, recipe = Path(out), _learning_recipe(recipe)
    _check(model, recipe, out)
    try_file(out)
    ids, described = _windows(model, tokenizer, recipe, calibration)
    fields = RECIPE_FIELDS + (SMOOTHING_FIELDS if recipe.smooth else ())
    part = {name: recipe.to_dict()[name] for name in fields}
    key = fingerprint(part, {}, ids, model)
    if out.exists():
        return _finished(out, key)
    seed, options = recipe.rotation.seed, recipe.rotation_learning
    report = RotationReport(part, source_name(model.config._name_or_path or "unknown"), described, seed)
    partial = out.with_name(f".{out.name}.partial") if resume else None
    if recipe.smooth:
        seen, _ = calibration_ids(tokenizer, calibration, recipe, model.config.vocab_size)
        model = smooth(copy.deepcopy(model), seen, recipe.smooth)
    with torch.enable_grad():
        objective = OBJECTIVES[options.objective](model, recipe, ids)
        descent = Descent(_start(model, recipe), options, out, partial, key)
        report.resumed_at = descent.restore()
        with tqdm(
            total=options.steps, initial=report.resumed_at, desc="learn rotation", unit="step",
            disable=not progress,
        ) as bar:  # fmt: skip
            descent.run(objective, bar)
        report.after = objective(0, descent.rotations).item()
    report.before, report.losses, report.orthogonality = descent.losses[0], descent.losses, descent.drift
    report.seconds, report.peak_memory_mb = descent.seconds, peak_memory_mb(model.device)
    _write(out, descent.rotations, report, {"key": key, "model": model_mark(model)})
    if partial is not None:
        partial.unlink(missing_ok=True)
    return report


def _learning_recipe(recipe: Recipe | str) -> Recipe:
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if "learned" not in (recipe.rotation.r1, recipe.rotation.r2):
        recipe = recipe.override(**{"rotation.r1": "learned", "rotation.r2": "learned"})
    return recipe.override(**{"rotation.learned": None})


def _check(model: nn.Module, recipe: Recipe, out: Path) -> None:
    if out.suffix != ".safetensors":
        raise RotationError(f"out={str(out)!r}: give the name of a .safetensors file to write")
    check_original(model)
    fold.check(model)
    options = recipe.rotation_learning
    kept = recipe.weight_bits == 16 or options.weights == "full"
    if options.objective != "kurtosis" and kept and recipe.act_bits == recipe.kv_bits == 16:
        raise RotationError(
            f"act_bits=16, kv_bits=16, rotation_learning.weights={options.weights!r}: nothing is quantised "
            "while learning, and all rotations are equally good; set act_bits or kv_bits to 4"
        )
    if recipe.weight_bits < 16:
        act_group_sizes(model, recipe)


def _windows(
    model: nn.Module, tokenizer: Any, recipe: Recipe, calibration: TextSource | Tensor
) -> tuple[Tensor, str]:
    """Token ids int64 `[n, <= seqlen]`, n at least a batch, and a line that describes the text."""
    options, size = recipe.rotation_learning, model.config.vocab_size
    if isinstance(calibration, Tensor):
        ids = check_token_ids(calibration, size)[:, : options.seqlen]
        described = f"{ids.shape[0]} x {ids.shape[1]} tokens"
    else:
        text = load_text(calibration, "calibration")
        ids = check_known(windows(tokenizer, text, options.seqlen), size)
        described = describe_text(calibration, text)
    if len(ids) < options.batch_size or ids.shape[1] < 2:
        raise CalibrationError(
            f"the text fills {len(ids)} windows of {ids.shape[1]} tokens, and a step needs "
            f"rotation_learning.batch_size={options.batch_size} of at least 2: give a longer text, or a "
            "smaller batch_size or seqlen"
        )
    return ids, described


def _start(model: nn.Module, recipe: Recipe) -> dict[str, nn.Parameter]:
    """The rotations to start from by name: float32, or float64 for a float64 model."""
    llama, rotation, weight = model.config, recipe.rotation, model.model.embed_tokens.weight
    head_dim = model.model.layers[0].self_attn.head_dim
    sizes = {"R1": llama.hidden_size} if rotation.r1 == "learned" else {}
    if rotation.r2 == "learned":
        sizes |= {f"R2.{i}": head_dim for i in range(llama.num_hidden_layers)}
    dtype = torch.promote_types(weight.dtype, torch.float32)
    kind = recipe.rotation_learning.init
    return {
        name: nn.Parameter(
            OnlineRotation(kind, size, rotation.seed, name.lower()).matrix(dtype).to(weight.device)
        )
        for name, size in sizes.items()
    }


def _finished(out: Path, key: str) -> RotationReport:
    """The report in a file that the same call wrote before."""
    metadata = read_metadata(out)
    if metadata.get("key") != key:
        raise RotationError(
            f"{str(out)!r} exists and holds other rotations (another model, recipe or calibration); "
            "give another file, or remove this one first"
        )
    return RotationReport(**metadata["report"])


def _write(out: Path, rotations: dict[str, Tensor], report: RotationReport, about: dict[str, str]) -> None:
    """Write plot and report first, so that a file of rotations means that all files are there."""
    tensors = {name: r.detach().float() for name, r in rotations.items()}
    report.final = {name: orthogonality_error(r) for name, r in tensors.items()}
    report.plot = _plot(out.with_suffix(".png"), report)
    write_json(out.with_suffix(".json"), dataclasses.asdict(report))
    write_tensors(out, tensors, {**about, "report": dataclasses.asdict(report)})


def _plot(path: Path, report: RotationReport) -> str:
    """Loss and drift by step as PNG; the file's name, or why there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "none: matplotlib is not installed (pip install matplotlib)"
    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(report.losses, ".-")
    upper.set(title=f"{report.source}: learned rotations", ylabel="loss")
    lower.semilogy(report.orthogonality, ".-")
    lower.set(xlabel="step", ylabel="max |RᵀR - I|")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
    return path.name
