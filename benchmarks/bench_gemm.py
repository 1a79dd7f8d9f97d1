"""Linear layers on quantised activations for one to thousands of tokens, where the kernel changes.

    python -m benchmarks.bench_gemm [--device cpu|cuda] [--json FILE] [--models NAME] ...
        [--shapes 4096x4096,11008x4096] [--tokens 1,8,16] [--threads N] [--quick] [--tune]

Ours is what `w2a4.ops` chooses. Peers: torch.nn.functional.linear in float32 on the CPU, in bfloat16 and
float16 (cuBLAS) on CUDA; torch._int_mm; gemlite and humming-kernels where they are installed; up to 64
tokens the other kernel of w2a4, which shows where the choice ought to change. Without --tokens every number
of tokens from 1 to 64 is measured too, for one shape of each model and no peers: a cliff shows.

--tune checks every tile of the Triton GEMM against the reference, measures those that are right, and keeps
the fastest in Triton's cache, where every later process finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click
import torch

from benchmarks import checks, peers
from benchmarks.bench_gemv import cublas, other_peers, weights
from benchmarks.harness import Case, Options, Subject, command, say
from benchmarks.shapes import MODELS, LinearShape, linear_shapes
from benchmarks.timing import Workload, tensor_bytes
from w2a4 import ops
from w2a4.ops import dispatch

OPS = ("linear_w2a4", "linear_w4a4")
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16)}
BENCHED_MODELS = ("llama-2-7b", "llama-3-8b", "llama-3.2-1b")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
QUICK_TOKENS = {"cpu": (1, 64), "cuda": (2048, 16, 32, 64)}
#: Every number of tokens up to this is looked at for cliffs.
CLIFFS = 64


def run(linear: Callable, group: int, dtype: torch.dtype, codes, scale, *tensors: torch.Tensor):
    """A linear layer of `ops` or `torch.ops.w2a4`, its constants first."""
    return linear(codes, scale, *tensors, None, group, dtype)


def agrees(op: str, linear: Callable, codes, scale, tensors: tuple, group: int) -> bool:
    """Is a `run` of an op right on these tensors, and with scales of 1 to the integer?"""
    right = checks.linear_agrees(op, linear(codes, scale, *tensors), codes, scale, tensors, group)
    return right and checks.integers_agree(op, linear, codes, tensors, group)


def subject(op: str, shape: LinearShape, tokens: int, dtype: torch.dtype, device: str, alone: bool,
            tune: bool, projects: bool = True) -> Subject:  # fmt: skip
    """Ours, and the peers unless it is `alone`, on one shape; other projects' kernels if wanted."""
    x = torch.randn(tokens, shape.features, dtype=dtype, device=device)
    codes, scale = ops.quantize_a4(x, torch.tensor([0.9], device=device))
    data = weights(op, shape, device)
    (tensors,) = data.take(1)
    linear = partial(run, getattr(ops, op), shape.group, dtype)
    if tune:
        tune_tiles(op, shape, codes, scale, tensors, dtype)
    found = []
    if not alone:
        found = [cublas(x, shape, norm=False), *_products(op, x, shape, projects)]
        for name, kernel in other_kernels(op, tokens, shape.group, x.device, dtype).items():
            found.append(Workload(name, partial(run, kernel, shape.group, dtype, codes, scale), data))
    moved = data.bytes + tensor_bytes(codes, scale) + tokens * shape.out * x.element_size()
    ours = Workload(op, partial(linear, codes, scale), data)
    return Subject(ours, found, moved, partial(agrees, op, linear, codes, scale, tensors, shape.group))


def other_kernels(op: str, tokens: int, group: int, device: torch.device, dtype: torch.dtype) -> dict:
    """The kernel that the dispatch does not choose, for numbers of tokens where it might."""
    if device.type != "cuda" or tokens > CLIFFS:
        return {}
    there = {"cuda": ops.has_cuda_kernels(device), "triton": not dispatch.why_no_triton(device.index)}
    chosen = dispatch.linear_kernel(device, tokens, group, dtype, there["cuda"])
    names = {"cuda": op, "triton": op.replace("linear", "gemm")}
    return {f"w2a4.{kernel}": getattr(torch.ops.w2a4, names[kernel])
            for kernel, is_there in there.items() if is_there and kernel != chosen}  # fmt: skip


