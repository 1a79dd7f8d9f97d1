"""The check before the clock: a few outputs of an op, chosen at random, against `w2a4.ops.reference`.

The reference takes minutes for a large matrix, so it computes chosen rows of the weights for chosen
tokens; both are drawn anew for every case. What is drawn must be exact on the CPU. A GPU may sum float32
in another order, so there results agree within the rounding of such sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from w2a4.format.hadamard import HadamardSpec, had_k_matrix
from w2a4.ops import reference
from w2a4.ops.packing import unpack

#: Rows of the weights, and tokens, that are checked.
ROWS, TOKENS = 64, 4

#: Share of 4-bit codes that may be off by one where float32 and float64 lie on two sides of a tie.
TIES = 2e-3

#: Of a dtype, relatively.
STEP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}


def choose(count: int, most: int) -> Tensor:
    """At most so many distinct indices below `count`, the last one always among them."""
    chosen = torch.randperm(count)[:most]
    chosen[0] = count - 1
    return chosen.unique()


def linear_agrees(
    name: str, got: Tensor, a_codes: Tensor, a_scale: Tensor, weights: tuple, group: int
) -> bool:
    """Is `got` what `reference.<name>` says?

    Args:
        got: `[tokens, out]` of the op.
        weights: the op's tensors between the activations and the bias, each `[out, ...]`.
    """
    rows, tokens = choose(got.shape[1], ROWS), choose(got.shape[0], TOKENS)
    parts = [tensor.cpu()[rows] for tensor in weights]
    linear = getattr(reference, name)
    want = linear(a_codes.cpu()[tokens], a_scale.cpu()[tokens], *parts, None, group, got.dtype)
    have = got.cpu()[tokens][:, rows]
    if got.device.type == "cpu":
        return torch.equal(have, want)
    # One step of the output's dtype, and float32 sums in another order.
    return within(have, want, rtol=STEP[got.dtype], atol=1e-5 * float(want.float().abs().max()))


def integers_agree(name: str, linear: Callable, a_codes: Tensor, weights: tuple, group: int) -> bool:
    """Does `linear(a_codes, a_scale, *weights)`, with every scale 1, give the reference's integer sums?

    float32 holds them, and sums of them, below 2**24, so no order of adding is an excuse. The dtype of the
    result may be narrower: the one rounding to it is the same.
    """
    *others, scale = weights
    ones = torch.ones(*a_codes.shape[:-1], 1, device=a_codes.device), torch.ones_like(scale)
    got = linear(a_codes, ones[0], *others, ones[1])
    rows, tokens = choose(got.shape[1], ROWS), choose(got.shape[0], TOKENS)
    parts = [tensor.cpu()[rows] for tensor in (*others, ones[1])]
    want = getattr(reference, name)(
        a_codes.cpu()[tokens], ones[0].cpu()[tokens], *parts, None, group, got.dtype
    )
    return torch.equal(got.cpu()[tokens][:, rows], want)


def within(have: Tensor, want: Tensor, rtol: float, atol: float) -> bool:
    """`|have - want| <= atol + rtol * |want|` everywhere, and nowhere NaN."""
    have, want = have.double(), want.double()
    return bool(((have - want).abs() <= atol + rtol * want.abs()).all())


def reference_hadamard(x: Tensor, spec: HadamardSpec, transpose: bool = False) -> Tensor:
    """`reference.hadamard` in float64 on the CPU, for widths whose dense matrix would fill the memory.

    H = A ⊗ B, so x H is B along the inner half of the indices and A along the outer half; each is a
    small dense product in the reference. The transpose of H is that of both.
    """
    levels = (spec.block_size // spec.k).bit_length() - 1
    inner = 2 ** (levels // 2 if spec.k == 1 else levels)
    outer = spec.block_size // inner
    y = x.cpu().double().unflatten(-1, (-1, outer, inner))
    y = reference.hadamard(y, None, inner, transpose)
    had_k = had_k_matrix(spec.k)
    return reference.hadamard(y.mT.contiguous(), had_k, outer, transpose).mT.reshape(x.shape)


def hadamard_agrees(got: Tensor, x: Tensor, spec: HadamardSpec) -> bool:
    """At most twice the rounding of the exact result to the dtype, and float32 sums."""
    tokens = choose(x.shape[0], TOKENS)
    want = reference_hadamard(x[tokens.to(x.device)], spec)
    return within(got[tokens.to(got.device)].cpu(), want, STEP[x.dtype], 2e-6 * float(want.abs().max()))


def codes_agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], exact: bool) -> bool:
    """Codes and scales of a quantisation; unless `exact`, a few codes may be off by one."""
    (codes, scale), (want_codes, want_scale) = ([t.cpu() for t in pair] for pair in (got, want))
    if exact:
        return torch.equal(codes, want_codes) and torch.equal(scale, want_scale)
    features = 2 * codes.shape[-1]
    off = (unpack(codes, 4, features, signed=True).int() - unpack(want_codes, 4, features, signed=True)).abs()
    few = float((off > 0).float().mean()) <= TIES
    return few and int(off.max()) <= 1 and within(scale, want_scale, rtol=2e-5, atol=0)


def attention_agrees(
    got: Tensor, q: Tensor, kv: tuple, length: int, scaling: float, atol: float = 1e-5
) -> bool:
    """Of one KV head of one sequence and a few queries, chosen at random: one step of the dtype, and the
    rounding of sums, `atol` times the largest value there could be.

    Args:
        got: `[batch, q_tokens, q_heads, head_dim]`.
        kv: codes and params of keys, then of values.
    """
    batch, head = (int(torch.randint(count, ())) for count in kv[0].shape[:2])
    repeat, tokens = q.shape[1] // kv[0].shape[1], choose(q.shape[2], TOKENS)
    heads = slice(head * repeat, (head + 1) * repeat)
    part = [t[batch : batch + 1, head : head + 1].cpu() for t in kv]
    seen = torch.arange(length) <= length - q.shape[2] + tokens[:, None]
    queries = q[batch : batch + 1, heads].cpu()[:, :, tokens]
    want = reference.attention_kv4(queries, *part, length, seen[None, None], False, scaling)
    largest = 15 * part[3][..., 0].float().abs() + part[3][..., 1].float().abs()
    have = got[batch : batch + 1].cpu()[:, tokens, heads]
    return within(have, want, rtol=STEP[got.dtype], atol=atol * float(largest.max()))


def append_agrees(
    call: Callable[..., Tensor], tensors: tuple, r3: tuple[Tensor | None, int], start: int, clip: float
) -> bool:
    """`call(qkv, cos, sin, k_codes, k_params, v_codes, v_params)` is rope_append_kv4: values exactly,
    queries and keys within the rounding of R3's sums, and few codes of keys off by one."""
    q = call(*tensors).cpu()
    qkv, cos, sin, *kv = (t.cpu() for t in tensors)
    want = [torch.zeros_like(t) for t in kv]
    had_k = None if r3[0] is None else r3[0].cpu()
    exact = reference.rope_append_kv4(qkv, cos, sin, had_k, r3[1], *want, start, clip)
    places = slice(start, start + qkv.shape[1])
    got, want = ([t[:, :, places] for t in cache] for cache in (kv, want))
    if not torch.equal(got[2], want[2]) or not torch.equal(got[3], want[3]):
        return False
    off = (unpack(got[0], 4, cos.shape[-1]).int() - unpack(want[0], 4, cos.shape[-1])).abs()
    # A parameter next to a tie of float16 takes the codes of its head with it.
    few = float((off > 0).float().mean()) <= 10 * TIES and int(off.max()) <= 1
    largest = float(exact.float().abs().max())
    close = within(q, exact, rtol=2 * STEP[q.dtype], atol=2e-6 * largest)
    return few and close and within(got[1], want[1], rtol=STEP[torch.float16], atol=1e-6 * largest)
