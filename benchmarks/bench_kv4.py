"""Attention on the 4-bit KV cache: one new token of every sequence, and a whole prompt (`prefill_kv4`).

    python -m benchmarks.bench_kv4 [--device cpu|cuda] [--json FILE] [--models NAME] ...
        [--shapes 32x8x128x4096] [--tokens 1,8] [--threads N] [--quick]

A shape is query heads, KV heads, head_dim and keys in the cache; --tokens are sequences. Peers: PyTorch's
scaled_dot_product_attention on a cache of 16 bits (32 on the CPU), and a copy of the same bytes. RoPE and
append do not depend on how many keys there are, and are measured once a model. A prompt is as long as its
cache, if that is 4096 keys at most (512 on the CPU).
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import checks, peers
from benchmarks.harness import Case, Options, Subject, command, skip
from benchmarks.shapes import MODELS
from benchmarks.timing import Copies, Workload, tensor_bytes
from w2a4 import ops
from w2a4.format.hadamard import had_k_matrix, hadamard_spec

DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float16, torch.bfloat16)}
CHOSEN = ("llama-2-7b", "llama-3-8b", "llama-3.2-1b")
CONTEXTS = (1024, 4096, 32768)
SEQUENCES = (1, 8)
#: Longest prompt, whose attention costs as the square of it.
PROMPT = {"cpu": 512, "cuda": 4096}
#: The peer's cache may take as many bytes; our own takes a quarter.
MAX_CACHE = {"cpu": 1 << 30, "cuda": 8 << 30}
CLIP = 0.95

Shape = tuple[int, int, int, int]


@lru_cache(maxsize=1)
def packed(sequences: int, shape: Shape, device: str) -> Copies:
    """A random cache: codes and params of keys, then of values."""
    _, heads, head_dim, keys = shape
    tensors = []
    for _ in range(2):
        codes = torch.randint(
            0, 256, (sequences, heads, keys, head_dim // 2), dtype=torch.uint8, device=device
        )
        params = torch.rand(sequences, heads, keys, 2, device=device) * 0.2 + 0.1
        params[..., 1] *= -10
        tensors += [codes, params.half()]
    return Copies(*tensors)


@lru_cache(maxsize=1)
def plain(sequences: int, shape: Shape, dtype: torch.dtype, device: str) -> Copies:
    """The same of full precision, other numbers."""
    _, heads, head_dim, keys = shape
    return Copies(*(torch.randn(sequences, heads, keys, head_dim, dtype=dtype, device=device) for _ in "kv"))


def sdpa(q: Tensor, shape: Shape, sequences: int, causal: bool = False) -> Workload:
    data = plain(sequences, shape, q.dtype, q.device.type)
    grouped = shape[0] != shape[1]
    name = f"sdpa.{str(q.dtype).removeprefix('torch.')}"
    attend = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=grouped)
    return Workload(name, lambda k, v: attend(q, k, v), data)


def attention(shape: Shape, sequences: int, dtype: torch.dtype, device: str) -> Subject:
    heads, kv_heads, head_dim, keys = shape
    q = torch.randn(sequences, heads, 1, head_dim, dtype=dtype, device=device)
    data = packed(sequences, shape, device)

    def call(*kv: Tensor) -> Tensor:
        return ops.attention_kv4(q, *kv, keys, None, True, head_dim**-0.5)

    (kv,) = data.take(1)
    moved = data.bytes + 2 * tensor_bytes(q)
    others = [peers.copy_of(moved, device)]
    if 2 * sequences * kv_heads * keys * head_dim * dtype.itemsize <= MAX_CACHE[device]:
        others.insert(0, sdpa(q, shape, sequences))
    else:
        skip(f"sdpa of {keys} keys, {sequences} sequences", "its cache is too large")
    check = partial(lambda: checks.attention_agrees(call(*kv), q, kv, keys, head_dim**-0.5))
    return Subject(Workload("attention_kv4", call, data), others, moved, check)


def prefill(shape: Shape, sequences: int, dtype: torch.dtype, device: str) -> Subject:
    heads, _, head_dim, keys = shape
    q = torch.randn(sequences, heads, keys, head_dim, dtype=dtype, device=device)
    data = packed(sequences, shape, device)

    def call(*kv: Tensor) -> Tensor:
        return ops.attention_kv4(q, *kv, keys, None, True, head_dim**-0.5)

    (kv,) = data.take(1)
    # Triton rounds weights and values to 11 bits.
    atol = 1e-5 if device == "cpu" else 3 * 2.0**-11
    check = partial(lambda: checks.attention_agrees(call(*kv), q, kv, keys, head_dim**-0.5, atol))
    moved = data.bytes + 2 * tensor_bytes(q)
    return Subject(Workload("attention_kv4", call, data), [sdpa(q, shape, sequences, True)], moved, check)


def rope_append(shape: Shape, sequences: int, dtype: torch.dtype, device: str) -> Subject:
    heads, kv_heads, head_dim, _ = shape
    qkv = torch.randn(sequences, 1, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    angles = torch.randn(sequences, 1, head_dim // 2, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    (cache,) = packed(sequences, (heads, kv_heads, head_dim, 16), device).take(1)
    spec = hadamard_spec(head_dim)
    r3 = had_k_matrix(spec.k, device), spec.block_size
    data = Copies(qkv, cos, sin, *cache)

    def call(qkv: Tensor, cos: Tensor, sin: Tensor, *kv: Tensor) -> Tensor:
        return ops.rope_append_kv4(qkv, cos, sin, *r3, *kv, 7, CLIP)

    written = 2 * sequences * kv_heads * (head_dim // 2 + 4)
    moved = tensor_bytes(qkv, cos, sin) + sequences * heads * head_dim * dtype.itemsize + written
    (tensors,) = data.take(1)
    check = partial(lambda: checks.append_agrees(call, tensors, r3, 7, CLIP))
    return Subject(Workload("rope_append_kv4", call, data), [peers.copy_of(moved, device)], moved, check)


def plan(options: Options) -> list[Case]:
    models = options.models or (("llama-3-8b",) if options.quick else CHOSEN)
    contexts = CONTEXTS[1:] if options.quick else CONTEXTS
    heads = [(m.heads, m.kv_heads, m.head_dim) for m in (MODELS[name] for name in models)]
    shapes = list(options.shapes) or [(*head, keys) for head in heads for keys in contexts]
    dtypes = DTYPES[options.device][: 1 if options.quick else None]
    firsts = {shape[:3]: shape for shape in reversed(shapes)}
    prompts = [shape for shape in shapes if shape[3] <= PROMPT[options.device]]
    return [
        Case(op, "x".join(map(str, shape[:width])), sequences, str(dtype).removeprefix("torch."),
             partial(build, shape, sequences, dtype, options.device))
        for op, build, width, chosen in (("rope_append_kv4", rope_append, 3, reversed(firsts.values())),
                                         ("attention_kv4", attention, 4, shapes),
                                         ("prefill_kv4", prefill, 4, prompts))
        for shape in chosen
        for dtype in dtypes
        for sequences in (options.tokens or SEQUENCES)[: 1 if build is prefill else None]
    ]  # fmt: skip


main = command(__doc__, plan, "HEADSxKVxDIMxKEYS")

if __name__ == "__main__":
    main()
