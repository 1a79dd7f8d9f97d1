"""Models of transformers whose linears `replace_linears` has packed: how they are recorded, saved and loaded.

They have none of what a quantised model of a family has: no rotations, no KV cache, no packed layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from .. import arch
from ..errors import ArchitectureError, CheckpointError, RecipeError, W2A4Error, shown
from ..evaluate.report import source_name, versions
from ..format.linear import PACKED_LINEARS, _PackedModule
from ..format.manifest import GRIDS, ReplacedLinears, Replacement
from ..runtime.classes import derived
from . import portable
from .model import WholeSaves
from .replace import fixed_linears


class ReplacedModelMixin(WholeSaves):
    """Mixed in by `install_replaced`."""

    @property
    def dtype(self) -> torch.dtype:
        """That of activations; the first parameter may be a scale."""
        return float_dtype(self)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs) -> None:
        """As transformers', but whole or not at all, and under the names that the model has in memory."""
        if save_original_format:
            raise W2A4Error(
                "save_original_format=True: packed linears have no tensors of an older format; leave it out"
            )
        self.__dict__["_checkpoint_conversion_mapping"] = {}  # by which 4.57 goes back to older names
        try:
            super().save_pretrained(save_directory, *args, save_original_format=False, **kwargs)
        finally:
            del self.__dict__["_checkpoint_conversion_mapping"]

    def _write_beside(self, directory: Path) -> None:
        """Nothing: there is no recipe and no report."""

    def _mend_config(self, path: Path) -> None:
        portable.write_config(path, self.dtype, family=self.config.model_type in arch.names())


def check_replaceable(model: nn.Module) -> None:
    """Raise W2A4Error if the linears of a transformers model cannot be replaced and saved."""
    before = _recorded(model)
    if before is None or isinstance(getattr(before, "manifest", None), Replacement):
        return
    by = getattr(before, "quant_method", None) or (isinstance(before, Mapping) and before.get("quant_method"))
    raise W2A4Error(
        f"{type(model).__name__} was rotated or quantised already (by {str(by or 'another method')[:40]!r}); "
        "give replace_linears the original, or pack a rotated model by w2a4.quantize"
    )


def _recorded(model: nn.Module) -> object:
    """The quantization_config of a model, or None."""
    return getattr(model.config, "quantization_config", None)


def record(model: nn.Module, names: tuple[str, ...], bits: int, group_size: int | str) -> None:
    """Write into the model's config which linears were replaced just now, beside those before."""
    from .transformers import W2A4Config

    before = _recorded(model)
    parts = before.manifest.replaced if isinstance(before, W2A4Config) else ()
    part = ReplacedLinears(names, bits, GRIDS[bits], group_size, 4)
    source = source_name(getattr(model.config, "_name_or_path", "") or "unknown")
    manifest = Replacement(model.config.model_type, type(model).__name__, (*parts, part))
    install_replaced(model, W2A4Config(manifest, provenance={"source": source, **versions()}))


def install_replaced(model: nn.Module, config) -> None:
    """Give a model with replaced linears its `save_pretrained`, and record `config` in it."""
    model.config.quantization_config = config
    model.is_quantized = True
    if not isinstance(model, ReplacedModelMixin):
        model.__class__ = derived(ReplacedModelMixin, type(model))


def prepare_replaced(model: nn.Module, manifest: Replacement) -> None:
    """Swap the named linears of a meta-device model for empty packed ones.

    Raises:
        CheckpointError: another class, a name that is no linear of the model or that is tied, or a group
            size that does not divide.
    """
    if type(model).__name__ != manifest.model_class:
        raise CheckpointError(
            f"the linears of a {shown(manifest.model_class)} were replaced, and this loads as "
            f"{type(model).__name__}; load with the class of which the model was saved"
        )
    modules, fixed = dict(model.named_modules(remove_duplicate=False)), fixed_linears(model)
    dtype, packed = float_dtype(model), {}
    for name, kind in manifest.kinds.items():
        old = modules.get(name)
        if type(old) is not nn.Linear or name in fixed:
            what = "has no linear of that name" if type(old) is not nn.Linear else "ties or casts its weight"
            raise CheckpointError(
                f"quantization_config says that {shown(name)} was replaced; {type(model).__name__} {what}: "
                "config.json was changed or is of another model, copy or download it again"
            )
        if old not in packed:
            packed[old] = _empty(name, old, kind, dtype)
        model.set_submodule(name, packed[old])


def _empty(name: str, old: nn.Linear, kind: ReplacedLinears, dtype: torch.dtype) -> nn.Module:
    try:
        return PACKED_LINEARS[kind.weight_bits](
            old.in_features, old.out_features, old.bias is not None, kind.group_size,
            act_bits=kind.act_bits, dtype=dtype, device="meta",
        )  # fmt: skip
    except RecipeError as error:
        raise CheckpointError(f"{shown(name)}: {error}; config.json was changed, copy it again") from None


def float_dtype(model: nn.Module) -> torch.dtype:
    """Of the first floating parameter that is not part of a packed format."""
    for module in model.modules():
        packed = module._format if isinstance(module, _PackedModule) else ()
        for name, value in module.named_parameters(recurse=False):
            if name not in packed and value.is_floating_point():
                return value.dtype
    return torch.get_default_dtype()


def class_of(manifest: Replacement, config: object) -> type:
    """The transformers class that a model with replaced linears was saved of, which takes this config.

    Raises:
        ArchitectureError: transformers has no model class of that name.
        CheckpointError: the class takes another config.
    """
    import transformers

    name = manifest.model_class
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ArchitectureError(
            f"the model is a {shown(name)}, which this transformers does not have; load it with its own class"
        )
    if found.config_class is None or not isinstance(config, found.config_class):
        raise CheckpointError(
            f"model_class={shown(name)}, but config.json is a {type(config).__name__}, which that class does "
            "not take; config.json was changed, copy or download it again"
        )
    return found
