"""Run by test_simt_gemv.py with the sanitizers' runtime preloaded: `python -m support.simt_sanitized MODULE`.

Every argument is an array of its own, so that a byte too many is an error. Results are compared in
the files test_simt_*.py; here only numpy is imported, since torch is slow under a sanitizer.
"""

import sys

import numpy as np

from support.simt import load

random = np.random.default_rng(0)


SMALL, LARGE = 99 << 10, 227 << 10  # bytes of shared memory a block may have: sm_86, sm_90


def gemv(module, bits, out, features, group, tokens, kernel="auto"):
    groups = features // group
    y = np.empty((tokens, out), np.float32)
    module.linear_a4(
        random.integers(0, 256, (tokens, -(-features // 2)), np.uint8),
        np.ones((tokens, 1), np.float32),
        random.integers(0, 256, (out, -(-features * bits // 8)), np.uint8),
        random.integers(-128, 128, (out, groups, 4), np.int8) if bits == 2 else None,
        np.full((out, groups), 0x3C00, np.uint16),
        np.ones(out, np.float32),
        np.ones_like(y), y, features, group, "float32", kernel, 90, 1, SMALL, 0,
    )  # fmt: skip
    assert np.isfinite(y).all()


def signs(k):
    return None if k == 1 else random.choice(np.array([-1, 1], np.int8), (k, k))


def transform(module, k, power, dtype, shared, processors=2, offset=0, arch=80, blocks=2):
    n = blocks * k * power
    x = random.standard_normal(3 * n + offset).astype(dtype)[offset:].reshape(3, n)
    y = np.empty_like(x)
    for transpose in (False, True):
        module.hadamard(
            x, y, np.dtype(dtype).name, signs(k), k * power, transpose, arch, processors, shared, 0
        )
        assert np.isfinite(y).all()


def quantize(module, features, groups, k, block, dtype, up=False, eps=None, shared=SMALL, processors=2,
             arch=80):  # fmt: skip
    x = random.standard_normal((3, features)).astype(dtype)
    codes, scale = np.empty((3, -(-features // 2)), np.uint8), np.empty((3, groups), np.float32)
    other = x[::-1].copy() if up else None
    module.quantize_a4(
        x, np.full(1, 0.9, np.float32), codes, scale, np.dtype(dtype).name, other, eps,
        None if eps is None else np.ones(features, np.float32), "float32", signs(k), block, arch,
        processors, shared, 0,
    )  # fmt: skip
    assert np.isfinite(scale).all()


def linear_w8(module, tokens, out, features):
    y = np.empty((tokens, out), np.float32)
    module.linear_w8(
        random.standard_normal((tokens, features)).astype(np.float32),
        random.integers(-128, 128, (out, features), np.int8),
        np.full(out, 0x3C00, np.uint16), np.ones(out, np.float32), y, "float32", 2, SMALL, 0,
    )  # fmt: skip
    assert np.isfinite(y).all()


def rope_append(module, head_dim, k, block, dtype, start, starts=None, wide=2**31, paged=False):
    """`paged`: into blocks of two tokens, some of which are named out of bounds and some not at all."""
    qkv = random.standard_normal((2, 3, 5 * head_dim)).astype(dtype)
    angles = np.ones((2, 3, head_dim), np.float32)
    codes = [np.zeros((2, 1, start + 3, head_dim // 2), np.uint8) for _ in "kv"]
    params = [np.zeros((2, 1, start + 3, 2), np.uint16) for _ in "kv"]
    q = np.empty((2, 3, 3, head_dim), dtype)
    slots = np.array([[3, -1, 2**62], [0, -(2**62), 2 * start + 6]]) if paged else None
    if paged:
        codes, params = ([x.reshape(start + 3, 1, 2, -1) for x in both] for both in (codes, params))
        start = 0
    module.rope_append_kv4(
        qkv, np.dtype(dtype).name, angles, angles, "float32", signs(k), block, codes[0], params[0], codes[1],
        params[1], start, starts, 0.9, q, 0, wide, slots,
    )  # fmt: skip
    assert np.isfinite(q).all()
    module.quantize_kv4(
        q, np.zeros((2, 3, 3, head_dim // 2), np.uint8), np.zeros((2, 3, 3, 2), np.uint16),
        np.dtype(dtype).name, 0, None, 0.9, 0, None,
    )  # fmt: skip


def attention(module, repeat, tokens, head_dim, length, split, sinks=0, starts=None, batch=2, heads=2,
              processors=132, size=0):  # fmt: skip
    """`size`: tokens of a block of a paged cache, in a random order; 0: not paged."""
    q = random.standard_normal((batch, heads * repeat, tokens, head_dim)).astype(np.float16)
    columns = -(-length // size) if size else 0
    shape = (batch * columns, heads, size) if size else (batch, heads, length)
    codes = [random.integers(0, 256, (*shape, head_dim // 2), np.uint8) for _ in "kv"]
    params = [np.full((*shape, 2), 0x3000, np.uint16) for _ in "kv"]
    table = random.permutation(batch * columns).astype(np.int32).reshape(batch, columns) if size else None
    sink = [random.standard_normal((batch, heads, sinks, head_dim)).astype(np.float32) for _ in "kv"]
    mask = np.ones((1, 1, tokens, length), bool)
    y = np.full((batch, tokens, heads * repeat, head_dim), np.nan, np.float16)
    room = np.empty(q.size // head_dim * -(-length // 256) * (head_dim + 2), np.float32) if split else None
    module.attention_kv4(
        q, "float16", codes[0], params[0], codes[1], params[1], length, mask, True, 0.1,
        *(sink if sinks else (None, None)), "float32", starts, y, room, processors, SMALL, 0, table,
    )  # fmt: skip
    assert np.isfinite(y).all()


if __name__ == "__main__":
    module = load(sys.argv[1])
    outside = np.array([-3, 2**62], np.int64)
    for head_dim, k, block in [
        (2, 1, 1),
        (30, 1, 2),
        (64, 1, 64),
        (96, 12, 96),
        (256, 1, 256),
        (1024, 1, 512),
    ]:
        for dtype in (np.float32, np.float16):
            rope_append(module, head_dim, k, block, dtype, 0)
            rope_append(module, head_dim, k, block, dtype, 4, outside)
    for head_dim in (64, 128, 256):
        for dtype in (np.float32, np.float16):
            rope_append(module, head_dim, 1, head_dim, dtype, 4, outside, wide=0)
            for wide in (0, 2**31):
                rope_append(module, head_dim, 1, head_dim, dtype, 4, wide=wide, paged=True)
    for head_dim in (2, 30, 64, 80, 96, 128, 256):
        for repeat, tokens, length in [(1, 1, 1), (4, 1, 256), (3, 2, 257), (1, 1, 600)]:
            for split in (True, False):
                attention(module, repeat, tokens, head_dim, length, split)
        attention(module, 8, 2, head_dim, 300, True, sinks=3)
        attention(module, 1, 1, head_dim, 300, False, sinks=300, starts=outside)
        for size in (1, 6, 16):
            attention(module, 3, 2, head_dim, 301, True, sinks=3, size=size)
            attention(module, 1, 1, head_dim, 301, False, starts=outside, size=size)
    for tokens in (1, 2, 3, 9):
        for features, group in [(128, 128), (640, 128), (4736, 128), (1024, 256), (640, 640)]:
            gemv(module, 2, 34, features, group, tokens, "bmma")
        for bits in (2, 4):
            for features, group in [(128, 128), (640, 128), (2688, 128), (320, 64), (288, 32), (576, 64)]:
                gemv(module, bits, 65, features, group, tokens, "imma")
            for features, group in [(101, 101), (96, 32), (7, 7), (96, 96), (577, 577)]:
                gemv(module, bits, 5, features, group, tokens)
        for out, features in [(33, 576), (5, 7), (2, 1040)]:
            linear_w8(module, tokens, out, features)
    for dtype in (np.float32, np.float16):
        for k, power in [(1, 2), (1, 64), (1, 1024), (1, 8192), (12, 8), (28, 64), (36, 16), (172, 64)]:
            transform(module, k, power, dtype, SMALL if dtype == np.float16 else LARGE)
        for features, groups in [(7, 1), (96, 3), (576, 1), (4096, 32)]:
            quantize(module, features, groups, 1, 1, dtype)
            quantize(module, features, groups, 1, 1, dtype, eps=1e-5)
            quantize(module, features, groups, 1, 1, dtype, up=True)
        for features, k, block in [(1536, 12, 1536), (11008, 172, 11008), (4096, 1, 4096), (192, 12, 96)]:
            quantize(module, features, 1, k, block, dtype, up=True, shared=LARGE)
