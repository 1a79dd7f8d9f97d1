"""The CUDA kernels of `hadamard` and of the ops that end in `quantize_a4`, run on a CPU lane by lane."""

import pytest
import torch
import torch.nn.functional as F

from support import simt
from support.numerics import UNIT, assert_close, assert_quantized
from support.simt_arrays import (
    BF16,
    F32,
    HALF,
    LARGE,
    NAMES,
    NEEDS_PYBIND11,
    SMALL,
    aligned,
    guarded,
    numpy_of,
    signs_of,
)
from w2a4.format.hadamard import had_k_matrix, hadamard_spec
from w2a4.ops import reference

CLIP = torch.tensor([0.9])
EPS = 1e-5

pytestmark = NEEDS_PYBIND11


def hadamard(x, had_k, block, transpose=False, arch=80, processors=1, shared=SMALL, seed=0):
    """What the kernel makes of x [rows, n], and how it was divided."""
    y, intact = guarded(x.shape, x.dtype)
    signs = signs_of(had_k)
    plan = simt.load().hadamard(
        numpy_of(x), numpy_of(y), NAMES[x.dtype], signs, block, transpose, arch, processors, shared, seed
    )
    assert intact()
    return y, plan


def fast_hadamard(x, had_k, block, transpose=False):
    """`reference.hadamard` of float64, by butterflies: the matrix of a large block does not fit."""
    k = 1 if had_k is None else had_k.shape[0]
    v = x.reshape(-1, k, block // k)
    half = 1
    while half < block // k:
        pairs = v.reshape(len(v), k, -1, 2, half)
        v = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
        v, half = v.reshape(len(v), k, -1), 2 * half
    if had_k is not None:
        h = had_k.double()
        v = torch.einsum("bim,io->bom", v, h.T if transpose else h)
    return (v / block**0.5).reshape(x.shape)


def sums_of(x, block):
    """What signed sums of a block stay below, times 1 / sqrt(block), at each element: the sum of magnitudes,
    or eight standard deviations of random signs."""
    blocks = x.unflatten(-1, (-1, block))
    sums = blocks.abs().sum(-1, keepdim=True) / block**0.5
    sums = torch.minimum(sums, 8 * blocks.square().mean(-1, keepdim=True).sqrt())
    return sums.expand_as(blocks).flatten(-2)


def error_of(x, had_k, block):
    """Of float32 sums in any order: log2 of the power of two roundings, three terms for each row of R."""
    k = 1 if had_k is None else had_k.shape[0]
    power = block // k
    rows = k * min(64, power)
    return (power.bit_length() + 3 * rows / 16 + 3) * 2 * UNIT * sums_of(x, block)


def assert_hadamard(x, had_k, block, transpose=False, **kwargs):
    y, plan = hadamard(x, had_k, block, transpose, **kwargs)
    wide = x.double()
    exact = fast_hadamard(wide, had_k, block, transpose)
    error = error_of(wide, had_k, block)
    # A result of 2 bytes is rounded once more; subnormal ones to a fixed step.
    last, step = {F32: (0, 1e-44), HALF: (2.0**-11, 2.0**-25), BF16: (2.0**-8, 1e-40)}[x.dtype]
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= error + last * (exact.abs() + error) + step).all()
    return y, plan


#: n, rows; the transform is the one of hadamard_spec(n).
SIZES = [
    (1, 5), (2, 7), (4, 33), (8, 3), (16, 9), (32, 130), (64, 70), (128, 33), (256, 9), (512, 5), (1024, 5),
    (2048, 3), (4096, 3), (8192, 1), (16384, 1), (32768, 1), (65536, 1),
    (12, 5), (24, 7), (48, 5), (96, 3), (28 * 4, 3), (576, 5), (688, 2), (1536, 3), (5632, 2), (8960, 1),
    (11008, 1), (13824, 1), (14336, 1), (28672, 1), (27648, 1), (53248, 1),
]  # fmt: skip


@pytest.mark.parametrize("n,rows", SIZES)
@pytest.mark.parametrize("dtype", [F32, HALF, BF16])
def test_hadamard(n, rows, dtype):
    if dtype == BF16 and n > 20000:
        pytest.skip("float16 of the same size covers it")
    spec = hadamard_spec(n)
    assert_hadamard(aligned(torch.randn(rows, n).to(dtype)), had_k_matrix(spec.k), spec.block_size)


