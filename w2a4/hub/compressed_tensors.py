"""A 4-bit checkpoint in the format compressed-tensors, which transformers and vLLM read without w2a4.

That format has uniform weights in groups and dynamic activations, and neither KV4's rotation, nor an exact
prefix, nor clips of activations: what cannot be said in it is refused, or told where it is documented.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from ..errors import CheckpointError
from ..format.directories import atomic_directory, check_out_dir
from ..format.files import write_atomically, write_json
from ..format.linear import W4A4Linear, W8Embedding, W8Linear
from ..format.manifest import Manifest, read_manifest
from ..format.online import OnlineRotation
from ..runtime import joint
from .generation import generation_text
from .model import adapted_module
from .portable import save_tokenizer, write_config
from .transformers import W2A4Config

#: Of the format compressed-tensors, the form that packs codes. Without it in every group, versions that read
#: only these take activations of 4 bits for a sign of bytes.
FORMAT = "pack-quantized"

#: The name of R4 in a file's `transform_config`, and so in those of its tensors.
R4 = "R4"

_NOT_PACKED = (
    "is not what w2a4 quantize or w2a4 train has packed, from which compressed-tensors is written; give that"
)

#: Settings of a checkpoint that the format has words for.
_PLAIN = "--set rotation.r4=none --set prefix_tokens=0"

#: Bits of a code and of the integers that hold eight.
BITS, WORD = 4, 32


@torch.no_grad()
def export_compressed_tensors(
    model: nn.Module,
    tokenizer: Any,
    out_dir: str | Path,
    dtype: torch.dtype = torch.float16,
    for_vllm: bool = False,
) -> None:
    """Write a model of 4-bit weights as `pack-quantized`; the weights are those of the checkpoint to the bit.

    Embedding and head are written in `dtype`, as is the KV cache of whoever loads it. Activations get the
    format's own quantiser: a scale of max│x│ / 7.5 a group, without clips.

    Args:
        model: as `load_model` gives it.
        tokenizer: written too; None is none.
        out_dir: a new directory.
        dtype: of what is not packed, and of the scales: float16 or float32, which hold these exactly.
        for_vllm: with an R4 as a `transform`, which vLLM applies; transformers 5.24 passes over it without a
            word, and computes something else.

    Raises:
        CheckpointError: other weights, a prefix or an R4, a dtype that does not hold a number, an adapter, or
            `out_dir` exists and is not empty.
    """
    manifest = check_expressible(model, for_vllm)
    if dtype not in (torch.float16, torch.float32):
        raise CheckpointError(
            f"dtype={str(dtype).removeprefix('torch.')}: scales of weights have eleven bits, more than it: "
            "give float16 or float32"
        )
    check_out_dir(out_dir)
    tensors, packed = _tensors(model, dtype)
    generation = getattr(model, "generation_config", None)
    config = model.config.to_dict()
    for name in ("auto_map", "_name_or_path"):  # the code of the checkpoint, and where it lay
        config.pop(name, None)
    config["quantization_config"] = _quantization(packed, manifest.act_bits)
    if manifest.r4 is not None:
        config["quantization_config"]["transform_config"] = _transform(manifest.r4)
        tensors |= _matrices(manifest.r4, packed, dtype)
    config |= {"architectures": [type(model).__name__], "tie_word_embeddings": False}
    with atomic_directory(out_dir) as directory:
        save_torch_state_dict(tensors, directory, metadata={"format": "pt"})
        write_json(directory / "config.json", config)
        write_config(directory / "config.json", dtype, code=False)
        if generation is not None:
            write_atomically(directory / "generation_config.json", generation_text(generation))
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory)


def check_expressible(model: nn.Module, for_vllm: bool = False) -> Manifest:
    """The manifest of a model, or CheckpointError with what compressed-tensors has no words for."""
    quantization = getattr(model.config, "quantization_config", None)
    manifest = quantization.manifest if isinstance(quantization, W2A4Config) else None
    if not isinstance(manifest, Manifest):
        raise CheckpointError(f"this {type(model).__name__} {_NOT_PACKED}")
    adapted = adapted_module(model)
    if adapted is not None:
        raise CheckpointError(f"{adapted} has an adapter; merge it first, by PEFT's merge_and_unload")
    check_manifest(manifest, for_vllm)
    return manifest


def check_checkpoint(directory: str | Path, for_vllm: bool = False) -> Manifest:
    """`check_expressible`, by config.json alone."""
    path = Path(directory) / "config.json"
    quantization = (
        json.loads(path.read_text(encoding="utf-8")).get("quantization_config") if path.is_file() else None
    )
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == "w2a4"
    manifest = read_manifest(quantization) if ours else None
    if not isinstance(manifest, Manifest):
        raise CheckpointError(f"{str(directory)!r} {_NOT_PACKED}")
    check_manifest(manifest, for_vllm)
    return manifest


def check_manifest(manifest: Manifest, for_vllm: bool = False) -> None:
    """Raise CheckpointError with what compressed-tensors has no words for."""
    again = f"make the checkpoint again: w2a4 quantize MODEL --out DIR --recipe w4a4kv4 {_PLAIN}"
    if manifest.weight_bits != BITS:
        raise CheckpointError(
            f"weight_bits={manifest.weight_bits}: compressed-tensors is of 4-bit weights; {again}; or "
            "serve this one with w2a4's plug-in for vLLM"
        )
    if manifest.prefix:
        raise CheckpointError(
            f"prefix={list(manifest.prefix)}: compressed-tensors has no keys and values that stand before "
            f"every sequence, and without them the model is another; {again}"
        )
    if manifest.r4 is not None and not for_vllm:
        raise CheckpointError(
            f"rotation.r4={manifest.r4.kind!r}: transformers does not turn the input of down_proj, though "
            f"the format asks for it; {again}; or export this one for vLLM alone (--for-vllm)"
        )


def _transform(r4: OnlineRotation) -> dict[str, Any]:
    """R4 as the format's `transform_config`."""
    down = {"targets": ["re:.*\\.down_proj$"], "location": "input", "inverse": False, "ignore": []}
    scheme = {"type": "random-hadamard", "apply": [down], "randomize": False, "requires_grad": False}
    return {"config_groups": {R4: scheme | {"head_dim": _block(r4), "precision": "float32"}}}


