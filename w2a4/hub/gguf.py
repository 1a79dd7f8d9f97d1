"""GGUF files of the llama architecture: every tensor and every key is used, or the file is refused.

transformers unpacks the weights. It takes the keys it knows and gives random values to tensors that are
not there, so that all of that is checked here first, from the file's header; RoPE's scaling, which it
passes over, is read here.
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError

#: Keys of `llama.*` that are read, by us or transformers.
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length",
}  # fmt: skip

#: Keys that say nothing about the numbers, or nothing if they have this value.
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "rope.scaling.finetuned": None, "rope.scaling.attn_factor": (1.0,), "tensor_data_layout": None,
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "use_parallel_residual": (False,),
    "attention.sliding_window": (0,), "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,),
}  # fmt: skip

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)

#: Low and high frequency factor of LLaMA 3's RoPE, which all its models share.
_LOW, _HIGH = 1.0, 4.0


def load_gguf(path: Path) -> tuple[nn.Module, Any]:
    """Model in float32 and tokenizer.

    Raises:
        CheckpointError: not GGUF, truncated, part of a split file, or with a tensor or key that w2a4
            does not read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scaling = check_gguf(path)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # of the readers of many tensor types and tokenizers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot load {path.name!r}: {reason}") from error
    # transformers refuses to save models that came from GGUF: move the weights to a fresh one.
    config = copy.deepcopy(loaded.config)
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    config.dtype = torch.float32
    _set_rope(config, scaling)
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True, strict=True)
    model.tie_weights()
    # Buffers that are not part of the state, such as RoPE's frequencies, are still on meta.
    model.model.rotary_emb = type(loaded.model.rotary_emb)(config)
    model.generation_config = loaded.generation_config
    model.config._name_or_path = path.name
    return model.eval(), tokenizer


def check_gguf(path: Path) -> dict[str, Any]:
    """Check the header; what LlamaConfig is to say about RoPE, `rope_theta` included."""
    reader = _open(path)
    about = _contents(path, reader)
    architecture = str(about.get("general.architecture", "unnamed"))
    if architecture != "llama":
        raise CheckpointError(f"{path.name} holds architecture {architecture!r}; w2a4 reads 'llama'")
    _check_split(path, about)
    keys = {key.removeprefix("llama."): value for key, value in about.items() if key.startswith("llama.")}
    _check_keys(path, keys)
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    _check_tensors(path, shapes, _sizes(path, keys, shapes))
    return _rope(path, keys, next((t.data for t in reader.tensors if t.name == "rope_freqs.weight"), None))


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(f"reading {path.name} needs the package gguf: pip install gguf") from None
    try:
        return GGUFReader(path)
    except Exception as error:  # a damaged header can make it fail anywhere
        raise CheckpointError(f"{path.name} is not a GGUF file, or it is truncated: {error}") from None


def _contents(path: Path, reader: Any) -> dict[str, Any]:
    try:
        wanted = ("general.", "llama.", "split.")
        return {key: field.contents() for key, field in reader.fields.items() if key.startswith(wanted)}
    except Exception as error:
        raise CheckpointError(f"{path.name} has a damaged header: {error}") from None


def _check_split(path: Path, about: dict[str, Any]) -> None:
    count, name = int(about.get("split.count", 0)), _SPLIT.search(path.name)
    if name is not None and not count:
        count = int(name.group(2))
    if count > 1:
        raise CheckpointError(
            f"{path.name} is one of {count} files of a split model; put them together first: "
            "llama-gguf-split --merge FIRST.gguf WHOLE.gguf"
        )