def test_fast_hadamard_is_the_reference():
    for n, transpose in [(96, False), (112, True), (688, True), (64, False)]:
        spec, x = hadamard_spec(n), torch.randn(2, n, dtype=torch.float64)
        args = x, had_k_matrix(spec.k), spec.block_size, transpose
        torch.testing.assert_close(fast_hadamard(*args), reference.hadamard(*args), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [112, 688, 3584, 11008, 14336])
@pytest.mark.parametrize("dtype", [F32, HALF])
def test_transpose_inverts(n, dtype):
    spec = hadamard_spec(n)
    had_k = had_k_matrix(spec.k)
    assert not torch.equal(had_k, had_k.T)
    x = aligned(torch.randn(1, n).to(dtype))
    y, _ = assert_hadamard(x, had_k, n)
    back, _ = assert_hadamard(y, had_k, n, transpose=True)
    wide = (x.double(), had_k, n)
    rounding = {F32: 0, HALF: 2.0**-11}[dtype] * (sums_of(y.double().abs(), n) + x.double().abs()) + 1e-7
    assert ((back.double() - x.double()).abs() <= 4 * error_of(*wide) + rounding).all()


#: n of several blocks a row: k, block
DIAGONAL = [(320, 1, 64), (8640, 1, 64), (384, 1, 128), (13440, 1, 128), (1024, 1, 2), (192, 12, 48),
            (720, 12, 24), (4608, 36, 576), (6144, 12, 1536)]  # fmt: skip


@pytest.mark.parametrize("n,k,block", DIAGONAL)
@pytest.mark.parametrize("dtype", [F32, HALF])
def test_blocks_in_a_row(n, k, block, dtype):
    assert_hadamard(aligned(torch.randn(3, n).to(dtype)), had_k_matrix(k), block)


@pytest.mark.parametrize("k,block", [(1, 64), (1, 512), (28, 224), (12, 1536), (1, 8192)])
@pytest.mark.parametrize("dtype", [F32, HALF])
def test_unaligned_pointers_give_the_same_bits(k, block, dtype):
    x = torch.randn(3, block).to(dtype)
    want, plan = hadamard(aligned(x), had_k_matrix(k), block)
    got, slow_plan = hadamard(aligned(x, 1), had_k_matrix(k), block)
    assert plan["vector"] and not slow_plan["vector"]
    assert_close(got, want)


@pytest.mark.parametrize("had_k", [[[1]], [[-1]], [[1, 1], [1, -1]], [[-1, 1], [1, 1]]])
def test_small_had_k(had_k):
    had_k = torch.tensor(had_k, dtype=torch.int8)
    for power in (1, 8, 128):
        assert_hadamard(torch.randn(3, power * len(had_k)), had_k, power * len(had_k))


@pytest.mark.parametrize("n,rows", [(64, 300), (128, 70), (576, 9), (4096, 3), (8192, 3), (11008, 2)])
@pytest.mark.parametrize("dtype", [F32, HALF])
def test_bits_do_not_depend_on_the_order_of_lanes_or_the_division(n, rows, dtype):
    spec = hadamard_spec(n)
    x, had_k = aligned(torch.randn(rows, n).to(dtype)), had_k_matrix(spec.k)
    want, _ = hadamard(x, had_k, n, processors=1, seed=1)
    for kwargs in ({"seed": 2}, {"processors": 132, "shared": LARGE}, {"processors": 2}):
        assert_close(hadamard(x, had_k, n, **kwargs)[0], want)


@pytest.mark.parametrize("dtype", [F32, HALF])
def test_nan_and_infinity_stay_in_their_block(dtype):
    x = torch.randn(40, 128).to(dtype)
    x[3, 7], x[20, 100], x[21, 0] = float("nan"), float("inf"), -float("inf")
    for block, rows in ((64, 80), (128, 40)):
        y = hadamard(aligned(x.view(rows, block)), None, block)[0].view(40, 128)
        bad = ~y.isfinite().view(rows, block).all(1)
        assert bad.sum() == 3
        want = fast_hadamard(x.double(), None, block).view(rows, block).to(dtype)
        assert_close(y.view(rows, block)[bad].isnan(), want[bad].isnan())
        assert_close(y.view(rows, block)[bad].nan_to_num(0.0), want[bad].nan_to_num(0.0))


def test_too_large_and_float64_are_refused():
    with pytest.raises(RuntimeError, match="not float64; convert"):
        hadamard(torch.randn(1, 64, dtype=torch.float64), None, 64)
    with pytest.raises(RuntimeError, match="shared memory, this device has 1000"):
        hadamard(torch.randn(1, 16384), None, 16384, shared=1000)


