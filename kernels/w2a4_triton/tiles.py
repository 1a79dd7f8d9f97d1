"""Which tile a GEMM runs with: measured once where that was asked for, else by a rule.

The bits of a result do not depend on the tile, so a choice may change between two calls. `autotune(True)`
measures every tile the first time a (tokens rounded up to a power of two, shape, device) is met outside of
CUDA graph capture and tracing, and keeps the fastest in Triton's cache directory, where every later process
finds it. It does not check results, but compilers are known to get some tiles wrong on some GPUs:
`python -m benchmarks.bench_gemm --tune` checks each before it measures, with `only`.

`triton.autotune` does not serve here: it measures during capture too, knows no rule for what was not
measured, and counts every number of tokens as a new shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.cache import CacheManager, get_cache_manager
from triton.runtime.errors import OutOfResources


class Tile(NamedTuple):
    """`m` tokens by `n` outputs, `k` inputs a step (fewer where scales are finer), and how to launch it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


#: Each compiles without spills for sm_80, sm_90 and sm_100; `tests/test_triton_compile.py` checks it.
TILES = (
    Tile(16, 64, 256, 4, 4),
    Tile(32, 64, 256, 4, 4),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 128, 128, 4, 3),
    Tile(128, 64, 128, 4, 3),
    Tile(128, 128, 128, 8, 3),
)


class Problem(NamedTuple):
    """What the choice depends on; `group` and `act_group` are inputs of one weight scale and token scale."""

    bits: int
    tokens: int
    out_features: int
    in_features: int
    group: int
    act_group: int

    @property
    def block(self) -> int:
        """Inputs that share both scales: those of one exact sum."""
        return min(self.group, self.act_group)


def fit_k(tile: Tile, block: int) -> Tile:
    """The tile with no more inputs a step than a block holds, and 64 at least: two int8 products of 32."""
    return tile._replace(k=min(tile.k, max(64, triton.next_power_of_2(block))))


def rule(problem: Problem) -> Tile:
    """The smallest tile that holds all tokens; where several are needed, the largest that fills the GPU.

    Not measured yet. 128 tiles in flight fill any GPU since sm_80 about once.
    """
    for tile in TILES[:2]:
        if problem.tokens <= tile.m:
            return tile
    for tile in reversed(TILES[3:]):
        if triton.cdiv(problem.tokens, tile.m) * triton.cdiv(problem.out_features, tile.n) >= 128:
            return tile
    return TILES[2]


_measuring = False
_allowed = TILES
_measured: dict[tuple, Tile | None] = {}


def autotune(enabled: bool) -> None:
    """Measure tiles of shapes met for the first time from now on, or stop doing so. Off at the start."""
    global _measuring
    _measuring = enabled


@contextmanager
def only(*tiles: Tile) -> Iterator[None]:
    """Choose among these tiles of `TILES` only; a single one is taken everywhere."""
    global _allowed
    before, _allowed = _allowed, tiles
    try:
        yield
    finally:
        _allowed = before


def choose_tile(problem: Problem, a_codes: Tensor, run: Callable[[Tile], None]) -> Tile:
    """The tile for a call on these activations, which `run` would make with a tile of choice."""
    ruled = rule(problem)
    ruled = fit_k(ruled if ruled in _allowed else _allowed[-1], problem.block)
    # Fake and functional tensors, which torch.compile traces with, can not be measured.
    if type(a_codes) is not Tensor or not a_codes.is_cuda or len(_allowed) == 1:
        return ruled
    key = (*problem._replace(tokens=triton.next_power_of_2(problem.tokens)),
           torch.cuda.get_device_name(a_codes.device), torch.version.cuda, triton.__version__)  # fmt: skip
    if key not in _measured:
        _measured[key] = _read(key)
    if _measured[key] not in {fit_k(tile, problem.block) for tile in _allowed}:
        if not _measuring or torch.cuda.is_current_stream_capturing():
            return ruled
        _measured[key] = _measure(key, problem.block, run)
    return _measured[key]


def _measure(key: tuple, block: int, run: Callable[[Tile], None]) -> Tile:
    """The fastest tile, kept on disk."""

    def milliseconds(tile: Tile) -> float:
        try:
            return triton.testing.do_bench(lambda: run(tile))
        except OutOfResources:
            return float("inf")

    best = min({fit_k(tile, block) for tile in _allowed}, key=milliseconds)
    _file(key).put(" ".join(map(str, best)), _NAME, binary=False)
    return best


def _read(key: tuple) -> Tile | None:
    """The tile that a process before this one measured."""
    path = _file(key).get_file(_NAME)
    if path is None:
        return None
    with open(path) as file:
        return Tile(*map(int, file.read().split()))


_NAME = "w2a4_gemm_tile.txt"


def _file(key: tuple) -> CacheManager:
    """The place in Triton's cache directory that belongs to a key; it takes hexadecimal names."""
    return get_cache_manager(repr(key).encode().hex())
