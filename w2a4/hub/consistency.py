"""A checkpoint directory against itself: config.json, the headers of its tensors, and the digests in them.

Everything here reads headers and small tensors only, before a model is built: what a hostile config asks
for (a billion layers, a rotation of another model) is refused by its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import arch
from ..errors import CheckpointError, shown
from ..format.headers import read_config, safetensors_header, shards_of
from ..format.manifest import Manifest, Replacement, is_replacement, read_manifest
from ..format.online import OnlineRotation

#: More layers than any model; where headers can be read, they say how many there are.
MAX_LAYERS = 1000

#: Largest sizes that a config may give.
LIMITS = {
    "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16, "head_dim": 1 << 16, "vocab_size": 1 << 26,
    "num_hidden_layers": MAX_LAYERS,
}  # fmt: skip
#: Fields that count layers, in configs of any model.
_LAYERS = re.compile(r"(layers?|blocks|depth)$")

_OPTIONAL = ("num_key_value_heads", "head_dim")

#: Fields of a config that say how many rows an output of a linear has.
_FIELDS = {
    "q": "num_attention_heads * head_dim", "k": "num_key_value_heads * head_dim",
    "v": "num_key_value_heads * head_dim", "o": "hidden_size", "gate": "intermediate_size",
    "up": "intermediate_size", "down": "hidden_size",
}  # fmt: skip

#: What is written before names by torch.compile and DataParallel.
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
FLOATS = ("F16", "BF16", "F32", "F64")
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


def check_directory(directory: Path) -> dict[str, Any]:
    """The config of a directory whose tensors it describes; of `.bin` files only the config is looked at.

    Raises:
        CheckpointError: not a LLaMA, sizes that are none or that the tensors do not have.
    """
    config = read_config(directory)
    replaced = is_packed(config) and is_replacement(config["quantization_config"])
    check_any_sizes(config) if replaced else check_sizes(config)
    if bin_only(directory):
        return config
    tensors = {}
    for shard in shards_of(directory):
        tensors |= safetensors_header(shard)
    if replaced:
        check_replaced(config, tensors)
        return config
    named = {PREFIXES.sub("", name): value for name, value in tensors.items()}
    _check_layers(config, named)
    _check_shapes(config, named)
    if is_packed(config):
        check_packed(config, named)
    return config


def bin_only(directory: Path) -> bool:
    """Whether a directory has its weights as pickles only, which transformers reads with weights_only."""
    return not any(directory.glob("*.safetensors*")) and any(directory.glob("pytorch_model*.bin"))


def is_packed(config: Mapping[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "w2a4"


def check_any_sizes(config: Mapping[str, Any], prefix: str = "") -> None:
    """Raise CheckpointError if a config of any model, or a part of it, has a number that is no size.

    What is not a whole number is left to the model's own class: some have a size a stage. Layers have many
    names, and a billion of any would be built before a tensor is looked for.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_any_sizes(value, f"{prefix}{key}.")
        limit = LIMITS.get(key, MAX_LAYERS if _LAYERS.search(str(key)) else None)
        if limit is None or type(value) is not int or value <= limit:
            continue
        raise CheckpointError(
            f"config.json says {prefix}{key}={str(value)[:40]}, more than {limit}; it is damaged or of "
            "another model"
        )