#: n, blocks of the cluster that does a token, columns that a warp mixes at once in tiles of 8
CLUSTERS = [(2048, 1, 2), (4096, 1, 2), (5632, 2, 2), (8960, 4, 2), (11008, 8, 1), (13824, 4, 2),
            (14336, 4, 2), (28672, 8, 2)]  # fmt: skip


@pytest.mark.parametrize("n,cluster,at_once", CLUSTERS)
@pytest.mark.parametrize("dtype", [F32, HALF, BF16])
def test_hadamard_by_clusters(n, cluster, at_once, dtype):
    if dtype == BF16 and n > 5000:
        pytest.skip("float16 of the same size covers it")
    had_k = had_k_matrix(hadamard_spec(n).k)
    x = aligned(torch.randn(1 if n > 20000 else 3, n).to(dtype))
    for transpose in (False, True) if had_k is not None else (False,):
        y, plan = assert_hadamard(x, had_k, n, transpose, arch=90, shared=LARGE)
        assert (plan["cluster"], plan["at_once"]) == (cluster, at_once)
        assert plan["blocks"] <= 2 * cluster  # so that a cluster does several tokens
    many, plan = hadamard(x, had_k, n, transpose, arch=90, processors=132, shared=LARGE, seed=1)
    assert plan["blocks"] == cluster * len(x)
    assert_close(many, y)


def test_what_no_cluster_takes_has_a_kernel():
    for n, offset, arch in [(1024, 0, 90), (4096, 1, 90), (11008, 0, 80)]:
        x = aligned(torch.randn(1, n).half(), offset)
        assert assert_hadamard(x, had_k_matrix(hadamard_spec(n).k), n, arch=arch)[1]["cluster"] == 0


# ---- quantize_a4


