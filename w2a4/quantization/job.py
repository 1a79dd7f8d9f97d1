"""From a float model to a packed one: load, rotate, quantise, save."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import arch
from ..errors import RotationError, W2A4Error
from ..evaluate.data import TextSource, calibration_ids
from ..evaluate.report import Report, source_name, versions
from ..evaluate.text_checks import warn_of_unknown_text
from ..format.directories import atomic_directory, check_out_dir
from ..format.grid import Uniform
from ..format.linear import W8Embedding, W8Linear, _PackedModule
from ..hub.generation import check_generation
from ..hub.gguf import load_gguf
from ..hub.loading import load_pretrained
from ..hub.portable import save_tokenizer
from ..hub.sources import check_source, is_gguf
from ..hub.transformers import (
    W2A4Config,
    check_language_model,
    check_original,
    install,
    kv_settings,
    prepare_layer,
)
from ..ops.devices import peak_memory_mb
from ..recipe import Recipe, RotationConfig
from .layer import LayerQuantizer, Streams, check_weight, needs_full
from .prefix import add_prefix, choose_prefix
from .resume import Progress, fingerprint
from .rotation import fold
from .rotation.learn import learn_rotation
from .rotation.network import act_group_sizes
from .smooth import smooth

#: Tokens that run through a layer at once while quantising.
BATCH_TOKENS = 2048

#: Batches that run through the full-precision layers where nothing but the error that is shown needs them.
SHOWN_BATCHES = 1

#: See `quantize`.
Refine = Callable[[int, LayerQuantizer, list[Tensor], Streams], None]

#: A recipe that keeps everything in 16 bits: what a model is that was rotated only.
ROTATED_ONLY = {"weight_bits": 16, "act_bits": 16, "kv_bits": 16, "head_bits": 16, "embed_bits": 16}


def load_model(
    source: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer.

    Args:
        source: a transformers directory (float or packed by w2a4), a hub id, or a `.gguf` file of an
            architecture in `hub.gguf_header` (needs the package `gguf`; weights become float32).
        dtype: as in transformers; ignored for `.gguf`.
        device: where the model goes.

    Returns:
        the model in eval mode, and the tokenizer.

    Raises:
        W2A4Error: nothing there, of no supported family, or damaged; the message says what to do.
    """
    check_source(source)
    if is_gguf(source):
        model, tokenizer = load_gguf(Path(source))
        return model.to(device), tokenizer
    model, tokenizer = load_pretrained(source, dtype)
    return model.to(device), tokenizer


def rotate(model: nn.Module, config: RotationConfig | None = None) -> nn.Module:
    """Rotate a model in place so that it is easier to quantise; its output stays the same.

    Args:
        model: of a family in `arch`, float.
        config: which rotation goes where, see `RotationConfig`.

    Returns:
        the same model. It saves and loads like any other (loading needs `import w2a4`).

    Raises:
        RotationError: of no supported family, rotated already, or with parts the rotation would miss.
    """
    return _rotate(model, config or RotationConfig())


def _rotate(model: nn.Module, config: RotationConfig, smoothed: float = 0.0) -> nn.Module:
    """`rotate`, and the record of it, with the alpha that the model was smoothed by."""
    check_original(model)
    fold.rotate(model, config)
    rotation = model.config.w2a4_rotation
    del model.config.w2a4_rotation
    if config.learned is not None:
        # What was learned is folded into the weights by now; a checkpoint names no local directory.
        config = dataclasses.replace(config, learned=Path(config.learned).name)
        rotation["learned"] = config.learned
    provenance = {"source": source_name(model.config._name_or_path or "unknown"), **versions()}
    recipe = Recipe(name="rotated", rotation=config, smooth=smoothed, **ROTATED_ONLY)
    install(model, W2A4Config.of_recipe(recipe, rotation, provenance, model.config.model_type))
    return model


def rotate_by_recipe(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    calibration: TextSource | Tensor = "general",
    progress: bool = True,
    resume: str | Path | None = None,
) -> nn.Module:
    """Smooth and `rotate` as the recipe says; rotations to be learned that name no file are learned first.

    Args: as for `quantize`; learning keeps its state in `resume` too.
    """
    with settled_rotation(model, tokenizer, recipe, calibration, progress, resume) as rotation:
        return _rotate(model, rotation, recipe.smooth)


