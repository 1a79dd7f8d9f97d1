"""RoPE of a GGUF file, whose scaling transformers passes over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .gguf_header import File

#: Low and high frequency factor of LLaMA 3's RoPE, which all its models share.
_LOW, _HIGH = 1.0, 4.0


def rope_of(file: File, factors: Any, width: int, scaled: bool) -> dict[str, Any]:
    """`rope_theta`, and the scaling that keys or the tensor of factors ask for.

    Args:
        factors: the tensor `rope_freqs.weight`, or None.
        width: of a head.
        scaled: whether the family takes a scaling of another kind than longrope's.
    """
    keys, prefix = file.keys, f"{file.prefix}rope"
    theta = float(keys.get("rope.freq_base", 10000.0))
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)) or 1.0)
    # llama.cpp takes a factor without a type for linear.
    kind = str(keys.get("rope.scaling.type", "linear"))
    if not (math.isfinite(theta) and theta > 0 and math.isfinite(factor) and factor > 0):
        raise CheckpointError(f"{file.name}: {prefix}.freq_base = {theta}, factor {factor} are not positive")
    stretched = kind != "none" and factor != 1.0
    if kind not in ("none", "linear") and (stretched or factors is None):
        raise CheckpointError(
            f"{file.name} says {prefix}.scaling.type = {kind!r} with factor {factor:g}; w2a4 reads 'none', "
            "'linear' and LLaMA 3's factors from GGUF: give the transformers directory of the model"
        )
    if stretched and factors is not None:
        raise CheckpointError(
            f"{file.name} holds both rope_freqs.weight and {prefix}.scaling.factor = {factor:g}; "
            "give the transformers directory of the model"
        )
    if (stretched or factors is not None) and not scaled:
        what = "rope_freqs.weight" if factors is not None else f"{prefix}.scaling.factor = {factor:g}"
        raise CheckpointError(
            f"{file.name} holds {what}, which models of this family do not have in transformers; give the "
            "transformers directory of the model"
        )
    if stretched:
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    plain = {"rope_theta": theta, "rope_type": "default"}
    return plain if factors is None else _from_factors(file, theta, factors, width, plain)


def _from_factors(
    file: File, theta: float, factors: Any, width: int, plain: dict[str, Any]
) -> dict[str, Any]:
    """LLaMA 3's scaling whose divisors of the frequencies are these; refused if there is none."""
    found = torch.tensor(factors, dtype=torch.float64).flatten()
    if len(found) == width // 2:
        if torch.allclose(found, torch.ones_like(found)):
            return plain
        lengths = [2**n for n in range(3, 21)]
        lengths.insert(0, int(file.keys.get("rope.scaling.original_context_length", 8192)))
        for length in lengths:
            for factor in {float(found.max()), float(found.max().round()), 8.0, 32.0}:
                made = _llama3_factors(theta, width, factor, length)
                if torch.allclose(made, found, rtol=1e-4, atol=0):
                    return {
                        "rope_theta": theta, "rope_type": "llama3", "factor": factor, "low_freq_factor": _LOW,
                        "high_freq_factor": _HIGH, "original_max_position_embeddings": length,
                    }  # fmt: skip
    raise CheckpointError(
        f"{file.name}: the {len(found)} factors in rope_freqs.weight are not those of LLaMA 3's RoPE; give "
        "the transformers directory of the model"
    )


def _llama3_factors(theta: float, width: int, factor: float, length: int) -> torch.Tensor:
    """What LLaMA 3 divides RoPE's frequencies by, float64 `[width / 2]`."""
    wavelength = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    smooth = ((length / wavelength - _LOW) / (_HIGH - _LOW)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def set_rope(config: Any, scaling: dict[str, Any]) -> None:
    """Put `rope_theta` and scaling into a configuration, as transformers 5 keeps them or as 4 does."""
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = {**(config.rope_parameters or {}), **scaling}
        return
    config.rope_theta = scaling["rope_theta"]
    rest = {key: value for key, value in scaling.items() if key != "rope_theta"}
    config.rope_scaling = rest if rest["rope_type"] != "default" else None
