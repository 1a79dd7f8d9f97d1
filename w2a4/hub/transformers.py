"""transformers: the quantisation plug-in, and what a model needs to run and to save itself.

`import w2a4` registers the quantiser, so `AutoModelForCausalLM.from_pretrained(directory)` rebuilds a
packed model: the skeleton is swapped on the meta device (`prepare_skeleton`), the tensors are loaded
as they are, and every one is validated. `install` gives a model, freshly quantised or loaded, the
attention function, the KV4 cache as its default cache, and a `save_pretrained` that writes the
recipe, the report and the model card too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import arch
from ..errors import CheckpointError, RotationError
from ..evaluate.report import Report
from ..format.linear import PACKED_LINEARS, W8Embedding, W8Linear, _PackedModule
from ..format.online import OnlineRotation, RotatedLinear
from ..recipe import Recipe
from ..runtime import attention
from ..runtime.classes import derived
from ..runtime.guards import before_forward
from ..runtime.layer import fuse
from ..version import VERSION
from .checkpoint import (
    FORMAT_VERSION,
    check_config,
    check_config_beside,
    check_headers,
    check_placement,
    check_values,
)
from .model import PackedModelMixin, report_beside
from .portable import check_rope

METHOD = "w2a4"


class W2A4Config(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: plain data, enough to rebuild the model.

    Attributes:
        recipe: `Recipe.to_dict()`; weight_bits 16 for a model that was rotated only.
        rotation: how the model was rotated, with `online` = {"r3": …, "r4": …} to rebuild the
            online rotations from (`OnlineRotation.from_dict`); empty if it was not.
        provenance: free: source model, versions.
    """

    def __init__(
        self,
        recipe: dict[str, Any] | None = None,
        rotation: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        w2a4_version: str | None = None,
        **kwargs: Any,
    ):
        if type(format_version) is not int or format_version < 1:
            raise CheckpointError(f"format_version={format_version!r}: give a number from 1 on")
        if format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint format {format_version!r} is newer than {FORMAT_VERSION}, which "
                f"w2a4 {VERSION} reads; upgrade w2a4"
            )
        kwargs.pop("quant_method", None)
        if kwargs:
            raise CheckpointError(f"quantization_config has unknown keys {sorted(kwargs)}")
        self.quant_method = METHOD
        self.format_version = format_version
        self.w2a4_version = w2a4_version or VERSION
        self.recipe = Recipe.of_checkpoint(recipe or {}).to_dict()
        self.rotation = rotation or {}
        self.provenance = provenance or {}

    def online(self, name: str) -> OnlineRotation | None:
        """The online rotation `r3` or `r4`, or None."""
        data = self.rotation.get("online", {}).get(name)
        return None if not data or data["kind"] == "none" else OnlineRotation.from_dict(data)

    @property
    def parsed_recipe(self) -> Recipe:
        return Recipe.of_checkpoint(self.recipe)


class W2A4Quantizer(HfQuantizer):
    """Loads packed checkpoints. Quantising is `w2a4.quantize`, not `from_pretrained`."""

    requires_calibration = True
    requires_parameters_quantization = False

    def update_attn_implementation(self, config: Any) -> Any:
        """What transformers 5 asks before it builds the skeleton, of however many layers config.json says."""
        check_config(config)
        return super().update_attn_implementation(config)

    def update_tp_plan(self, config: Any) -> Any:
        """The same in transformers 4.57."""
        check_config(config)
        return super().update_tp_plan(config) if hasattr(super(), "update_tp_plan") else config

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, device_map=None, **kwargs):
        check_placement(device_map)
        self._asked = _activation_dtype(model)
        if checkpoint_files:
            check_config_beside(checkpoint_files)
        prepare_skeleton(model, self.quantization_config)
        if checkpoint_files:
            check_headers(checkpoint_files, model.state_dict())

    def update_expected_keys(self, model, expected_keys: list[str], loaded_keys: list[str]) -> list[str]:
        """transformers 4.57: names are known here, and floats are cast to one dtype unless it is None."""
        missing = sorted(set(expected_keys) - set(loaded_keys))
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
        check_values(model)
        install(model, self.quantization_config, report_beside(getattr(model.config, "_name_or_path", "")))
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.quantization_config.parsed_recipe.weight_bits == 16

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Register quantiser, attention and mask with transformers; harmless when done before."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(W2A4Config)
        register_quantizer(METHOD)(W2A4Quantizer)
    attention.register()


