"""A decoder layer of vLLM as one op, on a CPU.

vLLM's layer is a dozen modules one after another; what lies between their kernels takes a CPU longer than the
kernels of a small model. Where `ops.decoder_layer` computes such a layer, it is called instead, on vLLM's
pages; its bits are those of `w2a4.Engine`, which rounds less between the ops than vLLM does in 16 bits.
Layers of other models, under tensor or pipeline parallelism, and on a GPU keep vLLM's forward.
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
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer
from vllm.model_executor.models.mistral import MistralAttention, MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2Attention, Qwen2DecoderLayer
from vllm.utils.torch_utils import direct_register_custom_op

from ... import ops
from ...errors import CheckpointError
from ...format.online import OnlineRotation
from ...runtime.step import TENSOR_ORDER
from .attention import KV4Attention, KV4Metadata, PlacedRun
from .linear import HADAMARD_A4, PackedLinearMethod

#: vLLM's classes of layers whose forward `ops.decoder_layer` computes once the linears are packed.
LAYERS = {
    LlamaDecoderLayer: LlamaAttention,
    MistralDecoderLayer: MistralAttention,
    Qwen2DecoderLayer: Qwen2Attention,
}


class FusedLayer:
    """`ops.decoder_layer` of one layer; its attention's implementation holds it."""

    def __init__(self, layer: Any):
        attn, mlp = layer.self_attn, layer.mlp
        self.attn, self.impl, self.rotary = attn.attn, attn.attn.impl, attn.rotary_emb
        self.linears = attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj
        self.norms = [norm.weight for norm in _norms(layer)]
        self.eps = layer.input_layernorm.variance_epsilon
        self.r3, self.r4 = _rotations(layer)
        self._fixed = (
            self.norms, self.eps, *map(_tensors, self.linears),
            [linear.quant_method.group for linear in self.linears],
            [linear.quant_method.act_group for linear in self.linears], self.r3, self.r4,
        )  # fmt: skip
        self._pages: tuple[Tensor | None, tuple[Tensor, ...]] = None, ()

    def __call__(
        self, x: Tensor, positions: Tensor, kv_cache: Tensor, metadata: KV4Metadata, slots: Tensor
    ) -> Tensor:
        """Hidden states `[tokens, hidden]` behind the layer; 0 where a token belongs to no sequence."""
        if kv_cache is not self._pages[0]:
            self._pages = kv_cache, self.impl.parts(kv_cache)
        runs = metadata.placed(self.rotary, positions, slots, x.dtype)
        tokens = max((placed.run.tokens.stop for placed in runs), default=0)
        # Sequences of different lengths go through the linears together, which read the weights once.
        out = self._run(runs[0], x[:tokens]) if len(runs) == 1 else self._by_ops(runs, x[:tokens])
        return out if tokens == len(x) else torch.cat([out, x.new_zeros(len(x) - tokens, x.shape[1])])

    def _run(self, placed: PlacedRun, x: Tensor) -> Tensor:
        run, impl = placed.run, self.impl
        out = ops.decoder_layer(
            x.view(-1, run.queries, x.shape[-1]), placed.cos, placed.sin,
            run.mask(impl.sliding_window, impl.prefix), *self._fixed, *self._pages[1],
            *run.sinks(self.attn, impl.prefix), run.length - run.queries, impl.clip, impl.scale,
            run.starts, placed.slots, run.block_table,
        )  # fmt: skip
        return out.view(x.shape)

    def _by_ops(self, runs: list[PlacedRun], x: Tensor) -> Tensor:
        """The ops that `decoder_layer` is made of, one after another: its bits."""
        if not runs:
            return x
        impl, pages, context = self.impl, self._pages[1], []
        qkv = self._normed(0, x)
        for placed in runs:
            run, shape = placed.run, (len(placed.cos), placed.run.queries, qkv.shape[1])
            q = ops.rope_append_kv4(
                qkv[run.tokens].view(shape), placed.cos, placed.sin, *self.r3, *pages, 0, impl.clip, None,
                placed.slots,
            )  # fmt: skip
            mask = run.mask(impl.sliding_window, impl.prefix)
            seen = ops.attention_kv4(
                q, *pages, run.length, mask, mask is None, impl.scale, *run.sinks(self.attn, impl.prefix),
                run.starts, run.block_table,
            )  # fmt: skip
            context.append(seen.flatten(0, 1).flatten(1))
        o = self.linears[1]
        codes = ops.quantize_a4(torch.cat(context), o.act_clip, o.quant_method.act_group)
        return self.mlp(_linear(o, codes, x) + x)

    def mlp(self, x: Tensor) -> Tensor:
        """Norm, MLP and residual of hidden states `[tokens, hidden]`."""
        gate, up = (half.contiguous() for half in self._normed(1, x).chunk(2, -1))
        down = self.linears[3]
        codes = ops.silu_mul_hadamard_a4(gate, up, *self.r4, down.act_clip, down.quant_method.act_group)
        return _linear(down, codes, x) + x

    def _normed(self, which: int, x: Tensor) -> Tensor:
        """What q, k and v or gate and up give for the first or the second norm."""
        linear = self.linears[2 * which]
        group = linear.quant_method.act_group
        return _linear(linear, ops.rmsnorm_a4(x, self.norms[which], self.eps, linear.act_clip, group), x)


