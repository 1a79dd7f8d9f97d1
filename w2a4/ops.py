"""The only door to the kernels: one function an op, its fake, its gradient, the choice of back end.

`torch.ops.w2a4.<op>` runs compiled kernels on the CPU where `w2a4._C` is built, on CUDA where `w2a4._cuda`
is, and `w2a4.reference` everywhere else (slowly, with one warning). Functions here are what other modules
call; they make activations contiguous and check nothing, since the ops check everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference

_SCHEMAS = {
    "hadamard": "(Tensor x, Tensor? had_k, int block_size, bool transpose=False) -> Tensor",
    "quantize_a4": "(Tensor x, Tensor clip, int group_size=-1) -> (Tensor, Tensor)",
    "hadamard_a4": "(Tensor x, Tensor? had_k, int block_size, Tensor clip, int group_size=-1) "
    "-> (Tensor, Tensor)",
    "rmsnorm_a4": "(Tensor x, Tensor? weight, float eps, Tensor clip, int group_size=-1) -> (Tensor, Tensor)",
    "silu_mul_hadamard_a4": "(Tensor gate, Tensor up, Tensor? had_k, int block_size, Tensor clip, "
    "int group_size=-1) -> (Tensor, Tensor)",
    "linear_w2a4": "(Tensor a_codes, Tensor a_scale, Tensor weight, Tensor levels, Tensor scale, "
    "Tensor? bias, int group_size, ScalarType out_dtype) -> Tensor",
    "linear_w4a4": "(Tensor a_codes, Tensor a_scale, Tensor weight, Tensor scale, Tensor? bias, "
    "int group_size, ScalarType out_dtype) -> Tensor",
    "linear_w8": "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    "quantize_kv4": "(Tensor x, float clip) -> (Tensor, Tensor)",
    "append_kv4": "(Tensor x, Tensor(a!) codes, Tensor(b!) params, SymInt start, float clip) -> ()",
    "rope_append_kv4": "(Tensor qkv, Tensor cos, Tensor sin, Tensor? had_k, int block_size, "
    "Tensor(a!) k_codes, Tensor(b!) k_params, Tensor(c!) v_codes, Tensor(d!) v_params, SymInt start, "
    "float clip) -> Tensor",
    "attention_kv4": "(Tensor q, Tensor k_codes, Tensor k_params, Tensor v_codes, Tensor v_params, "
    "SymInt length, Tensor? mask, bool causal, float scaling, Tensor? k_sink=None, "
    "Tensor? v_sink=None) -> Tensor",
}

_HOW_TO_BUILD = "build it with `pip install .` or `python setup.py build_ext --inplace`"

try:
    from . import _C
except ImportError as error:
    _C = None
    _library = torch.library.Library("w2a4", "DEF")
    for _name, _schema in _SCHEMAS.items():
        _library.define(_name + _schema)
    warnings.warn(
        f"w2a4._C is missing ({error}): ops run on their slow PyTorch reference; {_HOW_TO_BUILD}",
        stacklevel=2,
    )
else:
    _library = torch.library.Library("w2a4", "FRAGMENT")

_ops = torch.ops.w2a4


def _load_cuda():
    """The module that registers the CUDA kernels, or None and why it is not there."""
    if _C is None:
        return None, "w2a4._C is missing"
    if torch.version.cuda is None:
        return None, _C.no_cuda or "this torch is built without CUDA"
    try:
        from . import _cuda
    except ImportError as error:
        return None, _C.no_cuda or str(error)
    return _cuda, ""


_cuda, _no_cuda = _load_cuda()


def build_info() -> str:
    """One line: which kernels were built, with what, and why others were not."""
    if _C is None:
        return f"w2a4._C: not built; {_HOW_TO_BUILD}"
    return f"{_C.build_info}; {_cuda.build_info if _cuda else f'w2a4._cuda: not loaded ({_no_cuda})'}"


# Fallback: a device without compiled kernels runs the reference.

_warned: set[str] = set()


def _warn_slow(name: str, device: str) -> None:
    """Once a device, or once an op where the device has kernels for others."""
    has_kernels = device == "cpu" or (device == "cuda" and _cuda is not None)
    key = f"{device} {name}" if has_kernels else device
    if _C is None or key in _warned:
        return
    _warned.add(key)
    if has_kernels:
        message = f"w2a4.{name} has no {device} kernel: it runs on its slow PyTorch reference"
    elif device == "cuda":
        message = (
            f"w2a4's CUDA kernels are not loaded ({_no_cuda}): ops run on their slow PyTorch reference; "
            "to build them, put nvcc on PATH and run W2A4_BUILD_CUDA=1 pip install ."
        )
    else:
        message = f"w2a4 has no kernels for {device!r}: ops run on their slow PyTorch reference there"
    warnings.warn(message, stacklevel=3)


def _fallback(name: str) -> Callable:
    function = getattr(reference, name)

    def run(*args, **kwargs):
        _warn_slow(name, args[0].device.type)
        return function(*args, **kwargs)

    return run


for _name in _SCHEMAS:
    _library.impl(_name, _fallback(_name), "CompositeExplicitAutograd")


# Fakes: shapes and dtypes without data, for torch.compile and meta tensors.


def _one_device(**tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise RuntimeError(f"arguments lie on different devices: {listed}; move them to one")


@torch.library.register_fake("w2a4::hadamard")
def _(x, had_k, block_size, transpose=False):
    _one_device(x=x, had_k=had_k)
    return x.new_empty(x.shape)


def _fake_a4(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    *tokens, features = x.shape
    groups = 1 if group_size == -1 else features // group_size
    codes = x.new_empty((*tokens, (features + 1) // 2), dtype=torch.uint8)
    return codes, x.new_empty((*tokens, groups), dtype=torch.float32)


@torch.library.register_fake("w2a4::quantize_a4")
def _(x, clip, group_size=-1):
    _one_device(x=x, clip=clip)
    return _fake_a4(x, group_size)


@torch.library.register_fake("w2a4::hadamard_a4")
def _(x, had_k, block_size, clip, group_size=-1):
    _one_device(x=x, had_k=had_k, clip=clip)
    return _fake_a4(x, group_size)


@torch.library.register_fake("w2a4::rmsnorm_a4")
def _(x, weight, eps, clip, group_size=-1):
    _one_device(x=x, weight=weight, clip=clip)
    return _fake_a4(x, group_size)


@torch.library.register_fake("w2a4::silu_mul_hadamard_a4")
def _(gate, up, had_k, block_size, clip, group_size=-1):
    _one_device(gate=gate, up=up, had_k=had_k, clip=clip)
    return _fake_a4(gate, group_size)


@torch.library.register_fake("w2a4::linear_w2a4")
def _(a_codes, a_scale, weight, levels, scale, bias, group_size, out_dtype):
    _one_device(a_codes=a_codes, a_scale=a_scale, weight=weight, levels=levels, scale=scale, bias=bias)
    return a_codes.new_empty((*a_codes.shape[:-1], scale.shape[0]), dtype=out_dtype)


@torch.library.register_fake("w2a4::linear_w4a4")
def _(a_codes, a_scale, weight, scale, bias, group_size, out_dtype):
    _one_device(a_codes=a_codes, a_scale=a_scale, weight=weight, scale=scale, bias=bias)
    return a_codes.new_empty((*a_codes.shape[:-1], scale.shape[0]), dtype=out_dtype)


@torch.library.register_fake("w2a4::linear_w8")
def _(x, weight, scale, bias):
    _one_device(x=x, weight=weight, scale=scale, bias=bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("w2a4::quantize_kv4")
def _(x, clip):
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return codes, x.new_empty((*x.shape[:-1], 2), dtype=torch.float16)


@torch.library.register_fake("w2a4::append_kv4")
def _(x, codes, params, start, clip):
    _one_device(x=x, codes=codes, params=params)


@torch.library.register_fake("w2a4::rope_append_kv4")
def _(qkv, cos, sin, had_k, block_size, k_codes, k_params, v_codes, v_params, start, clip):
    _one_device(qkv=qkv, cos=cos, sin=sin, had_k=had_k, k_codes=k_codes, k_params=k_params,
                v_codes=v_codes, v_params=v_params)  # fmt: skip
    batch, tokens, width = qkv.shape
    head_dim = cos.shape[-1]
    return qkv.new_empty((batch, width // head_dim - 2 * k_codes.shape[1], tokens, head_dim))


@torch.library.register_fake("w2a4::attention_kv4")
def _(q, k_codes, k_params, v_codes, v_params, length, mask, causal, scaling, k_sink=None, v_sink=None):
    _one_device(q=q, k_codes=k_codes, k_params=k_params, v_codes=v_codes, v_params=v_params, mask=mask,
                k_sink=k_sink, v_sink=v_sink)  # fmt: skip
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty((batch, tokens, heads, head_dim))


if _C is not None:
    torch.library.register_fake("w2a4::snap")(lambda w, levels: torch.empty_like(w))
    torch.library.register_fake("w2a4::snap_backward")(
        lambda grad, w, soft, levels: (torch.empty_like(w), torch.empty_like(soft))
    )
    torch.library.register_fake("w2a4::fake_quant_rows")(lambda x, clip, kv: torch.empty_like(x))
    torch.library.register_fake("w2a4::fake_quant_rows_backward")(
        lambda grad, x, clip, kv: (torch.empty_like(x), x.new_empty(x.shape[:-1].numel()))
    )


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
    return _ops.hadamard.default(x.contiguous(), had_k, block_size, transpose)


def quantize_a4(x: Tensor, clip: Tensor, group_size: int = -1) -> tuple[Tensor, Tensor]:
    """4-bit activations, one scale a token and group; the bits are those of `reference.quantize_a4`.

    Args:
        x: floating `[..., K]`.
        clip: float32 `[1]`.
        group_size: divides K; -1 is the whole token.

    Returns:
        codes uint8 `[..., ceil(K / 2)]`, scale float32 `[..., K / group_size]`. A group with NaN or
        infinity has that as its scale and codes 0, so the error stays visible.

    Equivalent: `scale = clip * x.abs().amax(-1) / 7; codes = (x / scale).round().clamp(-8, 7)`.
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
    bias: Tensor | None, group_size: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`a @ W.T + bias`, 4-bit activations, non-uniform 2-bit weights; bits as the reference's.

    Args:
        a_codes: uint8 `[..., ceil(in / 2)]`, and
        a_scale: float32 `[..., A]`, from `quantize_a4`.
        weight: uint8 `[out, ceil(in / 4)]`.
        levels: int8 `[out, in / group_size, 4]`.
        scale: float16 `[out, in / group_size]`.
        bias: floating `[out]` or None.
        group_size: of the weights; it divides the activations' group `in / A` or is a multiple of it.
        out_dtype: float32, float16, bfloat16 or float64.

    Returns:
        `[..., out]`; a token's result does not depend on the other tokens.

    Equivalent: `dequantize_a4(a_codes, a_scale, in) @ (scale * levels[codes]).T + bias`.
    """
    a_codes, a_scale = a_codes.contiguous(), a_scale.contiguous()
    return _ops.linear_w2a4.default(a_codes, a_scale, weight, levels, scale, bias, group_size, out_dtype)


def linear_w4a4(
    a_codes: Tensor, a_scale: Tensor, weight: Tensor, scale: Tensor,
    bias: Tensor | None, group_size: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `linear_w2a4` with symmetric 4-bit weights: `weight` is uint8 `[out, ceil(in / 2)]`.

    Equivalent: `dequantize_a4(a_codes, a_scale, in) @ (scale * codes).T + bias`.
    """
    a_codes, a_scale = a_codes.contiguous(), a_scale.contiguous()
    return _ops.linear_w4a4.default(a_codes, a_scale, weight, scale, bias, group_size, out_dtype)


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