def _cast_unpacked(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            packed = isinstance(module, _PackedModule) and name in module._format
            if value.is_floating_point() and not packed and value.dtype != dtype:
                setattr(
                    module, name, nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad)
                )


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
            its config.
    """
    family = arch.of_config(model.config)
    if not arch.is_language_model(model, family):
        raise CheckpointError(
            f"a checkpoint of w2a4 loads as {family.model_class}, not as {type(model).__name__}; use "
            "AutoModelForCausalLM, whose `.model` is the bare decoder"
        )
    check_rope(model.config)
    recipe, r4 = config.parsed_recipe, config.online("r4")
    dtype = model.model.norm.weight.dtype
    model.config.tie_word_embeddings = False
    for layer in model.model.layers:
        prepare_layer(layer, family, recipe, r4, dtype)
    with torch.device("meta"):
        if recipe.embed_bits == 8:
            old = model.model.embed_tokens
            model.model.embed_tokens = W8Embedding(*old.weight.shape, old.padding_idx, dtype=dtype)
        if recipe.head_bits == 8:
            model.lm_head = W8Linear(model.lm_head.in_features, model.lm_head.out_features)


def prepare_layer(
    layer: nn.Module, family: arch.Architecture, recipe: Recipe, r4: OnlineRotation | None, dtype: torch.dtype
) -> None:
    """Swap a decoder layer's linears for empty packed ones on the meta device."""
    head_dim = layer.self_attn.head_dim
    with torch.device("meta"):
        for site in family.sites:
            for path in site.paths:
                old = layer.get_submodule(path)
                act_group = -1
                if recipe.weight_bits < 16:
                    act_group = family.act_group_size(recipe, site, head_dim, old.in_features)
                rotation = r4 if site.rotation == "r4" else None
                layer.set_submodule(path, _empty_linear(old, recipe, rotation, act_group, dtype))


def _empty_linear(
    old: nn.Linear, recipe: Recipe, rotation: OnlineRotation | None, act_group: int, dtype: torch.dtype
) -> nn.Module:
    shape = (old.in_features, old.out_features, old.bias is not None)
    if recipe.weight_bits == 16:
        return old if rotation is None else RotatedLinear(*shape, rotation=rotation, dtype=dtype)
    return PACKED_LINEARS[recipe.weight_bits](
        *shape, recipe.group_size, act_bits=recipe.act_bits, rotation=rotation, act_group_size=act_group,
        dtype=dtype,
    )  # fmt: skip


def _activation_dtype(model: nn.Module) -> torch.dtype | None:
    """That of the final norm; None for a model that is no language model with one."""
    return getattr(
        getattr(getattr(getattr(model, "model", None), "norm", None), "weight", None), "dtype", None
    )


def kv_settings(config: W2A4Config) -> attention.KVSettings:
    recipe = config.parsed_recipe
    return attention.KVSettings(recipe.kv_bits, recipe.kv_clip, recipe.sink_tokens, config.online("r3"))


def install(model: nn.Module, config: W2A4Config, report: Report | None = None) -> None:
    """Give a rotated or quantised model its attention, cache and `save_pretrained`."""
    set_attention(model, config)
    if config.parsed_recipe.weight_bits < 16:
        model.is_quantized = True
        fuse(model.model.layers)
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
        layer.self_attn.kv_settings = settings
    model.set_attn_implementation(attention.NAME)
