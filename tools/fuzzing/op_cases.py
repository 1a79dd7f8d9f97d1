"""A random call of every op, sound or hostile, and what its result has to agree with.

A case is drawn through a `Draw`, which `tools/fuzz.py` makes of a seed and the tests of hypothesis.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from w2a4 import ops
from w2a4.format import fake_quant as quantizers
from w2a4.format.hadamard import had_k_matrix
from w2a4.ops import reference
from w2a4.ops.packing import pack, unpack

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = (1.0, 1.0, 1.0, 1e-3, 1e4, 1e-30)


class Draw(Protocol):
    """Where a case's choices come from."""

    def number(self, least: int, most: int) -> int: ...

    def pick(self, options: Sequence[Any]) -> Any: ...


@dataclass
class OpCase:
    """A call.

    Attributes:
        args: of `torch.ops.w2a4.<name>`; tensors that it writes, or lists of them, are at `written`.
        agree: compares what the op and what the reference gave, and raises AssertionError.
    """

    name: str
    args: list[Any]
    agree: Callable[[Any, Any], None]
    written: tuple[int, ...] = ()
    hostile: str = ""
    oracle: Callable[..., Any] | None = field(default=None, repr=False)

    def reference(self, args: list[Any]) -> Any:
        return (self.oracle or getattr(reference, self.name))(*args)


def exact(got: Any, want: Any) -> None:
    for a, b in zip(_list(got), _list(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5)), (
            f"{int((a != b).sum())} of {a.numel()} elements differ"
        )


