"""What w2a4 is compared with: the same mathematics in eager PyTorch, and other projects' kernels.

An adapter of a package that is not installed says so and gives None.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.harness import skip
from benchmarks.timing import Copies, Workload, copies_on, tensor_bytes
from w2a4.format.hadamard import HadamardSpec, had_k_matrix


def installed(package: str) -> bool:
    """Can it be imported? If not, says that it is not measured."""
    if importlib.util.find_spec(package) is not None:
        return True
    skip(package, "not installed")
    return False


def eager_quantize_a4(x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.quantize_a4` of whole tokens as one writes it in PyTorch."""
    scale = clip * x.float().abs().amax(-1, keepdim=True) / 7
    codes = (x.float() / scale).round().clamp(-8, 7).to(torch.int8)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low & 15 | high << 4).view(torch.uint8), scale


@lru_cache(maxsize=8)
def _signs(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The K part transposed, `[k, k]`, in the dtype of the product."""
    return had_k_matrix(k, device).T.to(dtype)


def eager_hadamard(x: Tensor, spec: HadamardSpec) -> Tensor:
    """`ops.hadamard` in PyTorch: a butterfly a doubling, then one small product for the K part."""
    y = x.unflatten(-1, (-1, spec.k, spec.block_size // spec.k))
    width = 1
    while width < y.shape[-1]:
        a, b = y.unflatten(-1, (-1, 2, width)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        width *= 2
    if spec.k > 1:
        y = _signs(spec.k, x.dtype, x.device) @ y
    return y.reshape(x.shape) / spec.block_size**0.5


def dense_hadamard(spec: HadamardSpec, dtype: torch.dtype, device: str) -> Tensor:
    """One block of the transform as a matrix `[block_size, block_size]`."""
    block = had_k_matrix(spec.k, device)
    block = torch.ones(1, 1, dtype=torch.int8, device=device) if block is None else block
    while block.shape[0] < spec.block_size:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)), 0)
    if spec.k > 1:  # the doublings are the inner factor of the op's matrix; here they came out outer
        inner = spec.block_size // spec.k
        block = block.view(inner, spec.k, inner, spec.k).permute(1, 0, 3, 2).reshape(block.shape)
    return block.to(dtype) / spec.block_size**0.5


def fast_hadamard_transform(x: Tensor, spec: HadamardSpec) -> Workload | None:
    """Tri Dao's kernel, which knows powers of two (other widths it pads)."""
    if spec.k != 1 or spec.block_size != spec.size or not installed("fast_hadamard_transform"):
        return None
    from fast_hadamard_transform import hadamard_transform

    scale = spec.size**-0.5
    return Workload("fast-hadamard-transform", lambda x: hadamard_transform(x, scale), Copies(x))


def gemlite_w2(x: Tensor, out: int, group: int) -> Workload | None:
    """gemlite's weight-only kernel: fp16 activations, uniform 2-bit weights, a scale and a zero a group."""
    if x.dtype != torch.float16 or x.shape[-1] % 32 or out % 32 or not installed("gemlite"):
        return None
    from gemlite.helper import A16W2_HQQ_INT

    features = x.shape[-1]
    codes = torch.randint(0, 4, (out, features), dtype=torch.uint8, device=x.device)
    scales = torch.rand(out * features // group, 1, device=x.device).half() + 0.1
    zeros = torch.full_like(scales, 1.5)
    layer = A16W2_HQQ_INT(device=str(x.device), dtype=torch.float16).from_weights(codes, scales, zeros)
    data = Copies(layer, bytes=tensor_bytes(layer.W_q, layer.scales, layer.zeros))
    return Workload("gemlite.a16w2", lambda layer: layer(x), data)


def humming_w2(x: Tensor, out: int, group: int, act_bits: int = 16) -> Workload | None:
    """Humming's kernel: uniform 2-bit weights, a scale a group; fp16 activations, or of 8 or 4 bits."""
    if x.dtype != torch.float16 or not installed("humming"):
        return None
    if act_bits == 4 and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9:
        skip("humming.w2a4", "its tuner has no configurations for 4-bit activations on sm_90")
        return None
    from humming.layer import HummingLayer

    features = x.shape[-1]
    config = {"dtype": "int2", "group_size": group}
    inputs = None if act_bits == 16 else {"dtype": f"int{act_bits}"}
    layer = HummingLayer(
        shape_n=out, shape_k=features, weight_config=config, input_config=inputs, torch_dtype=x.dtype
    )
    layer = layer.to(x.device)
    layer.load_from_unquantized(torch.randn(out, features, dtype=x.dtype, device=x.device))
    layer.transform()
    data = Copies(layer, bytes=tensor_bytes(*layer.parameters(), *layer.buffers()))
    return Workload(f"humming.w2a{act_bits}", lambda layer: layer(x), data)


#: Adapters of each other project, `(x, out, group) -> Workload or None`.
PROJECTS = {
    "humming": (humming_w2, partial(humming_w2, act_bits=8), partial(humming_w2, act_bits=4)),
    "gemlite": (gemlite_w2,),
}


def int_mm(tokens: int, out: int, features: int, device: str) -> Workload | None:
    """Products of int8 matrices, as `torch._int_mm`; on CUDA (cuBLAS) it takes more than 16 tokens."""
    if tokens <= 16 and device == "cuda":
        return None
    a = torch.randint(-128, 128, (tokens, features), dtype=torch.int8, device=device)
    weight = torch.randint(-128, 128, (out, features), dtype=torch.int8, device=device)
    return Workload("torch._int_mm", lambda weight: torch._int_mm(a, weight.T), Copies(weight))


@lru_cache(maxsize=2)
def copy_of(bytes: int, device: str) -> Workload:
    """A copy that reads and writes so many bytes in all."""
    return copies_on(device, bytes)[0]
