"""CPU kernels of linear_w2a4, _w3a4, _w4a4 and linear_w8: every instruction set gives the reference's bits.

A process keeps the instruction set it began with, so each runs this file's `main` in one of its own.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT, TESTS


def instruction_sets() -> list[str]:
    """The sets this machine has, by the names W2A4_CPU_ISA knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        return ["base"]
    flags = set(cpuinfo.read_text().split())
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    found = {
        "base": True,
        "avx2": "avx2" in flags,
        "avxvnni": "avx_vnni" in flags,
        "avx512": avx512,
        "avx512vnni": avx512 and "avx512_vnni" in flags,
    }
    return [name for name, there in found.items() if there]


@pytest.mark.parametrize("isa", instruction_sets())
def test_bits_of_the_reference(isa):
    paths = os.pathsep.join([str(ROOT), str(TESTS)])
    run = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"W2A4_CPU_ISA": isa, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


# What runs in such a process

TOKENS = [1, 2, 3, 5, 8, 16, 17, 33]

#: out, in, group_size, act_group (-1: the whole row).
SHAPES = [
    *[(out, 1536, group, -1) for out, group in [(19, 32), (9, 64), (33, 128), (8, 256), (5, -1)]],
    *[(out, 576, group, -1) for out, group in [(35, 32), (7, 64), (3, 192), (10, 288), (17, -1)]],
    *[(out, features, -1, -1) for out in (1, 12) for features in (1, 7, 100, 1000)],
    *[(11, 512, 32, act) for act in (16, 64, 128)],
    *[(11, 512, 64, act) for act in (16, 32, 128)],
    *[(11, 512, 128, act) for act in (32, 64, 256)],
    *[(11, 1024, 256, act) for act in (8, 32, 64, 128)],
    # blocks that do not fill vectors, units or bytes
    *[(6, 720, group, act) for group, act in [(36, -1), (20, 60), (48, 24), (90, 15), (18, -1), (5, 45)]],
    (2, 32, 32, -1),
    (70, 8448, 64, 128),
    (9, 8448, 128, -1),
]


def packed(torch, bits: int, out: int, features: int, groups: int):
    """Weight, levels and scale: every code occurs, and levels reach both bounds."""
    from w2a4.ops.packing import pack

    scale = (torch.rand(out, groups) + 0.1).half()
    if bits == 4:
        scale[torch.rand(scale.shape) < 0.5] *= -1  # of either sign, as fits give them
        return [pack(torch.randint(-8, 8, (out, features), dtype=torch.int8), 4), scale]
    levels = torch.randint(-128, 128, (out, groups, 2**bits), dtype=torch.int8)
    levels[:, :, 0], levels[:, :, -1] = -128, 127
    return [pack(torch.randint(0, 2**bits, (out, features), dtype=torch.int8), bits), levels, scale]


def check(torch, bits, activations, weights, bias, group, dtype, tokens, what):
    """The op's bits are the reference's, for the first n tokens, n in `tokens`."""
    from support.numerics import assert_close
    from w2a4 import ops
    from w2a4.ops import reference

    rest = (*weights, bias, group, dtype)
    want = getattr(reference, f"linear_w{bits}a4")(*activations, *rest)
    for n in tokens:
        got = getattr(ops, f"linear_w{bits}a4")(*[t[:n] for t in activations], *rest)
        assert_close(got, want[:n], what=f"w{bits} {what}, {n} tokens")


def check_shapes(torch):
    from w2a4.ops import reference

    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    for bits in (2, 3, 4):
        for i, (out, features, group, act) in enumerate(SHAPES):
            group = features if group == -1 else group
            weights = packed(torch, bits, out, features, features // group)
            x = torch.randn(max(TOKENS), features)
            activations = reference.quantize_a4(x, torch.tensor([0.5]), act)
            bias = torch.randn(out).to(dtypes[i % 3]) if i % 2 else None
            what = f"{out}x{features} group {group}, {act}"
            check(torch, bits, activations, weights, bias, group, dtypes[i % 4], TOKENS, what)


def check_extremes(torch):
    """The largest sums of products: 16-bit lanes must not saturate, 32-bit ones end exact."""
    import itertools

    from w2a4.ops.packing import packed_width

    shapes = (4096, 128), (4096, 64), (96, 32), (16384, 16384)
    for (features, group), a_byte, bits in itertools.product(shapes, (0x88, 0x77, 0x87), (2, 3)):
        for level in (-128, 127):
            weight = torch.randint(0, 256, (9, packed_width(features, bits)), dtype=torch.uint8)
            weight[:2] = 0xFF  # one code alone, which is as far from the first as can be
            levels = torch.full((9, features // group, 2**bits), level, dtype=torch.int8)
            levels[:2, :, 0] = -1 - level
            scale = torch.ones(9, features // group).half()
            activations = torch.full((11, features // 2), a_byte, dtype=torch.uint8), torch.ones(11, 1)
            weights = [weight, levels, scale]
            what = f"activations {a_byte:#x}, levels {level}, group {group}"
            check(torch, bits, activations, weights, None, group, torch.float32, (1, 4, 11), what)


def check_special_scales(torch):
    """Scales of float16 that are subnormal, infinite or NaN; activation scales likewise."""
    codes = torch.randint(0, 256, (5, 64), dtype=torch.uint8)
    a_scale = torch.tensor([1e-40, 1.0, float("inf"), float("nan"), 3e38])[:, None]
    for bits in (2, 3):
        weights = packed(torch, bits, 12, 128, 2)
        weights[2][:5, 0] = torch.tensor([6e-8, -6e-8, float("inf"), float("nan"), 65504.0]).half()
        check(torch, bits, (codes, a_scale), weights, None, 64, torch.float32, (1, 4, 5), "special scales")


def check_one_token_of_w8(torch):
    """One token has a kernel of its own: the same bits as among others."""
    from support.numerics import assert_close
    from w2a4 import ops

    for out, features in ((1, 1), (9, 15), (130, 64), (7, 577)):
        x = torch.randn(3, features)
        weight = torch.randint(-128, 128, (out, features), dtype=torch.int8)
        rest = torch.rand(out).half(), torch.randn(out)
        assert_close(ops.linear_w8(x[:1], weight, *rest), ops.linear_w8(x, weight, *rest)[:1])


def main():
    import types

    package = types.ModuleType("w2a4")  # ops only: the whole package imports transformers
    package.__path__ = [str(ROOT / "w2a4")]
    sys.modules["w2a4"] = package
    import torch

    from w2a4 import ops

    assert ops.build_info().startswith("w2a4._C: CPU"), ops.build_info()
    torch.manual_seed(0)
    check_shapes(torch)
    check_extremes(torch)
    check_special_scales(torch)
    check_one_token_of_w8(torch)


if __name__ == "__main__":
    main()
