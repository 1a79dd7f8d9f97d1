"""Tiny random LLaMAs with everything that trips up a rotation or a quantiser."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from w2a4 import arch
from w2a4.evaluate import data
from w2a4.runtime.layer import PackedDecoderLayer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: Shapes that trip up rotations, by name: keywords of `tiny_llama`.
MODELS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "intermediate_size": 44},
    "odd heads": {
        "hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8,
        "intermediate_size": 76, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "llama3 rope": {"rope_scaling": LLAMA3_ROPE, "num_key_value_heads": 4},
    "wide heads": {"head_dim": 12, "hidden_size": 32},
}  # fmt: skip


class ExactRMSNorm(LlamaRMSNorm):
    """RMSNorm in the dtype it is given: the original rounds to float32 even in a float64 model."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def tiny_llama(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    rope_scaling: dict[str, Any] | None = None,
    **overrides: Any,
) -> LlamaForCausalLM:
    """A random LLaMA in eval mode.

    By default: 2 layers, hidden 32, 4 heads over 2 KV heads, FFN 48 = 12 * 4, untied, no biases, norm
    weights away from 1, embedding rows with a mean. Tests override any `LlamaConfig` key, e.g.
    `hidden_size=36, num_attention_heads=3, num_key_value_heads=1, head_dim=8`, `intermediate_size=44` or 76,
    `attention_bias=True`, `mlp_bias=True`, `tie_word_embeddings=True`.

    Args:
        seed: of a local generator; torch's global one is left alone.
        dtype: float64 models compute in float64 throughout but for RoPE's angles.
        rope_scaling: e.g. `LLAMA3_ROPE`.
    """
    values = {
        "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    } | overrides  # fmt: skip
    if rope_scaling is not None:
        if int(transformers.__version__.split(".")[0]) >= 5:
            values["rope_parameters"] = {"rope_theta": 10000.0, **rope_scaling}
        else:
            values["rope_scaling"] = rope_scaling
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(**values)).to(dtype).eval()
    if dtype == torch.float64:
        for module in model.modules():
            if type(module) is LlamaRMSNorm:
                module.__class__ = ExactRMSNorm
    fill(model, seed)
    return model


@torch.no_grad()
def fill(model: LlamaForCausalLM, seed: int) -> None:
    """Random parameters of sensible size, the same in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            noise = 1.2 + 0.5 * noise.clamp(-2, 2)
        elif "embed_tokens" in name:
            noise = 0.5 * noise + torch.randn(parameter.shape[0], 1, generator=generator, dtype=torch.float64)
        elif name.endswith("bias"):
            noise = 0.3 * noise
        else:
            noise = noise / parameter.shape[-1] ** 0.5
        parameter.copy_(noise)


def tokens(model: LlamaForCausalLM, batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    """Random token ids, int64 `[batch, length]`, from a local generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def tiny_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens, trained on a few lines of the built-in text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([data.builtin_text()[0][:2000]], trainer)
    names = {"eos_token": "</s>", **({"bos_token": "<s>"} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_model(**changes):
    """A random float32 LLaMA over the tokens of `tiny_tokenizer`."""
    return tiny_llama(dtype=torch.float32, vocab_size=300, bos_token_id=0, eos_token_id=1, **changes)


def decoder_linears(layer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linears of a LLaMA's decoder layer, by the last part of their names."""
    packed = isinstance(layer, PackedDecoderLayer)
    linears = layer.linears() if packed else arch.of_model_type("llama").linears(layer)
    return {path.rpartition(".")[2]: linear for path, linear in linears.items()}
