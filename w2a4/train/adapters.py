"""Adapters (LoRA) on packed models, by PEFT: the packed weights stay as they are, the adapters are trained.

model = AutoModelForCausalLM.from_pretrained("DIR")      # packed
w2a4.prepare_for_adapters(model)
model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
...                                                      # transformers' Trainer, or a loop of yours
model.save_pretrained("ADAPTER")                         # the adapters alone
model = model.merge_and_unload()                         # or into the weights, which are rounded anew
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..format.grid import Codebook
from ..format.linear import W8Linear, _PackedLinear, _PackedModule
from ..format.lloyd import settle_levels
from ..format.manifest import Replacement
from ..format.online import RotatedLinear
from ..format.weight import QuantizedWeight
from ..hub.transformers import W2A4Config, W2A4Quantizer
from ..ops.packing import pack
from ..runtime.layer import PackedDecoderLayer

#: Ways to begin an adapter that look at its matrices only; others decompose a weight that is not there.
STARTS = (True, False, "gaussian", "orthogonal")

#: Fields of PEFT's LoraConfig that ask for more than a product beside the linear.
UNKNOWN = (
    "use_dora", "lora_bias", "alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config",
    "monteclora_config", "kasa_config", "eva_config", "corda_config", "trainable_token_indices",
    "target_parameters", "layer_replication",
)  # fmt: skip


def prepare_for_adapters(model: nn.Module) -> nn.Module:
    """Let PEFT put LoRA adapters on a packed model and train them, in place.

    All that the model has is frozen. Gradients pass the packed linears as their weights are, and roundings of
    activations, keys and values straight through. Linears that one input goes to are apart from now on, under
    their own names, so that each can have an adapter: the model computes the same and somewhat slower until
    it is saved and loaded.

    Args:
        model: from `from_pretrained` or `w2a4.quantize`; of one with weights in 16 bits PEFT only learns how
            rotations at run time are merged.

    Returns:
        the same model.

    Raises:
        TrainingError: w2a4 did not quantise the model as a whole, it has adapters already, or PEFT is not
            installed.
    """
    if hasattr(model, "get_base_model"):
        raise TrainingError("this model has adapters already; call prepare_for_adapters before PEFT")
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, W2A4Config) or isinstance(config.manifest, Replacement):
        kind = "one whose linears were replaced" if isinstance(config, W2A4Config) else "no model of w2a4"
        raise TrainingError(
            f"prepare_for_adapters takes what w2a4.quantize made, and this {type(model).__name__} is {kind}: "
            "PEFT trains a float model as it is, and w2a4.prepare trains one quantised"
        )
    try:
        _teach_peft()
    except ImportError as error:
        raise TrainingError(f"adapters need PEFT ({error}): pip install peft") from None
    model.requires_grad_(False)
    for layer in model.model.layers:
        if isinstance(layer, PackedDecoderLayer):
            layer.differentiate()
    if isinstance(model.lm_head, W8Linear):
        model.lm_head.differentiable = True
    if getattr(model, "hf_quantizer", None) is None:  # transformers' Trainer asks it
        model.hf_quantizer = W2A4Quantizer(config, pre_quantized=True)
    return model


@functools.cache
def _teach_peft() -> None:
    """Let PEFT's LoRA know packed linears; it has a list of quantisers and no way to add one."""
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    make = LoraModel._create_new_module

    def make_packed(lora_config: Any, adapter_name: str, target: nn.Module, **others: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, RotatedLinear):
            return _class("RotatedLoraLinear")(target, adapter_name, config=lora_config, **others)
        if not isinstance(base, _PackedLinear):
            return make(lora_config, adapter_name, target, **others)
        return _class("PackedLoraLinear")(target, adapter_name, config=lora_config, **others)

    inject = LoraModel.inject_adapter

    @functools.wraps(inject)
    def inject_packed(self: Any, model: nn.Module, adapter_name: str, *rest: Any, **options: Any) -> Any:
        _check(config := self.peft_config[adapter_name], model)
        if str(config.target_modules).lower() == "all-linear" and _packed_names(model):
            head = model.get_output_embeddings()  # PEFT counts its own kinds, and leaves the head out
            others = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
            config.target_modules = {name.rpartition(".")[2] for name in {*_packed_names(model), *others}}
        return inject(self, model, adapter_name, *rest, **options)

    LoraModel._create_new_module = staticmethod(make_packed)
    LoraModel.inject_adapter = inject_packed


