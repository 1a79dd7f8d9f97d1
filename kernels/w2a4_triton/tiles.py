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
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.cache import CacheManager, get_cache_manager
from triton.runtime.errors import OutOfResources

from .language import INTERPRET


class Tile(NamedTuple):
    """`m` tokens by `n` outputs, `k` inputs a step (fewer where scales are finer), and how to launch it.

    With `int8` (0 or 1) all codes are decoded before, see `gemm_int8`.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    int8: int = 0


#: Each compiles without spills for sm_80, sm_90 and sm_100; `tests/kernels/test_triton_compile.py` checks it.
TILES = (
    Tile(16, 64, 256, 4, 4),
    Tile(32, 64, 256, 4, 4),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 128, 128, 4, 3),
    Tile(128, 64, 128, 4, 3),
    Tile(128, 128, 128, 8, 3),
)

#: For sm_90 alone, without spills there but for float32 results with several scales a token.
INT8_TILES = (
    Tile(128, 64, 128, 4, 3, 1),
    Tile(128, 128, 128, 8, 4, 1),
    Tile(256, 64, 128, 4, 2, 1),
    Tile(256, 128, 128, 8, 4, 1),
)

#: From so many tokens on codes are decoded before: for 4096 x 4096 weights that takes about 9 us (24 MB from
#: and to memory, two launches), and a token then 0.03 us instead of the 0.077 us measured on an H200 with
#: decoding in the loop, so 200 tokens would pay; but only 1024 fill the GPU once with the largest tile. Not
#: measured yet. Tuning tries half as many. Several scales a token take 5.5 instructions a sum instead of 3,
#: in the loop that decodes too.
INT8_TOKENS = 1024


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


def rule(problem: Problem, int8: bool = False) -> Tile:
    """The smallest tile that holds all tokens; where several are needed, the largest that fills the GPU.

    Not measured yet. 128 tiles in flight fill any GPU since sm_80 about once. `int8` says whether the tiles
    with it serve here.
    """
    for tile in TILES[:2]:
        if problem.tokens <= tile.m:
            return tile
    tiles = INT8_TILES if int8 and problem.tokens >= INT8_TOKENS else TILES[2:]
    for tile in reversed(tiles[1:]):
        if triton.cdiv(problem.tokens, tile.m) * triton.cdiv(problem.out_features, tile.n) >= 128:
            return tile
    return tiles[0]


def serving(problem: Problem, a_codes: Tensor) -> tuple[Tile, ...]:
    """All tiles that can run a call on these activations."""
    return _EVERY if _int8_serves(problem, a_codes) else TILES


def _int8_serves(problem: Problem, a_codes: Tensor) -> bool:
    """Blocks of a step, or one scale a token and weight; rows of 16 bytes for the copy engine of sm_90.

    torch.compile traces with tensors that no descriptor can be made of.
    """
    if type(a_codes) is not Tensor or problem.tokens < INT8_TOKENS // 2 and not INTERPRET.value:
        return False
    one_scale = problem.act_group == problem.in_features
    blocks = problem.group in (128, problem.in_features) if one_scale else problem.block == 128
    if not blocks or problem.in_features % 128 or problem.out_features % 8:
        return False
    return INTERPRET.value or a_codes.is_cuda and _is_hopper(a_codes.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@triton.jit
def program_tile(tokens, out_features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Numbers of this program's tile: bands of 8 tiles of rows, column by column, so that L2 is reused."""
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    band = tl.program_id(0) // (8 * tiles_n)
    within = tl.program_id(0) % (8 * tiles_n)
    height = tl.minimum(tiles_m - 8 * band, 8)
    return 8 * band + within % height, within // height


_measuring = False
_EVERY = TILES + INT8_TILES
_allowed = _EVERY
_measured: dict[tuple, Tile | None] = {}

#: Milliseconds of the tiles that were measured last.
measured_ms: dict[Tile, float] = {}


def autotune(enabled: bool) -> None:
    """Measure tiles of shapes met for the first time from now on, or stop doing so. Off at the start."""
    global _measuring
    _measuring = enabled


@contextmanager
def only(*tiles: Tile) -> Iterator[None]:
    """Choose among these tiles only; a single one is taken everywhere, or wherever it serves."""
    global _allowed
    before, _allowed = _allowed, tiles
    try:
        yield
    finally:
        _allowed = before


def choose_tile(problem: Problem, a_codes: Tensor, run: Callable[[Tile], None]) -> Tile:
    """The tile for a call on these activations, which `run` would make with a tile of choice."""
    there = serving(problem, a_codes)
    # Every call comes here, so the usual case looks at nothing twice.
    allowed = there if _allowed is _EVERY else tuple(tile for tile in _allowed if tile in there) or TILES
    ruled = rule(problem, bool(allowed[-1].int8))
    ruled = fit_k(ruled if ruled in allowed else allowed[-1], problem.block)
    # Fake and functional tensors, which torch.compile traces with, can not be measured.
    if type(a_codes) is not Tensor or not a_codes.is_cuda or len(allowed) == 1:
        return ruled
    key = (*problem._replace(tokens=triton.next_power_of_2(problem.tokens)),
           torch.cuda.get_device_name(a_codes.device), torch.version.cuda, triton.__version__)  # fmt: skip
    if key not in _measured:
        _measured[key] = _read(key)
    if _measured[key] is None and not _measuring:
        return ruled
    candidates = {fit_k(tile, problem.block) for tile in allowed}
    if _measured[key] not in candidates:
        if not _measuring or torch.cuda.is_current_stream_capturing():
            return ruled
        _measured[key] = _measure(key, candidates, run)
    return _measured[key]


def _measure(key: tuple, candidates: set[Tile], run: Callable[[Tile], None]) -> Tile:
    """The fastest tile, kept on disk; what all of them took stays in `measured_ms`."""

    def milliseconds(tile: Tile) -> float:
        try:
            # In a graph: the time that Python takes to launch two kernels would hide what they take.
            return triton.testing.do_bench_cudagraph(lambda: run(tile))
        except OutOfResources:
            return float("inf")

    measured_ms.clear()
    measured_ms.update((tile, milliseconds(tile)) for tile in candidates)
    best = min(measured_ms, key=measured_ms.get)
    _file(key).put(" ".join(map(str, best)), _NAME, binary=False)
    return best


def _read(key: tuple) -> Tile | None:
    """The tile that a process before this one measured."""
    path = _file(key).get_file(_NAME)
    if path is None:
        return None
    with open(path) as file:
        return Tile(*map(int, file.read().split()))


_NAME = "w2a4_gemm_tile_2.txt"  # the second list of tiles


def _file(key: tuple) -> CacheManager:
    """The place in Triton's cache directory that belongs to a key; it takes hexadecimal names."""
    return get_cache_manager(repr(key).encode().hex())
