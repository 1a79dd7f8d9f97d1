"""Quantisation of activations to 4 bits, alone and fused with what comes before it.

    python -m benchmarks.bench_quantize [--device cpu|cuda] [--json FILE] [--models NAME] ...
        [--shapes 4096,11008] [--tokens 1,8,16] [--threads N] [--quick]

Peers: the same in eager PyTorch, and a copy of the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import checks, peers
from benchmarks.bench_hadamard import spec_of
from benchmarks.harness import Case, Options, Subject, command
from benchmarks.shapes import MODELS, hidden_sizes, intermediate_sizes
from benchmarks.timing import Copies, Workload, tensor_bytes
from w2a4 import ops
from w2a4.format.hadamard import had_k_matrix
from w2a4.ops import reference

DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float16, torch.bfloat16)}
TOKENS = (1, 16, 512)
EPS = 1e-5

Pair = tuple[Tensor, Tensor]
#: An op's call, the same in eager PyTorch, and the same by the reference, of the same tensors.
Three = tuple[Callable[..., Pair], Callable[..., Pair], Callable[..., Pair]]


def quantize_a4(size: int, clip: Tensor, device: str) -> Three:
    return (
        lambda x: ops.quantize_a4(x, clip),
        lambda x: peers.eager_quantize_a4(x, clip),
        lambda x: reference.quantize_a4(x, clip.cpu()),
    )


def rmsnorm_a4(size: int, clip: Tensor, device: str) -> Three:
    gain = torch.rand(size, device=device)
    return (
        lambda x: ops.rmsnorm_a4(x, gain.to(x.dtype), EPS, clip),
        lambda x: peers.eager_quantize_a4(F.rms_norm(x, (size,), gain.to(x.dtype), EPS), clip),
        lambda x: reference.rmsnorm_a4(x, gain.cpu().to(x.dtype), EPS, clip.cpu()),
    )


def hadamard_a4(size: int, clip: Tensor, device: str) -> Three:
    spec = spec_of(size)
    had_k = had_k_matrix(spec.k, device)
    return (
        lambda x: ops.hadamard_a4(x, had_k, spec.block_size, clip),
        lambda x: peers.eager_quantize_a4(peers.eager_hadamard(x, spec), clip),
        lambda x: reference.quantize_a4(checks.reference_hadamard(x, spec).float(), clip.cpu()),
    )


def silu_mul_hadamard_a4(size: int, clip: Tensor, device: str) -> Three:
    _, eager, exact = hadamard_a4(size, clip, device)
    spec = spec_of(size)
    had_k = had_k_matrix(spec.k, device)
    return (
        lambda gate, up: ops.silu_mul_hadamard_a4(gate, up, had_k, spec.block_size, clip),
        lambda gate, up: eager(F.silu(gate) * up),
        lambda gate, up: exact(F.silu(gate.double()) * up.double()),
    )


#: The op's three, how many tensors it takes, and the widths it works on in a model.
OPS = {
    "quantize_a4": (quantize_a4, 1, hidden_sizes),
    "rmsnorm_a4": (rmsnorm_a4, 1, hidden_sizes),
    "hadamard_a4": (hadamard_a4, 1, intermediate_sizes),
    "silu_mul_hadamard_a4": (silu_mul_hadamard_a4, 2, intermediate_sizes),
}


def subject(op: str, size: int, tokens: int, dtype: torch.dtype, device: str) -> Subject:
    make, inputs, _ = OPS[op]
    ours, eager, exact = make(size, torch.tensor([0.9], device=device), device)
    data = Copies(*(torch.randn(tokens, size, dtype=dtype, device=device) for _ in range(inputs)))
    (tensors,) = data.take(1)
    moved = data.bytes + tensor_bytes(*ours(*tensors))

    def check() -> bool:
        chosen = checks.choose(tokens, checks.TOKENS)
        got = [part.cpu()[chosen] for part in ours(*tensors)]
        want = exact(*(tensor.cpu()[chosen] for tensor in tensors))
        return checks.codes_agree(tuple(got), want, exact=op == "quantize_a4")

    others = [Workload("eager", eager, data), peers.copy_of(moved, device)]
    return Subject(Workload(op, ours, data), others, moved, check)


def plan(options: Options) -> list[Case]:
    models = options.models or (("llama-3.2-1b", "llama-3-8b") if options.quick else tuple(MODELS))
    tokens = options.tokens or ((1, 64) if options.quick else TOKENS)
    return [
        Case(op, str(size), count, str(dtype).removeprefix("torch."),
             partial(subject, op, size, count, dtype, options.device))
        for op, (_, _, sizes) in OPS.items()
        for size in ([width for (width,) in options.shapes] or sizes(models))
        for dtype in DTYPES[options.device][: 1 if options.quick else None]
        for count in tokens
    ]  # fmt: skip


main = command(__doc__, plan, "WIDTH")

if __name__ == "__main__":
    main()
