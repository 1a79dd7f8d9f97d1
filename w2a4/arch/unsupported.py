"""What families and features that are not supported would need, for the error that refuses them."""

from __future__ import annotations

_EXPERTS = "its experts would need a rotation of each and a kernel that picks among them"
_POST_NORMS = "its norms behind attention and MLP do not pass a rotation of the residual stream"
_LAYER_NORMS = "its LayerNorms subtract the mean, which does not pass a rotation of the residual stream"

#: By `model_type`.
REASONS = {
    "bloom": _LAYER_NORMS,
    "cohere": f"{_LAYER_NORMS}; attention and MLP are parallel",
    "cohere2": f"{_LAYER_NORMS}; attention and MLP are parallel",
    "deepseek_v2": f"{_EXPERTS}; its attention keeps compressed keys",
    "deepseek_v3": f"{_EXPERTS}; its attention keeps compressed keys",
    "falcon": _LAYER_NORMS,
    "gemma": "its norms multiply by 1 + weight and its embeddings are scaled",
    "gemma2": f"{_POST_NORMS}, and attention scores have a soft cap",
    "gemma3": f"{_POST_NORMS}, and there are norms of queries and keys by 1 + weight",
    "gemma3_text": f"{_POST_NORMS}, and there are norms of queries and keys by 1 + weight",
    "gemma4": f"{_POST_NORMS}; it mixes kinds of attention",
    "glm4": _POST_NORMS,
    "gpt2": f"{_LAYER_NORMS}; positions are learned",
    "gpt_neox": f"{_LAYER_NORMS}; attention and MLP are parallel",
    "gpt_oss": f"{_EXPERTS}; attention has learned sinks",
    "granite": "its residual, embedding and logit multipliers would have to be folded",
    "llama4": f"{_EXPERTS}; keys are normalised behind RoPE",
    "mixtral": _EXPERTS,
    "olmo2": _POST_NORMS,
    "olmo3": _POST_NORMS,
    "opt": f"{_LAYER_NORMS}; positions are learned",
    "phi": f"{_LAYER_NORMS}; attention and MLP are parallel",
    "phimoe": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "qwen3_next": f"{_EXPERTS}; it mixes attention with a linear recurrence",
    "stablelm": _LAYER_NORMS,
    "starcoder2": _LAYER_NORMS,
}

#: Fields of a configuration that change what a layer computes.
FEATURES = {
    "attn_logit_softcapping": "soft caps on attention scores",
    "final_logit_softcapping": "soft caps on logits",
    "n_routed_experts": "experts",
    "num_experts": "experts",
    "num_local_experts": "experts",
}
