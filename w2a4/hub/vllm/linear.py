"""Packed linears in vLLM's layers: their tensors, how these are split among processes, and the ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parameter import (
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)
from vllm.model_executor.utils import set_weight_attrs

from ... import ops
from ...arch import Site
from ...errors import CheckpointError
from ...format.groups import resolve_group_size
from ...format.linear import PACKED_LINEARS
from ...format.online import OnlineRotation

#: What a down_proj says it takes instead of floats.
HADAMARD_A4 = "w2a4_hadamard_a4"

_LINEAR: dict[int, Callable[..., Tensor]] = {2: ops.linear_w2a4, 3: ops.linear_w3a4, 4: ops.linear_w4a4}


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):
    """A linear of 2, 3 or 4 bits a weight behind 4-bit activations; q/k/v and gate/up are one each.

    Args:
        quantization: of the checkpoint.
        site: where the linear stands.
    """

    def __init__(self, quantization: Any, site: Site):
        self.manifest, self.family = quantization.manifest, quantization.family
        self.head_dim, self.site = quantization.head_dim, site
        self.rotation: OnlineRotation | None = None

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Empty tensors of the process's share, split by rows, or by groups of inputs."""
        manifest, width = self.manifest, input_size_per_partition
        self.group = resolve_group_size(input_size, manifest.group_size)
        self.act_group = self.family.act_group_size(manifest, self.site, self.head_dim, input_size)
        if self.site.rotation == "r4":
            self.rotation = manifest.r4
        if width != input_size:
            self._check_shares(width, input_size)
        rows, loader = sum(output_partition_sizes), extra["weight_loader"]
        kind = PACKED_LINEARS[manifest.weight_bits]
        packed = kind(width, rows, False, self.group, act_group_size=self.act_group, device="meta")
        for name, (shape, dtype) in packed._format.items():
            if name == "act_clip":  # q, k and v have one each, of the same value
                empty = torch.empty(len(output_partition_sizes), dtype=dtype)
                parameter = PerTensorScaleParameter(data=empty, weight_loader=loader)
                parameter.dummy_weight_value = 1.0  # of vLLM's --load-format dummy
            else:
                split = ModelWeightParameter if name == "weight" else GroupQuantScaleParameter
                empty = torch.empty(shape, dtype=dtype)
                parameter = split(data=empty, input_dim=1, output_dim=0, weight_loader=loader)
            layer.register_parameter(name, parameter)

    def _check_shares(self, width: int, whole: int) -> None:
        """Raise CheckpointError unless a process computes with its inputs what all compute with all."""
        linear, processes = self.site.linears[0].name, get_tensor_model_parallel_world_size()
        told = f"{linear} has {whole} inputs, of which each of {processes} processes gets {width}, but"
        if self.manifest.weight_bits == 3:
            why = "a row of 3-bit codes is two planes, which are not cut"
            advice = "quantise to 2 or 4 bits"
        elif self.act_group == -1 or self.group == whole:
            why = "all inputs share one scale of " + ("weights" if self.group == whole else "activations")
            advice = "quantise with act_group_size and group_size in [32, 64, 128]"
        elif width % self.act_group or width % self.group:
            why = f"{self.act_group} activations and {self.group} weights share a scale"
            advice = "use a number of processes that leaves groups whole"
        elif self.rotation is not None and not self._share_of_rotation(width):
            why = f"R4 is {self.rotation.kind} in blocks of {self.rotation.block_size or whole} inputs"
            advice = f"quantise with rotation.r4=hadamard and rotation.r4_blocks={processes}"
        else:
            return
        raise CheckpointError(f"tensor_parallel_size={processes}: {told} {why}; {advice}")

    def _share_of_rotation(self, width: int) -> bool:
        """Take the part of R4 that the process's inputs see, where there is one."""
        whole = self.rotation
        if whole.kind != "hadamard" or width % whole.block_size:
            return False
        self.rotation = dataclasses.replace(whole, size=width)
        return True

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Plain parameters, as the ops and torch.compile take them."""
        clip = layer.act_clip.data
        if not bool((clip == clip[0]).all()):
            raise CheckpointError(
                f"{', '.join(self.site.paths)} have clips {clip.tolist()}, and are one linear here, which "
                "quantises its input once; serve this checkpoint with transformers"
            )
        for name in ("weight", "scale", "levels"):
            if hasattr(layer, name):
                tensor = getattr(layer, name).data.contiguous()
                setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        layer.act_clip = nn.Parameter(clip[:1].clone(), requires_grad=False)
        if self.rotation is not None:
            r4 = OnlineRotation.for_ops(self.rotation, clip.device)
            if r4 is not None:
                had_k, layer.w2a4_block = r4
                layer.register_buffer(
                    "w2a4_had_k", had_k, persistent=False
                )  # vLLM keeps buffers in its sleep
                layer.w2a4_act_group, layer._input_quant_key = self.act_group, HADAMARD_A4

    def apply(self, layer: nn.Module, x: Tensor | QuantizedActivation, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]` in x's dtype."""
        if isinstance(x, QuantizedActivation):
            codes, scale, dtype = x.data, x.scale, x.orig_dtype
        else:
            quantize = ops.quantize_a4 if self.rotation is None else self.rotation.quantize
            codes, scale = quantize(x, layer.act_clip, self.act_group)
            dtype = x.dtype
        weights = (layer.weight,) if self.manifest.weight_bits == 4 else (layer.weight, layer.levels)
        linear = _LINEAR[self.manifest.weight_bits]
        return linear(codes, scale, *weights, layer.scale, bias, self.group, dtype)


def _silu_mul_hadamard(x: Tensor, linear: nn.Module) -> QuantizedActivation:
    """SiLU, product, R4 and rounding in one op, in front of down_proj."""
    gate, up = x.chunk(2, -1)
    codes, scale = ops.silu_mul_hadamard_a4(
        gate, up, linear.w2a4_had_k, linear.w2a4_block, linear.act_clip, linear.w2a4_act_group
    )
    return QuantizedActivation(codes, scale, x.dtype, gate.shape, HADAMARD_A4)


fused_act_quant._FUSED_ACT_QUANT[(SiluAndMul, HADAMARD_A4)] = _silu_mul_hadamard


class W8Method(QuantizeMethodBase):
    """8-bit rows of an embedding or of lm_head, split by rows."""

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        rows = sum(output_partition_sizes)
        for name, shape, dtype in (
            ("weight", (rows, input_size_per_partition), torch.int8),
            ("scale", (rows,), torch.float16),
        ):
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"output_dim": 0, **extra})
            layer.register_parameter(name, parameter)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this process's rows."""
        return ops.linear_w8(x, layer.weight, layer.scale, bias)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """`[...]` ids to `[..., embedding_dim]`."""
        rows = layer.weight[ids].float() * layer.scale[ids].float()[..., None]
        return rows.to(layer.params_dtype)