def _check_keys(path: Path, keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        if key in _READ or (key in _NEUTRAL and (_NEUTRAL[key] is None or value in _NEUTRAL[key])):
            continue
        what = "a mixture of experts" if "expert" in key else "a model that differs from LLaMA"
        raise CheckpointError(
            f"{path.name} says llama.{key} = {str(value)[:60]}, which w2a4 does not read ({what}); give the "
            "transformers directory of a plain LLaMA"
        )


def _sizes(path: Path, keys: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """layers, hidden, ffn, q, kv (outputs of the projections) and vocabulary, from keys of the right type."""

    def number(key: str, default: int | None = None) -> int:
        value = keys.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise CheckpointError(
                f"{path.name} says llama.{key} = {str(value)[:60]}; w2a4 needs one whole number"
            )
        return value

    hidden, heads = number("embedding_length"), number("attention.head_count")
    width = number("attention.key_length", number("rope.dimension_count", hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, width) != width:
            raise CheckpointError(
                f"{path.name} says llama.{key} = {keys[key]}, but heads are {width} wide; w2a4 reads models "
                "whose keys, values and RoPE have the same width"
            )
    if "rope.dimension_count" not in keys and width != hidden // heads:
        raise CheckpointError(
            f"{path.name} has heads {width} wide and no llama.rope.dimension_count to say so"
        )
    kv = number("attention.head_count_kv", heads)
    vocabulary = shapes.get("token_embd.weight", (0,))[0]
    if number("vocab_size", vocabulary or 1) != vocabulary and "token_embd.weight" in shapes:
        raise CheckpointError(
            f"{path.name}: llama.vocab_size = {keys['vocab_size']}, embeddings {vocabulary}"
        )
    return {
        "layers": number("block_count"), "hidden": hidden, "ffn": number("feed_forward_length"),
        "q": heads * width, "kv": kv * width, "vocabulary": vocabulary,
    }  # fmt: skip


def _check_tensors(path: Path, shapes: dict[str, tuple[int, ...]], size: dict[str, int]) -> None:
    """Every tensor that a LLaMA has is there in its shape, and no other."""
    if size["layers"] > len(shapes):
        raise CheckpointError(
            f"{path.name} says llama.block_count = {size['layers']} and holds {len(shapes)} tensors; it is "
            "truncated, or part of a split model"
        )
    hidden, ffn, q, kv = size["hidden"], size["ffn"], size["q"], size["kv"]
    layer = {
        "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (q, hidden), "attn_k": (kv, hidden),
        "attn_v": (kv, hidden), "attn_output": (hidden, q), "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn),
    }  # fmt: skip
    expected = {f"blk.{i}.{n}.weight": s for i in range(size["layers"]) for n, s in layer.items()}
    expected |= {"token_embd.weight": (size["vocabulary"], hidden), "output_norm.weight": (hidden,)}
    optional = {"output.weight": (size["vocabulary"], hidden)}
    known = {**expected, **optional}
    unknown = sorted(set(shapes) - set(known) - {"rope_freqs.weight"})
    if unknown:
        raise CheckpointError(
            f"{path.name} holds {_some(unknown)}, which w2a4 does not read{_why(unknown[0])}"
        )
    missing = sorted(set(expected) - set(shapes))
    if missing:
        raise CheckpointError(
            f"{path.name} lacks {_some(missing)}; it is truncated, or part of a split model"
        )
    for name, shape in known.items():
        if name in shapes and shapes[name] != shape:
            raise CheckpointError(
                f"{path.name}: {name} is {list(shapes[name])}, its keys say {list(shape)}; download it again"
            )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors"


def _why(name: str) -> str:
    if name.endswith(".bias"):
        return (
            " (biases); give the transformers directory of the model, with attention_bias in its config.json"
        )
    if "exp" in name or "gate_inp" in name:
        return " (a mixture of experts); give a plain LLaMA"
    return "; give the transformers directory of the model"


# RoPE


def _rope(path: Path, keys: dict[str, Any], factors: Any) -> dict[str, Any]:
    """`rope_theta`, and the scaling that keys or the tensor of factors ask for."""
    theta = float(keys.get("rope.freq_base", 10000.0))
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)) or 1.0)
    # llama.cpp takes a factor without a type for linear.
    kind = str(keys.get("rope.scaling.type", "linear"))
    if not (math.isfinite(theta) and theta > 0 and math.isfinite(factor) and factor > 0):
        raise CheckpointError(
            f"{path.name}: llama.rope.freq_base = {theta}, factor {factor} are not positive"
        )
    scaled = kind != "none" and factor != 1.0
    if kind not in ("none", "linear") and (scaled or factors is None):
        raise CheckpointError(
            f"{path.name} says llama.rope.scaling.type = {kind!r} with factor {factor:g}; w2a4 reads 'none', "
            "'linear' and LLaMA 3's factors from GGUF: give the transformers directory of the model"
        )
    if scaled and factors is not None:
        raise CheckpointError(
            f"{path.name} holds both rope_freqs.weight and llama.rope.scaling.factor = {factor:g}; "
            "give the transformers directory of the model"
        )
    if scaled:
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    plain = {"rope_theta": theta, "rope_type": "default"}
    return plain if factors is None else _from_factors(path, theta, factors, keys, plain)


def _from_factors(
    path: Path, theta: float, factors: Any, keys: dict[str, Any], plain: dict[str, Any]
) -> dict[str, Any]:
    """LLaMA 3's scaling whose divisors of the frequencies are these; refused if there is none."""
    found = torch.tensor(factors, dtype=torch.float64).flatten()
    width = int(keys.get("rope.dimension_count", keys["embedding_length"] // keys["attention.head_count"]))
    if len(found) == width // 2:
        if torch.allclose(found, torch.ones_like(found)):
            return plain
        lengths = [2**n for n in range(3, 21)]
        lengths.insert(0, int(keys.get("rope.scaling.original_context_length", 8192)))
        for length in lengths:
            for factor in {float(found.max()), float(found.max().round()), 8.0, 32.0}:
                made = _llama3_factors(theta, width, factor, length)
                if torch.allclose(made, found, rtol=1e-4, atol=0):
                    return {
                        "rope_theta": theta, "rope_type": "llama3", "factor": factor, "low_freq_factor": _LOW,
                        "high_freq_factor": _HIGH, "original_max_position_embeddings": length,
                    }  # fmt: skip
    raise CheckpointError(
        f"{path.name}: the {len(found)} factors in rope_freqs.weight are not those of LLaMA 3's RoPE; give "
        "the transformers directory of the model"
    )


def _llama3_factors(theta: float, width: int, factor: float, length: int) -> torch.Tensor:
    """What LLaMA 3 divides RoPE's frequencies by, float64 `[width / 2]`."""
    wavelength = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    smooth = ((length / wavelength - _LOW) / (_HIGH - _LOW)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _set_rope(config: Any, scaling: dict[str, Any]) -> None:
    """As transformers 5 keeps it, and as 4 does."""
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = dict(scaling)
        return
    config.rope_theta = scaling["rope_theta"]
    rest = {key: value for key, value in scaling.items() if key != "rope_theta"}
    config.rope_scaling = rest if rest["rope_type"] != "default" else None
