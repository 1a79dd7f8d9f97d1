"""A small call of every op beside its reference: whether what was built computes what it should here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, library, reference
from .table import OPS, Op

#: The most by which a float may differ from the reference's, as a share of the largest; 16 bits have 2**-8.
TOLERANCE = 0.02

#: The share of results that may differ by more: a value between two codes goes to either.
MOST_ROUNDINGS = 0.02

#: Widths and numbers of the calls: a model's, made small.
_TOKENS, _HIDDEN, _HEAD, _GROUP, _KEYS = 3, 256, 64, 64, 20


class Verdict(NamedTuple):
    """What became of an op.

    Attributes:
        kernel: `cpu`, `cuda`, `triton` or `reference`.
        right: None if only the reference runs here, so that there is nothing to compare.
        why: what is wrong, or why no kernel runs.
    """

    kernel: str
    right: bool | None
    why: str


def run(device: torch.device) -> dict[str, Verdict]:
    """Call every op once on this device; takes about a second where nothing has to be compiled."""
    generator = torch.Generator().manual_seed(0)
    arguments = _Arguments(generator, torch.float16 if device.type == "cuda" else torch.float32)
    return {op.name: _verdict(op, getattr(arguments, op.name), device) for op in OPS.values()}


def _verdict(op: Op, build: Callable[[], tuple], device: torch.device) -> Verdict:
    kernel, why = _kernel(op, device)
    if kernel == "reference":
        return Verdict(kernel, None, why)
    wanted = _moved(build(), torch.device("cpu"))
    given = _moved(wanted, device)
    try:
        got = getattr(torch.ops.w2a4, op.name).default(*given)
        # A kernel writes into caches that it is given.
        pairs = zip(_tensors((got, given)), _tensors((op.reference(*wanted), wanted)), strict=True)
        wrong = [why for one, other in pairs if (why := _difference(one.cpu(), other))]
    except Exception as error:  # of any kind: this is what a user is to be told
        first = (str(error).strip().splitlines() or [""])[0]
        wrong = [f"{type(error).__name__}: {first[:200]}"]
    return Verdict(kernel, not wrong, wrong[0] if wrong else "")


def _kernel(op: Op, device: torch.device) -> tuple[str, str]:
    """What runs the op's calls, and why it is only the reference."""
    kind = device.type
    if dispatch.backend == "reference":
        return "reference", "W2A4_BACKEND=reference"
    compiled = {"cpu": library.cpu_module, "cuda": library.cuda_module}[kind] is not None
    missing = dispatch.why_no_triton(device.index if kind == "cuda" else None)
    if op.is_triton_only:
        return ("reference", missing) if missing else ("triton", "")
    by_triton = "triton" in op.kernels and not missing
    if kind in op.kernels and compiled and not (by_triton and dispatch.backend == "triton"):
        return kind, ""
    if by_triton:
        return "triton", ""
    if kind not in op.kernels:
        others = f", and {missing}" if "triton" in op.kernels else ""
        return "reference", f"it has no {kind} kernel{others}"
    return "reference", library.no_cuda if kind == "cuda" else "w2a4._C is missing"


