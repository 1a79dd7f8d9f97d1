"""LLaMAs of published shapes with random weights, made where they run: packed, or in one float format."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import w2a4
from benchmarks.shapes import MODELS, Model
from w2a4.format.online import OnlineRotation
from w2a4.hub import transformers as hf


def config_of(shape: Model, positions: int) -> LlamaConfig:
    """As in the checkpoint of that shape, with `positions` of them."""
    return LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, max_position_embeddings=positions, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def float_llama(shape: Model | str, positions: int, device: str, dtype: torch.dtype) -> Any:
    """Weights as transformers draws them."""
    shape = MODELS[shape] if isinstance(shape, str) else shape
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config_of(shape, positions)).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def packed_llama(
    shape: Model | str, positions: int, device: str, dtype: torch.dtype, recipe: str = "w2a4kv4"
) -> Any:
    """Random codes and levels, with scales that keep activations of about their size; R3 and R4 as recipes
    have them. No float weights are ever made.
    """
    shape = MODELS[shape] if isinstance(shape, str) else shape
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(shape, positions)).to(dtype).eval()
    chosen = w2a4.Recipe.load(recipe)
    rotations = (("r3", chosen.rotation.r3, shape.head_dim), ("r4", chosen.rotation.r4, shape.intermediate))
    online = {name: OnlineRotation(kind, size, 0, name).to_dict() for name, kind, size in rotations}
    config = w2a4.W2A4Config.of_recipe(chosen, {"online": online}, {}, "llama")
    hf.prepare_skeleton(model, config)
    model.to_empty(device=device)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)  # its table is no parameter
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            _fill(module, name, value)
    hf.install(model, config)
    return model


def _fill(module: nn.Module, name: str, value: nn.Parameter) -> None:
    if name == "levels":
        value.copy_(torch.tensor([-120, -35, 35, 120], dtype=torch.int8))
    elif name == "act_clip":
        value.fill_(0.9)
    elif name == "scale":
        # Levels and codes of 2 and 4 bits have a mean square of about 88**2 and 4.6**2, bytes of 74**2.
        size = {"W2A4Linear": 88, "W4A4Linear": 4.6}.get(type(module).__name__, 74)
        inputs = getattr(module, "in_features", 1)
        value.fill_(1 / (size * inputs**0.5))
    elif value.dtype == torch.uint8:
        value.random_(0, 256)
    elif value.dtype == torch.int8:
        value.random_(-128, 128)
    else:
        value.fill_(1.0)  # of a norm