def _packed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _PackedLinear)]


def _check(config: Any, model: nn.Module) -> None:
    """Raise TrainingError for a model that is not prepared, or for what reads or changes its weights."""
    names = _packed_names(model)
    if not names:
        return
    if not all(model.get_submodule(name).differentiable for name in names):
        raise TrainingError("call w2a4.prepare_for_adapters(model) before PEFT gets a packed model")
    start = config.init_lora_weights
    if start not in STARTS:
        raise TrainingError(
            f"init_lora_weights={start!r} decomposes the weight, which is packed; give one of "
            f"{', '.join(map(repr, STARTS))}"
        )
    if config.bias != "none":
        raise TrainingError(f"bias={config.bias!r} trains what is packed; give bias='none'")
    for name in UNKNOWN:
        if getattr(config, name, None):
            raise TrainingError(
                f"{name}={getattr(config, name)!r} is not known on packed weights; leave it out"
            )
    parts = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    for name in config.modules_to_save or ():
        if isinstance(parts.get(name), _PackedModule):
            raise TrainingError(
                f"modules_to_save={name!r} is packed in 8 bits and cannot be trained; quantise with "
                "embed_bits=16 and head_bits=16, or leave it out"
            )


@functools.cache
def _class(name: str) -> type[nn.Module]:
    """PEFT's linear with LoRA over one of ours: `PackedLoraLinear`, or `RotatedLoraLinear`."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class RotatedLoraLinear(Linear):
        """Over a float linear that rotates its input, which adapters read before that."""

        def get_delta_weight(self, adapter: str) -> Tensor:
            return self.get_base_layer().rotation.apply(super().get_delta_weight(adapter))

    class PackedLoraLinear(Linear):
        """A packed linear and its adapters; they read its input before it is rotated and rounded."""

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Add adapters to the weights, which are rounded to their grid again."""
            names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.lora_A]
            if not names:
                return
            base: _PackedLinear = self.get_base_layer()
            change = sum(self.get_delta_weight(name).float() for name in names)
            if not bool(torch.isfinite(change).all()):
                raise ValueError(f"the adapters {', '.join(names)} hold NaN or infinity, and were not merged")
            self.__dict__.setdefault("_unmerged", dict(base._parameters))
            change = change if base.rotation is None else base.rotation.apply(change)
            fitted = _rounded(base.fitted(), base.dequantize() + change)
            base._set("weight", pack(fitted.codes, base.bits))
            for tensor in base.grid.tensors:
                base._set(tensor, getattr(fitted, tensor))
            self.merged_adapters.extend(names)

        def unmerge(self) -> None:
            """Put back the weights from before `merge`, to the bit."""
            base: _PackedLinear = self.get_base_layer()
            base._parameters.update(self.__dict__.pop("_unmerged", {}))
            self.merged_adapters.clear()

    made = {kind.__name__: kind for kind in (RotatedLoraLinear, PackedLoraLinear)}[name]
    made.__qualname__ = name  # pickle finds it as an attribute of this module
    return made


def __getattr__(name: str) -> Any:
    if name in ("PackedLoraLinear", "RotatedLoraLinear"):
        return _class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@torch.no_grad()
def _rounded(before: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """`weight` `[out, in]` on the grids of `before`, or where that is better on grids fitted anew."""
    grid, groups = before.grid, weight.unflatten(1, (-1, before.group_size))
    if isinstance(grid, Codebook):
        levels, scale = settle_levels(groups, before.levels.float() * before.scale.float()[..., None])
    else:
        scale, levels = grid.fit(groups)

    def error(scale: Tensor, levels: Tensor) -> Tensor:
        return (grid.decode(grid.nearest(groups, scale, levels), scale, levels) - groups).square().sum(-1)

    better = error(scale, levels) < error(before.scale, before.levels)
    scale = torch.where(better, scale, before.scale)
    levels = torch.where(better[..., None], levels, before.levels)
    codes = grid.nearest(groups, scale, levels).flatten(1)
    return QuantizedWeight(codes, scale, levels, before.group_size, grid)