def _moved(value: Any, device: torch.device) -> Any:
    """The same with copies of all tensors, on a device."""
    if isinstance(value, Tensor):
        return value.detach().clone().to(device)
    return type(value)(_moved(each, device) for each in value) if isinstance(value, list | tuple) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _difference(got: Tensor, wanted: Tensor) -> str:
    """Empty, or how a result differs from the reference's by more than rounding does."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {wanted.dtype} {list(wanted.shape)}"
    if not wanted.is_floating_point():
        share = float((got != wanted).float().mean()) if wanted.numel() else 0.0
        return f"{share:.1%} of its integers differ" if share > MOST_ROUNDINGS else ""
    if not bool(got.isfinite().all()):
        return "NaN or infinity"
    size = wanted.double().abs().amax().clamp_min(1e-30) if wanted.numel() else 1.0
    error = (got.double() - wanted.double()).abs()
    off = float((error > TOLERANCE * size).double().mean()) if wanted.numel() else 0.0
    return f"{off:.1%} of its numbers are off" if off > MOST_ROUNDINGS else ""


class _Arguments:
    """Of one call of each op, by its name; floats are of `dtype` where the op takes several."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype):
        self.generator, self.dtype = generator, dtype
        self.clip = torch.tensor([-0.9])

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def floats(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(self.dtype)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator)

    def hadamard(self) -> tuple:
        return self.floats(_TOKENS, _HIDDEN), None, _HIDDEN

    def quantize_a4(self) -> tuple:
        return self.floats(_TOKENS, _HIDDEN), self.clip, _GROUP

    def hadamard_a4(self) -> tuple:
        return self.floats(_TOKENS, _HIDDEN), None, _HIDDEN, self.clip, -1

    def rmsnorm_a4(self) -> tuple:
        return self.floats(_TOKENS, _HIDDEN), self.floats(_HIDDEN), 1e-5, self.clip, _GROUP

    def silu_mul_hadamard_a4(self) -> tuple:
        gate, up = self.floats(2, _TOKENS, _HIDDEN)
        return gate, up, None, _HIDDEN, self.clip, -1

    def round_columns(self) -> tuple:
        grid = self.normal(2, 4, 16).sort(1).values
        return self.normal(8, 16), self.normal(8, 8) / 8, None, grid, torch.arange(8) % 2

    # The KV cache: one sequence, two heads of keys and values, four of queries.

    def keys(self) -> tuple[Tensor, Tensor]:
        return reference.quantize_kv4(self.normal(1, 2, _KEYS, _HEAD), 0.95)

    def empty(self) -> tuple[Tensor, Tensor]:
        codes, params = self.keys()
        return torch.zeros_like(codes), torch.zeros_like(params)

    def quantize_kv4(self) -> tuple:
        return self.floats(1, 2, _TOKENS, _HEAD), 0.95

    def append_kv4(self) -> tuple:
        return self.floats(1, 2, _TOKENS, _HEAD), *self.empty(), 5, 0.95

    def rope_append_kv4(self) -> tuple:
        angles = self.normal(1, _TOKENS, _HEAD)
        qkv = self.floats(1, _TOKENS, 8 * _HEAD)
        return qkv, angles.cos(), angles.sin(), None, _HEAD, *self.empty(), *self.empty(), 5, 0.95

    def attention_kv4(self) -> tuple:
        q = self.floats(1, 4, _TOKENS, _HEAD)
        return q, *self.keys(), *self.keys(), _KEYS, None, True, _HEAD**-0.5

    def attention_kv4_prefill(self) -> tuple:
        q, *rest = self.attention_kv4()
        return q.half(), *rest

    # Linear layers.

    def activations(self) -> tuple[Tensor, Tensor]:
        return reference.quantize_a4(self.normal(_TOKENS, _HIDDEN), self.clip, _GROUP)

    def scales(self, rows: int = _GROUP, inputs: int = _HIDDEN) -> Tensor:
        return (torch.rand(rows, inputs // _GROUP, generator=self.generator) * 0.01 + 0.001).half()

    def codebook(self, bits: int) -> tuple:
        levels = self.normal(_GROUP, _HIDDEN // _GROUP, 2**bits).mul(40).clamp(-127, 127).sort(-1).values
        weight = self.bytes(_GROUP, _HIDDEN * bits // 8)
        return *self.activations(), weight, levels.to(torch.int8), self.scales(), None, _GROUP, self.dtype

    def linear_w2a4(self) -> tuple:
        return self.codebook(2)

    def linear_w3a4(self) -> tuple:
        return self.codebook(3)

    def linear_w4a4(self) -> tuple:
        weight = self.bytes(_GROUP, _HIDDEN // 2)
        return *self.activations(), weight, self.scales(), None, _GROUP, self.dtype

    gemm_w2a4, gemm_w4a4 = linear_w2a4, linear_w4a4

    def linear_w8(self) -> tuple:
        weight = self.bytes(_GROUP, _HIDDEN).view(torch.int8)
        return self.floats(_TOKENS, _HIDDEN), weight, self.scales()[:, 0].contiguous(), None

    def decoder_layer(self) -> tuple:
        ffn, width = 2 * _GROUP, 4 * _HEAD

        def packed(inputs: int, rows: int) -> list[Tensor]:
            levels = torch.tensor([-100, -30, 30, 100], dtype=torch.int8).repeat(rows, inputs // _GROUP, 1)
            return [self.bytes(rows, inputs // 4), self.scales(rows, inputs), self.clip, levels]

        angles = self.normal(1, _TOKENS, _HEAD)
        linears = packed(width, 8 * _HEAD), packed(width, width), packed(width, 2 * ffn), packed(ffn, width)
        return (
            self.floats(1, _TOKENS, width), angles.cos(), angles.sin(), None, [self.floats(width)] * 2, 1e-5,
            *linears, [_GROUP] * 4, [_GROUP] * 4, None, _HEAD, None, ffn, *self.empty(), *self.empty(),
            None, None, 0, 0.95, _HEAD**-0.5,
        )  # fmt: skip

    def decoder_layers(self) -> tuple:
        before, caches, after = (each := self.decoder_layer())[:16], each[16:20], each[22:]
        lists = [value * 2 if isinstance(value, list) else value for value in before]
        return *lists, *([t, t.clone()] for t in caches), [], [], *after

    # Training.

    def groups(self) -> tuple[Tensor, Tensor]:
        """Weights, and levels of their groups, ascending."""
        return self.normal(8, 4, _GROUP), self.normal(8, 4, 4).sort(-1).values

    def snap(self) -> tuple:
        return self.groups()

    def snap_backward(self) -> tuple:
        w, levels = self.groups()
        return torch.randn(w.shape, generator=self.generator), w, levels, levels

    def fake_quant_rows(self) -> tuple:
        return self.floats(_TOKENS, 4, _GROUP), self.clip, False

    def fake_quant_rows_backward(self) -> tuple:
        return self.floats(_TOKENS, 4, _GROUP), *self.fake_quant_rows()

    def ldp_forward(self) -> tuple:
        shares = [self.normal(8, 4) + 2 for _ in "bc"] + [self.normal(8, 4) for _ in "12"]
        return self.normal(8, 4, _GROUP), *shares

    def ldp_backward(self) -> tuple:
        w, *shares = self.ldp_forward()
        _, *levels = reference.ldp_forward(w, *shares)
        return torch.randn(w.shape, generator=self.generator), w, *shares, *levels

    def divergence_rows(self) -> tuple:
        return self.floats(5, 300), self.floats(5, 300), torch.ones(5, dtype=torch.bool)

    def divergence_grad(self) -> tuple:
        student, teacher, keep = self.divergence_rows()
        known = reference.divergence_rows(student, teacher, keep)
        return student, teacher, known, torch.full((5,), 0.2), torch.tensor(0.5)