def near(rtol: float) -> Callable[[Any, Any], None]:
    """Within `rtol` of the largest magnitude, and a rounding to the dtype."""

    def agree(got: Any, want: Any) -> None:
        for a, b in zip(_list(got), _list(want), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
            most = float(b.double().abs().nan_to_num(0).max()) if b.numel() else 0.0
            limit = (rtol + 4 * torch.finfo(b.dtype).eps * (b.dtype != torch.float64)) * most + 1e-30
            off = (a.double() - b.double()).abs()
            assert torch.equal(a.isfinite(), b.isfinite()), "not finite at other places"
            worst = float(off[b.isfinite()].max()) if b.isfinite().any() else 0.0
            assert worst <= limit, f"off by {worst:g}, {limit:g} allowed"

    return agree


def quantized(features: int) -> Callable[[Any, Any], None]:
    """Codes may differ by a step where what was rounded differs in its last bits."""

    def agree(got: Any, want: Any) -> None:
        near(1e-5)(got[1], want[1])
        codes = [unpack(t, 4, features, signed=True).int() for t in (got[0], want[0])]
        apart = (codes[0] - codes[1]).abs()
        assert not apart.numel() or int(apart.max()) <= 1, f"codes are {int(apart.max())} apart"
        assert apart.float().mean().nan_to_num(0) < 0.05 or apart.numel() < 64, "many codes differ"

    return agree


def cached(head_dim: int) -> Callable[[Any, Any], None]:
    """Queries and written caches: keys pass a transform, values are exact."""

    def agree(got: Any, want: Any) -> None:
        near(1e-5)(got[0], want[0])
        near(2e-3)(got[2], want[2])
        exact(got[3:], want[3:])
        codes = [unpack(t, 4, head_dim).int() for t in (got[1], want[1])]
        assert not codes[0].numel() or int((codes[0] - codes[1]).abs().max()) <= 1, "key codes differ"

    return agree


def summed(first: float, second: float) -> Callable[[Any, Any], None]:
    """Two gradients within these of float32 sums in another order."""

    def agree(got: Any, want: Any) -> None:
        for a, b, limit in zip(got, want, (first, second), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
            off = _most(a.double() - b.double())
            assert off <= limit + 1e-30, f"off by {off:g}, {limit:g} allowed"

    return agree


def _most(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _list(value: Any) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


def _randn(draw: Draw, *shape: int, dtype: torch.dtype | None = None, size: float | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(draw.number(0, 2**31))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * (
        draw.pick(SIZES) if size is None else size
    )
    return x.to(draw.pick(FLOATS) if dtype is None else dtype)


def _integers(draw: Draw, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    generator = torch.Generator().manual_seed(draw.number(0, 2**31))
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def _tokens(draw: Draw) -> tuple[int, ...]:
    return draw.pick(((), (1,), (0,), (draw.number(1, 20),), (draw.number(0, 3), draw.number(0, 5))))


def _transform(draw: Draw) -> tuple[Tensor | None, int]:
    k = draw.pick((1, 1, 12, 20))
    return had_k_matrix(k), k * 2 ** draw.number(0, 6 if k == 1 else 3)


def _hadamard(draw: Draw) -> OpCase:
    had_k, block = _transform(draw)
    x = _randn(draw, *_tokens(draw), block * draw.number(0, 3))
    return OpCase("hadamard", [x, had_k, block, draw.pick((False, True))], near(2e-6))


def _group(draw: Draw, features: int) -> int:
    return draw.pick((-1, *[g for g in (1, 2, 5, 16, 32, 64) if features % g == 0]))


def _clip(draw: Draw) -> Tensor:
    return torch.tensor([draw.pick((0.9, 1.0, 0.6))])


def _signed_clip(draw: Draw) -> Tensor:
    """Also a negative one: for ops that are exact, so that no rounding decides the sign of a scale."""
    return torch.tensor([draw.pick((0.9, 1.0, 0.6, -0.9, -1.0))])


def _quantize_a4(draw: Draw) -> OpCase:
    features = draw.pick((1, 7, 32, 90, 128))
    x = _randn(draw, *_tokens(draw), features)
    if x.numel() and draw.number(0, 5) == 0:
        x.view(-1)[draw.number(0, x.numel() - 1)] = draw.pick((float("nan"), float("inf"), 0.0))
    return OpCase("quantize_a4", [x, _signed_clip(draw), _group(draw, features)], exact)


def _fused_a4(draw: Draw) -> OpCase:
    name = draw.pick(("hadamard_a4", "rmsnorm_a4", "silu_mul_hadamard_a4"))
    had_k, block = _transform(draw)
    if block == 1:
        had_k = None
    features = block * draw.number(1, 3)
    x = _randn(draw, *_tokens(draw), features, size=1.0)
    end = [_clip(draw), _group(draw, features)]
    if name == "rmsnorm_a4":
        args = [x, draw.pick((None, _randn(draw, features, size=1.0))), draw.pick((1e-6, 0.1)), *end]
    elif name == "hadamard_a4":
        args = [x, had_k, block, *end]
    else:
        args = [x, _randn(draw, *x.shape, dtype=x.dtype, size=1.0), had_k, block, *end]
    return OpCase(name, args, quantized(features))


def _linear_a4(draw: Draw) -> OpCase:
    bits, groups = draw.pick((2, 3, 4)), draw.number(1, 4)
    group, out = draw.pick((1, 3, 10, 16, 32, 64)), draw.number(0, 20)
    features = group * groups
    act = draw.pick([g for g in (-1, group, 2 * group) if g == -1 or features % g == 0])
    a = reference.quantize_a4(_randn(draw, *_tokens(draw), features, size=1.0), torch.tensor([0.8]), act)
    low, high = (-8, 8) if bits == 4 else (0, 2**bits)
    weight = pack(_integers(draw, low, high, out, features), bits)
    scale = (_randn(draw, out, groups, dtype=torch.float64).abs() + 2.0**-24).clamp(max=6e4).half()
    levels = [] if bits == 4 else [_integers(draw, -128, 128, out, groups, 2**bits)]
    bias = draw.pick((None, _randn(draw, out, size=1.0)))
    args = [*a, weight, *levels, scale, bias, group, draw.pick(FLOATS)]
    return OpCase(f"linear_w{bits}a4", args, exact)


def _linear_w8(draw: Draw) -> OpCase:
    out, features = draw.number(0, 70), draw.pick((0, 1, 16, 33, 130))
    x = _randn(draw, *_tokens(draw), features, size=1.0)
    scale = _randn(draw, out, dtype=torch.float16, size=0.01).abs()
    bias = draw.pick((None, _randn(draw, out, size=1.0)))
    return OpCase("linear_w8", [x, _integers(draw, -128, 128, out, features), scale, bias], near(1e-5))


def _caches(draw: Draw, batch: int, heads: int, capacity: int, head_dim: int) -> list[Tensor]:
    codes = _integers(draw, 0, 256, batch, heads, capacity, head_dim // 2, dtype=torch.uint8)
    params = _randn(draw, batch, heads, capacity, 2, dtype=torch.float16, size=1.0)
    if draw.number(0, 1):  # tokens outermost, as views of another layout
        codes, params = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (codes, params))
    return [codes, params]


def _starts(draw: Draw, batch: int, most: int) -> Tensor | None:
    if draw.number(0, 2):
        return None
    return torch.tensor([draw.number(0, most) for _ in range(batch)], dtype=torch.long)


def _quantize_kv4(draw: Draw) -> OpCase:
    shape = draw.number(0, 2), draw.number(0, 3), draw.number(0, 9), 2 * draw.number(1, 40)
    return OpCase("quantize_kv4", [_randn(draw, *shape), draw.pick((0.95, 1.0, 0.5))], exact)


def _append_kv4(draw: Draw) -> OpCase:
    batch, heads, tokens, head_dim = (
        draw.number(0, 2),
        draw.number(0, 3),
        draw.number(0, 5),
        2 * draw.number(1, 20),
    )
    start = draw.number(0, 6)
    cache = _caches(draw, batch, heads, start + tokens + draw.number(0, 3), head_dim)
    x = _randn(draw, batch, heads, tokens, head_dim)
    args = [x, *cache, start, 0.95, _starts(draw, batch, start)]
    return OpCase("append_kv4", args, exact, (1, 2))


def _paged_append_kv4(draw: Draw) -> OpCase:
    batch, heads, tokens, head_dim = (
        draw.number(0, 2),
        draw.number(0, 3),
        draw.number(0, 5),
        2 * draw.number(1, 20),
    )
    blocks, size = draw.number(0, 4), draw.pick((1, 3, 16))
    free, slots = list(range(blocks * size)), []
    for _ in range(batch * tokens):
        skipped = not free or draw.number(0, 4) == 0
        slots.append(-draw.number(1, 9) if skipped else free.pop(draw.number(0, len(free) - 1)))
    slots = torch.tensor(slots, dtype=torch.long).view(draw.pick(((batch, tokens), (batch * tokens,))))
    args = [_randn(draw, batch, heads, tokens, head_dim), *_caches(draw, blocks, heads, size, head_dim)]
    return OpCase("append_kv4", [*args, 0, 0.95, None, slots], exact, (1, 2))


def _rope_append_kv4(draw: Draw) -> OpCase:
    batch, tokens, kv_heads = draw.number(0, 2), draw.number(0, 5), draw.number(1, 2)
    q_heads, start = draw.number(1, 4), draw.number(0, 5)
    had_k, block = draw.pick(((None, 1), (None, 8), (had_k_matrix(12), 24)))
    head_dim = block * 2 if block > 1 else 2 * draw.number(1, 30)
    qkv = _randn(draw, batch, tokens, (q_heads + 2 * kv_heads) * head_dim, size=1.0)
    angles = _randn(draw, draw.pick((1, batch)), tokens, head_dim, dtype=torch.float64, size=1.0)
    rope = draw.pick(FLOATS)
    caches = [*_caches(draw, batch, kv_heads, start + tokens, head_dim)] + [
        *_caches(draw, batch, kv_heads, start + tokens, head_dim)
    ]
    args = [qkv, angles.cos().to(rope), angles.sin().to(rope), had_k, block, *caches, start, 0.95]
    return OpCase("rope_append_kv4", [*args, _starts(draw, batch, start)], cached(head_dim), (5, 6, 7, 8))


def _paged_attention_kv4(draw: Draw) -> OpCase:
    """As `_attention_kv4`; blocks may be shared by sequences."""
    case = _attention_kv4(draw)
    batch, kv_heads, length, half = (
        len(case.args[0]),
        case.args[1].shape[1],
        case.args[5],
        case.args[1].shape[3],
    )
    blocks, size = draw.number(1, 6), draw.pick((1, 3, 16))
    case.args[1:5] = [t for _ in range(2) for t in _caches(draw, blocks, kv_heads, size, 2 * half)]
    columns = -(-length // size) + draw.number(0, 1)
    case.args.append(_integers(draw, 0, blocks, batch, columns, dtype=torch.int32))
    return case


def _attention_kv4(draw: Draw) -> OpCase:
    batch, kv_heads, repeat = draw.number(0, 2), draw.number(1, 2), draw.number(1, 3)
    q_tokens, head_dim, length = draw.number(0, 5), 2 * draw.number(1, 40), draw.number(0, 20)
    q = _randn(draw, batch, kv_heads * repeat, q_tokens, head_dim, size=1.0)
    caches = [t for _ in range(2) for t in _caches(draw, batch, kv_heads, length + 2, head_dim)]
    mask = None
    if draw.number(0, 1):
        shape = draw.pick((1, batch)), draw.pick((1, kv_heads * repeat)), q_tokens, length
        mask = _integers(draw, 0, 2, *shape, dtype=torch.bool)
    sinks: list[Any] = [None, None]
    if draw.number(0, 2) == 0:
        count = draw.number(0, 4)
        sinks = [_randn(draw, batch, kv_heads, count, head_dim, size=1.0) for _ in range(2)]
    starts = _starts(draw, batch, length - q_tokens) if length >= q_tokens else None
    args = [q, *caches, length, mask, draw.pick((False, True)), 0.3, *sinks, starts]
    return OpCase("attention_kv4", args, near(1e-4))


def _round_columns(draw: Draw) -> OpCase:
    columns, out, groups = draw.number(0, 20), draw.number(0, 70), draw.number(1, 3)
    points = draw.pick((1, 4))
    grid = _randn(draw, groups, points, out, dtype=torch.float32, size=1.0)
    grid = grid.sort(1).values if points == 4 else grid.abs() + 0.01
    work = _randn(draw, columns, out, dtype=torch.float32, size=1.0)
    coupling = _randn(draw, columns, columns, dtype=torch.float32, size=0.1)
    current = draw.pick((None, _randn(draw, columns, out, dtype=torch.float32, size=1.0)))
    group = _integers(draw, 0, groups, columns, dtype=torch.long)
    return OpCase("round_columns", [work, coupling, current, grid, group], exact)


def _snap(draw: Draw) -> OpCase:
    out, groups, size = draw.number(0, 5), draw.number(0, 3), draw.number(0, 40)
    w = _randn(draw, out, groups, size, dtype=torch.float32)
    levels = _randn(draw, out, groups, 4, dtype=torch.float32).sort(-1).values

    def oracle(w: Tensor, levels: Tensor) -> Tensor:
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        codes = (w[..., None] > middles[..., None, :]).sum(-1)
        return levels.gather(-1, codes)

    return OpCase("snap", [w, levels], exact, oracle=oracle)


def _fake_quant_rows(draw: Draw) -> OpCase:
    kv = draw.pick((False, True))
    x = _randn(draw, *_tokens(draw), 2 * draw.number(1, 40), dtype=torch.float32, size=1.0)

    def oracle(x: Tensor, clip: Tensor, kv: bool) -> Tensor:
        if kv:  # in pairs, where the packed form stores two to a byte
            even = torch.cat([x, x[..., -1:]], -1)[..., : x.shape[-1] + x.shape[-1] % 2]
            return reference.dequantize_kv4(*reference.quantize_kv4(even, float(clip)))[..., : x.shape[-1]]
        return reference.dequantize_a4(*reference.quantize_a4(x, clip), x.shape[-1])

    clip = _clip(draw) if kv else _signed_clip(draw)
    return OpCase("fake_quant_rows", [x, clip, kv], exact, oracle=oracle)


def _snap_backward(draw: Draw) -> OpCase:
    out, groups, size = draw.number(0, 5), draw.number(0, 3), draw.number(0, 40)
    grad, w = (_randn(draw, out, groups, size, dtype=torch.float32) for _ in range(2))
    soft, levels = (_randn(draw, out, groups, 4, dtype=torch.float32).sort(-1).values for _ in range(2))

    def oracle(grad: Tensor, w: Tensor, soft: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        codes = (w[..., None] > middles[..., None, :]).sum(-1)
        inside = (w >= soft[..., :1]) & (w <= soft[..., 3:])
        sums = torch.zeros(soft.shape, dtype=torch.float64).scatter_add(-1, codes, grad.double())
        return grad * inside, sums.float()

    limit = 1e-6 * size * _most(grad)
    return OpCase("snap_backward", [grad, w, soft, levels], summed(0.0, limit), oracle=oracle)


def _fake_quant_rows_backward(draw: Draw) -> OpCase:
    size, kv = draw.number(1, 80), draw.pick((False, True))
    x, grad = (_randn(draw, *shape, size, dtype=torch.float32, size=1.0) for shape in [_tokens(draw)] * 2)

    def oracle(grad: Tensor, x: Tensor, clip: Tensor, kv: bool) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1]).clone().requires_grad_()
        own = clip.repeat(len(rows)).reshape(-1, 1).requires_grad_()  # one for each row
        quantizer = quantizers.fake_quant_kv4 if kv else quantizers.fake_quant_a4
        with unittest.mock.patch.object(ops, "has_training_kernels", lambda _: False):
            y = quantizer(rows, own)
        to_x, to_clip = torch.autograd.grad(y, [rows, own], grad.view(rows.shape))
        return to_x.view(x.shape), to_clip.flatten()

    limit = 1e-5 * size * _most(grad)
    agree = summed(limit, limit * max(1.0, _most(x)))
    clip = _clip(draw) if kv else _signed_clip(draw)
    return OpCase("fake_quant_rows_backward", [grad, x, clip, kv], agree, oracle=oracle)


def _packed_linear(draw: Draw, features: int, out: int) -> tuple[list[Tensor], int, int]:
    """Tensors as `decoder_layer` takes them, and the groups of weights and of inputs."""
    sizes = [size for size in (1, 2, 8, 16, 32, features) if features % size == 0]
    bits, group = draw.pick((2, 3, 4)), draw.pick(sizes)
    act = draw.pick([-1, *[g for g in (group, 2 * group) if features % g == 0]])
    low, high = (-8, 8) if bits == 4 else (0, 2**bits)
    tensors = [pack(_integers(draw, low, high, out, features), bits)]
    tensors += [_randn(draw, out, features // group, dtype=torch.float16, size=0.05).abs(), _clip(draw)]
    if bits < 4:
        tensors.append(_integers(draw, -128, 128, out, features // group, 2**bits))
    if draw.number(0, 1):
        tensors.append(_randn(draw, out, size=0.1))
    return tensors, group, act


def _decoder_layer(draw: Draw) -> OpCase:
    batch, tokens, kv_heads = draw.number(0, 2), draw.number(0, 4), draw.number(1, 2)
    q_heads, start, hidden = kv_heads * draw.number(1, 3), draw.number(0, 5), draw.pick((1, 7, 24, 32, 96))
    r3 = draw.pick(((None, 1), (None, 8), (had_k_matrix(12), 24)))
    head_dim = r3[1] * 2 if r3[1] > 1 else 2 * draw.number(1, 20)
    r4 = _transform(draw)
    ffn = r4[1] * draw.number(1, 2)
    shapes = (
        (hidden, (q_heads + 2 * kv_heads) * head_dim),
        (q_heads * head_dim, hidden),
        (hidden, 2 * ffn),
        (ffn, hidden),
    )
    linears, groups, acts = zip(*(_packed_linear(draw, *shape) for shape in shapes), strict=True)
    x = _randn(draw, batch, tokens, hidden, dtype=draw.pick(FLOATS[:3]), size=1.0)
    angles = _randn(draw, draw.pick((1, batch)), tokens, head_dim, dtype=torch.float64, size=1.0)
    rope, length = draw.pick(FLOATS), start + tokens
    mask = None
    if draw.number(0, 2) == 0:
        shape = draw.pick((1, batch)), draw.pick((1, q_heads)), tokens, length
        mask = _integers(draw, 0, 2, *shape, dtype=torch.bool)
    caches = [t for _ in range(2) for t in _caches(draw, batch, kv_heads, length + 2, head_dim)]
    sinks: list[Any] = [None, None]
    if draw.number(0, 2) == 0:
        count = draw.number(0, 4)
        sinks = [_randn(draw, batch, kv_heads, count, head_dim, size=1.0) for _ in range(2)]
    norms = [_randn(draw, hidden, size=1.0) for _ in range(2)]
    args = [x, angles.cos().to(rope), angles.sin().to(rope), mask, norms, draw.pick((1e-6, 0.1)),
            *linears, list(groups), list(acts), *r3, *r4, *caches, *sinks, start, 0.95, 0.3,
            _starts(draw, batch, start)]  # fmt: skip
    return OpCase("decoder_layer", args, exact, (16, 17, 18, 19), oracle=_layer_of_ops)


def _decoder_layers(draw: Draw) -> OpCase:
    """Layers of the same weights, each with caches of its own."""
    args, layers = _decoder_layer(draw).args, draw.number(1, 3)
    caches = [[t.clone() for _ in range(layers)] for t in args[16:20]]
    sinks = [[] if t is None else [t] * layers for t in args[20:22]]
    lists = [each * layers for each in args[6:12]]
    args = [*args[:4], args[4] * layers, args[5], *lists, *args[12:16], *caches, *sinks, *args[22:]]
    return OpCase("decoder_layers", args, exact, (16, 17, 18, 19), oracle=_one_after_another)


def _one_after_another(x: Tensor, *args: Any) -> Tensor:
    """`decoder_layers` by `decoder_layer`."""
    layers = len(args[15])

    def part(each: Any, i: int) -> Any:
        size = len(each) // layers
        return each[size * i : size * (i + 1)]

    for i in range(layers):
        lists = [part(each, i) for each in args[5:11]]
        caches, sinks = [each[i] for each in args[15:19]], [each[i] if each else None for each in args[19:21]]
        one = *args[:3], part(args[3], i), args[4], *lists, *args[11:15], *caches, *sinks, *args[21:]
        x = torch.ops.w2a4.decoder_layer(x, *one)
    return x


def _paged_decoder_layer(draw: Draw) -> OpCase:
    """As `_decoder_layer`; blocks may be shared by sequences, but no slot by two tokens."""
    case = _decoder_layer(draw)
    (batch, tokens), start = case.args[0].shape[:2], case.args[22]
    kv_heads, half = case.args[16].shape[1], case.args[16].shape[3]
    size = draw.pick((1, 3, 16))
    blocks = -(-max(1, batch * tokens) // size) + draw.number(0, 2)
    case.args[16:20] = [t for _ in range(2) for t in _caches(draw, blocks, kv_heads, size, 2 * half)]
    first, columns = draw.number(0, blocks * size - batch * tokens), -(-(start + tokens) // size)
    slots = torch.arange(first, first + batch * tokens).flip(0).view(batch, tokens)
    case.args += [slots, _integers(draw, 0, blocks, batch, columns, dtype=torch.int32)]
    return case


def _layer_of_ops(
    x, cos, sin, mask, norms, eps, qkv_proj, o_proj, gate_up_proj, down_proj, groups, acts, r3, r3_block, r4,
    r4_block, k_codes, k_params, v_codes, v_params, k_sink, v_sink, start, clip, scaling, starts, slots=None,
    block_table=None,
) -> Tensor:  # fmt: skip
    """`decoder_layer` by the ops that it is made of, one after another, whose bits are promised."""
    op = torch.ops.w2a4
    caches = k_codes, k_params, v_codes, v_params

    def linear(tensors: list[Tensor], group: int, a: tuple[Tensor, Tensor], residual: Tensor | None = None):
        weight, scale, _, *rest = tensors
        levels = [t for t in rest if t.dtype == torch.int8][-1:]
        bias = [t for t in rest if t.dtype != torch.int8][-1:] or [None]
        call = {4: op.linear_w2a4, 8: op.linear_w3a4}[levels[0].shape[-1]] if levels else op.linear_w4a4
        return call(*a, weight, *levels, scale, *bias, group, x.dtype, residual)

    qkv = linear(qkv_proj, groups[0], op.rmsnorm_a4(x, norms[0], eps, qkv_proj[2], acts[0]))
    places = (start, clip, starts) if slots is None else (0, clip, None, slots)
    q = op.rope_append_kv4(qkv, cos, sin, r3, r3_block, *caches, *places)
    length, sinks = start + x.shape[1], (k_sink, v_sink)
    context = op.attention_kv4(q, *caches, length, mask, mask is None, scaling, *sinks, starts, block_table)
    y = linear(o_proj, groups[1], op.quantize_a4(context.flatten(2), o_proj[2], acts[1]), x)
    both = linear(gate_up_proj, groups[2], op.rmsnorm_a4(y, norms[1], eps, gate_up_proj[2], acts[2]))
    gate, up = (half.contiguous() for half in both.chunk(2, -1))
    a = op.silu_mul_hadamard_a4(gate, up, r4, r4_block, down_proj[2], acts[3])
    return linear(down_proj, groups[3], a, y)


CASES = (
    _hadamard, _quantize_a4, _fused_a4, _fused_a4, _linear_a4, _linear_a4, _linear_w8, _quantize_kv4,
    _append_kv4, _paged_append_kv4, _rope_append_kv4, _attention_kv4, _attention_kv4, _paged_attention_kv4,
    _round_columns, _snap, _fake_quant_rows, _snap_backward, _fake_quant_rows_backward, _decoder_layer,
    _decoder_layer, _decoder_layers, _decoder_layers, _paged_decoder_layer,
)  # fmt: skip

#: Numbers that no argument should be taken at its word for.
NUMBERS = (0, -1, -2, 1, 3, 7, 2**31, 2**40, 2**62, -(2**63))


def sound(draw: Draw) -> OpCase:
    """A call that an op has to serve."""
    return draw.pick(CASES)(draw)


def hostile(draw: Draw) -> OpCase:
    """A call of which one argument is wrong, strange or shares memory with another."""
    case = sound(draw)
    index = draw.number(0, len(case.args) - 1)
    value = case.args[index]
    if isinstance(value, Tensor):
        changed, case.hostile = _spoil(draw, value, case, index)
    elif isinstance(value, list) and value:
        changed, case.hostile = _spoil_list(draw, value, case, index)
    elif isinstance(value, (bool, list)) or value is None:
        return case
    elif isinstance(value, int):
        changed = draw.pick(NUMBERS)
        case.hostile = f"argument {index} is {changed}"
    elif isinstance(value, float):
        changed = draw.pick((0.0, -1.0, float("nan"), float("inf"), 1e300))
        case.hostile = f"argument {index} is {changed}"
    else:
        changed = torch.int8
        case.hostile = f"argument {index} is {changed}"
    case.args[index] = changed
    return case


def _spoil_list(draw: Draw, value: list[Any], case: OpCase, index: int) -> tuple[list[Any], str]:
    place, kind = draw.number(0, len(value) - 1), draw.pick(("one", "one", "one", "less", "more"))
    before, one, after = value[:place], value[place], value[place + 1 :]
    if kind == "less":
        return [*before, *after], f"argument {index} lacks entry {place}"
    if kind == "more":
        return [*value, one], f"argument {index} has entry {place} once more"
    if isinstance(one, Tensor):
        one, told = _spoil(draw, one, case, index)
        return [*before, one, *after], f"entry {place} of {told}"
    one = draw.pick(NUMBERS)
    return [*before, one, *after], f"entry {place} of argument {index} is {one}"


def _spoil(draw: Draw, t: Tensor, case: OpCase, index: int) -> tuple[Tensor, str]:
    def at(dim: int) -> str:
        return f"argument {index} of shape {[*t.shape]}, dimension {dim}: "

    dim = draw.number(0, max(0, t.dim() - 1))
    others = [
        a for i, a in enumerate(case.args) if isinstance(a, Tensor) and i != index and a.dtype == t.dtype
    ]
    kind = draw.pick(("shorter", "dtype", "transposed", "expanded", "values", "scalar", "alias", "empty"))
    if kind == "shorter" and t.dim() and t.shape[dim]:
        return t.narrow(dim, 0, t.shape[dim] - 1), at(dim) + "shorter by one"
    if kind == "dtype":
        return t.to(draw.pick((torch.int32, torch.float32, torch.uint8))), at(dim) + "another dtype"
    if kind == "transposed" and t.dim() > 1:
        return t.transpose(dim, -1), at(dim) + "transposed"
    if kind == "expanded" and t.dim() and t.shape[dim]:
        return t.narrow(dim, 0, 1).expand(t.shape), at(dim) + "every element is one"
    if kind == "values" and t.dtype == torch.long and t.numel():
        changed = t.clone()
        changed.view(-1)[0] = draw.pick((-1, 99, 2**62, -(2**63)))
        return changed, at(dim) + f"first value {int(changed.reshape(-1)[0])}"
    if kind == "alias" and others and case.written:
        other = draw.pick(others)
        if other.is_contiguous() and other.numel() >= t.numel() > 0:
            return other.view(-1)[: t.numel()].view(t.shape), at(dim) + "shares memory with another argument"
    if kind == "empty" and t.dim():
        return t.narrow(dim, 0, 0), at(dim) + "empty"
    return t.flatten()[0].clone() if t.numel() else t, at(dim) + "scalar"


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return value.clone() if isinstance(value, Tensor) else value


def run(case: OpCase) -> str:
    """`right`, or `refused: …`; an AssertionError where op and reference differ.

    Memory that is written is cloned for the reference, aliased or not, so what an op does to it shows.
    """
    plain = [_copied(a) for a in case.args]
    try:
        got = getattr(torch.ops.w2a4, case.name).default(*case.args)
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0]
        if not case.hostile:
            raise AssertionError(f"a sound call was refused: {first}") from error
        assert case.name in first or "w2a4" in first or "out of memory" in first, f"unclear: {first}"
        return f"refused: {first}"
    got = [*_list(got), *(t for i in case.written for t in _list(case.args[i]))]
    try:
        want = case.reference(plain)
    except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        if "can't allocate memory" in str(error):  # a dense matrix that the op does without
            return "right"
        raise AssertionError(f"served what the reference refuses: {error}") from error
    want = [*_list(want), *(t for i in case.written for t in _list(plain[i]))]
    case.agree(got, want)
    return "right"
