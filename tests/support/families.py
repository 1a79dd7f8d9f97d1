"""A tiny random model of every family, of shapes that trip up rotations and grouping."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from w2a4 import arch

#: 3 heads over one, a head narrower than hidden / heads, inner width 28 * 4, no power of two but the head.
SHAPE = {
    "vocab_size": 131, "hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

#: What is particular to a family: keywords of its configuration by the name of a case.
CASES: dict[str, dict[str, dict]] = {
    "llama": {
        "plain": {},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "yarn": {"rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        "longrope": {"rope_scaling": {
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 16, "long_factor": [1.5 + 0.1 * i for i in range(16)]}},
        "llama3": {"rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}},
    },
    "mistral": {"plain": {"sliding_window": None}, "window": {"sliding_window": 16}},
    "qwen2": {
        "plain": {},
        "window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    },
    "qwen3": {"plain": {}, "biases": {"attention_bias": True}},
    "phi3": {
        "plain": {"sliding_window": None},
        "window": {"sliding_window": 16},
        "partial": {"sliding_window": None, "partial_rotary_factor": 0.75},
    },
    "smollm3": {"plain": {"no_rope_layers": [1, 0, 1]}},
}  # fmt: skip

#: (family, case) of all.
ALL = [(family, case) for family in arch.names() for case in CASES.get(family, {"plain": {}})]


def tiny_family(
    family: str, case: str = "plain", seed: int = 0, dtype: torch.dtype = torch.float32, **changes
):
    """A random model in eval mode, whose norms and biases are not what they are initialised to."""
    values = {**SHAPE, **CASES.get(family, {"plain": {}})[case], **changes}
    config = AutoConfig.for_model(family, **values)
    if not hasattr(config, "head_dim"):
        config.head_dim = SHAPE["head_dim"]
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
            else:
                parameter.normal_(0, 0.1)
    torch.random.set_rng_state(state)
    return model.to(dtype)
