"""A random call of every op, sound or hostile, and what its result has to agree with.

A case is drawn through a `Draw`, which `tools/fuzz.py` makes of a seed and the tests of hypothesis.
"""

from __future__ import annotations

import unittest.mock
from typing import Any

import torch
from torch import Tensor

from w2a4 import ops
from w2a4.format import fake_quant as quantizers
from w2a4.format.hadamard import had_k_matrix
from w2a4.ops import reference
from w2a4.ops.packing import pack

from . import draws, layer_cases
from .draws import Draw, OpCase


def _hadamard(draw: Draw) -> OpCase:
    had_k, block = draws.transform(draw)
    x = draws.randn(draw, *draws.tokens(draw), block * draw.number(0, 3))
    return OpCase("hadamard", [x, had_k, block, draw.pick((False, True))], draws.near(2e-6))


def _quantize_a4(draw: Draw) -> OpCase:
    features = draw.pick((1, 7, 32, 90, 128))
    x = draws.randn(draw, *draws.tokens(draw), features)
    if x.numel() and draw.number(0, 5) == 0:
        x.view(-1)[draw.number(0, x.numel() - 1)] = draw.pick((float("nan"), float("inf"), 0.0))
    return OpCase("quantize_a4", [x, draws.signed_clip(draw), draws.group(draw, features)], draws.exact)


def _fused_a4(draw: Draw) -> OpCase:
    name = draw.pick(("hadamard_a4", "rmsnorm_a4", "silu_mul_hadamard_a4"))
    had_k, block = draws.transform(draw)
    if block == 1:
        had_k = None
    features = block * draw.number(1, 3)
    x = draws.randn(draw, *draws.tokens(draw), features, size=1.0)
    end = [draws.clip(draw), draws.group(draw, features)]
    if name == "rmsnorm_a4":
        args = [x, draw.pick((None, draws.randn(draw, features, size=1.0))), draw.pick((1e-6, 0.1)), *end]
    elif name == "hadamard_a4":
        args = [x, had_k, block, *end]
    else:
        args = [x, draws.randn(draw, *x.shape, dtype=x.dtype, size=1.0), had_k, block, *end]
    return OpCase(name, args, draws.quantized(features))


def _linear_a4(draw: Draw) -> OpCase:
    bits, groups = draw.pick((2, 3, 4)), draw.number(1, 4)
    group, out = draw.pick((1, 3, 10, 16, 32, 64)), draw.number(0, 20)
    features = group * groups
    act = draw.pick([g for g in (-1, group, 2 * group) if g == -1 or features % g == 0])
    a = reference.quantize_a4(
        draws.randn(draw, *draws.tokens(draw), features, size=1.0), torch.tensor([0.8]), act
    )
    low, high = (-8, 8) if bits == 4 else (0, 2**bits)
    weight = pack(draws.integers(draw, low, high, out, features), bits)
    scale = (draws.randn(draw, out, groups, dtype=torch.float64).abs() + 2.0**-24).clamp(max=6e4).half()
    levels = [] if bits == 4 else [draws.integers(draw, -128, 128, out, groups, 2**bits)]
    bias = draw.pick((None, draws.randn(draw, out, size=1.0)))
    args = [*a, weight, *levels, scale, bias, group, draw.pick(draws.FLOATS)]
    return OpCase(f"linear_w{bits}a4", args, draws.exact)


def _linear_w8(draw: Draw) -> OpCase:
    out, features = draw.number(0, 70), draw.pick((0, 1, 16, 33, 130))
    x = draws.randn(draw, *draws.tokens(draw), features, size=1.0)
    scale = draws.randn(draw, out, dtype=torch.float16, size=0.01).abs()
    bias = draw.pick((None, draws.randn(draw, out, size=1.0)))
    return OpCase(
        "linear_w8", [x, draws.integers(draw, -128, 128, out, features), scale, bias], draws.near(1e-5)
    )


def _quantize_kv4(draw: Draw) -> OpCase:
    shape = draw.number(0, 2), draw.number(0, 3), draw.number(0, 9), 2 * draw.number(1, 40)
    return OpCase("quantize_kv4", [draws.randn(draw, *shape), draw.pick((0.95, 1.0, 0.5))], draws.exact)