def _matrices(r4: OnlineRotation, packed: dict[str, W4A4Linear], dtype: torch.dtype) -> dict[str, Tensor]:
    """What multiplies the inputs of down_proj, times the root of its width as the format has it.

    It stands at the first one alone: vLLM holds one matrix for all of a width.
    """
    size = _block(r4)
    if r4.kind == "hadamard":
        r4 = dataclasses.replace(r4, size=size)  # one of its blocks
    matrix = r4.matrix() * size**0.5
    if "hadamard" in r4.kind and r4.block_size == size:
        matrix = matrix.round()  # 1 and -1
    first = next(name for name in packed if name.endswith(".down_proj"))
    return {f"{first}.{R4}_input.weight": matrix.to(dtype)}


def _block(r4: OnlineRotation) -> int:
    """Width of the equal blocks on the diagonal that it consists of."""
    return r4.block_size if r4.kind == "hadamard" else r4.size


def _tensors(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, W4A4Linear]]:
    """Tensors under the names of the format, and the packed linears by theirs."""
    packed: dict[str, W4A4Linear] = {}
    tensors: dict[str, Tensor] = {}
    for name, module in joint.named_modules(model):
        if isinstance(module, W4A4Linear):
            packed[name] = module
            fitted = module.fitted()
            tensors[f"{name}.weight_packed"] = pack_int32(fitted.codes)
            tensors[f"{name}.weight_scale"] = fitted.scale.to(dtype)
            tensors[f"{name}.weight_shape"] = torch.tensor(fitted.codes.shape)
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias.to(dtype)
        elif isinstance(module, W8Linear):
            tensors[f"{name}.weight"] = module.dequantize().to(dtype)
        elif isinstance(module, W8Embedding):
            tensors[f"{name}.weight"] = (module.weight.float() * module.scale.float()[:, None]).to(dtype)
        else:
            for key, value in module.named_parameters(recurse=False):
                tensors[f"{name}.{key}"] = value.to(dtype)
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{name} holds numbers that {str(dtype).removeprefix('torch.')} does not: give --dtype "
                "float32"
            )
        # Rows of a joint linear share its memory, which files of safetensors do not.
        shared = value.untyped_storage().nbytes() > value.nbytes
        tensors[name] = value.cpu().clone() if shared else value.cpu().contiguous()
    return tensors, packed


def pack_int32(codes: Tensor) -> Tensor:
    """Codes int8 -8..7 `[out, in]` as int32 `[out, ceil(in / 8)]`: code + 8, the first in the lowest bits."""
    in_word = WORD // BITS
    nibbles = torch.nn.functional.pad((codes.int() + 8), (0, -codes.shape[1] % in_word))
    shifts = torch.arange(in_word, device=codes.device) * BITS
    words = (nibbles.unflatten(1, (-1, in_word)).long() << shifts).sum(-1)
    return torch.where(words < 2 ** (WORD - 1), words, words - 2**WORD).int()


def _quantization(packed: dict[str, W4A4Linear], act_bits: int) -> dict[str, Any]:
    """The format's `quantization_config`: linears of equal groups together."""
    alike: dict[tuple[int, int], set[str]] = defaultdict(set)
    for name, linear in packed.items():
        alike[_group(linear, linear.group_size), _group(linear, linear.act_group_size)].add(
            name.rpartition(".")[2]
        )
    groups, dynamic = {}, {"dynamic": True}
    for number, ((weights, activations), leaves) in enumerate(sorted(alike.items())):
        groups[f"group_{number}"] = {
            "format": FORMAT,
            "targets": [f"re:.*\\.{re.escape(leaf)}$" for leaf in sorted(leaves)],
            "weights": _arguments(weights, "channel") | {"dynamic": False},
            "input_activations": _arguments(activations, "token") | dynamic if act_bits == 4 else None,
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": FORMAT, "quantization_status": "compressed",
        "config_groups": groups, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


def _group(linear: W4A4Linear, size: int) -> int:
    """-1 if one scale serves all inputs."""
    return -1 if size in (-1, linear.in_features) else size


def _arguments(size: int, whole: str) -> dict[str, Any]:
    grouped = {"strategy": "group", "group_size": size} if size != -1 else {"strategy": whole}
    return {"num_bits": BITS, "type": "int", "symmetric": True, **grouped}
