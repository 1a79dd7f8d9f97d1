"""Which kernel runs, where an op has more than one: the rule behind the table in `docs/kernels.md`.

`W2A4_BACKEND`, read once, forces a choice: `cuda` (w2a4._cuda), `triton`, `reference`, or `auto`.

Both kernels add the exact integer sums of the reference. With several scales a token the Triton GEMM gives
its bits; with one it adds groups by fma and multiplies the token's scale in last. The CUDA GEMV adds them in
another order and multiplies that scale in last too (`csrc/cuda/gemv.cuh`), so all three differ by the
rounding of float32, unless that happens to be exact. On a CUDA device with both, a token's last bits may thus
change where the number of tokens passes `GEMV_TOKENS`; with `W2A4_BACKEND=cuda` or `triton` they do not.
Attention differs more: w2a4._cuda multiplies integers of 30 bits, Triton 16-bit floats, as any flash
attention does.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError

BACKENDS = ("auto", "cuda", "triton", "reference")

#: Most tokens that the CUDA GEMV serves if the Triton GEMM is there. Instructions a 2-bit weight on sm_90,
#: counted in SASS: gemv_imma 1.46 for every 8 tokens; the GEMM's tiles of 16 tokens 3.1, of 32 tokens 4.1.
#: At 16 tokens that is 2.9 against 3.1, and the GEMV fills the GPU better; at 24 it is 4.4 against 4.1, and
#: the GEMM reads the weights once instead of three times. Not measured yet.
GEMV_TOKENS = 16

#: Most queries of a sequence that attention_kv4 of w2a4._cuda serves if Triton is there. That kernel decodes
#: keys and values anew for every 8 rows (tokens times query heads of a KV head) and divides them among thread
#: blocks; Triton's decodes them once a call, then a block takes up to 128 tokens of a head. Not measured yet.
DECODE_TOKENS = 64

#: A 32-bit sum of the GEMM holds this many products, see `MAX_BLOCK` in `kernels/w2a4_triton/gemm.py`.
_MOST_INPUTS = (2**31 - 1) // 2**14

_GEMM_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _from_environment() -> str:
    name = os.environ.get("W2A4_BACKEND") or "auto"
    if name not in BACKENDS:
        raise BackendError(f"W2A4_BACKEND={name} is not a back end; set one of {', '.join(BACKENDS)}")
    return name


backend = _from_environment()


def prefers_triton(
    a_codes: Tensor, a_scale: Tensor, scale: Tensor, group_size: int, out_dtype: torch.dtype, cuda: bool
) -> bool:
    """Whether `linear_kernel` gives a call to Triton; `cuda` says whether w2a4._cuda is loaded.

    `ops` does not ask on a CPU unless a back end is forced: there, at one token, a microsecond counts.
    """
    act_group = scale.shape[-1] * group_size // max(a_scale.shape[-1], 1)
    block, tokens = min(group_size, act_group), math.prod(a_codes.shape[:-1])
    return linear_kernel(a_codes.device, tokens, block, out_dtype, cuda) == "triton"


def linear_kernel(
    device: torch.device, tokens: int, block: int, out_dtype: torch.dtype, compiled: bool
) -> str:
    """What runs a linear layer on packed weights: "cpu", "cuda", "triton" or "reference".

    Args:
        block: inputs that share both scales.
        compiled: whether w2a4's compiled kernels for this device are loaded.

    Raises:
        BackendError: W2A4_BACKEND asks for what cannot run this.
    """
    if backend == "reference" or device.type == "meta":
        return "reference"
    if device.type == "cuda":
        return _cuda_linear_kernel(device, tokens, block, out_dtype, compiled)
    if backend == "triton" and device.type == "cpu":
        missing = why_no_triton(None) or _unfit(block, out_dtype)
        return "triton" if not missing else _impossible(device, missing, "")
    if backend != "auto":
        _impossible(device, "there it has no kernels", "")
    return "cpu" if device.type == "cpu" and compiled else "reference"


def _cuda_linear_kernel(device, tokens, block, out_dtype, compiled) -> str:
    if compiled and (backend == "cuda" or backend == "auto" and tokens <= GEMV_TOKENS):
        return "cuda"
    missing = why_no_triton(device.index) or _unfit(block, out_dtype)
    if backend == "cuda":
        _impossible(device, "w2a4._cuda is not loaded", "" if missing else "triton, ")
    if not missing:
        return "triton"
    if backend == "triton":
        _impossible(device, missing, "cuda, " if compiled else "")
    if not compiled:
        return "reference"  # which warns by itself
    _warn_once(f"w2a4's linear layers on more than {GEMV_TOKENS} tokens run on the CUDA GEMV, 8 tokens at a "
               f"time, and not on the faster Triton GEMM: {missing}")  # fmt: skip
    return "cuda"


def attention_kernel(
    device: torch.device, tokens: int, head_dim: int, dtype: torch.dtype, compiled: bool
) -> str:
    """What runs attention of `tokens` queries a sequence on the packed cache, as `linear_kernel` names it.

    W2A4_BACKEND=triton takes Triton's kernel wherever it serves, and another one where it does not.
    """
    if backend == "reference" or device.type == "meta":
        return "reference"
    if device.type == "cuda":
        other = "cuda" if compiled else "reference"
        if backend == "cuda" or compiled and backend == "auto" and tokens <= DECODE_TOKENS:
            return other
    elif device.type == "cpu":
        other = "cpu" if compiled else "reference"
        if backend != "triton":
            return other
    else:
        return "reference"
    missing = why_no_triton(device.index if device.type == "cuda" else None)
    if not missing and (dtype not in (torch.float16, torch.bfloat16) or head_dim > 256 or head_dim % 2):
        missing = f"it takes float16 and bfloat16 and an even head_dim up to 256, not {dtype} and {head_dim}"
    if not missing:
        return "triton"
    if other == "cuda" and backend == "auto":
        _warn_once(f"w2a4's attention of more than {DECODE_TOKENS} tokens runs on its CUDA kernel for "
                   f"decoding and not on the faster one of Triton: {missing}")  # fmt: skip
    return other


def has_triton_training(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether training's own ops on such tensors run on Triton; on CPUs in the interpreter, if forced.

    Raises:
        BackendError: W2A4_BACKEND=triton where Triton does not run.
    """
    if backend in ("cuda", "reference") or dtype not in _GEMM_DTYPES:
        return False
    if device.type != "cuda" and (backend == "auto" or device.type != "cpu"):
        return False
    missing = why_no_triton(device.index)
    if missing and backend == "triton":
        _impossible(device, missing, "cuda, " if device.type == "cuda" else "")
    return not missing


