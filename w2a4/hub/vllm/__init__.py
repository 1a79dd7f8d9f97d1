"""vLLM's plug-in: `vllm serve DIR` takes a checkpoint of this package once both are installed.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). What it enters is looked
at for checkpoints whose `quant_method` is ours only; other models keep vLLM's own layers and attention.
`docs/vllm.md` says what is served and what is refused.
"""

from __future__ import annotations


def register() -> None:
    """Enter `quant_method: w2a4` into vLLM's table of quantisations."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import W2A4Quantization

    register_quantization_config("w2a4")(W2A4Quantization)