def append_kv4(x: Tensor, codes: Tensor, params: Tensor, start: int, clip: float) -> None:
    """Quantise x as `quantize_kv4` and write it into a cache at token `start`, in place.

    Args:
        x: floating `[batch, heads, tokens, head_dim]`.
        codes: uint8 `[batch, heads, capacity, head_dim / 2]`, written, and
        params: float16 `[batch, heads, capacity, 2]`, written; both may be strided views.
        start: `start + tokens <= capacity`.
        clip: see `quantize_kv4`.

    Equivalent: `codes[:, :, start:stop], params[:, :, start:stop] = quantize_kv4(x, clip)`.
    """
    _ops.append_kv4.default(x, codes, params, start, clip)


def rope_append_kv4(
    qkv: Tensor, cos: Tensor, sin: Tensor, had_k: Tensor | None, block_size: int,
    k_codes: Tensor, k_params: Tensor, v_codes: Tensor, v_params: Tensor, start: int, clip: float,
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

    Returns:
        queries `[batch, q_heads, tokens, head_dim]` in qkv's dtype, contiguous; float32 in between.

    Equivalent: `q, k = (hadamard(rope(x)) for x in (q, k)); append_kv4(k, …); append_kv4(v, …)`.
    """
    return _ops.rope_append_kv4.default(
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), had_k, block_size,
        k_codes, k_params, v_codes, v_params, start, clip,
    )  # fmt: skip


def attention_kv4(
    q: Tensor, k_codes: Tensor, k_params: Tensor, v_codes: Tensor, v_params: Tensor, length: int,
    mask: Tensor | None, causal: bool, scaling: float,
    k_sink: Tensor | None = None, v_sink: Tensor | None = None,
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
        k_sink, v_sink: floating `[batch, kv_heads, s, head_dim]`, replace the first s cache entries.

    Returns:
        `[batch, q_tokens, q_heads, head_dim]` in q's dtype, contiguous; zeros where no key is seen. A
        query's result has the same bits whatever the other queries, the threads and unseen keys are.

    Equivalent: `softmax(q @ k.mT * scaling + mask) @ v` with k and v from `dequantize_kv4`.
    """
    return _ops.attention_kv4.default(
        q, k_codes, k_params, v_codes, v_params, length, mask, causal, scaling, k_sink, v_sink
    )


# What training passes through. These have CPU kernels and nothing else; `quantizers` is PyTorch elsewhere.


def has_training_kernels(x: Tensor) -> bool:
    """Whether the next four ops take tensors like x: float32 on the CPU, where kernels are built."""
    return _C is not None and x.device.type == "cpu" and x.dtype == torch.float32


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
