"""Qwen 3: query and key heads are normalised before RoPE, and R3 turns them behind it.

The norms are of one head, which no rotation in front of them touches (R1 is undone by q and k), so their
weights stay as they are.
"""

from ..architecture import Architecture

ARCHITECTURE = Architecture("qwen3", "Qwen3ForCausalLM", head_norms=("self_attn.q_norm", "self_attn.k_norm"))