def _linear(linear: nn.Module, codes: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    quantized = QuantizedActivation(*codes, x.dtype, x.shape, HADAMARD_A4)
    return linear.quant_method.apply(linear, quantized, getattr(linear, "bias", None))


def _tensors(linear: nn.Module) -> list[Tensor]:
    found = (getattr(linear, name, None) for name in TENSOR_ORDER)
    return [tensor for tensor in found if tensor is not None]


def _norms(layer: Any) -> tuple[RMSNorm, RMSNorm]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _rotations(layer: Any) -> list[tuple[Tensor | None, int] | None]:
    """R3 and R4 as the ops take them, None where they cannot."""
    rotations = layer.self_attn.attn.impl.r3, layer.mlp.down_proj.quant_method.rotation
    return [OnlineRotation.for_ops(each, layer.input_layernorm.weight.device) for each in rotations]


def _computes(layer: Any) -> bool:
    """Whether `ops.decoder_layer` computes a layer: one process, plain norms, SiLU, RoPE of whole heads."""
    if get_tensor_model_parallel_world_size() > 1 or get_pp_group().world_size > 1:
        return False
    if type(layer.self_attn) is not LAYERS.get(type(layer)):
        return False
    attn, mlp, rotary, norms = layer.self_attn, layer.mlp, layer.self_attn.rotary_emb, _norms(layer)
    linears = attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj
    return (
        isinstance(attn.attn.impl, KV4Attention)
        and all(isinstance(linear.quant_method, PackedLinearMethod) for linear in linears)
        and all(linear.quant_method.rotation is None for linear in linears[:3])
        and getattr(attn, "q_norm", None) is None
        and not getattr(attn, "do_llama_4_scaling", False)
        and getattr(layer, "ada_rms_norm_t_cond", None) is None
        and type(mlp.act_fn) is SiluAndMul
        and all(type(norm) is RMSNorm and norm.variance_size_override is None for norm in norms)
        and norms[0].variance_epsilon == norms[1].variance_epsilon
        and isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and type(rotary).forward_cpu is RotaryEmbedding.forward_cpu
        and rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size == attn.attn.head_size
        and None not in _rotations(layer)
        and ops.has_layer_kernel(norms[0].weight)
    )


def fuse(layer: Any) -> None:
    """Give a layer of vLLM the forward of one op, if that computes it; called when weights were loaded."""
    impl = layer.self_attn.attn.impl
    layer.__dict__.pop("forward", None)
    impl.fused = None
    if _computes(layer):
        impl.fused = FusedLayer(layer)
        layer.forward = functools.partial(_forward, layer.self_attn.attn.layer_name)


def _forward(
    name: str, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **others: Any
) -> tuple[Tensor, Tensor]:
    """As the `forward` of vLLM's layers, whose two results what follows adds: here the second is 0."""
    x = hidden_states if residual is None else hidden_states + residual
    out = torch.ops.vllm.w2a4_decoder_layer(x, positions, name)
    return out, torch.zeros_like(out)


@maybe_transfer_kv_layer
def _on_pages(x: Tensor, positions: Tensor, layer_name: str) -> Tensor:
    metadata, attn, kv_cache, slots = get_attention_context(layer_name)
    fused = getattr(attn.impl, "fused", None)
    if fused is None:
        raise CheckpointError(
            f"{layer_name} is not one op in this process, but a graph that vllm kept says so: remove what "
            "vllm compiled (in VLLM_CACHE_ROOT, or ~/.cache/vllm) and start again"
        )
    if metadata is None:  # a run that only measures memory
        return fused.mlp(x)
    return fused(x, positions, kv_cache, metadata, slots)


def _decoder_layer(x: Tensor, positions: Tensor, layer_name: str) -> Tensor:
    return _on_pages(x, positions, layer_name)  # whose annotations the decorator hides from the registration


def _empty(x: Tensor, positions: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


direct_register_custom_op("w2a4_decoder_layer", _decoder_layer, mutates_args=[], fake_impl=_empty)


@functools.cache
def watch() -> None:
    """Make layers built from now on known to their attention, which vLLM tells when all is loaded.

    The classes are changed for the whole process; only layers whose attention is `KV4Attention` see it.
    Mistral's layers are built by LLaMA's `__init__`.
    """
    for kind in (LlamaDecoderLayer, Qwen2DecoderLayer):
        kind.__init__ = _watched(kind.__init__)


def _watched(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **others: Any) -> None:
        init(self, *args, **others)
        impl = getattr(getattr(self.self_attn, "attn", None), "impl", None)
        if isinstance(impl, KV4Attention):
            impl.decoder_layer = weakref.ref(self)

    return __init__
