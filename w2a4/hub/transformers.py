"""transformers: the quantisation plug-in, and what a model needs to run and to save itself.

`import w2a4` registers the quantiser, so `AutoModelForCausalLM.from_pretrained(directory)` rebuilds a
packed model: the skeleton is swapped on the meta device (`prepare_skeleton`), the tensors are loaded
as they are, and every one is validated. `install` gives a model, freshly quantised or loaded, the
attention function, the KV4 cache as its default cache, and a `save_pretrained` that writes the
recipe, the report and the model card too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import arch
from ..errors import CheckpointError, RotationError, shown
from ..evaluate.report import Report
from ..format.linear import PACKED_LINEARS, W8Embedding, W8Linear, _PackedModule
from ..format.manifest import FORMAT_VERSION, NEEDS_W2A4, Manifest, Replacement, read_manifest
from ..format.online import OnlineRotation, RotatedLinear
from ..recipe import Recipe
from ..runtime import attention
from ..runtime.classes import derived
from ..runtime.guards import before_forward
from ..runtime.layer import PackedDecoderLayer
from ..runtime.prefix import KVPrefix
from ..version import VERSION
from .checkpoint import (
    check_config,
    check_config_beside,
    check_headers,
    check_parallel,
    check_placement,
    check_values,
    local_shards,
    packed_tensors,
)
from .model import PackedModelMixin, report_beside
from .plugin import METHOD
from .portable import check_rope
from .replace import float32_patterns, tied_parameters
from .replaced import float_dtype, install_replaced, prepare_replaced


class W2A4Config(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, of format 1 or 2; it is written in format 2.

    Attributes:
        manifest: what loading and computing need, see `Manifest` and `Replacement`.
        recipe: `Recipe.to_dict()` of the version that made the model, for people and reports; not checked.
        provenance: free: source model, versions.
        w2a4_version: what wrote the checkpoint.

    Raises:
        CheckpointError: a newer format, with the w2a4 that reads it, or a manifest that is none.
    """

    def __init__(
        self,
        manifest: Manifest | Replacement | dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        format_version: int = 1,
        w2a4_version: str | None = None,
        needs_w2a4: str | None = None,
        rotation: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(manifest, (Manifest, Replacement)):
            manifest = read_manifest({
                "format_version": format_version, "w2a4_version": w2a4_version, "needs_w2a4": needs_w2a4,
                "manifest": manifest, "recipe": recipe, "rotation": rotation,
            })  # fmt: skip
        kwargs.pop("quant_method", None)
        if kwargs:
            raise CheckpointError(f"quantization_config has unknown keys {sorted(kwargs)}")
        for name, part in (("recipe", recipe), ("provenance", provenance)):
            if part is not None and not isinstance(part, dict):
                raise CheckpointError(
                    f"quantization_config says {name}={shown(part)}, which is not a mapping"
                )
        self.quant_method = METHOD
        self.manifest = manifest
        self.w2a4_version = w2a4_version if w2a4_version and format_version == FORMAT_VERSION else VERSION
        self.recipe = recipe or {}
        self.provenance = provenance or {}

    @classmethod
    def of_recipe(
        cls, recipe: Recipe, rotation: dict[str, Any], provenance: dict[str, Any], family: str,
        prefix: Sequence[int] = (),
    ) -> W2A4Config:  # fmt: skip
        """The config of a model that is being made; see `Manifest.of_recipe`."""
        data = recipe.to_dict()
        return cls(Manifest.of_recipe(data, rotation, family, prefix), data, provenance)

    def quantized_by(self, recipe: Recipe, prefix: Sequence[int] = ()) -> W2A4Config:
        """The config of this model, rotated already, after it is quantised by a recipe that agrees."""
        online = self.manifest.to_dict()
        return self.of_recipe(recipe, {"online": online}, self.provenance, self.manifest.family, prefix)

    @property
    def rotated_by(self) -> dict[str, Any]:
        """What the rotation of this model settles of a recipe, for `Recipe.override`."""
        rotation = dataclasses.asdict(self.manifest.rotation)
        rotation["r4_blocks"] = self.manifest.r4_blocks
        if "learned" in (rotation["r1"], rotation["r2"]):
            recorded = self.recipe.get("rotation")
            rotation["learned"] = recorded.get("learned") if isinstance(recorded, dict) else None
        return {"rotation": rotation, "smooth": self.recipe.get("smooth", 0.0)}

    def online(self, name: str) -> OnlineRotation | None:
        """The online rotation `r3` or `r4`, or None."""
        return getattr(self.manifest, name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as config.json holds it."""
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "w2a4_version": self.w2a4_version,
            "needs_w2a4": NEEDS_W2A4,
            "manifest": self.manifest.to_dict(),
            "recipe": copy.deepcopy(self.recipe),
            "provenance": copy.deepcopy(self.provenance),
        }

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Pairs of `to_dict`: transformers calls `dict(config)`."""
        return iter(self.to_dict().items())


class W2A4Quantizer(HfQuantizer):
    """Loads packed checkpoints. Quantising is `w2a4.quantize`, not `from_pretrained`."""

    requires_calibration = True
    requires_parameters_quantization = False

    @property
    def _replaced(self) -> bool:
        return isinstance(self.quantization_config.manifest, Replacement)

    def update_attn_implementation(self, config: Any) -> Any:
        """What transformers 5 asks before it builds the skeleton, of however many layers config.json says."""
        check_config(config, self._replaced)
        return super().update_attn_implementation(config)

    def update_tp_plan(self, config: Any) -> Any:
        """The same in transformers 4.57."""
        check_config(config, self._replaced)
        return super().update_tp_plan(config) if hasattr(super(), "update_tp_plan") else config

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, device_map=None, **kwargs):
        check_placement(device_map)
        check_parallel(model)
        self._asked = float_dtype(model)
        if checkpoint_files is None:  # transformers 4.57 does not say
            checkpoint_files = local_shards(model.config)
        if checkpoint_files:
            check_config_beside(checkpoint_files)
        prepare_skeleton(model, self.quantization_config)
        if checkpoint_files:
            check_headers(checkpoint_files, model)

    def update_expected_keys(self, model, expected_keys: list[str], loaded_keys: list[str]) -> list[str]:
        """transformers 4.57: names are known here, and floats are cast to one dtype unless it is None."""
        missing = sorted(set(expected_keys) - set(loaded_keys) - tied_parameters(model))
        if missing:
            raise CheckpointError(
                f"{missing[0]} is missing from the checkpoint; a shard is missing or of another model"
            )
        self._dtype = model.config._pre_quantization_dtype
        model.config._pre_quantization_dtype = None
        return expected_keys

    def _process_model_after_weight_loading(self, model, **kwargs):
        check_placement(getattr(model, "hf_device_map", None))
        if hasattr(self, "_dtype"):
            model.config._pre_quantization_dtype = self._dtype
            _cast_unpacked(model, self._asked)
        for name, module in model.named_modules():
            if isinstance(module, _PackedModule):
                module.validate(name)
                module.requires_grad_(False)  # transformers asks gradients of every float that it loads
        check_values(model)
        if self._replaced:
            install_replaced(model, self.quantization_config)
            return model
        install(model, self.quantization_config, report_beside(getattr(model.config, "_name_or_path", "")))
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether transformers' Trainer may have it; what is packed it takes with adapters only."""
        return not self._replaced

    @property
    def is_compileable(self) -> bool:
        return True


def _register() -> None:
    """Enter quantiser, attention and mask into transformers' tables, instead of the stand-ins of `plugin`."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = W2A4Config
    AUTO_QUANTIZER_MAPPING[METHOD] = W2A4Quantizer
    attention.register()


def _cast_unpacked(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floats, in place since some are tied, that neither the format nor the model has a dtype for."""
    packed, kept = packed_tensors(model), list(float32_patterns(model))
    for name, value in model.named_parameters():
        fixed = name in packed or any(pattern.search(name) for pattern in kept)
        if value.is_floating_point() and not fixed and value.dtype != dtype:
            value.data = value.detach().to(dtype)


def check_original(model: nn.Module) -> None:
    """Raise RotationError if w2a4 cannot begin with this model; see `check_rope` too."""
    check_language_model(model)
    check_rope(model.config)
    if isinstance(getattr(model.config, "quantization_config", None), W2A4Config):
        raise RotationError("this model was rotated or quantised by w2a4 already; start from the original")


def check_language_model(model: nn.Module) -> None:
    """Raise RotationError if a checkpoint of this model would lose a part, or the model lacks one."""
    arch.of_model(model)
    bias = getattr(model.lm_head, "bias", None)
    if bias is not None:
        raise RotationError(
            f"lm_head has a bias of shape {[*bias.shape]}, which the checkpoint of a {type(model).__name__} "
            "does not hold; give a model without"
        )


def prepare_skeleton(model: nn.Module, config: W2A4Config) -> None:
    """Swap a meta-device model's linears and embeddings for empty packed ones.

    Raises:
        CheckpointError: of no supported family, another head than a language model's, or without the RoPE of
            its config; for a `Replacement`, see `prepare_replaced`.
    """
    if isinstance(config.manifest, Replacement):
        prepare_replaced(model, config.manifest)
        return
    family = arch.of_config(model.config)
    if not arch.is_language_model(model, family):
        raise CheckpointError(
            f"a checkpoint of w2a4 loads as {family.model_class}, not as {type(model).__name__}; use "
            "AutoModelForCausalLM, whose `.model` is the bare decoder"
        )
    check_rope(model.config)
    manifest, r4 = config.manifest, config.online("r4")
    dtype = model.model.norm.weight.dtype
    model.config.tie_word_embeddings = False
    for layer in model.model.layers:
        prepare_layer(layer, family, manifest, r4, dtype)
        if manifest.prefix:
            heads, head_dim = model.config.num_key_value_heads, layer.self_attn.head_dim
            with torch.device("meta"):
                layer.self_attn.prefix = KVPrefix(heads, len(manifest.prefix), head_dim)
    if manifest.weight_bits < 16:
        pack_layers(model, family)
    with torch.device("meta"):
        if manifest.embed_bits == 8:
            old = model.model.embed_tokens
            model.model.embed_tokens = W8Embedding(*old.weight.shape, old.padding_idx, dtype=dtype)
        if manifest.head_bits == 8:
            head = model.lm_head
            model.lm_head = W8Linear(head.in_features, head.out_features, dtype=dtype)


def prepare_layer(
    layer: nn.Module, family: arch.Architecture, manifest: Manifest | Recipe, r4: OnlineRotation | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Swap a decoder layer's linears for empty packed ones on the meta device."""
    head_dim = layer.self_attn.head_dim
    with torch.device("meta"):
        for site in family.sites:
            for path in site.paths:
                old = layer.get_submodule(path)
                act_group = -1
                if manifest.weight_bits < 16:
                    act_group = family.act_group_size(manifest, site, head_dim, old.in_features)
                rotation = r4 if site.rotation == "r4" else None
                layer.set_submodule(path, _empty_linear(old, manifest, rotation, act_group, dtype))


def _empty_linear(
    old: nn.Linear, manifest: Manifest, rotation: OnlineRotation | None, act_group: int, dtype: torch.dtype
) -> nn.Module:
    shape = (old.in_features, old.out_features, old.bias is not None)
    if manifest.weight_bits == 16:
        return old if rotation is None else RotatedLinear(*shape, rotation=rotation, dtype=dtype)
    return PACKED_LINEARS[manifest.weight_bits](
        *shape, manifest.group_size, act_bits=manifest.act_bits, rotation=rotation, act_group_size=act_group,
        dtype=dtype,
    )  # fmt: skip


def pack_layers(model: nn.Module, family: arch.Architecture) -> None:
    """Put a `PackedDecoderLayer` in place of every layer of transformers, whose modules it takes over."""
    layers = model.model.layers
    for index, layer in enumerate(layers):
        if not isinstance(layer, PackedDecoderLayer):
            layers[index] = PackedDecoderLayer.of(layer, family)


def kv_settings(config: W2A4Config) -> attention.KVSettings:
    manifest = config.manifest
    return attention.KVSettings(manifest.kv_bits, manifest.kv_clip, manifest.sink_tokens, manifest.r3)


def install(model: nn.Module, config: W2A4Config, report: Report | None = None) -> None:
    """Give a rotated or quantised model its attention, cache and `save_pretrained`."""
    set_attention(model, config)
    if config.manifest.weight_bits < 16:
        model.is_quantized = True
        pack_layers(model, arch.of_config(model.config))
        for layer in model.model.layers:
            layer.join()
    if not isinstance(model, PackedModelMixin):
        model.__class__ = derived(PackedModelMixin, type(model))
        model.register_forward_pre_hook(before_forward, with_kwargs=True)
    model.w2a4_report = report


def set_attention(model: nn.Module, config: W2A4Config) -> None:
    """Record `config` in the model and let it attend with R3 and the KV cache that this asks for."""
    model.config.quantization_config = config
    model.config.tie_word_embeddings = False
    settings = kv_settings(config)
    for layer in model.model.layers:
        prefix = getattr(layer.self_attn, "prefix", None)
        layer.self_attn.kv_settings = dataclasses.replace(settings, prefix=prefix)
    model.set_attn_implementation(attention.NAME)


_register()
