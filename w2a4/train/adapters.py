"""Adapters (LoRA) on packed models, by PEFT: the packed weights stay as they are, the adapters are trained.

model = AutoModelForCausalLM.from_pretrained("DIR")      # packed
w2a4.prepare_for_adapters(model)
model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
...                                                      # Trainer, TRL or a loop of yours
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
from ..format.linear import W8Linear, _PackedLinear
from ..format.lloyd import settle_levels
from ..format.rtn import fit_rtn
from ..format.weight import QuantizedWeight
from ..hub.transformers import W2A4Config, W2A4Quantizer
from ..ops.packing import pack
from ..runtime.layer import PackedDecoderLayer

#: Ways to begin an adapter that look at its matrices only; others decompose a weight that is not there.
STARTS = (True, False, "gaussian", "orthogonal")


def prepare_for_adapters(model: nn.Module) -> nn.Module:
    """Let PEFT put LoRA adapters on a packed model and train them, in place.

    All that the model has is frozen. Gradients pass the packed linears as their weights are, and roundings of
    activations, keys and values straight through. Linears that one input goes to are apart from now on, under
    their own names, so that each can have an adapter: the model computes the same and somewhat slower until
    it is saved and loaded.

    Args:
        model: from `from_pretrained` or `w2a4.quantize`, with weights packed in 2, 3 or 4 bits.

    Returns:
        the same model.

    Raises:
        TrainingError: the model is not packed as a whole, or PEFT is not installed.
    """
    layers = getattr(getattr(model, "model", None), "layers", [])
    if not layers or not all(isinstance(layer, PackedDecoderLayer) for layer in layers):
        raise TrainingError(
            f"prepare_for_adapters takes a model that w2a4 has packed, not a {type(model).__name__} whose "
            "decoder layers are float: PEFT trains that as it is, and w2a4.prepare trains it quantised"
        )
    try:
        _teach_peft()
    except ImportError as error:
        raise TrainingError(f"adapters need PEFT ({error}): pip install peft") from None
    model.requires_grad_(False)
    for layer in layers:
        layer.differentiate()
    if isinstance(model.lm_head, W8Linear):
        model.lm_head.differentiable = True
    if getattr(model, "hf_quantizer", None) is None:  # transformers' Trainer asks it
        config: W2A4Config = model.config.quantization_config
        model.hf_quantizer = W2A4Quantizer(config, pre_quantized=True)
    return model


@functools.cache
def _teach_peft() -> None:
    """Let PEFT's LoRA know packed linears; it has a list of quantisers and no way to add one."""
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    make, kind = LoraModel._create_new_module, _adapter_class()

    def make_packed(lora_config: Any, adapter_name: str, target: nn.Module, **others: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, _PackedLinear):
            return make(lora_config, adapter_name, target, **others)
        _check(lora_config)
        return kind(target, adapter_name, config=lora_config, **others)

    inject = LoraModel.inject_adapter

    @functools.wraps(inject)
    def inject_packed(self: Any, model: nn.Module, adapter_name: str, *rest: Any, **others: Any) -> Any:
        config = self.peft_config[adapter_name]
        names = [name for name, module in model.named_modules() if isinstance(module, _PackedLinear)]
        packed = {name.rpartition(".")[2] for name in names}
        if packed and str(config.target_modules).lower() == "all-linear":  # PEFT counts its own kinds
            config.target_modules = packed
        return inject(self, model, adapter_name, *rest, **others)

    LoraModel._create_new_module = staticmethod(make_packed)
    LoraModel.inject_adapter = inject_packed


def _check(config: Any) -> None:
    """Raise TrainingError for kinds of LoRA that read or change the weight itself."""
    start = config.init_lora_weights
    if start not in STARTS:
        raise TrainingError(
            f"init_lora_weights={start!r} decomposes the weight, which is packed; give one of "
            f"{', '.join(map(repr, STARTS))}"
        )
    for name in ("use_dora", "lora_bias"):
        if getattr(config, name, False):
            raise TrainingError(f"{name}=True changes packed weights; leave it out")


def _adapter_class() -> type[nn.Module]:
    """PEFT's linear with LoRA, over a packed one."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge

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

    return PackedLoraLinear


@torch.no_grad()
def _rounded(before: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """`weight` `[out, in]`, near `before`, on grids that begin at those of `before`."""
    if not isinstance(before.grid, Codebook):
        return fit_rtn(weight, before.grid, before.group_size)
    groups = weight.unflatten(1, (-1, before.group_size))
    levels, scale = settle_levels(groups, before.levels.float() * before.scale.float()[..., None])
    codes = before.grid.nearest(groups, scale, levels).flatten(1)
    return QuantizedWeight(codes, scale, levels, before.group_size, before.grid)
