"""The only door to the kernels: one function an op, its gradient, the choice of back end.

`torch.ops.w2a4.<op>` runs compiled kernels on the CPU where `w2a4._C` is built, on CUDA where `w2a4._cuda`
is, and `w2a4.ops.reference` everywhere else (slowly, with one warning). `table` says what an op is, `library`
registers it. Functions here are what other modules call; they make activations contiguous and check nothing,
since the ops check everything. Where there are Triton kernels too, `dispatch` chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .activations import hadamard_by_doublings
from .library import build_info  # noqa: F401
from .library import cpu_module as _C
from .library import cuda_module as _cuda
from .library import registered as _ops

# Gradient of the one op that has one by itself; those of the last four are in `quantizers`.


def _save_hadamard(ctx, inputs, output):
    _, ctx.had_k, ctx.block_size, ctx.transpose = inputs


def _hadamard_backward(ctx, grad):
    return hadamard(grad, ctx.had_k, ctx.block_size, not ctx.transpose), None, None, None


torch.library.register_autograd("w2a4::hadamard", _hadamard_backward, setup_context=_save_hadamard)


# The ops. Bad arguments raise RuntimeError, as those of torch's own ops; the message names the argument.


def hadamard(x: Tensor, had_k: Tensor | None, block_size: int, transpose: bool = False) -> Tensor:
    """`x @ H`, H block-diagonal of `kron(had_k, Sylvester) / sqrt(block_size)`; differentiable.

    Args:
        x: floating `[..., n]`, n a multiple of `block_size`.
        had_k: int8 +-1 `[K, K]`, or None for K = 1.
        block_size: K * 2**m.
        transpose: multiply by H transposed, the inverse.

    Returns:
        `[..., n]` in x's dtype, computed in float32 (float64 for float64).

    Equivalent: `(x.unflatten(-1, (-1, block_size)) @ H).flatten(-2)`.
    """
    if x.dtype == torch.float64 and has_cuda_kernels(x.device):  # they hold 32 bits
        return hadamard_by_doublings(x, had_k, block_size, transpose)
    return _ops.hadamard.default(x.contiguous(), had_k, block_size, transpose)


def quantize_a4(x: Tensor, clip: Tensor, group_size: int = -1) -> tuple[Tensor, Tensor]:
    """4-bit activations, one scale a token and group; the bits are those of `reference.quantize_a4`.

    Args:
        x: floating `[..., K]`.
        clip: float32 `[1]`, in (0, 1], or in [-1, 0) for scales of either sign that use all sixteen codes.
        group_size: divides K; -1 is the whole token.

    Returns:
        codes uint8 `[..., ceil(K / 2)]`, scale float32 `[..., K / group_size]`. A group with NaN or
        infinity has that as its scale and codes 0, so the error stays visible.

    Equivalent: `scale = clip * x.abs().amax(-1) / 7; codes = (x / scale).round().clamp(-8, 7)`; for a
    negative clip `scale = clip * x.gather(-1, x.abs().argmax(-1, True)) / 8`, see `reference.a4_scale`.
    """
    return _ops.quantize_a4.default(x.contiguous(), clip, group_size)


def hadamard_a4(
    x: Tensor, had_k: Tensor | None, block_size: int, clip: Tensor, group_size: int = -1
) -> tuple[Tensor, Tensor]:
    """`quantize_a4(hadamard(x))` in one pass, float32 in between whatever x's dtype is.

    Args:
        x: floating `[..., n]`; float64 is rounded to float32 first.
        had_k, block_size: as in `hadamard`; block_size 1 is no transform.
        clip, group_size: as in `quantize_a4`.

    Returns:
        codes uint8 `[..., ceil(n / 2)]`, scale float32 `[..., n / group_size]`; for float32 on the CPU
        the bits of the two ops one after the other.

    Equivalent: `quantize_a4(hadamard(x.float(), had_k, block_size), clip, group_size)`.
    """
    return _ops.hadamard_a4.default(x.contiguous(), had_k, block_size, clip, group_size)


def rmsnorm_a4(
    x: Tensor, weight: Tensor | None, eps: float, clip: Tensor, group_size: int = -1
) -> tuple[Tensor, Tensor]:
    """RMSNorm and `quantize_a4` in one pass, float32 in between whatever x's dtype is.

    Args:
        x: floating `[..., n]`; float64 is rounded to float32 first.
        weight: floating `[n]`, or None for ones.
        eps: added to the mean square, not negative.
        clip, group_size: as in `quantize_a4`.

    Returns:
        codes uint8 `[..., ceil(n / 2)]`, scale float32 `[..., n / group_size]`; a token's result does
        not depend on the other tokens.

    Equivalent: `quantize_a4(weight * x / (x.square().mean(-1, True) + eps).sqrt(), clip, group_size)`.
    """
    return _ops.rmsnorm_a4.default(x.contiguous(), weight, eps, clip, group_size)


def silu_mul_hadamard_a4(
    gate: Tensor, up: Tensor, had_k: Tensor | None, block_size: int, clip: Tensor, group_size: int = -1
) -> tuple[Tensor, Tensor]:
    """What lies between gate/up and down_proj in one pass, float32 in between whatever the dtype is.

    Args:
        gate, up: floating `[..., n]`, of one dtype; float64 is rounded to float32 first.
        had_k, block_size: as in `hadamard`; block_size 1 is no transform.
        clip, group_size: as in `quantize_a4`.

    Returns:
        codes uint8 `[..., ceil(n / 2)]`, scale float32 `[..., n / group_size]`.

    Equivalent: `quantize_a4(hadamard(silu(gate) * up, had_k, block_size), clip, group_size)`.
    """
    gate, up = gate.contiguous(), up.contiguous()
    return _ops.silu_mul_hadamard_a4.default(gate, up, had_k, block_size, clip, group_size)


def linear_w2a4(
    a_codes: Tensor, a_scale: Tensor, weight: Tensor, levels: Tensor, scale: Tensor,
    bias: Tensor | None, group_size: int, out_dtype: torch.dtype, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`a @ W.T + bias + residual`, 4-bit activations, non-uniform 2-bit weights.

    The bits are those of the reference on a CPU; the kernels of CUDA round at other places, see `dispatch`.

    Args:
        a_codes, a_scale: uint8 `[..., ceil(in / 2)]` and float32 `[..., A]`, from `quantize_a4`.
        weight: uint8 `[out, ceil(in / 4)]`.
        levels: int8 `[out, in / group_size, 4]`.
        scale: float16 `[out, in / group_size]`.
        bias: floating `[out]` or None.
        group_size: of the weights; it divides the activations' group `in / A` or is a multiple of it.
        out_dtype: float32, float16, bfloat16 or float64.
        residual: `[..., out]` in out_dtype or None; added to the rounded result, as by an addition after it.

    Returns:
        `[..., out]`; a token's result does not depend on other tokens; on a CUDA device its last bits may
        depend on whether they are few or many, see `dispatch`.

    Raises:
        BackendError: W2A4_BACKEND asks for a kernel that can not run this.

    Equivalent: `dequantize_a4(a_codes, a_scale, in) @ (scale * levels[codes]).T + bias`.
    """
    return _linear_a4(2, a_codes, a_scale, (weight, levels), scale, bias, group_size, out_dtype, residual)


