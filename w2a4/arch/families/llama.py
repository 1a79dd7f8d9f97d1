"""LLaMA 1 to 3 and all that take its class: SmolLM2, TinyLlama, Yi, DeepSeek LLM, …"""

from ..architecture import Architecture

ARCHITECTURE = Architecture("llama", "LlamaForCausalLM")