def _append_kv4(draw: Draw) -> OpCase:
    batch, heads, tokens, head_dim = (
        draw.number(0, 2),
        draw.number(0, 3),
        draw.number(0, 5),
        2 * draw.number(1, 20),
    )
    start = draw.number(0, 6)
    cache = draws.caches(draw, batch, heads, start + tokens + draw.number(0, 3), head_dim)
    x = draws.randn(draw, batch, heads, tokens, head_dim)
    args = [x, *cache, start, 0.95, draws.starts(draw, batch, start)]
    return OpCase("append_kv4", args, draws.exact, (1, 2))


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
    args = [
        draws.randn(draw, batch, heads, tokens, head_dim),
        *draws.caches(draw, blocks, heads, size, head_dim),
    ]
    return OpCase("append_kv4", [*args, 0, 0.95, None, slots], draws.exact, (1, 2))


def _rope_append_kv4(draw: Draw) -> OpCase:
    batch, tokens, kv_heads = draw.number(0, 2), draw.number(0, 5), draw.number(1, 2)
    q_heads, start = draw.number(1, 4), draw.number(0, 5)
    had_k, block = draw.pick(((None, 1), (None, 8), (had_k_matrix(12), 24)))
    head_dim = block * 2 if block > 1 else 2 * draw.number(1, 30)
    qkv = draws.randn(draw, batch, tokens, (q_heads + 2 * kv_heads) * head_dim, size=1.0)
    angles = draws.randn(draw, draw.pick((1, batch)), tokens, head_dim, dtype=torch.float64, size=1.0)
    rope = draw.pick(draws.FLOATS)
    caches = [*draws.caches(draw, batch, kv_heads, start + tokens, head_dim)] + [
        *draws.caches(draw, batch, kv_heads, start + tokens, head_dim)
    ]
    args = [qkv, angles.cos().to(rope), angles.sin().to(rope), had_k, block, *caches, start, 0.95]
    return OpCase(
        "rope_append_kv4", [*args, draws.starts(draw, batch, start)], draws.cached(head_dim), (5, 6, 7, 8)
    )


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
    case.args[1:5] = [t for _ in range(2) for t in draws.caches(draw, blocks, kv_heads, size, 2 * half)]
    columns = -(-length // size) + draw.number(0, 1)
    case.args.append(draws.integers(draw, 0, blocks, batch, columns, dtype=torch.int32))
    return case


def _attention_kv4(draw: Draw) -> OpCase:
    batch, kv_heads, repeat = draw.number(0, 2), draw.number(1, 2), draw.number(1, 3)
    q_tokens, head_dim, length = draw.number(0, 5), 2 * draw.number(1, 40), draw.number(0, 20)
    q = draws.randn(draw, batch, kv_heads * repeat, q_tokens, head_dim, size=1.0)
    caches = [t for _ in range(2) for t in draws.caches(draw, batch, kv_heads, length + 2, head_dim)]
    mask = None
    if draw.number(0, 1):
        shape = draw.pick((1, batch)), draw.pick((1, kv_heads * repeat)), q_tokens, length
        mask = draws.integers(draw, 0, 2, *shape, dtype=torch.bool)
    sinks: list[Any] = [None, None]
    if draw.number(0, 2) == 0:
        count = draw.number(0, 4)
        sinks = [draws.randn(draw, batch, kv_heads, count, head_dim, size=1.0) for _ in range(2)]
    starts = draws.starts(draw, batch, length - q_tokens) if length >= q_tokens else None
    args = [q, *caches, length, mask, draw.pick((False, True)), 0.3, *sinks, starts]
    return OpCase("attention_kv4", args, draws.near(1e-4))


def _round_columns(draw: Draw) -> OpCase:
    columns, out, groups = draw.number(0, 20), draw.number(0, 70), draw.number(1, 3)
    points = draw.pick((1, 4))
    grid = draws.randn(draw, groups, points, out, dtype=torch.float32, size=1.0)
    grid = grid.sort(1).values if points == 4 else grid.abs() + 0.01
    work = draws.randn(draw, columns, out, dtype=torch.float32, size=1.0)
    coupling = draws.randn(draw, columns, columns, dtype=torch.float32, size=0.1)
    current = draw.pick((None, draws.randn(draw, columns, out, dtype=torch.float32, size=1.0)))
    group = draws.integers(draw, 0, groups, columns, dtype=torch.long)
    return OpCase("round_columns", [work, coupling, current, grid, group], draws.exact)


def _snap(draw: Draw) -> OpCase:
    out, groups, size = draw.number(0, 5), draw.number(0, 3), draw.number(0, 40)
    w = draws.randn(draw, out, groups, size, dtype=torch.float32)
    levels = draws.randn(draw, out, groups, 4, dtype=torch.float32).sort(-1).values

    def oracle(w: Tensor, levels: Tensor) -> Tensor:
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        codes = (w[..., None] > middles[..., None, :]).sum(-1)
        return levels.gather(-1, codes)

    return OpCase("snap", [w, levels], draws.exact, oracle=oracle)


def _fake_quant_rows(draw: Draw) -> OpCase:
    kv = draw.pick((False, True))
    x = draws.randn(draw, *draws.tokens(draw), 2 * draw.number(1, 40), dtype=torch.float32, size=1.0)

    def oracle(x: Tensor, clip: Tensor, kv: bool) -> Tensor:
        if kv:  # in pairs, where the packed form stores two to a byte
            even = torch.cat([x, x[..., -1:]], -1)[..., : x.shape[-1] + x.shape[-1] % 2]
            return reference.dequantize_kv4(*reference.quantize_kv4(even, float(clip)))[..., : x.shape[-1]]
        return reference.dequantize_a4(*reference.quantize_a4(x, clip), x.shape[-1])

    clip = draws.clip(draw) if kv else draws.signed_clip(draw)
    return OpCase("fake_quant_rows", [x, clip, kv], draws.exact, oracle=oracle)


def _snap_backward(draw: Draw) -> OpCase:
    out, groups, size = draw.number(0, 5), draw.number(0, 3), draw.number(0, 40)
    grad, w = (draws.randn(draw, out, groups, size, dtype=torch.float32) for _ in range(2))
    soft, levels = (draws.randn(draw, out, groups, 4, dtype=torch.float32).sort(-1).values for _ in range(2))

    def oracle(grad: Tensor, w: Tensor, soft: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        codes = (w[..., None] > middles[..., None, :]).sum(-1)
        inside = (w >= soft[..., :1]) & (w <= soft[..., 3:])
        sums = torch.zeros(soft.shape, dtype=torch.float64).scatter_add(-1, codes, grad.double())
        return grad * inside, sums.float()

    limit = 1e-6 * size * draws.most(grad)
    return OpCase("snap_backward", [grad, w, soft, levels], draws.summed(0.0, limit), oracle=oracle)


def _fake_quant_rows_backward(draw: Draw) -> OpCase:
    size, kv = draw.number(1, 80), draw.pick((False, True))
    x, grad = (
        draws.randn(draw, *shape, size, dtype=torch.float32, size=1.0) for shape in [draws.tokens(draw)] * 2
    )

    def oracle(grad: Tensor, x: Tensor, clip: Tensor, kv: bool) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1]).clone().requires_grad_()
        own = clip.repeat(len(rows)).reshape(-1, 1).requires_grad_()  # one for each row
        quantizer = quantizers.fake_quant_kv4 if kv else quantizers.fake_quant_a4
        with unittest.mock.patch.object(ops, "has_training_kernels", lambda _: False):
            y = quantizer(rows, own)
        to_x, to_clip = torch.autograd.grad(y, [rows, own], grad.view(rows.shape))
        return to_x.view(x.shape), to_clip.flatten()

    limit = 1e-5 * size * draws.most(grad)
    agree = draws.summed(limit, limit * max(1.0, draws.most(x)))
    clip = draws.clip(draw) if kv else draws.signed_clip(draw)
    return OpCase("fake_quant_rows_backward", [grad, x, clip, kv], agree, oracle=oracle)


CASES = (
    _hadamard, _quantize_a4, _fused_a4, _fused_a4, _linear_a4, _linear_a4, _linear_w8, _quantize_kv4,
    _append_kv4, _paged_append_kv4, _rope_append_kv4, _attention_kv4, _attention_kv4, _paged_attention_kv4,
    _round_columns, _snap, _fake_quant_rows, _snap_backward, _fake_quant_rows_backward,
    *[layer_cases.decoder_layer, layer_cases.decoder_layers] * 2, layer_cases.paged_decoder_layer,
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
    got = [*draws.listed(got), *(t for i in case.written for t in draws.listed(case.args[i]))]
    try:
        want = case.reference(plain)
    except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        if "can't allocate memory" in str(error):  # a dense matrix that the op does without
            return "right"
        raise AssertionError(f"served what the reference refuses: {error}") from error
    want = [*draws.listed(want), *(t for i in case.written for t in draws.listed(plain[i]))]
    case.agree(got, want)
    return "right"
