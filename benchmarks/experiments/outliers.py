"""Activations with outlier channels, as large models have them: planted, measured, and read in 4 bits."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import w2a4
from w2a4.evaluate.data import builtin_text
from w2a4.format.fake_quant import fake_quant_a4
from w2a4.quantization.rotation import fold as fuse

#: Bytes of the windows that outliers are planted by and measured on.
WINDOW = 256


@torch.no_grad()
def plant_outliers(
    model: LlamaForCausalLM, channels: int = 2, factor: float = 16.0, seed: int = 0
) -> LlamaForCausalLM:
    """Give a LLaMA activations with outlier channels, in place; its output is the same up to rounding.

    The residual stream is turned into the basis of its principal directions, where few channels carry
    most of it: an orthogonal matrix that a LLaMA without norm weights does not notice (they are folded
    first). Keys, values and the input of down_proj get `channels` channels (of every KV head, of every
    layer) `factor` times as large, what multiplies them so much smaller. Keys come in RoPE's pairs.

    Args:
        factor: a power of two scales without any rounding.
        seed: of the choice of channels.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "r1.safetensors")
        save_file({"R1": principal_directions(model)}, file)
        turn = w2a4.RotationConfig(r1="learned", r2="none", r3="none", r4="none", learned=file)
        fuse.rotate(model, turn)
    del model.config.w2a4_rotation  # an ordinary LLaMA again, free to be rotated
    generator = torch.Generator().manual_seed(seed)

    def choose(width: int, count: int) -> Tensor:
        return torch.randperm(width, generator=generator)[:count]

    head_dim, intermediate = model.config.head_dim, model.config.intermediate_size
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs = choose(head_dim // 2, channels // 2)
        keys = torch.cat([pairs, pairs + head_dim // 2])
        _scale_outputs(attention.k_proj, head_dim, keys, factor)
        _scale_outputs(attention.q_proj, head_dim, keys, 1 / factor)
        for source, reader, width in (
            (attention.v_proj, attention.o_proj, head_dim),
            (mlp.up_proj, mlp.down_proj, intermediate),
        ):
            chosen = choose(width, channels)
            _scale_outputs(source, width, chosen, factor)
            reader.weight.unflatten(1, (-1, width))[:, :, chosen] /= factor
    return model


def _scale_outputs(linear: nn.Linear, width: int, chosen: Tensor, factor: float) -> None:
    """The chosen ones of every `width` outputs times `factor`."""
    for parameter in linear.parameters():
        parameter.unflatten(0, (-1, width))[:, chosen] *= factor


def principal_directions(model: LlamaForCausalLM, windows: int = 16) -> Tensor:
    """Eigenvectors of the second moment of what the norms give out (before their weights), training text.

    Returns:
        orthogonal float64 `[hidden, hidden]`, a direction a column, the strongest first.
    """
    moment = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64)

    def add(norm: nn.Module, args: tuple[Tensor]) -> None:
        x = F.rms_norm(args[0].double(), args[0].shape[-1:]).flatten(0, -2)
        moment.addmm_(x.T, x)

    names = ("input_layernorm", "post_attention_layernorm", "model.norm")
    norms = [module for name, module in model.named_modules() if name.endswith(names)]
    ids = _windows(builtin_text()[0], windows)
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for norm in norms:
            hooks.callback(norm.register_forward_pre_hook(add).remove)
        model.base_model(input_ids=ids, use_cache=False)
    return torch.linalg.eigh(moment).eigenvectors.flip(-1).contiguous()


def input_shape(model: LlamaForCausalLM, windows: int = 4) -> dict[str, tuple[float, float]]:
    """How far the inputs of the decoder's linears are from even, on held-out text.

    Returns:
        for `norms` (the inputs of q, k, v, gate and up), `o_proj` and `down_proj`, means over tokens and
        layers of a token's kurtosis (mean x**4 / (mean x**2)**2, 3 if normal) and of max|x| / rms.
    """
    found: dict[str, list[Tensor]] = {"norms": [], "o_proj": [], "down_proj": []}

    def measure(name: str, x: Tensor) -> Tensor:
        power = x.double().square()
        mean = power.mean(-1)
        kind = name.rpartition(".")[2]
        kurtosis, peak = power.square().mean(-1) / mean.square(), (power.amax(-1) / mean).sqrt()
        found[kind if kind in found else "norms"].append(torch.stack([kurtosis, peak], -1).flatten(0, -2))
        return x

    ids = _windows(builtin_text()[1], windows)
    with changed_inputs(model, measure), torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    return {kind: tuple(torch.cat(parts).mean(0).tolist()) for kind, parts in found.items()}


@contextlib.contextmanager
def four_bit_inputs(model: LlamaForCausalLM) -> Iterator[None]:
    """While it lasts, the decoder's linears read their inputs in 4 bits, a scale a token; weights stay."""
    clip = torch.ones(1)
    with changed_inputs(model, lambda name, x: fake_quant_a4(x, clip)):
        yield


@contextlib.contextmanager
def changed_inputs(model: LlamaForCausalLM, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, the decoder's linears read `change(name, x)`; x is past R4 where there is one."""

    def hook(name: str, linear: nn.Linear, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = linear.rotation.apply(args[0]) if isinstance(linear, fuse.RotatedLinear) else args[0]
        return F.linear(change(name, x), linear.weight, linear.bias)

    with contextlib.ExitStack() as hooks:
        for name, module in model.model.layers.named_modules():
            if isinstance(module, nn.Linear):
                handle = module.register_forward_hook(functools.partial(hook, name))
                hooks.callback(handle.remove)
        yield


def _windows(text: str, count: int) -> Tensor:
    """The first bytes of a text, as tokens int64 `[count, WINDOW]`."""
    return torch.tensor(list(text.encode()[: count * WINDOW])).view(count, WINDOW)