def check_replaced(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Every linear that a manifest calls replaced has packed codes, as its header says.

    Raises:
        CheckpointError: see above; or another `model_type` than the manifest's.
    """
    manifest = read_manifest(config["quantization_config"])
    _check_family(manifest, config)
    for name in manifest.kinds:
        kind, shape = tensors.get(f"{name}.weight", ("missing", ()))
        if kind != "U8" or len(shape) != 2:
            raise CheckpointError(
                f"quantization_config says that {shown(name)} was replaced, but its weight is {kind} "
                f"{list(shape)} in the checkpoint, not packed codes; config.json was changed, copy or "
                "download it again"
            )


def _check_family(manifest: Manifest | Replacement, config: Mapping[str, Any]) -> None:
    if manifest.family != config.get("model_type"):
        raise CheckpointError(
            f"config.json says model_type={config.get('model_type')!r}, its manifest "
            f"family={manifest.family!r}; config.json was changed, copy or download it again"
        )


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a config is of a supported family and its sizes are sizes."""
    arch.of_model_type(config.get("model_type"))
    for key, limit in LIMITS.items():
        value = config.get(key)
        if value is None and (key in _OPTIONAL or key not in config):
            continue  # transformers has a default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise CheckpointError(
                f"config.json says {key}={str(value)[:40]}, not a whole number in 1..{limit}; it is damaged "
                "or of another model"
            )


def _check_layers(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    found = {int(match.group(1)) for name in tensors if (match := _LAYER.match(name))}
    count = config.get("num_hidden_layers")
    if found and count is not None and found != set(range(count)):
        lost = sorted(set(range(count)) - found)
        raise CheckpointError(
            f"config.json says num_hidden_layers={count}, the checkpoint holds {len(found)} layers"
            + (f" and lacks layer {lost[0]}" if lost else "")
            + "; a shard is missing or of another model, or config.json is"
        )


def _check_shapes(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Sizes in the config against rows, which packing leaves as they are."""
    if not config.get("hidden_size") or not config.get("num_attention_heads"):
        return
    family = arch.of_model_type(config.get("model_type"))
    rows = {
        "model.embed_tokens.weight": ("vocab_size", config.get("vocab_size")),
        "lm_head.weight": ("vocab_size", config.get("vocab_size")),
        "model.norm.weight": ("hidden_size", config.get("hidden_size")),
    }
    if config.get("intermediate_size"):
        shapes = family.linear_shapes(config)
        for linear in (linear for site in family.sites for linear in site.linears):
            told = " + ".join(_FIELDS[output] for output in linear.outputs)
            rows[f"{linear.path}.weight"] = told, shapes[linear.path][0]
    for name, (_, shape) in tensors.items():
        key, size = rows.get(_LAYER.sub("", name), (None, None))
        if size is not None and (not shape or shape[0] != size):
            raise CheckpointError(
                f"{name} has {shape[0] if shape else 'no'} rows, config.json says {key} = {size}; they do "
                "not belong together"
            )


def check_packed(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Dtypes and rotations of a checkpoint that w2a4 wrote."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    norm = tensors.get("model.norm.weight", ("", ()))[0]
    for name, (kind, _) in tensors.items():
        if name.endswith(("norm.weight", ".bias")) and kind not in FLOATS:
            raise CheckpointError(f"{name} is {kind}, expected one of {', '.join(FLOATS)}; it is damaged")
    if norm and _DTYPES.get(str(dtype)) != norm:
        right = {value: key for key, value in _DTYPES.items()}[norm]
        raise CheckpointError(
            f"config.json says dtype={dtype!r}, the norms are {norm}; write it again, or give it "
            f"'dtype': {right!r}"
        )
    manifest = read_manifest(config["quantization_config"])
    _check_family(manifest, config)
    check_rotations(manifest, config)


def check_rotations(manifest: Manifest, config: Mapping[str, Any]) -> None:
    """The online rotations of a manifest have the widths of this model, and the manifest's seed."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    head_dim = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    for name, size in (("r3", head_dim), ("r4", config.get("intermediate_size"))):
        found = getattr(manifest, name)
        if found is None:
            continue
        size = size or found.size
        blocks = manifest.r4_blocks if name == "r4" else 1
        if size % blocks:  # the width is another one, which is what is told
            blocks = 1
        right = OnlineRotation.in_blocks(found.kind, size, manifest.rotation.seed, name, blocks)
        if found != right:
            raise CheckpointError(
                f"quantization_config rebuilds {name} from {found.to_dict()}, the model needs "
                f"{right.to_dict()}; config.json was changed, copy or download it again"
            )
