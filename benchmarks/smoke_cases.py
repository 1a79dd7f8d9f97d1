"""What `benchmarks.smoke` runs: each op with a CUDA or Triton kernel once, at a real shape or at a small one.

Weights and inputs are drawn where the op runs. Checks are those of `benchmarks.checks`, on chosen rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import checks
from benchmarks.bench_hadamard import spec_of
from benchmarks.bench_kv4 import CLIP, packed
from benchmarks.bench_quantize import OPS as QUANTIZERS
from w2a4 import ops
from w2a4.format import fake_quant as quantizers
from w2a4.format.hadamard import had_k_matrix
from w2a4.ops import dispatch, reference
from w2a4.ops.packing import packed_width
from w2a4.train import losses

HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

#: A call, and whether what it returned is right.
Prepared = tuple[Callable[[], object], Callable[[object], bool]]


@dataclass(frozen=True)
class Case:
    """One call. `build(device)` makes its data, late.

    Attributes:
        kernel: gemv_bmma and gemv_imma, cuda, triton, or cpu.
    """

    op: str
    shape: str
    tokens: int
    dtype: str
    kernel: str
    build: Callable[[str], Prepared]

    @property
    def name(self) -> str:
        return "-".join((self.op, self.shape, str(self.tokens), self.dtype, self.kernel))


@contextmanager
def chosen(kernel: str) -> Iterator[None]:
    """That GEMV, if `kernel` is one; the op reads the environment at every call."""
    before = os.environ.get("W2A4_GEMV")
    os.environ["W2A4_GEMV"] = kernel.removeprefix("gemv_") if kernel.startswith("gemv_") else "auto"
    try:
        yield
    finally:
        os.environ.pop("W2A4_GEMV")
        if before is not None:
            os.environ["W2A4_GEMV"] = before


def linear(
    bits: int, out: int, features: int, group: int, tokens: int, dtype: torch.dtype, kernel: str, device: str
) -> Prepared:
    name, groups = f"linear_w{bits}a4", features // group
    op = getattr(torch.ops.w2a4, f"gemm_w{bits}a4" if kernel == "triton" else name)

    def random(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    codes = random(tokens, packed_width(features, 4))
    if features % 2:  # what lies beyond the last input is 0
        codes[:, -1] &= 15
    scale = torch.rand(tokens, 1, device=device) * 0.1 + 0.05  # float16 holds what comes out
    weight, levels = random(out, packed_width(features, bits)), random(out, groups, 4).view(torch.int8)
    others = (levels,) if bits == 2 else ()
    tensors = (weight, *others, (torch.rand(out, groups, device=device) + 0.1).half())

    def run(codes: Tensor, scale: Tensor, *tensors: Tensor) -> Tensor:
        with chosen(kernel):
            return op(codes, scale, *tensors, None, group, dtype)

    def check(got: Tensor) -> bool:
        right = checks.linear_agrees(name, got, codes, scale, tensors, group)
        return right and checks.integers_agree(name, run, codes, tensors, group)

    return partial(run, codes, scale, *tensors), check


def linear_w8(out: int, features: int, tokens: int, dtype: torch.dtype, device: str) -> Prepared:
    x = torch.randn(tokens, features, dtype=dtype, device=device)
    weight = torch.randint(-128, 128, (out, features), dtype=torch.int8, device=device)
    scale = (torch.rand(out, device=device) * 0.01).half()

    def check(got: Tensor) -> bool:
        rows = checks.choose(out, checks.ROWS).to(device)
        places = checks.choose(tokens, checks.TOKENS).to(device)
        # In float64; the op sums in float32, in an order of its own.
        want = x[places].double() @ (weight[rows].double() * scale[rows].double()[:, None]).T
        return checks.within(got[places][:, rows], want, checks.STEP[dtype], 1e-5 * float(want.abs().max()))

    return partial(ops.linear_w8, x, weight, scale, None), check


def quantizer(op: str, size: int, tokens: int, dtype: torch.dtype, device: str) -> Prepared:
    make, inputs, _ = QUANTIZERS[op]
    ours, _, exact = make(size, torch.tensor([0.9], device=device), device)
    tensors = [torch.randn(tokens, size, dtype=dtype, device=device) for _ in range(inputs)]

    def check(got: tuple[Tensor, Tensor]) -> bool:
        places = checks.choose(tokens, checks.TOKENS)
        want = exact(*(tensor.cpu()[places] for tensor in tensors))
        have = tuple(part.cpu()[places] for part in got)
        return checks.codes_agree(have, want, exact=op == "quantize_a4")

    return partial(ours, *tensors), check


def hadamard(size: int, tokens: int, dtype: torch.dtype, device: str) -> Prepared:
    spec = spec_of(size)
    x = torch.randn(tokens, size, dtype=dtype, device=device)
    call = partial(ops.hadamard, x, had_k_matrix(spec.k, device), spec.block_size)
    return call, lambda got: checks.hadamard_agrees(got, x, spec)


def quantize_kv4(heads: int, head_dim: int, tokens: int, dtype: torch.dtype, device: str) -> Prepared:
    x = torch.randn(1, heads, tokens, head_dim, dtype=dtype, device=device)
    return partial(ops.quantize_kv4, x, CLIP), lambda got: equal(got, reference.quantize_kv4(x.cpu(), CLIP))


def append_kv4(heads: int, head_dim: int, tokens: int, dtype: torch.dtype, device: str) -> Prepared:
    x = torch.randn(1, heads, tokens, head_dim, dtype=dtype, device=device)
    codes, params, *_ = packed(1, (heads, heads, head_dim, tokens + 9), device).take(1)[0]
    cache = codes.clone(), params.clone()

    def call() -> tuple[Tensor, Tensor]:
        ops.append_kv4(x, *cache, 7, CLIP)
        return cache

    def check(got: tuple[Tensor, Tensor]) -> bool:
        want = codes.cpu(), params.cpu()
        want = want[0].clone(), want[1].clone()
        reference.append_kv4(x.cpu(), *want, 7, CLIP)
        return equal(got, want)

    return call, check


def rope_append_kv4(
    heads: int, kv_heads: int, head_dim: int, tokens: int, dtype: torch.dtype, device: str
) -> Prepared:
    qkv = torch.randn(1, tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    angles = torch.randn(1, tokens, head_dim // 2, device=device).repeat(1, 1, 2)
    cache = packed(1, (heads, kv_heads, head_dim, tokens + 9), device).take(1)[0]
    tensors = qkv, angles.cos().to(dtype), angles.sin().to(dtype), *(t.clone() for t in cache)
    spec = spec_of(head_dim)
    r3 = had_k_matrix(spec.k, device), spec.block_size

    def call(qkv: Tensor, cos: Tensor, sin: Tensor, *kv: Tensor) -> Tensor:
        return ops.rope_append_kv4(qkv, cos, sin, *r3, *kv, 7, CLIP)

    return partial(call, *tensors), lambda _: checks.append_agrees(call, tensors, r3, 7, CLIP)


def attention_kv4(
    heads: int, kv_heads: int, head_dim: int, keys: int, tokens: int, dtype: torch.dtype, kernel: str,
    device: str,
) -> Prepared:  # fmt: skip
    q = torch.randn(1, heads, tokens, head_dim, dtype=dtype, device=device)
    kv = packed(1, (heads, kv_heads, head_dim, keys), device).take(1)[0]
    op = torch.ops.w2a4.attention_kv4_prefill if kernel == "triton" else torch.ops.w2a4.attention_kv4
    # Triton rounds weights and values to 11 bits.
    atol = 3 * 2.0**-11 if kernel == "triton" else 1e-5

    def check(got: Tensor) -> bool:
        return checks.attention_agrees(got, q, kv, keys, head_dim**-0.5, atol)

    return partial(op, q, *kv, keys, None, True, head_dim**-0.5), check


def training(name: str, rows: int, size: int, dtype: torch.dtype, device: str) -> Prepared:
    """Forward and backward of what training passes through, against the same in PyTorch on that device."""
    x = torch.randn(rows, size, dtype=dtype, device=device)
    grad, clip = torch.randn_like(x), torch.tensor([0.9], device=device)
    function, others = {
        "fake_quant_a4": (quantizers.fake_quant_a4, [clip]),
        "fake_quant_kv4": (quantizers.fake_quant_kv4, [clip]),
        "ldp": (partial(ldp, group=128), [torch.randn(rows, size // 128, device=device) for _ in range(4)]),
    }[name]

    def call() -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, *others)]
        result = function(*leaves)
        result.backward(grad)
        return [result.detach(), *(leaf.grad for leaf in leaves)]

    def check(got: list[Tensor]) -> bool:
        want = in_pytorch(call)
        total = float(grad.double().abs().sum())
        return torch.equal(got[0], want[0]) and all(
            norms_agree(ours, theirs, total) for ours, theirs in zip(got[1:], want[1:], strict=True)
        )

    return call, check


def distillation_loss(rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> Prepared:
    """The loss and its gradient, against the same in PyTorch on that device."""
    student, teacher = (3 * torch.randn(2, rows, vocabulary, device=device)).to(dtype)

    def call() -> list[Tensor]:
        leaf = student.detach().clone().requires_grad_()
        loss = losses.distillation_loss(leaf, teacher)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    def check(got: list[Tensor]) -> bool:
        want = in_pytorch(call)
        return all(norms_agree(*pair, float(want[0])) for pair in zip(got, want, strict=True))

    return call, check


def in_pytorch(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    before, dispatch.backend = dispatch.backend, "reference"
    try:
        return call()
    finally:
        dispatch.backend = before


def ldp(w: Tensor, *shares: Tensor, group: int) -> Tensor:
    return quantizers.ldp_fake_quant(w, shares, group)


def norms_agree(ours: Tensor, theirs: Tensor, total: float) -> bool:
    """Sums are added in another order; a single one may cancel to nothing beside its `total`."""
    off = float((ours.double() - theirs.double()).norm())
    relative = 4 * torch.finfo(theirs.dtype).eps + 1e-5
    return off <= relative * float(theirs.double().norm()) + (1e-5 * total if theirs.numel() == 1 else 0)


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))


# which


@dataclass(frozen=True)
class Sizes:
    """Of LLaMA-7B and its relatives, or small ones for a rehearsal."""

    linears: tuple[tuple[int, int], ...]
    head: tuple[int, int]
    hidden: int
    inner: tuple[int, ...]
    heads: tuple[int, int]
    keys: int
    prompt: int


REAL = Sizes(((4096, 4096), (11008, 4096), (4096, 11008)), (32000, 4096), 4096, (4096, 11008, 28672), (32, 8),
             4096, 512)  # fmt: skip
SMALL = Sizes(((64, 256), (96, 384), (40, 512)), (300, 64), 256, (256, 96, 768), (8, 2), 300, 40)

#: Tokens and kernels of the first matrix, and of the others.
FEW_BITS = ((1, "gemv_bmma"), (2, "gemv_bmma"), (1, "gemv_imma"), (8, "gemv_imma"), (16, "gemv_imma"),
            (64, "triton"))  # fmt: skip
MORE_BITS = ((1, "gemv_imma"), (8, "gemv_imma"), (64, "triton"))
OTHERS = ((1, "gemv_bmma"), (8, "gemv_imma"), (64, "triton"))


def plan(device: str, small: bool) -> list[Case]:
    """Every case once, what tells most first."""
    sizes = SMALL if small else REAL
    # Triton's interpreter cuts off what bfloat16 does not hold, where a GPU rounds.
    other = HALF if device == "cpu" else BF16
    cases = [*linears(sizes, other), *transforms(sizes), *caches(sizes)]
    train = F32 if device == "cpu" else BF16  # what there are kernels for
    for name in ("fake_quant_a4", "fake_quant_kv4", "ldp"):
        size = 128 if name == "fake_quant_kv4" else sizes.hidden
        cases.append(case(name, f"{64}x{size}", 64, train, "triton" if device == "cuda" else "cuda",
                          partial(training, name, 64, size, train)))  # fmt: skip
    vocabulary = sizes.head[0]
    kernel, build = (
        "triton" if device == "cuda" else "cuda",
        partial(distillation_loss, 64, vocabulary, train),
    )
    cases.append(case("distillation_loss", f"64x{vocabulary}", 64, train, kernel, build))
    found: dict[str, Case] = {}
    for each in cases:
        on_cpu = device == "cpu" and each.kernel != "triton"
        each = Case(each.op, each.shape, each.tokens, each.dtype, "cpu", each.build) if on_cpu else each
        found.setdefault(each.name, each)
    return list(found.values())


def case(op: str, shape: str, tokens: int, dtype: torch.dtype, kernel: str, build: Callable) -> Case:
    return Case(op, shape, tokens, str(dtype).removeprefix("torch."), kernel, build)


def linears(sizes: Sizes, other: torch.dtype) -> Iterator[Case]:
    """The first matrix in float16, those after it in another dtype."""
    first = sizes.linears[0]
    for bits, shape, dtype, kinds in (
        (2, first, HALF, FEW_BITS),
        (4, first, HALF, MORE_BITS),
        *((2, shape, other, OTHERS) for shape in sizes.linears[1:]),
    ):
        for tokens, kernel in kinds:
            build = partial(linear, bits, *shape, 128, tokens, dtype, kernel)
            yield case(f"linear_w{bits}a4", "x".join(map(str, shape)), tokens, dtype, kernel, build)
    for tokens in (1, 8):
        shape = "x".join(map(str, sizes.head))
        yield case("linear_w8", shape, tokens, HALF, "cuda", partial(linear_w8, *sizes.head, tokens, HALF))


def transforms(sizes: Sizes) -> Iterator[Case]:
    for tokens, dtype in ((1, HALF), (64, BF16)):
        for op in ("quantize_a4", "rmsnorm_a4"):
            yield case(op, str(sizes.hidden), tokens, dtype, "cuda",
                       partial(quantizer, op, sizes.hidden, tokens, dtype))  # fmt: skip
        for size in sizes.inner:
            for op in ("hadamard_a4", "silu_mul_hadamard_a4"):
                yield case(op, str(size), tokens, dtype, "cuda", partial(quantizer, op, size, tokens, dtype))
            yield case("hadamard", str(size), tokens, dtype, "cuda", partial(hadamard, size, tokens, dtype))
    for size in (64, 128):
        yield case("hadamard", str(size), 64, HALF, "cuda", partial(hadamard, size, 64, HALF))


def caches(sizes: Sizes) -> Iterator[Case]:
    heads, kv_heads = sizes.heads
    for head_dim, dtype in ((128, HALF), (64, BF16)):
        shape = f"{heads}x{kv_heads}x{head_dim}"
        for tokens in (1, 16, sizes.prompt):
            yield case("rope_append_kv4", shape, tokens, dtype, "cuda",
                       partial(rope_append_kv4, heads, kv_heads, head_dim, tokens, dtype))  # fmt: skip
        for tokens in (1, 16):
            for op in (quantize_kv4, append_kv4):
                yield case(op.__name__, f"{kv_heads}x{head_dim}", tokens, dtype, "cuda",
                           partial(op, kv_heads, head_dim, tokens, dtype))  # fmt: skip
        shape = f"{heads}x{kv_heads}x{head_dim}x{sizes.keys}"
        for tokens, kernel in ((1, "cuda"), (8, "cuda"), (64, "cuda"), (sizes.prompt, "triton")):
            build = partial(attention_kv4, heads, kv_heads, head_dim, sizes.keys, tokens, dtype, kernel)
            yield case("attention_kv4", shape, tokens, dtype, kernel, build)


#: Widths of little data that ops with a quantiser have kernels of their own for.
QUANTIZED = (
    ("quantize_a4", (30, 4096)),
    ("rmsnorm_a4", (576, 4096)),
    ("hadamard_a4", (576, 1536, 4096)),
    ("silu_mul_hadamard_a4", (1536, 11008)),
)


def launches() -> list[Case]:
    """Each variant of our CUDA kernels once, on little data, for tools that slow a GPU down."""
    cases = []

    def add(op: str, shape: str, tokens: int, dtype: torch.dtype, kernel: str, build: Callable) -> None:
        cases.append(case(op, shape, tokens, dtype, kernel, build))

    for bits, features, group, tokens, kernel in (
        (2, 1152, 128, 1, "gemv_bmma"), (2, 1152, 128, 2, "gemv_bmma"), (2, 640, 640, 1, "gemv_bmma"),
        (2, 512, 256, 9, "gemv_imma"), (2, 640, 64, 1, "gemv_imma"), (2, 288, 32, 3, "gemv_imma"),
        (2, 192, 96, 2, "gemv_imma"), (2, 101, 101, 1, "gemv_imma"), (4, 640, 128, 1, "gemv_imma"),
        (4, 320, 64, 9, "gemv_imma"), (4, 160, 32, 2, "gemv_imma"), (4, 101, 101, 2, "gemv_imma"),
    ):  # fmt: skip
        build = partial(linear, bits, 34, features, group, tokens, HALF, kernel)
        add(f"linear_w{bits}a4", f"34x{features}g{group}", tokens, HALF, kernel, build)
    for dtype in (F32, HALF, BF16):
        for tokens in (1, 3):
            add("linear_w8", "33x576", tokens, dtype, "cuda", partial(linear_w8, 33, 576, tokens, dtype))
        for size in (64, 576, 1536, 4096, 11008):
            add("hadamard", str(size), 3, dtype, "cuda", partial(hadamard, size, 3, dtype))
        for op, widths in QUANTIZED:
            for size in widths:
                add(op, str(size), 3, dtype, "cuda", partial(quantizer, op, size, 3, dtype))
        for head_dim in (64, 80, 128):
            add(
                "quantize_kv4",
                f"2x{head_dim}",
                3,
                dtype,
                "cuda",
                partial(quantize_kv4, 2, head_dim, 3, dtype),
            )
            add("append_kv4", f"2x{head_dim}", 3, dtype, "cuda", partial(append_kv4, 2, head_dim, 3, dtype))
            add("rope_append_kv4", f"8x2x{head_dim}", 3, dtype, "cuda",
                partial(rope_append_kv4, 8, 2, head_dim, 3, dtype))  # fmt: skip
        for head_dim in (64, 128, 256):  # as many heads of tokens as another kernel takes
            add("rope_append_kv4", f"128x64x{head_dim}", 33, dtype, "cuda",
                partial(rope_append_kv4, 128, 64, head_dim, 33, dtype))  # fmt: skip
    for head_dim in (64, 80, 128, 256):
        for keys, tokens in ((20, 1), (600, 1), (300, 5)):
            add("attention_kv4", f"8x2x{head_dim}x{keys}", tokens, HALF, "cuda",
                partial(attention_kv4, 8, 2, head_dim, keys, tokens, HALF, "cuda"))  # fmt: skip
    return cases