def _products(op: str, x: torch.Tensor, shape: LinearShape, projects: bool) -> list[Workload]:
    """torch._int_mm, and other projects' kernels for 2-bit weights."""
    if op == "linear_w2a4" and x.is_cuda:
        return other_peers(x, shape, projects)
    peer = peers.int_mm(x.shape[0], shape.out, shape.features, x.device.type)
    return [] if peer is None else [peer]


def tune_tiles(
    op: str, shape: LinearShape, codes, scale, tensors: tuple, dtype: torch.dtype
) -> list:  # fmt: skip
    """Measure the tiles that are right on this device, say what each took, and keep the fastest.

    Returns the wrong ones.

    Raises:
        click.ClickException: every tile is wrong.
    """
    from w2a4.triton_kernels import tiles

    name = op.replace("linear", "gemm")
    gemm = partial(run, getattr(torch.ops.w2a4, name), shape.group, dtype)
    bits, group = int(op[len("linear_w")]), codes.shape[-1] * 2 // scale.shape[-1]
    problem = tiles.Problem(bits, len(codes), shape.out, shape.features, shape.group, group)
    # Compiling takes seconds a tile, and tiles of few tokens do not win where there are many.
    fewest = min(128, len(codes) // 16)
    right, there = [], [tile for tile in tiles.serving(problem, codes) if tile.m >= fewest]
    for tile in there:
        try:
            with tiles.only(tile):
                if agrees(op, gemm, codes, scale, tensors, shape.group):
                    right.append(tile)
        except Exception as error:  # one that does not even run must not keep others from it
            say(f"{name} {shape}: {tile} fails, {type(error).__name__}: {error}")
    wrong = [tile for tile in there if tile not in right]
    for tile in wrong:
        say(f"{name} {shape}, {len(codes)} tokens: WRONG results with {tile}; it is not measured")
    if not right:
        raise click.ClickException(f"{name} {shape}: every tile gives wrong results on this device")
    tiles.measured_ms.clear()
    tiles.autotune(True)
    try:
        with tiles.only(*right):
            gemm(codes, scale, *tensors)
    finally:
        tiles.autotune(False)
    for tile, ms in sorted(tiles.measured_ms.items(), key=lambda item: item[1]):
        say(f"{name} {shape}, {len(codes)} tokens: {1000 * ms:.1f} us with {tile}")
    return wrong


def refuse_to_tune(device: str) -> None:
    """
    Raises:
        click.ClickException: there are no tiles to measure.
    """
    why = "it needs --device cuda" if device == "cpu" else dispatch.why_no_triton(torch.cuda.current_device())
    if why:
        raise click.ClickException(f"--tune measures tiles of the Triton GEMM: {why}")


def plan(options: Options) -> list[Case]:
    if options.tune:
        refuse_to_tune(options.device)
    quick_models = ("llama-3-8b",) if options.device == "cuda" else ("llama-3.2-1b",)
    models = options.models or (quick_models if options.quick else BENCHED_MODELS)
    tokens = options.tokens or (QUICK_TOKENS[options.device] if options.quick else TOKENS)
    shapes = [LinearShape(*shape) for shape in options.shapes] or linear_shapes(models)
    squares = (
        shapes[:1]
        if options.shapes
        else sorted({LinearShape(MODELS[name].hidden, MODELS[name].hidden) for name in models})
    )
    dtypes = DTYPES[options.device][: 1 if options.quick else None]

    def case(op: str, shape: LinearShape, count: int, dtype: torch.dtype, alone: bool = False) -> Case:
        name = str(dtype).removeprefix("torch.")
        build = partial(subject, op, shape, count, dtype, options.device, alone, options.tune)
        return Case(op, str(shape), count, name, build)

    # What tells most comes first, should the time run out.
    grid = [case(op, shape, count, dtype) for few in (tokens[:1], tokens[1:]) for shape in shapes
            for dtype in dtypes for op in OPS for count in few]  # fmt: skip
    if options.tokens or (options.quick and options.device == "cpu"):
        return grid
    cliffs = [case(op, shape, count, dtypes[0], alone=True) for op in OPS for shape in squares
              for count in range(1, CLIFFS + 1)]  # fmt: skip
    first = len(shapes) * len(dtypes) * len(OPS)
    return [*grid[:first], *cliffs, *grid[first:]]


main = command(__doc__, plan, "OUTxIN", tunes=True)

if __name__ == "__main__":
    main()
