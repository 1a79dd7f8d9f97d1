"""`prepare` and `convert`: a model that trains as it will compute, and the packed one it becomes.

model = w2a4.prepare(model, tokenizer, "w2a4kv4-rcp")
...                                  # any trainer: losses, optimisers and loops are yours
w2a4.convert(model)
w2a4.save(model, tokenizer, "out")
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..errors import W2A4Error
from ..evaluate.data import TextSource
from ..evaluate.report import Report
from ..format.linear import W8Linear
from ..hub.transformers import W2A4Config, install, set_attention
from ..quantization import job as pipeline
from ..recipe import Recipe, Training
from .block import BlockTrainer
from .linear import fake_quant_linears, make_trainable

#: How `Training.init` fits the weights that training begins with.
INIT_METHODS = {"gptq": "gptq", "lloyd": "rtn", "minmax": "rtn"}


def prepare(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe | str = "w2a4kv4",
    calibration: TextSource | Tensor = "general",
    progress: bool = True,
    resume: str | Path | None = None,
) -> nn.Module:
    """Turn a float model into one that trains quantised, in place.

    The model is rotated, a packed fit (`recipe.training.init`, then `block_steps`) gives the codes to begin
    with, and every decoder linear becomes a `FakeQuantLinear`; activations and the KV cache are quantised in
    the loop. The embedding and lm_head keep their (8-bit) values and are not trained; the norms' weights are
    folded into the linears.

    Args: as for `w2a4.quantize`.

    Returns:
        the same model. Its latent weights and the quantisers' parameters require gradients.

    Raises:
        W2A4Error: as `w2a4.quantize`, or the recipe keeps weights in 16 bits.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    check_trainable(model, recipe)
    start, family = start_recipe(recipe), arch.of_config(model.config)
    if not isinstance(getattr(model.config, "quantization_config", None), W2A4Config):
        pipeline.rotate_by_recipe(model, tokenizer, recipe, calibration, progress, resume)
    packed = copy.deepcopy(model)
    steps = recipe.training.block_steps
    refine = BlockTrainer(recipe, steps) if steps else None
    report = pipeline.quantize(packed, tokenizer, start, calibration, progress, resume, refine)
    for layer, fit in zip(model.model.layers, packed.model.layers, strict=True):
        make_trainable(layer, fit.linears(), layer, family, recipe.training, recipe.grid)
        if fit.self_attn.kv_settings.prefix is not None:
            layer.self_attn.prefix = fit.self_attn.kv_settings.prefix
    _freeze(model, packed, recipe.training)
    before: W2A4Config = packed.config.quantization_config
    set_attention(model, before.quantized_by(recipe.override(**before.rotated_by), before.manifest.prefix))
    model.w2a4_report = report
    return model.train()


def check_trainable(model: nn.Module, recipe: Recipe) -> None:
    """Raise W2A4Error if `prepare` would refuse the model or the recipe; cheap, for before any work."""
    if recipe.weight_bits == 16:
        raise W2A4Error(
            f"recipe {recipe.name!r} has weight_bits=16: there is nothing to train; give 2, 3 or 4"
        )
    pipeline.check_quantizable(model, recipe)


def start_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the packed fit that training begins with."""
    return recipe.override(weight_method=INIT_METHODS[recipe.training.init])


def _freeze(model: nn.Module, packed: nn.Module, training: Training) -> None:
    """Round the embedding and lm_head as they will be stored, and freeze all but decoder linears."""
    model.model.embed_tokens = packed.model.embed_tokens
    if isinstance(packed.lm_head, W8Linear):
        model.lm_head.weight.data = packed.lm_head.dequantize().to(model.lm_head.weight.dtype)
    model.requires_grad_(False)
    for linear in fake_quant_linears(model).values():
        linear.set_trainable(training.learn_act_clip)


@torch.no_grad()
def convert(model: nn.Module, facts: dict[str, Any] | None = None) -> nn.Module:
    """Pack a prepared model, in place: the packed model computes what the prepared one did in eval mode.

    Args:
        facts: about the training, for the report.

    Returns:
        the same model, ready for `w2a4.save`.

    Raises:
        W2A4Error: the model was not prepared, or a trained value is not finite.
    """
    linears = fake_quant_linears(model)
    if not linears:
        raise W2A4Error("this model has no FakeQuantLinear for w2a4.convert to pack; call w2a4.prepare first")
    for name, linear in linears.items():
        for key, value in linear.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise W2A4Error(f"{name}.{key} holds NaN or infinity; load an earlier checkpoint")
    config: W2A4Config = model.config.quantization_config
    report: Report = model.w2a4_report
    for name, linear in linears.items():
        model.set_submodule(name, linear.to_packed())
    if config.manifest.head_bits == 8:
        model.lm_head = W8Linear.from_linear(model.lm_head)
    report.recipe = config.recipe
    report.training = facts
    install(model, config, report)
    return model.eval()
