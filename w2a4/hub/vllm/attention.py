"""KV4 in vLLM's paged cache: R3, rounding and attention by w2a4's ops, an exact prefix before every sequence.

A slot of the cache, of a token and head, is the codes of its key and of its value, then (scale, zero-point)
of either: so both codes begin at a multiple of eight bytes, which the kernels for CUDA copy at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from ... import ops
from ...errors import CheckpointError
from ...format.manifest import Manifest


class KV4Method(BaseKVCacheMethod):
    """Gives one of vLLM's `Attention` layers the 4-bit cache, and its prefix.

    The layer has a back end and an implementation of vLLM's when this is called; both are replaced, for this
    layer and no other, so that other models in the process keep theirs.
    """

    def create_weights(self, layer: nn.Module) -> None:
        if layer.kv_cache_dtype not in ("auto", "bfloat16", "float16"):
            raise CheckpointError(
                f"kv_cache_dtype={layer.kv_cache_dtype}: this checkpoint has a 4-bit cache of its own; leave "
                "--kv-cache-dtype out"
            )
        manifest = self.quant_config.manifest
        layer.impl = KV4Attention(layer, manifest)
        layer.attn_backend = KV4Backend
        for name in ("prefix_keys", "prefix_values") if manifest.prefix else ():
            shape = layer.num_kv_heads, len(manifest.prefix), layer.head_size
            parameter = nn.Parameter(torch.empty(shape, dtype=torch.float16), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": _load_own_heads})
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: there are no scales of vLLM's."""


def _load_own_heads(parameter: nn.Parameter, loaded: Tensor) -> None:
    """The heads `[kv_heads, tokens, head_dim]` of this process; where heads are fewer, several have one."""
    first = get_tensor_model_parallel_rank() * len(loaded) // get_tensor_model_parallel_world_size()
    parameter.data.copy_(loaded[first : first + len(parameter)])


@dataclass
class Run:
    """Sequences next to each other in a batch that have equally many new tokens.

    Attributes:
        tokens: their new tokens in the batch.
        queries: new tokens of each.
        starts: int64 `[sequences]`, keys before a sequence's new ones, the prefix's included.
        length: keys of the longest, or more.
        block_table: int32 `[sequences, most blocks]`.
        masks: by width, what a sliding window lets them see.
    """

    tokens: slice
    queries: int
    starts: Tensor
    length: int
    block_table: Tensor
    masks: dict[int, Tensor] = field(default_factory=dict)

    def sinks(self, layer: Any, prefix: int) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of a layer's prefix, `[sequences, kv_heads, prefix, head_dim]`."""
        if not prefix:
            return None, None
        keys, values = layer.prefix_keys, layer.prefix_values
        return keys.expand(len(self.starts), *keys.shape), values.expand(len(self.starts), *values.shape)

    def mask(self, window: int | None, prefix: int) -> Tensor | None:
        """bool `[sequences, 1, queries, length]`: what a query sees of its window and the prefix, causally.

        None where a window hides nothing.
        """
        if window is None or self.length - prefix <= window:
            return None
        if window not in self.masks:
            device = self.starts.device
            keys = torch.arange(self.length, device=device)
            place = self.starts[:, None, None, None] + torch.arange(self.queries, device=device)[:, None]
            self.masks[window] = (keys > place - window) & (keys <= place) | (keys < prefix)
        return self.masks[window]


@dataclass
class PlacedRun:
    """A run, cos and sin of its tokens `[sequences, queries, head_dim]`, and their slots in the cache."""

    run: Run
    cos: Tensor
    sin: Tensor
    slots: Tensor


@dataclass
class KV4Metadata:
    """Of one step: what every layer of a group reads.

    Attributes:
        places: by the id of a RoPE module, the runs with their places, which are the same in all layers.
    """

    runs: list[Run]
    places: dict[int, list[PlacedRun]] = field(default_factory=dict)

    def placed(
        self, rope: nn.Module, positions: Tensor, slots: Tensor, dtype: torch.dtype
    ) -> list[PlacedRun]:
        """The runs for layers with a RoPE of vLLM's, which keeps cos and sin of half the width each."""
        if id(rope) not in self.places:
            cos, sin = rope.cos_sin_cache[positions].to(dtype).chunk(2, -1)
            of_tokens = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), slots
            self.places[id(rope)] = [
                PlacedRun(run, *(t[run.tokens].unflatten(0, (-1, run.queries)) for t in of_tokens))
                for run in self.runs
            ]
        return self.places[id(rope)]


