"""Fakes of the ops: shapes and dtypes without data, for torch.compile and meta tensors.

A function here has the name and the arguments of the op that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FAKES: dict[str, Callable] = {}


def _fake(function: Callable) -> Callable:
    _FAKES[function.__name__] = function
    return function


def missing() -> list[str]:
    """Ops that are not defined."""
    return [name for name in _FAKES if not hasattr(torch.ops.w2a4, name)]


def register() -> None:
    """Tell torch of the fakes of all ops that are defined."""
    for name in _FAKES.keys() - missing():
        torch.library.register_fake(f"w2a4::{name}", _FAKES[name])


def _one_device(**tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise RuntimeError(f"arguments lie on different devices: {listed}; move them to one")


@_fake
def hadamard(x, had_k, block_size, transpose=False):
    _one_device(x=x, had_k=had_k)
    return x.new_empty(x.shape)


def _fake_a4(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    *tokens, features = x.shape
    groups = 1 if group_size == -1 else features // group_size
    codes = x.new_empty((*tokens, (features + 1) // 2), dtype=torch.uint8)
    return codes, x.new_empty((*tokens, groups), dtype=torch.float32)


@_fake
def quantize_a4(x, clip, group_size=-1):
    _one_device(x=x, clip=clip)
    return _fake_a4(x, group_size)


@_fake
def hadamard_a4(x, had_k, block_size, clip, group_size=-1):
    _one_device(x=x, had_k=had_k, clip=clip)
    return _fake_a4(x, group_size)


@_fake
def rmsnorm_a4(x, weight, eps, clip, group_size=-1):
    _one_device(x=x, weight=weight, clip=clip)
    return _fake_a4(x, group_size)


@_fake
def silu_mul_hadamard_a4(gate, up, had_k, block_size, clip, group_size=-1):
    _one_device(gate=gate, up=up, had_k=had_k, clip=clip)
    return _fake_a4(gate, group_size)


@_fake
def linear_w2a4(a_codes, a_scale, weight, levels, scale, bias, group_size, out_dtype, residual=None):
    _one_device(a_codes=a_codes, a_scale=a_scale, weight=weight, levels=levels, scale=scale, bias=bias,
                residual=residual)  # fmt: skip
    return a_codes.new_empty((*a_codes.shape[:-1], scale.shape[0]), dtype=out_dtype)


@_fake
def linear_w4a4(a_codes, a_scale, weight, scale, bias, group_size, out_dtype, residual=None):
    _one_device(a_codes=a_codes, a_scale=a_scale, weight=weight, scale=scale, bias=bias, residual=residual)
    return a_codes.new_empty((*a_codes.shape[:-1], scale.shape[0]), dtype=out_dtype)


@_fake
def linear_w8(x, weight, scale, bias):
    _one_device(x=x, weight=weight, scale=scale, bias=bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_fake
def quantize_kv4(x, clip):
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return codes, x.new_empty((*x.shape[:-1], 2), dtype=torch.float16)


@_fake
def append_kv4(x, codes, params, start, clip, starts=None, slots=None):
    _one_device(x=x, codes=codes, params=params, starts=starts, slots=slots)


@_fake
def rope_append_kv4(
    qkv, cos, sin, had_k, block_size, k_codes, k_params, v_codes, v_params, start, clip, starts=None,
    slots=None,
):  # fmt: skip
    _one_device(qkv=qkv, cos=cos, sin=sin, had_k=had_k, k_codes=k_codes, k_params=k_params,
                v_codes=v_codes, v_params=v_params, starts=starts, slots=slots)  # fmt: skip
    batch, tokens, width = qkv.shape
    head_dim = cos.shape[-1]
    return qkv.new_empty((batch, width // head_dim - 2 * k_codes.shape[1], tokens, head_dim))


@_fake
def attention_kv4(
    q,
    k_codes,
    k_params,
    v_codes,
    v_params,
    length,
    mask,
    causal,
    scaling,
    k_sink=None,
    v_sink=None,
    starts=None,
    block_table=None,
):
    _one_device(q=q, k_codes=k_codes, k_params=k_params, v_codes=v_codes, v_params=v_params, mask=mask,
                k_sink=k_sink, v_sink=v_sink, starts=starts, block_table=block_table)  # fmt: skip
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty((batch, tokens, heads, head_dim))


@_fake
def round_columns(work, coupling, current, grid, group):
    _one_device(work=work, coupling=coupling, current=current, grid=grid, group=group)
    return torch.empty_like(work, dtype=torch.int8), torch.empty_like(work)


@_fake
def decoder_layer(x, *_):
    return torch.empty_like(x)


@_fake
def snap(w, levels):
    _one_device(w=w, levels=levels)
    return torch.empty_like(w)


@_fake
def snap_backward(grad, w, soft, levels):
    _one_device(grad=grad, w=w, soft=soft, levels=levels)
    return torch.empty_like(w), torch.empty_like(soft)


@_fake
def fake_quant_rows(x, clip, kv):
    _one_device(x=x, clip=clip)
    return torch.empty_like(x)


@_fake
def fake_quant_rows_backward(grad, x, clip, kv):
    _one_device(grad=grad, x=x, clip=clip)
    return torch.empty_like(x), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