def _impossible(device: torch.device, why: str, others: str) -> str:
    raise BackendError(
        f"W2A4_BACKEND={backend} can not be used for tensors on {device.type}: {why}; "
        f"possible here: auto, {others}reference"
    )


def _unfit(block: int, out_dtype: torch.dtype) -> str:
    """Empty, or why the Triton GEMM does not take a call."""
    if block % 32 != 0 or block > _MOST_INPUTS:
        return f"scales are shared by groups of {block} inputs, it takes multiples of 32 up to {_MOST_INPUTS}"
    return "" if out_dtype in _GEMM_DTYPES else f"it does not write {out_dtype}"


_no_triton: dict[int | None, str] = {}
_warned: set[str] = set()


# torch.compile calls these two while it traces and keeps what they return.


@torch.compiler.assume_constant_result
def why_no_triton(index: int | None) -> str:
    """Empty, or why Triton kernels do not run on this CUDA device (None: on CPUs). Imports them."""
    if index not in _no_triton:
        _no_triton[index] = _look_for_triton(index)
    return _no_triton[index]


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)


def _import_triton_kernels() -> Any:
    """Register the ops of all Triton kernels; returns their module `language`.

    In a source tree that is not installed, the package lies where setup.py takes it from.
    """
    name = "w2a4.triton_kernels"
    beside = Path(__file__).parents[2] / "kernels" / "w2a4_triton" / "__init__.py"
    if importlib.util.find_spec(name) is None and beside.is_file():
        spec = importlib.util.spec_from_file_location(name, beside)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    kernels = ("attention", "distill", "fake_quant", "gemm", "language", "ldp")
    return {kernel: importlib.import_module(f"{name}.{kernel}") for kernel in kernels}["language"]


def _look_for_triton(index: int | None) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, `pip install triton`"
    try:
        language = _import_triton_kernels()
    except Exception as error:  # an old or a broken triton fails in many ways
        return f"triton can not be used ({type(error).__name__}: {error}), `pip install --upgrade triton`"
    if index is None:
        interpreted = bool(language.INTERPRET.value)
        return "" if interpreted else "Triton runs there in its interpreter only, with TRITON_INTERPRET=1"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major >= 8 else f"its kernels are for sm_80 and later, this device is sm_{major}{minor}"
