"""Linear layers on quantised activations, and with the quantisation before them.

    python -m benchmarks.bench_gemv [--device cpu|cuda] [--json FILE] [--models NAME] ...
        [--shapes 4096x4096,11008x4096] [--tokens 1,8,16] [--threads N] [--quick]

Peers: torch.nn.functional.linear in float32 on the CPU, in float16 and bfloat16 (cuBLAS) on CUDA, and there
gemlite, humming-kernels and torch._int_mm where they can run.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from benchmarks import checks, peers
from benchmarks.harness import Case, Options, Subject, command
from benchmarks.shapes import MODELS, LinearShape, linear_shapes
from benchmarks.timing import Copies, Workload, tensor_bytes
from w2a4 import ops
from w2a4.ops.packing import packed_width

OPS = ("linear_w2a4", "linear_w4a4", "rmsnorm_a4+linear_w2a4")
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float16, torch.bfloat16)}
TOKENS = (1, 2, 4, 8, 16, 512)
EPS = 1e-5


@lru_cache(maxsize=3)
def weights(op: str, shape: LinearShape, device: str) -> Copies:
    """Random weights of an op, with every code and the extreme levels among them."""
    groups = shape.features // shape.group
    bits = 4 if op == "linear_w4a4" else 2
    width = packed_width(shape.features, bits)
    codes = torch.randint(0, 256, (shape.out, width), dtype=torch.uint8, device=device)
    scale = (torch.rand(shape.out, groups, device=device) + 0.1).half()
    levels = torch.randint(-128, 128, (shape.out, groups, 4), dtype=torch.int8, device=device)
    levels[..., 0], levels[..., 3] = -128, 127
    return Copies(*((codes, scale) if bits == 4 else (codes, levels, scale)))


@lru_cache(maxsize=2)
def full_weights(shape: LinearShape, dtype: torch.dtype, device: str) -> Copies:
    return Copies(torch.randn(shape.out, shape.features, dtype=dtype, device=device))


def cublas(x: torch.Tensor, shape: LinearShape, norm: bool) -> Workload:
    """The linear in full precision, after RMSNorm if ours has it too."""
    name = "torch" if x.device.type == "cpu" else "cublas"
    gain = torch.rand(shape.features, dtype=x.dtype, device=x.device)
    plain = partial(F.linear, x)

    def normed(weight: torch.Tensor) -> torch.Tensor:
        return F.linear(F.rms_norm(x, (shape.features,), gain, EPS), weight)

    data = full_weights(shape, x.dtype, x.device.type)
    return Workload(f"{name}.{str(x.dtype).removeprefix('torch.')}", normed if norm else plain, data)


def other_peers(x: torch.Tensor, shape: LinearShape, projects: bool = True) -> list[Workload]:
    """torch._int_mm on CUDA, and the kernels of other projects there."""
    if x.device.type == "cpu":
        return []
    found = [peers.int_mm(x.shape[0], shape.out, shape.features, "cuda")]
    if projects:
        makers = [make for group in peers.PROJECTS.values() for make in group]
        found += [make(x, shape.out, shape.group) for make in makers]
    return [peer for peer in found if peer is not None]


def subject(
    op: str, shape: LinearShape, tokens: int, dtype: torch.dtype, device: str, projects: bool = True
) -> Subject:
    """Ours and the peers on one shape; "rmsnorm_a4+linear" is the whole linear, from its input on."""
    name, norm = op.split("+")[-1], "+" in op
    x = torch.randn(tokens, shape.features, dtype=dtype, device=device)
    gain = torch.rand(shape.features, dtype=dtype, device=device)
    clip = torch.tensor([0.9], device=device)
    data = weights(name, shape, device)
    linear = getattr(ops, name)

    def quantised() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.rmsnorm_a4(x, gain, EPS, clip) if norm else ops.quantize_a4(x, clip)

    codes, scale = quantised()

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        a = quantised() if norm else (codes, scale)
        return linear(*a, *tensors, None, shape.group, dtype)

    def check() -> bool:
        (tensors,) = data.take(1)
        return checks.linear_agrees(name, call(*tensors), codes, scale, tensors, shape.group)

    activations = tensor_bytes(x, gain) if norm else tensor_bytes(codes, scale)
    moved = data.bytes + activations + tokens * shape.out * x.element_size()
    others = [] if norm or name != "linear_w2a4" else other_peers(x, shape, projects)
    return Subject(Workload(op, call, data), [cublas(x, shape, norm), *others], moved, check)


def plan(options: Options) -> list[Case]:
    models = options.models or (("llama-3.2-1b",) if options.quick else tuple(MODELS))
    tokens = options.tokens or ((1, 8) if options.quick else TOKENS)
    shapes = [LinearShape(*shape) for shape in options.shapes] or linear_shapes(models)
    return [
        Case(op, str(shape), count, str(dtype).removeprefix("torch."),
             partial(subject, op, shape, count, dtype, options.device))
        for shape in shapes
        for dtype in DTYPES[options.device][: 1 if options.quick else None]
        for op in OPS
        for count in tokens
    ]  # fmt: skip


main = command(__doc__, plan, "OUTxIN")

if __name__ == "__main__":
    main()
