"""SmolLM 3: a LLaMA some of whose layers have no RoPE (`no_rope_layers`)."""

from ..architecture import Architecture

ARCHITECTURE = Architecture("smollm3", "SmolLM3ForCausalLM")