def quantize(x, clip=CLIP, group=-1, up=None, eps=None, weight=None, had_k=None, block=1, offset=0,
             arch=80, processors=1, shared=SMALL, seed=0):  # fmt: skip
    """codes and scale of the kernel for x [tokens, features], and how it was divided."""
    tokens, features = x.shape
    groups = 1 if group == -1 else features // group
    codes, codes_intact = guarded((tokens, (features + 1) // 2), torch.uint8, offset)
    scale, scale_intact = guarded((tokens, groups), F32)
    plan = simt.load().quantize_a4(
        numpy_of(x), clip.numpy(), codes.numpy(), scale.numpy(), NAMES[x.dtype],
        None if up is None else numpy_of(up), eps, None if weight is None else numpy_of(weight),
        NAMES[F32 if weight is None else weight.dtype], signs_of(had_k), block, arch, processors,
        shared, seed,
    )  # fmt: skip
    assert codes_intact() and scale_intact()
    return (codes, scale), plan


def special_rows(features):
    """Rows with zeros, NaN, infinity, the largest and the smallest numbers, ties."""
    x = torch.randn(9, features)
    x[1] = 0
    x[2, features // 2], x[3, -1], x[4, 0] = float("nan"), float("inf"), -float("inf")
    x[5] *= 3e37 / x[5].abs().max()
    x[6] *= 1e-41
    x[7] = torch.randint(-14, 15, (features,)) / 2
    x[7, 0] = 7
    x[8, -1] = x[8, 0] = x[8].abs().max() + 1  # two that are opposite
    x[8, 0] *= -1
    x[8] *= 1e-30
    return x


@pytest.mark.parametrize("features,group", [(1, -1), (2, 1), (7, -1), (8, -1), (90, 15), (255, -1),
                                            (576, 64), (96, 12), (4096, -1), (4096, 128), (20000, -1),
                                            (20008, 8)])  # fmt: skip
@pytest.mark.parametrize("dtype", [F32, HALF, BF16])
@pytest.mark.parametrize("clip", [0.9, 1.0, -0.9, -1.0])
def test_quantize_a4_is_bit_exact(features, group, dtype, clip):
    if features > 4096 and (dtype == BF16 or abs(clip) == 1.0):
        pytest.skip("covered by the others")
    x = special_rows(features) if features <= 4096 else torch.randn(2, features)
    x, clip = aligned(x.to(dtype)), torch.tensor([clip])
    for got, want in zip(quantize(x, clip, group)[0], reference.quantize_a4(x, clip, group), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("features", [64, 70])
def test_unaligned_quantize_a4(features, offset):
    x = torch.randn(5, features).half()
    want = reference.quantize_a4(x, CLIP)
    for got, w in zip(quantize(aligned(x, offset), offset=1 - offset)[0], want, strict=True):
        assert_close(got, w)


def test_quotients_are_correctly_rounded():
    """Numbers next to the middle between two codes, for many scales: a quotient off by a unit shows."""
    scale = torch.rand(200, 1, dtype=torch.float64) * 2.0 ** torch.randint(-120, 120, (200, 1))
    steps = torch.arange(-7, 7, dtype=torch.float64).repeat(9) + 0.5
    x = (scale.float().double() * steps).float()
    bits = x.view(torch.int32) + torch.arange(-4, 5, dtype=torch.int32).repeat_interleave(14)
    x = torch.cat([bits.view(F32), 7 * scale.float(), torch.zeros(200, 1)], 1)
    for clip in (torch.ones(1), torch.tensor([-8 / 7])):
        for got, want in zip(quantize(aligned(x), clip)[0], reference.quantize_a4(x, clip), strict=True):
            assert_close(got, want)


#: tokens, features, K of had_k, block_size, group_size
FUSED = [
    (5, 64, 1, 64, -1), (3, 96, 12, 96, -1), (3, 96, 12, 48, 32), (3, 224, 28, 112, -1),
    (5, 576, 36, 576, 64),
    (2, 1536, 12, 1536, -1), (2, 688, 172, 344, -1), (2, 2048, 1, 512, 1024), (3, 20, 1, 4, 5),
    (3, 12, 12, 12, -1), (3, 90, 1, 2, 15), (1, 4096, 1, 4096, -1), (2, 8640, 1, 64, -1),
    (1, 5632, 44, 5632, 128),
    (1, 11008, 172, 11008, -1), (1, 14336, 28, 14336, -1), (1, 28672, 28, 28672, 1024),
    (1, 27648, 108, 27648, -1),
    (1, 53248, 52, 53248, -1), (1, 40000, 1, 32, -1), (9, 128, 1, 128, -1),
]  # fmt: skip


@pytest.mark.parametrize("tokens,features,k,block,group", FUSED)
@pytest.mark.parametrize("dtype", [F32, HALF, BF16])
def test_hadamard_a4(tokens, features, k, block, group, dtype):
    if dtype == BF16 and features > 6000:
        pytest.skip("float16 covers it")
    had_k, x = had_k_matrix(k), aligned(torch.randn(tokens, features).to(dtype))
    wide, clip = x.double(), -CLIP if dtype == HALF else CLIP
    got, _ = quantize(x, clip, group, had_k=had_k, block=block)
    assert_quantized(got, fast_hadamard(wide, had_k, block), error_of(wide, had_k, block), clip, group)


@pytest.mark.parametrize("tokens,features,k,block,group", [*FUSED, (3, 7, 1, 1, -1), (2, 4096, 1, 1, 64)])
@pytest.mark.parametrize("dtype,shared", [(F32, SMALL), (HALF, SMALL), (BF16, LARGE)])
def test_silu_mul_hadamard_a4(tokens, features, k, block, group, dtype, shared):
    had_k = had_k_matrix(k)
    gate = aligned((torch.randn(tokens, features) * 4).to(dtype))
    up = aligned(torch.randn(tokens, features).to(dtype))
    got, _ = quantize(gate, group=group, up=up, had_k=had_k, block=block, shared=shared)
    inner = F.silu(gate.double()) * up.double()
    exact = fast_hadamard(inner, had_k, block)
    error = (error_of(inner, had_k, block) if block > 1 else 0) + 10 * UNIT * sums_of(inner, block)
    assert_quantized(got, exact, error, CLIP, group)


@pytest.mark.parametrize("n", [4096, 11008, 14336, 28672])
@pytest.mark.parametrize("dtype", [F32, HALF, BF16])
@pytest.mark.parametrize("silu", [False, True])
def test_hadamard_a4_by_clusters(n, dtype, silu):
    if dtype == BF16 and n > 5000:
        pytest.skip("float16 of the same size covers it")
    had_k = had_k_matrix(hadamard_spec(n).k)
    x, up = (aligned(torch.randn(1 if n > 20000 else 3, n).to(dtype)) for _ in "xu")
    args = dict(up=up if silu else None, had_k=had_k, block=n, arch=90, shared=LARGE)
    got, plan = quantize(x, **args)
    assert plan["cluster"] > 0
    wide = F.silu(x.double()) * up.double() if silu else x.double()
    error = error_of(wide, had_k, n) + (10 * UNIT * sums_of(wide, n) if silu else 0)
    assert_quantized(got, fast_hadamard(wide, had_k, n), error, CLIP, -1)
    many, _ = quantize(x, **args, processors=132, seed=1)
    for one, other in zip(many, got, strict=True):
        assert_close(one, other)


def test_special_values_by_clusters():
    x = special_rows(5632)
    x[5] /= 1000  # or sums of so many overflow
    x = aligned(x)
    (codes, scale), plan = quantize(x, had_k=had_k_matrix(44), block=5632, arch=90, shared=LARGE)
    assert plan["cluster"] == 2
    assert scale.isfinite().flatten().tolist() == [True, True, False, False, False, True, True, True, True]
    assert scale[1] == 1 and not codes[1].any() and not codes[2:5].any()


def test_inputs_are_staged_where_several_warps_read_them_and_memory_allows():
    x = aligned(torch.randn(2, 11008).half())
    plans = [
        quantize(x, up=x, had_k=had_k_matrix(172), block=11008, shared=shared)[1]
        for shared in (48 << 10, SMALL)
    ]
    assert [plan["mix"] for plan in plans] == [1, 2]


@pytest.mark.parametrize("features,group", [(1, -1), (7, -1), (90, 15), (576, -1), (4096, 128), (20000, -1)])
@pytest.mark.parametrize("dtype,weight_dtype", [(F32, None), (HALF, F32), (BF16, BF16), (F32, HALF)])
def test_rmsnorm_a4(features, group, dtype, weight_dtype):
    x = aligned(torch.randn(3, features).to(dtype))
    weight = None if weight_dtype is None else aligned((torch.rand(features) + 0.5).to(weight_dtype))
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    exact = exact if weight is None else exact * weight.double()
    got, _ = quantize(x, group=group, eps=EPS, weight=weight)
    assert_quantized(got, exact, (features / 32 + 16) * UNIT * exact.abs(), CLIP, group)


@pytest.mark.parametrize("kwargs", [
    {"had_k": had_k_matrix(12), "block": 24}, {"block": 8}, {"block": 48 // 3}, {"eps": EPS}, {"up": 1},
    {"up": 1, "had_k": had_k_matrix(12), "block": 48},
])  # fmt: skip
@pytest.mark.parametrize("group", [24, 12])
def test_special_values(kwargs, group):
    x = special_rows(48)
    kwargs = kwargs | ({"up": torch.ones(9, 48)} if "up" in kwargs else {})
    (codes, scale), _ = quantize(x, group=group, **kwargs)
    with_bad = scale.isfinite().all(1) == torch.tensor([1, 1, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool)
    assert with_bad.all() or "eps" in kwargs  # infinity / infinity, and squares that overflow
    assert (scale[1] == 1).all() and not codes[1].any()
    assert not codes.unflatten(-1, (scale.shape[1], -1))[~scale.isfinite()].any()


@pytest.mark.parametrize("seed", [1, 2])
def test_tokens_do_not_depend_on_each_other(seed):
    had_k = had_k_matrix(36)
    x = aligned(torch.randn(11, 576).half())
    want, _ = quantize(x, up=x, group=64, had_k=had_k, block=576)
    many, _ = quantize(x, up=x, group=64, had_k=had_k, block=576, processors=132, shared=LARGE, seed=seed)
    one = aligned(x[7:8])
    alone, _ = quantize(one, up=one, group=64, had_k=had_k, block=576, seed=seed)
    for got, single, w in zip(many, alone, want, strict=True):
        assert_close(got, w)
        assert_close(single, w[7:8])


@pytest.mark.parametrize("features", [1536, 11008])
def test_bits_do_not_depend_on_how_many_tokens_there_are(features):
    """More of them than multiprocessors are divided otherwise; padding of a prompt counts on this."""
    had_k = had_k_matrix(hadamard_spec(features).k)
    x, up = (aligned(torch.randn(3, features).half()) for _ in "xu")
    args = dict(had_k=had_k, block=features, processors=2, shared=LARGE)
    many, plan = quantize(x, up=up, **args)
    few, other = quantize(aligned(x[:2]), up=aligned(up[:2]), **args)
    assert (plan["tiles"], other["tiles"]) == (2, 1) and plan["cluster"] == other["cluster"] == 0
    for got, want in zip(few, many, strict=True):
        assert_close(got, want[:2])


def test_what_no_kernel_takes_is_refused():
    x = torch.randn(2, 48)
    with pytest.raises(RuntimeError, match="not float64; convert"):
        quantize(x.double())
    with pytest.raises(RuntimeError, match="48 groups of 1 need .*use larger groups"):
        quantize(x, group=1, shared=500)
    with pytest.raises(RuntimeError, match="RMSNorm with neither"):
        quantize(x, eps=EPS, block=16)
    with pytest.raises(RuntimeError, match="weight of float32"):
        quantize(x, eps=EPS, weight=torch.ones(48, dtype=torch.float64))