class KV4MetadataBuilder(AttentionMetadataBuilder[KV4Metadata]):
    """Decoding sequences come first in a batch, as one run; prompts are runs of their own."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context  # of a draft too, which has its own
        prefixes = {layers[name].impl.prefix for name in layer_names}
        if len(prefixes) > 1:
            raise CheckpointError(
                f"prefixes of {' and '.join(map(str, sorted(prefixes)))} tokens in one group of layers: "
                "quantise target and draft with the same prefix_tokens"
            )
        (self.prefix,) = prefixes
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KV4Metadata:
        """Reads what lies on the host; nothing waits for a device."""
        common, runs, first = common_attn_metadata, [], 0
        places = common.query_start_loc_cpu.tolist()
        counts = [end - start for start, end in zip(places, places[1:], strict=False)]
        starts = common.seq_lens.long() + self.prefix
        while first < len(counts):
            last, queries = first + 1, counts[first]
            while last < len(counts) and counts[last] == queries:
                last += 1
            if queries:
                of_run = starts[first:last]
                longest = int(of_run.max()) if starts.is_cpu else common.max_seq_len + self.prefix
                tokens, table = slice(places[first], places[last]), common.block_table_tensor[first:last]
                runs.append(Run(tokens, queries, of_run - queries, longest, table))
            first = last
        return KV4Metadata(runs)


class KV4Attention(AttentionImpl[KV4Metadata]):
    """Attention of one layer over its packed pages."""

    def __init__(self, layer: Any, manifest: Manifest):
        self.num_heads, self.num_kv_heads = layer.num_heads, layer.num_kv_heads
        self.head_size, self.scale = layer.head_size, layer.impl.scale
        self.sliding_window, self.kv_cache_dtype = layer.sliding_window, layer.kv_cache_dtype
        self.r3, self.clip, self.prefix = manifest.r3, manifest.kv_clip, len(manifest.prefix)
        self.decoder_layer: Callable[[], Any] | None = None  # `watch` of the module `layer` sets it
        self.fused: Any = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM's last word on a layer, whose linears are loaded now."""
        from .layer import fuse

        if self.decoder_layer is not None:
            fuse(self.decoder_layer())

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Round new keys and values `[tokens, kv_heads, head_dim]` into their slots, which -1 are not."""
        tokens = len(slot_mapping)
        key = self._rotated(key[:tokens])
        k_codes, k_params, v_codes, v_params = self.parts(kv_cache)
        for x, codes, params in ((key, k_codes, k_params), (value[:tokens], v_codes, v_params)):
            ops.append_kv4(x.transpose(0, 1)[None], codes, params, 0, self.clip, None, slot_mapping)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: KV4Metadata | None, output: Tensor, output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Queries `[tokens, heads, head_dim]` over the cache, into `output`, of that shape."""
        if attn_metadata is None:  # a run that only measures memory
            return output
        query, pages = self._rotated(query), self.parts(kv_cache)
        for run in attn_metadata.runs:
            x = query[run.tokens].unflatten(0, (-1, run.queries)).transpose(1, 2)
            sinks, mask = run.sinks(layer, self.prefix), run.mask(self.sliding_window, self.prefix)
            seen = ops.attention_kv4(
                x, *pages, run.length, mask, True, self.scale, *sinks, run.starts, run.block_table
            )
            output[run.tokens] = seen.flatten(0, 1)
        return output

    def _rotated(self, x: Tensor) -> Tensor:
        return x if self.r3 is None else self.r3.apply(x)

    def parts(self, kv_cache: Tensor) -> tuple[Tensor, ...]:
        """Codes and params of keys, then of values, `[blocks, kv_heads, block_size, …]`."""
        half = self.head_size // 2
        k_codes, v_codes, k_params, v_params = kv_cache.view(torch.uint8).split([half, half, 4, 4], -1)
        return k_codes, k_params.view(torch.float16), v_codes, v_params.view(torch.float16)


class KV4Backend(AttentionBackend):
    """What vLLM asks a kind of attention for."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KV4Attention]:
        return KV4Attention

    @staticmethod
    def get_builder_cls() -> type[KV4MetadataBuilder]:
        return KV4MetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Pages hold slots of `head_dim + 8` bytes a head."""
        return replace(spec, state_content_bytes=spec.head_size + 8)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Runs are planned by what the host knows of the batch."""
        return False
