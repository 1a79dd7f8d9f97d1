"""Phi 3 and 4: q, k and v are one linear, gate and up another; RoPE may turn a part of a head only."""

from ..architecture import Architecture, Linear, Site

ARCHITECTURE = Architecture(
    "phi3",
    "Phi3ForCausalLM",
    attention_in=Site((Linear("self_attn.qkv_proj", ("q", "k", "v")),), "r1", "input_layernorm"),
    mlp_in=Site((Linear("mlp.gate_up_proj", ("gate", "up")),), "r1", "post_attention_layernorm"),
    rereads=True,
)