def linear_w3a4(
    a_codes: Tensor, a_scale: Tensor, weight: Tensor, levels: Tensor, scale: Tensor,
    bias: Tensor | None, group_size: int, out_dtype: torch.dtype, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `linear_w2a4` with eight levels a group: `weight` is uint8 `[out, ceil(in / 4) + ceil(in / 8)]`,
    3-bit codes as `packing` draws them, and `levels` int8 `[out, in / group_size, 8]`.

    There is a kernel for CPUs; other devices run the reference, slowly.

    Equivalent: `dequantize_a4(a_codes, a_scale, in) @ (scale * levels[codes]).T + bias`.
    """
    return _ops.linear_w3a4.default(
        a_codes.contiguous(), a_scale.contiguous(), weight, levels, scale, bias, group_size, out_dtype,
        residual if residual is None else residual.contiguous(),
    )  # fmt: skip


def linear_w4a4(
    a_codes: Tensor, a_scale: Tensor, weight: Tensor, scale: Tensor,
    bias: Tensor | None, group_size: int, out_dtype: torch.dtype, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `linear_w2a4` with symmetric 4-bit weights: `weight` is uint8 `[out, ceil(in / 2)]`.

    Equivalent: `dequantize_a4(a_codes, a_scale, in) @ (scale * codes).T + bias`.
    """
    return _linear_a4(4, a_codes, a_scale, (weight,), scale, bias, group_size, out_dtype, residual)


def _linear_a4(bits, a_codes, a_scale, weights, scale, bias, group_size, out_dtype, residual):
    a_codes, a_scale = a_codes.contiguous(), a_scale.contiguous()
    args = a_codes, a_scale, *weights, scale, bias, group_size, out_dtype
    triton = dispatch.backend != "auto" or not a_codes.is_cpu
    if triton and dispatch.prefers_triton(a_codes, a_scale, scale, group_size, out_dtype, _cuda is not None):
        y = getattr(torch.ops.w2a4, f"gemm_w{bits}a4").default(*args)
        return y if residual is None else y + residual
    op = getattr(_ops, f"linear_w{bits}a4")
    return op.default(*args, residual if residual is None else residual.contiguous())


def linear_w8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias`, full-precision activations, 8-bit weights with one scale a row.

    Args:
        x: floating `[..., in]`.
        weight: int8 `[out, in]`.
        scale: float16 `[out]`.
        bias: floating `[out]` or None.

    Returns:
        `[..., out]` in x's dtype, summed in float32; a token's result does not depend on the others.

    Equivalent: `x @ (weight * scale[:, None]).T + bias`.
    """
    return _ops.linear_w8.default(x.contiguous(), weight, scale, bias)


def quantize_kv4(x: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """4-bit keys or values, a scale and a zero-point a token and head; bits as the reference's.

    Args:
        x: floating `[batch, heads, tokens, head_dim]`, head_dim even; strided, last dimension contiguous.
        clip: the range is shrunk by this factor around its middle.

    Returns:
        codes uint8 `[batch, heads, tokens, head_dim / 2]`, params float16 `[batch, heads, tokens, 2]`
        (scale, zero-point). NaN has code 0 and makes the params NaN.

    Equivalent: `codes = ((x - zero) / scale).round().clamp(0, 15)`.
    """
    return _ops.quantize_kv4.default(x, clip)


def append_kv4(
    x: Tensor, codes: Tensor, params: Tensor, start: int, clip: float, starts: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:  # fmt: skip
    """Quantise x as `quantize_kv4` and write it into a cache at token `start`, in place.

    Args:
        x: floating `[batch, heads, tokens, head_dim]`.
        codes: uint8 `[batch, heads, capacity, head_dim / 2]`, written, and
        params: float16 `[batch, heads, capacity, 2]`, written; both may be strided views.
        start: `start + tokens <= capacity`.
        clip: see `quantize_kv4`.
        starts: int64 `[batch]`, instead of `start`, which is the most of them; or None.
        slots: int64 `[batch, tokens]` or `[batch * tokens]`, all different. The cache is then paged, codes
            uint8 `[blocks, heads, block_size, head_dim / 2]` and params float16
            `[blocks, heads, block_size, 2]`, and a token goes to position `slot % block_size` of block
            `slot // block_size`; one whose slot is negative is not written. start is 0 and starts None. On a
            CUDA device a slot that is too large is not written either; on a CPU it is an error.

    Equivalent: `codes[:, :, start:stop], params[:, :, start:stop] = quantize_kv4(x, clip)`.
    """
    _ops.append_kv4.default(x, codes, params, start, clip, starts, slots)


def rope_append_kv4(
    qkv: Tensor, cos: Tensor, sin: Tensor, had_k: Tensor | None, block_size: int,
    k_codes: Tensor, k_params: Tensor, v_codes: Tensor, v_params: Tensor, start: int, clip: float,
    starts: Tensor | None = None, slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """RoPE on queries and keys, R3 on both, and the new keys and values into their caches, in one pass.

    Args:
        qkv: floating `[batch, tokens, (q_heads + 2 * kv_heads) * head_dim]`: queries, keys, values.
        cos, sin: floating `[batch or 1, tokens, head_dim]`, of one dtype, as transformers' rotary
            embedding returns them.
        had_k, block_size: R3, as in `hadamard`; block_size 1 is no rotation.
        k_codes, v_codes: uint8 `[batch, kv_heads, capacity, head_dim / 2]`, written, and
        k_params, v_params: float16 `[batch, kv_heads, capacity, 2]`, written, as by `append_kv4`.
        start: token of the caches written first; `start + tokens <= capacity`.
        clip: see `quantize_kv4`.
        starts, slots: see `append_kv4`; keys and values of a token have one slot.

    Returns:
        queries `[batch, q_heads, tokens, head_dim]` in qkv's dtype, contiguous; float32 in between.

    Equivalent: `q, k = (hadamard(rope(x)) for x in (q, k)); append_kv4(k, …); append_kv4(v, …)`.
    """
    return _ops.rope_append_kv4.default(
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), had_k, block_size,
        k_codes, k_params, v_codes, v_params, start, clip, starts, slots,
    )  # fmt: skip


def attention_kv4(
    q: Tensor, k_codes: Tensor, k_params: Tensor, v_codes: Tensor, v_params: Tensor, length: int,
    mask: Tensor | None, causal: bool, scaling: float,
    k_sink: Tensor | None = None, v_sink: Tensor | None = None, starts: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention over a packed 4-bit cache, with grouped query heads.

    Args:
        q: floating `[batch, q_heads, q_tokens, head_dim]`.
        k_codes, v_codes: uint8 `[batch, kv_heads, capacity, head_dim / 2]`.
        k_params, v_params: float16 `[batch, kv_heads, capacity, 2]`.
        length: tokens of the cache in use; what lies beyond is not read.
        mask: bool `[batch or 1, q_heads or 1, q_tokens, length]`, True where a key may be seen, or None.
        causal: query i sees keys `<= length - q_tokens + i` only.
        scaling: factor on the scores.
        k_sink, v_sink: floating `[batch, kv_heads, s, head_dim]`, the first s keys and values: they replace
            the first s cache entries, and stand before those of a paged cache.
        starts: int64 `[batch]`: sequence b has `starts[b] + q_tokens` keys, and `length` is the most of
            these; or None. On a CUDA device nothing waits for the numbers, so a graph can be replayed with
            others in them.
        block_table: int32 `[batch, most blocks]`. The caches are then paged, `[blocks, kv_heads, block_size,
            …]`, and key j of sequence b, counted from behind the sinks, is at position `j % block_size` of
            block `block_table[b, j // block_size]`. What stands behind the blocks of a sequence's keys is not
            read. On a CUDA device a key in a block that does not exist makes NaN; on a CPU it is an error.

    Returns:
        `[batch, q_tokens, q_heads, head_dim]` in q's dtype, contiguous; zeros where no key is seen. A
        query's result has the same bits whatever the other queries, the threads and unseen keys are, as long
        as the same kernel runs: on CUDA that for many queries rounds to 16 bits, see `dispatch`.

    Equivalent: `softmax(q @ k.mT * scaling + mask) @ v` with k and v from `dequantize_kv4`.
    """
    args = q, k_codes, k_params, v_codes, v_params, length, mask, causal, scaling, k_sink, v_sink, starts
    if block_table is not None:  # Triton's kernel takes no paged cache
        return _ops.attention_kv4.default(*args, block_table)
    triton = (dispatch.backend != "auto" or not q.is_cpu) and "triton" == dispatch.attention_kernel(
        q.device, q.shape[2], q.shape[3], q.dtype, (_C if q.is_cpu else _cuda) is not None
    )
    return (torch.ops.w2a4.attention_kv4_prefill if triton else _ops.attention_kv4).default(*args)


def round_columns(
    work: Tensor, coupling: Tensor, current: Tensor | None, grid: Tensor, group: Tensor, bits: int = 4
) -> tuple[Tensor, Tensor]:
    """Columns of a weight matrix to the nearest values of their grids, one after another.

    What rounding a column changes in it is taken, times its coupling, off every later one.

    Args:
        work: float32 `[columns, out]`, the transposed weight.
        coupling: float32 `[columns, columns]`, row j that of column j to the others.
        current: float32 `[columns, out]` that changes are counted from; None counts from work.
        grid: float32 `[G, 4, out]` or `[G, 8, out]`, points in ascending order, or `[G, 1, out]`, a scale.
        group: int64 `[columns]` into grid.
        bits: points of a scale are its multiples -2**(bits - 1) .. 2**(bits - 1) - 1.

    Returns:
        codes int8 and changes float32, both `[columns, out]`.
    """
    return _ops.round_columns.default(
        work.contiguous(), coupling.contiguous(), current, grid.contiguous(), group, bits
    )


def has_cuda_kernels(device: torch.device) -> bool:
    """Whether ops run on compiled kernels there, on the current stream and without waiting for it."""
    return device.type == "cuda" and _cuda is not None and dispatch.backend != "reference"


def has_layer_kernel(x: Tensor) -> bool:
    """Whether `decoder_layer` takes activations like x: 32 or 16 bits on the CPU, where kernels are built."""
    return _C is not None and x.is_cpu and x.dtype != torch.float64 and dispatch.backend == "auto"


def decoder_layer(
    x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, norms: list[Tensor], eps: float,
    qkv_proj: list[Tensor], o_proj: list[Tensor], gate_up_proj: list[Tensor], down_proj: list[Tensor],
    group_sizes: list[int], act_group_sizes: list[int],
    r3: tuple[Tensor | None, int], r4: tuple[Tensor | None, int],
    k_codes: Tensor, k_params: Tensor, v_codes: Tensor, v_params: Tensor, k_sink: Tensor | None,
    v_sink: Tensor | None, start: int, kv_clip: float, scaling: float, starts: Tensor | None = None,
    slots: Tensor | None = None, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A decoder layer of a packed LLaMA, to the bit what its ops give one after another.

    Args:
        x: `[batch, tokens, hidden]`, see `has_layer_kernel`.
        cos, sin, mask: see `rope_append_kv4` and `attention_kv4`; a mask of None is causal.
        norms, eps: the weights of both RMSNorms.
        qkv_proj, o_proj, gate_up_proj, down_proj: weight, scale and act_clip of each linear, of q/k/v and of
            gate/up one below the other, then levels if its weights have 2 or 3 bits, then bias if it has one.
        group_sizes, act_group_sizes: of weights and of inputs of the four; see `linear_w2a4`.
        r3, r4: had_k and block_size of R3 and R4, see `hadamard`.
        k_codes, k_params, v_codes, v_params, start, kv_clip: the caches, written as by `rope_append_kv4`.
        k_sink, v_sink, scaling, starts: see `attention_kv4`.
        slots, block_table: of paged caches, both or neither; see `append_kv4` and `attention_kv4`. start is
            then the most of `starts`, sinks included.

    Returns:
        `[batch, tokens, hidden]` in x's dtype, with both residuals added.
    """
    return _ops.decoder_layer.default(
        x.contiguous(), cos.contiguous(), sin.contiguous(), mask, norms, eps,
        qkv_proj, o_proj, gate_up_proj, down_proj, group_sizes, act_group_sizes, *r3, *r4,
        k_codes, k_params, v_codes, v_params, k_sink, v_sink, start, kv_clip, scaling, starts, slots,
        block_table,
    )  # fmt: skip


def decoder_layers(
    x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, norms: list[Tensor], eps: float,
    qkv_proj: list[Tensor], o_proj: list[Tensor], gate_up_proj: list[Tensor], down_proj: list[Tensor],
    group_sizes: list[int], act_group_sizes: list[int],
    r3: tuple[Tensor | None, int], r4: tuple[Tensor | None, int],
    k_codes: list[Tensor], k_params: list[Tensor], v_codes: list[Tensor], v_params: list[Tensor],
    k_sink: list[Tensor], v_sink: list[Tensor], start: int, kv_clip: float, scaling: float,
    starts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Decoder layers one behind the other, to the bit what `decoder_layer` gives, in one call.

    Args:
        norms: two of each layer, the first layer's first; so it is with all the lists, which have as many
            tensors of each layer.
        group_sizes, act_group_sizes: four of each layer.
        k_sink, v_sink: of each layer, or none.

    The rest is that of `decoder_layer`.
    """
    return _ops.decoder_layers.default(
        x.contiguous(), cos.contiguous(), sin.contiguous(), mask, norms, eps,
        qkv_proj, o_proj, gate_up_proj, down_proj, group_sizes, act_group_sizes, *r3, *r4,
        k_codes, k_params, v_codes, v_params, k_sink, v_sink, start, kv_clip, scaling, starts,
    )  # fmt: skip


# What training passes through. `quantizers` has the same in PyTorch for where these have no kernels.


def has_training_kernels(x: Tensor) -> bool:
    """Whether the next four ops take tensors like x: float32 on CPUs, 16 bits too on CUDA, by Triton."""
    if x.is_cpu and dispatch.backend == "auto":
        return _C is not None and x.dtype == torch.float32
    return _C is not None and dispatch.has_triton_training(x.device, x.dtype)


def snap(w: Tensor, levels: Tensor) -> Tensor:
    """Weights `[out, G, group_size]` as the nearest of their group's `levels` `[out, G, 4]`, ascending."""
    return _ops.snap.default(w.contiguous(), levels.contiguous())


def snap_backward(grad: Tensor, w: Tensor, soft: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """To w what lies between the ends of `soft` `[out, G, 4]`; to each of soft the sum of what took it."""
    return _ops.snap_backward.default(grad.contiguous(), w.contiguous(), soft.contiguous(), levels)


def fake_quant_rows(x: Tensor, clip: Tensor, kv: bool) -> Tensor:
    """Each row of `[..., row]` as 4 bits give it back: keys and values (kv), or activations; clip `[1]`."""
    return _ops.fake_quant_rows.default(x.contiguous(), clip, kv)


def fake_quant_rows_backward(grad: Tensor, x: Tensor, clip: Tensor, kv: bool) -> tuple[Tensor, Tensor]:
    """Gradients to x, also through scale and zero-point, and to clip: `[rows]`, of which the sum is meant."""
    return _ops.fake_quant_rows_backward.default(grad.contiguous(), x.contiguous(), clip, kv)
