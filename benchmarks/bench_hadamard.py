"""The Hadamard transform, at every width that models have.

    python -m benchmarks.bench_hadamard [--device cpu|cuda] [--json FILE] [--models NAME] ...
        [--shapes 4096,11008] [--tokens 1,8,16] [--threads N] [--quick]

Peers: a copy of the same bytes, the dense product, and fast-hadamard-transform where it can run. Without
`--tokens`, one token, and as many as fill 16 MB: from there on the transform should take what a copy takes.
"""

from __future__ import annotations

import warnings
from functools import lru_cache, partial

import torch

from benchmarks import checks, peers
from benchmarks.harness import Case, Options, Subject, command, skip
from benchmarks.shapes import hadamard_sizes
from benchmarks.timing import Copies, Workload
from w2a4 import ops
from w2a4.format.hadamard import HadamardSpec, had_k_matrix, hadamard_spec

DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float16, torch.bfloat16)}
QUICK = (128, 576, 8192, 11008, 14336)
#: Bytes of x and the result together in the large case.
LARGE = 16 << 20
#: A dense matrix beyond this says nothing new, and its product takes long.
MAX_DENSE = {"cpu": 512 << 20, "cuda": 2 << 30}


def spec_of(size: int) -> HadamardSpec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a width is block-diagonal is known here
        return hadamard_spec(size)


@lru_cache(maxsize=1)
def dense(spec: HadamardSpec, dtype: torch.dtype, device: str) -> torch.Tensor:
    return peers.dense_hadamard(spec, dtype, device)


def dense_product(x: torch.Tensor, spec: HadamardSpec, data: Copies) -> Workload | None:
    device = x.device.type
    if spec.block_size**2 * x.element_size() > MAX_DENSE[device]:
        skip(f"dense product of width {spec.block_size}", f"its matrix is over {MAX_DENSE[device] >> 20} MB")
        return None
    matrix = dense(spec, x.dtype, device)
    return Workload("dense", lambda x: x.unflatten(-1, (-1, spec.block_size)) @ matrix, data)


def subject(size: int, tokens: int, dtype: torch.dtype, device: str) -> Subject:
    spec = spec_of(size)
    x = torch.randn(tokens, size, dtype=dtype, device=device)
    had_k, data = had_k_matrix(spec.k, device), Copies(x)

    def call(x: torch.Tensor) -> torch.Tensor:
        return ops.hadamard(x, had_k, spec.block_size)

    moved = 2 * data.bytes
    found = [
        peers.copy_of(moved, device),
        dense_product(x, spec, data),
        peers.fast_hadamard_transform(x, spec) if device == "cuda" else None,
    ]
    others = [peer for peer in found if peer is not None]
    check = partial(lambda: checks.hadamard_agrees(call(x), x, spec))
    return Subject(Workload("hadamard", call, data), others, moved, check)


def plan(options: Options) -> list[Case]:
    sizes = [width for (width,) in options.shapes] or hadamard_sizes(options.models or None)
    if options.quick and not (options.models or options.shapes):
        sizes = list(QUICK)
    return [
        Case("hadamard", str(size), count, str(dtype).removeprefix("torch."),
             partial(subject, size, count, dtype, options.device))
        for size in sizes
        for dtype in DTYPES[options.device][: 1 if options.quick else None]
        for count in options.tokens or (1, -(-LARGE // (2 * size * dtype.itemsize)))
    ]  # fmt: skip


main = command(__doc__, plan, "WIDTH")

if __name__ == "__main__":
    main()
