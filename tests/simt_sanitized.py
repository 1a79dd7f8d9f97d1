"""Run by test_simt_gemv.py with the sanitizers' runtime preloaded: `simt_sanitized.py MODULE`.

Every argument is an array of its own, so that a byte too many is an error. Results are compared in
test_simt_gemv.py; here only numpy is imported, since torch is slow under a sanitizer.
"""

import sys

import numpy as np
from simt import load

random = np.random.default_rng(0)


def run(module, bits, out, features, group, tokens, gemv="auto"):
    groups = features // group
    y = np.empty((tokens, out), np.float32)
    module.linear_a4(
        random.integers(0, 256, (tokens, -(-features // 2)), np.uint8),
        np.ones((tokens, 1), np.float32),
        random.integers(0, 256, (out, -(-features * bits // 8)), np.uint8),
        random.integers(-128, 128, (out, groups, 4), np.int8) if bits == 2 else None,
        np.full((out, groups), 0x3C00, np.uint16),
        np.ones(out, np.float32),
        y, features, group, "float32", gemv, 90, 99 << 10, 0,
    )  # fmt: skip
    assert np.isfinite(y).all()


if __name__ == "__main__":
    module = load(sys.argv[1])
    for tokens in (1, 2, 3, 9):
        for features, group in [(128, 128), (640, 128), (4736, 128), (1024, 256), (640, 640)]:
            run(module, 2, 17, features, group, tokens, "bmma")
        for bits in (2, 4):
            for features, group in [(128, 128), (640, 128), (2688, 128), (320, 64), (288, 32), (576, 64)]:
                run(module, bits, 33, features, group, tokens, "imma")
            for features, group in [(101, 101), (96, 32), (7, 7), (96, 96), (577, 577)]:
                run(module, bits, 5, features, group, tokens)
