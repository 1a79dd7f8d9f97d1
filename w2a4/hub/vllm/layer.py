"""A decoder layer of vLLM's as one op, on a CPU.

vLLM's layer is a dozen modules one after another; what lies between their kernels takes a CPU longer than the
kernels of a small model. Where `ops.decoder_layer` computes such a layer, it is called instead, on vLLM's
pages. Layers of other models, layers split among processes and layers on a GPU keep vLLM's forward.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.utils.torch_utils import direct_register_custom_op

from ... import ops
from ...format.online import OnlineRotation
from .attention import KV4Attention, KV4Metadata, PlacedRun
from .linear import PackedLinearMethod

#: vLLM's classes of layers whose forward is that of `ops.decoder_layer`, with the linears packed.
LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)


class FusedLayer:
    """`ops.decoder_layer` of one layer; its attention's implementation holds it."""

    def __init__(self, layer: Any):
        attn, mlp = layer.self_attn, layer.mlp
        self.attn, self.impl, self.rotary = attn.attn, attn.attn.impl, attn.rotary_emb
        linears = attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj
        norms = layer.input_layernorm, layer.post_attention_layernorm
        device = norms[0].weight.device
        r3, r4 = (
            OnlineRotation.for_ops(rotation, device)
            for rotation in (self.impl.r3, mlp.down_proj.quant_method.rotation)
        )
        self._pages: tuple[Tensor | None, tuple[Tensor, ...]] = None, ()
        self.computed = r3 is not None and r4 is not None and device.type == "cpu"
        self.fixed = (
            [norm.weight for norm in norms], norms[0].variance_epsilon, *map(_tensors, linears),
            [linear.quant_method.group for linear in linears],
            [linear.quant_method.act_group for linear in linears], r3, r4,
        )  # fmt: skip

    def __call__(
        self, x: Tensor, positions: Tensor, kv_cache: Tensor, metadata: KV4Metadata, slots: Tensor
    ) -> Tensor:
        """Hidden states `[tokens, hidden]` behind the layer; 0 where a token belongs to no sequence."""
        if kv_cache is not self._pages[0]:
            self._pages = kv_cache, self.impl.parts(kv_cache)
        runs = metadata.placed(self.rotary, positions, slots, x.dtype)
        if len(runs) == 1 and runs[0].run.tokens == slice(0, len(x)):
            return self._run(runs[0], x)
        out = torch.zeros_like(x)
        for placed in runs:
            out[placed.run.tokens] = self._run(placed, x[placed.run.tokens])
        return out

    def _run(self, placed: PlacedRun, x: Tensor) -> Tensor:
        run, impl = placed.run, self.impl
        out = ops.decoder_layer(
            x.view(-1, run.queries, x.shape[-1]), placed.cos, placed.sin,
            run.mask(impl.sliding_window, impl.prefix), *self.fixed, *self._pages[1],
            *run.sinks(self.attn, impl.prefix), run.length - run.queries, impl.clip, impl.scale,
            run.starts, placed.slots, run.block_table,
        )  # fmt: skip
        return out.view(x.shape)


def _tensors(linear: nn.Module) -> list[Tensor]:
    """Those of a linear in the order of `ops.decoder_layer`."""
    found = (getattr(linear, name, None) for name in ("weight", "scale", "act_clip", "levels", "bias"))
    return [tensor for tensor in found if tensor is not None]


def _computes(layer: Any) -> bool:
    """Whether `ops.decoder_layer` computes a layer: one process, plain norms, SiLU, RoPE of whole heads."""
    if get_tensor_model_parallel_world_size() > 1 or get_pp_group().world_size > 1:
        return False
    attn, mlp, rotary = layer.self_attn, layer.mlp, layer.self_attn.rotary_emb
    linears = attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return (
        isinstance(attn.attn.impl, KV4Attention)
        and all(isinstance(linear.quant_method, PackedLinearMethod) for linear in linears)
        and all(linear.quant_method.rotation is None for linear in linears[:3])
        and getattr(attn, "q_norm", None) is None
        and not getattr(attn, "do_llama_4_scaling", False)
        and getattr(layer, "ada_rms_norm_t_cond", None) is None
        and type(mlp.act_fn) is SiluAndMul
        and all(type(norm) is RMSNorm and norm.variance_size_override is None for norm in norms)
        and isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size == attn.attn.head_size
        and ops.has_layer_kernel(norms[0].weight)
    )


def fuse(layer: Any) -> None:
    """Give a loaded layer of vLLM's the forward of one op, if that computes it."""
    if type(layer) not in LAYERS or not _computes(layer):
        return
    fused = FusedLayer(layer)
    if fused.computed:
        layer.self_attn.attn.impl.fused = fused
        layer.forward = functools.partial(_forward, layer.self_attn.attn.layer_name)


def _forward(
    name: str, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **others: Any
) -> tuple[Tensor, Tensor]:
    """As the `forward` of vLLM's layers, the sum of whose results is what goes on: the second one is 0."""
    x = hidden_states if residual is None else hidden_states + residual
    out = torch.ops.vllm.w2a4_decoder_layer(x, positions, name)
    return out, torch.zeros_like(out)


def _decoder_layer(x: Tensor, positions: Tensor, name: str) -> Tensor:
    metadata, attn, kv_cache, slots = get_attention_context(name)
    if metadata is None:  # a run that only measures memory
        return x.clone()
    return attn.impl.fused(x, positions, kv_cache, metadata, slots)


def _empty(x: Tensor, positions: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


direct_register_custom_op("w2a4_decoder_layer", _decoder_layer, mutates_args=[], fake_impl=_empty)


@functools.cache
def watch() -> None:
    """Make layers built from now on known to their attention, which vLLM tells when all is loaded."""
    for kind in (LlamaDecoderLayer, Qwen2DecoderLayer):
        kind.__init__ = _watched(kind.__init__)


def _watched(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **others: Any) -> None:
        init(self, *args, **others)
        impl = getattr(self.self_attn.attn, "impl", None)
        if isinstance(impl, KV4Attention):
            impl.layer = weakref.ref(self)

    return __init__
