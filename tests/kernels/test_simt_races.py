"""Races in the CUDA kernels, looked for on a CPU by csrc/simt/races.h.

Values do not matter here, only who accesses what, and what orders it.
"""

import re
from functools import cache

import numpy as np
import pytest

from support import simt
from support import simt_sanitized as kernels

pytest.importorskip("pybind11")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not simt.CAN_WATCH, reason="races.cpp needs Linux")]

SMALL, LARGE = kernels.SMALL, kernels.LARGE
OUTSIDE = np.array([-3, 2**62], np.int64)
F32, HALF = np.float32, np.float16

#: Every kernel with each way that it may divide its work, at shapes small enough for a shadow of each byte:
#: arguments of the functions of simt_sanitized.py.
KERNELS = {
    "gemv_bmma": (kernels.gemv, [
        dict(bits=2, out=34, features=features, group=group, tokens=tokens, kernel="bmma")
        for tokens, features, group in [(1, 4736, 128), (2, 640, 128), (3, 1024, 256), (1, 128, 128)]
    ]),
    "gemv_imma": (kernels.gemv, [
        dict(bits=bits, out=65, features=features, group=group, kernel="imma", tokens=features // 64 % 8 + 1)
        for bits in (2, 4)
        for features, group in [(2688, 128), (640, 128), (320, 64), (288, 32), (577, 577)]
    ]),
    "linear_w8": (kernels.linear_w8, [
        dict(tokens=tokens, out=out, features=features)
        for tokens, out, features in [(1, 33, 576), (5, 33, 1040), (2, 5, 7)]
    ]),
    "hadamard": (kernels.transform, [
        dict(k=k, power=power, dtype=dtype, shared=LARGE, processors=1, offset=offset)
        for dtype in (F32, HALF)
        for k, power, offset in [(1, 2, 0), (1, 64, 0), (1, 1024, 0), (12, 8, 0), (1, 8192, 1), (172, 4, 0),
                                 (36, 16, 0), (52, 128, 0)]
    ] + [dict(k=44, power=128, dtype=HALF, shared=LARGE, processors=1, arch=90, blocks=1)]),
    "quantize_a4": (kernels.quantize, [
        dict(features=features, groups=groups, k=1, block=1, dtype=HALF, **options)
        for features, groups in [(7, 1), (96, 3), (576, 1), (4096, 32), (20000, 1)]
        for options in ({}, {"eps": 1e-5}, {"up": True})
    ]),
    "hadamard_quantize": (kernels.quantize, [
        dict(features=features, groups=groups, k=k, block=block, dtype=dtype, up=up, shared=LARGE,
             processors=1)
        for dtype, up in ((F32, True), (F32, False), (HALF, False))
        for features, groups, k, block in [(1536, 12, 12, 1536), (192, 2, 12, 96), (11008, 1, 172, 11008)]
    ] + [
        dict(features=5632, groups=1, k=44, block=5632, dtype=HALF, up=True, shared=LARGE,
             processors=1, arch=90)
    ]),
    "kv4": (kernels.rope_append, [
        dict(head_dim=head_dim, k=k, block=block, dtype=HALF, start=start, starts=OUTSIDE if start else None)
        for start in (0, 4)
        for head_dim, k, block in [(30, 1, 2), (64, 1, 64), (96, 12, 96), (256, 1, 256)]
    ] + [
        dict(head_dim=head_dim, k=1, block=head_dim, dtype=HALF, start=4, starts=OUTSIDE, wide=0)
        for head_dim in (64, 128, 256)
    ]),
    "attention_kv4": (kernels.attention, [
        dict(repeat=repeat, tokens=tokens, head_dim=head_dim, length=length, split=split, sinks=sinks,
             heads=1)
        for split in (True, False)
        for repeat, tokens, head_dim, length, sinks in [
            (1, 1, 64, 600, 0), (4, 1, 128, 257, 3), (3, 2, 80, 300, 0), (8, 1, 30, 300, 300),
        ]
    ] + [  # blocks that do several chunks each, without and with sinks in the second
        dict(repeat=4, tokens=1, head_dim=128, length=600, split=True, sinks=sinks, heads=2, processors=1)
        for sinks in (0, 600)
    ]),
    "attention_kv4_paged": (kernels.attention, [
        dict(repeat=repeat, tokens=1, head_dim=head_dim, length=300, split=split, heads=1, size=size)
        for repeat, head_dim, split, size in [(1, 64, True, 16), (4, 128, False, 1), (1, 30, True, 6)]
    ]),
    # More chunks than a block merges at a time.
    "merge_kv4": (kernels.attention, [
        dict(repeat=1, tokens=1, head_dim=2, length=128 * 256 + 1, split=True, batch=1, heads=1)
    ]),
}  # fmt: skip

SOURCES = sorted((simt.ROOT / "csrc/cuda").glob("*.cuh"))
#: Every barrier of the kernels and wait for copies, "file:line", and its line.
BARRIERS = {
    f"{path.name}:{number}": line.strip()
    for path in SOURCES
    if path.name != "ptx.cuh"
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"\b(sync_block|sync_warp|sync_cluster|cp_async_wait<.*>)\(", line)
}
#: Lines of barriers that no run here needs, and why.
NOT_NEEDED = {
    "for copies of the chunk behind the last": "there are none; it says so to who reads on",
    "the quantizers of the token before have been read": "a block has a second one only beyond 2**30 tokens",
}


@cache
def watched():
    return simt.load(simt.build("races"))


@cache
def barriers_of(kernel):
    """Runs a kernel, in which no race may be found. For each barrier the cases that meet at it."""
    run, cases = KERNELS[kernel]
    met = {}
    watched().take_barriers_met()
    for case in cases:
        run(watched(), **case)
        for site in watched().take_barriers_met():
            met.setdefault(site, []).append(case)
    return met


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_race(kernel):
    assert barriers_of(kernel).keys() <= BARRIERS.keys()


def finds_race(kernel, site, case):
    watched().leave_out(site)
    try:
        KERNELS[kernel][0](watched(), **case)
    except (RuntimeError, AssertionError) as error:  # or what came out is wrong
        return "race: " in str(error) or "that it never waited for" in str(error)
    finally:
        watched().leave_out("")
    return False


@pytest.mark.parametrize("site", BARRIERS)
def test_every_barrier_is_met_and_missed(site):
    """The kernels without it have a race, or copies that land when a lane has ended, and that is found."""
    users = [(kernel, case) for kernel in KERNELS for case in barriers_of(kernel).get(site, [])]
    assert users
    needed = not any(text in BARRIERS[site] for text in NOT_NEEDED)
    assert any(finds_race(kernel, site, case) for kernel, case in users) == needed