@contextlib.contextmanager
def settled_rotation(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    calibration: TextSource | Tensor,
    progress: bool = True,
    resume: str | Path | None = None,
) -> Iterator[RotationConfig]:
    """The rotations of a recipe, learned if they are to be, with a file that is there until the block ends.

    The model is smoothed in place, if the recipe says so. Args: as for `rotate_by_recipe`.
    """
    warn_of_unknown_text(model, tokenizer, calibration)
    rotation = recipe.rotation
    with tempfile.TemporaryDirectory() as temporary:
        if rotation.to_learn:
            directory = Path(resume if resume is not None else temporary)
            directory.mkdir(parents=True, exist_ok=True)
            file = directory / "rotation.safetensors"
            # It smooths a copy of its own.
            learn_rotation(model, tokenizer, recipe, calibration, file, progress, resume is not None)
            rotation = dataclasses.replace(rotation, learned=str(file))
        if recipe.smooth:
            ids, _ = calibration_ids(tokenizer, calibration, recipe, model.config.vocab_size)
            smooth(model, ids, recipe.smooth)
        yield rotation


@torch.no_grad()
def quantize(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe | str = "w2a4kv4",
    calibration: TextSource | Tensor = "general",
    progress: bool = True,
    resume: str | Path | None = None,
    refine: Refine | None = None,
    device: torch.device | None = None,
) -> Report:
    """Smooth, rotate and quantise a model in place, one decoder layer at a time.

    Rotations that the recipe calls `learned` without naming their file are learned first, on the same text.

    Args:
        model: of a family in `arch`, float, unrotated or fresh from `rotate`.
        tokenizer: for the calibration text.
        recipe: a `Recipe`, the name of one, or a YAML file.
        calibration: `general`, `builtin`, a text file, a list of documents, or token ids `[samples, tokens]`.
        progress: show a bar.
        resume: a directory that receives every finished layer; if it holds some of the same
            quantisation, interrupted, go on behind them. Yours to remove when the model is saved.
        refine: improves a packed layer; called with its index and quantiser, the quantised hidden
            states before it and both streams behind it, see `train.block.BlockTrainer`.
        device: where decoder layers are computed, the model's own if None. Each is there only while its
            turn lasts, so that a GPU need hold no more than one.

    Returns:
        what was done and how well each linear fits; also in `model.w2a4_report`.

    Raises:
        W2A4Error: quantised already, of no supported family, text too short, or a group size that does not
            divide.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    started = time.perf_counter()
    check_quantizable(model, recipe)
    ids, described = calibration_ids(tokenizer, calibration, recipe, model.config.vocab_size)
    # Before anything is rotated: the last bits of a rotation may depend on the number of threads.
    key = "" if resume is None else fingerprint(recipe.to_dict(), {}, ids, model)
    state = Progress(None if resume is None else Path(resume), key)
    if not isinstance(getattr(model.config, "quantization_config", None), W2A4Config):
        rotate_by_recipe(model, tokenizer, recipe, calibration, progress, resume)
    before: W2A4Config = model.config.quantization_config
    recipe = recipe.override(**before.rotated_by)
    prefix = choose_prefix(model, tokenizer, ids, recipe)
    add_prefix(model, prefix)
    config = before.quantized_by(recipe, prefix)
    report = Report(
        source=before.provenance["source"],
        recipe=recipe.to_dict(),
        calibration=described,
        seed=recipe.rotation.seed,
    )
    model.eval()
    layers = len(model.model.layers) if recipe.weight_bits < 16 else 0
    with tqdm(
        total=layers * len(arch.of_config(model.config).paths),
        desc=f"quantize {recipe.name}",
        unit="linear",
        disable=not progress,
    ) as bar:
        _quantize_layers(model, recipe, config, ids, state, bar, refine, device or model.device)
    for entry in (entry for layer in state.entries for entry in layer):
        report.add_layer(**entry)
    if recipe.head_bits == 8:
        check_weight("lm_head", model.lm_head.weight, Uniform(8))
        model.lm_head = W8Linear.from_linear(model.lm_head)
    report.seconds = time.perf_counter() - started
    report.peak_memory_mb = peak_memory_mb(device or model.device)
    install(model, config, report)
    return report


def check_quantizable(model: nn.Module, recipe: Recipe) -> None:
    """Raise W2A4Error if `quantize` would refuse the model or the recipe; cheap, changes nothing."""
    family = arch.of_model(model)
    check_language_model(model)
    if any(isinstance(module, _PackedModule) for module in model.modules()):
        raise W2A4Error("this model is quantised already; start from the original")
    if getattr(model.lm_head, "bias", None) is not None:
        raise W2A4Error(
            f"lm_head has a bias, which {family.model_class} does not have when it is loaded again; "
            "set lm_head.bias to None and add it to the logits yourself"
        )
    before = getattr(model.config, "quantization_config", None)
    if isinstance(before, W2A4Config) and recipe.smooth not in (0, before.rotated_by["smooth"]):
        raise RotationError(
            f"smooth={recipe.smooth}: this model is rotated already and its norms are folded, too late "
            "to smooth it; start from the original, or set smooth=0"
        )
    check_generation(model)
    if recipe.weight_bits < 16:
        act_group_sizes(model, recipe)


def _quantize_layers(
    model: nn.Module, recipe: Recipe, config: W2A4Config, ids: Tensor, progress: Progress, bar: tqdm,
    refine: Refine | None, device: torch.device,
) -> None:  # fmt: skip
    """All decoder layers, those that `progress` holds loaded instead, and the embedding."""
    home = model.device
    batches = ids.to(home).split(max(1, BATCH_TOKENS // ids.shape[1]))
    embed = model.model.embed_tokens
    full = [embed(batch).to(device) for batch in batches]
    dtype = full[0].dtype
    if recipe.embed_bits == 8:
        check_weight("model.embed_tokens", embed.weight, Uniform(8))
        model.model.embed_tokens = embed = W8Embedding.from_embedding(embed)
    if refine is None and not needs_full(recipe):
        del full[SHOWN_BATCHES:]
    streams = Streams(full, [embed(batch).to(device) for batch in batches])
    positions = torch.arange(ids.shape[1], device=device)[None]
    cos_sin = model.model.rotary_emb(streams.full[0], positions)
    settings, family = kv_settings(config), arch.of_config(model.config)
    if recipe.weight_bits == 16:
        return
    for index, layer in enumerate(model.model.layers):
        if index < progress.done:
            prepare_layer(layer, family, recipe, config.online("r4"), dtype)
            layer.load_state_dict(progress.layer(index), assign=True)
            layer.to(home)
            bar.update(len(family.paths))
            if index == progress.done - 1:
                streams = progress.streams().to(device, len(batches[0]))
            continue
        own = dataclasses.replace(settings, prefix=getattr(layer.self_attn, "prefix", None))
        quantizer = LayerQuantizer(layer.to(device), recipe, own, cos_sin, family)
        inputs = streams.quantized
        try:
            errors = quantizer.run(streams, bar.update)
        except W2A4Error as error:
            raise type(error)(f"model.layers.{index}: {error}") from error
        if refine is not None:
            refine(index, quantizer, inputs, streams)
        entries = [
            {"name": f"model.layers.{index}.{name}", "bits": packed.bits, "group_size": packed.group_size,
             "relative_error": errors[name]}
            for name, packed in quantizer.packed()
        ]  # fmt: skip
        progress.store(layer.to(home), streams, entries)
        bar.set_postfix(hidden_error=f"{_relative_error(streams):.3f}")


def _relative_error(streams: Streams) -> float:
    """Mean over tokens of the relative squared error of the hidden states."""
    ratios = [
        ((q - f).float().square().sum(-1) / f.float().square().sum(-1).clamp_min(1e-30)).mean()
        for f, q in zip(streams.full, streams.quantized, strict=False)
    ]
    return float(torch.stack(ratios).mean())


def save(model: nn.Module, tokenizer: Any, out_dir: str | Path) -> None:
    """Write a checkpoint with its tokenizer (None is none), whole or not at all.

    Raises:
        CheckpointError: `out_dir` exists and is not empty.
        OSError: the disk is full or not writable; `out_dir` is untouched.
    """
    check_out_dir(out_dir)
    with atomic_directory(out_dir) as directory:
        model.save_pretrained(directory)
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory)
