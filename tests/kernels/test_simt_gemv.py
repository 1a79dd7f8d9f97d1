"""The CUDA GEMV kernels, run on the CPU by csrc/simt, against the reference.

The same kernel bodies, plan and grid as on a GPU. What hardware leaves open (the order of lanes and
blocks, what shared memory holds at first, when cp.async lands) is drawn from the seed.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.gemv import SHAPES, assert_rounding, expected, matrix, simulate
from support.paths import TESTS
from support.simt import build


@pytest.mark.parametrize("bits,out,features,group", SHAPES)
def test_against_the_reference(bits, out, features, group):
    for tokens in (1, 2, 3, 8, 11):
        case = matrix(bits, out, features, group, tokens)
        y, _ = simulate(case, seed=tokens)
        assert_rounding(y, expected(case), case)


@pytest.mark.parametrize("bits,tokens", [(2, 1), (2, 2), (2, 3), (2, 8), (4, 1), (4, 9)])
@pytest.mark.parametrize("group,act_group", [(128, 128), (256, 128), (128, 512), (1536, 256)])
def test_activation_scales_of_whole_units(bits, tokens, group, act_group):
    case = matrix(bits, 36, 1536, group, tokens, act_group)
    y, name = simulate(case, seed=tokens)
    assert name == ("gemv_bmma" if bits == 2 and tokens <= 2 else "gemv_imma")
    assert_rounding(y, expected(case), case)
    if name == "gemv_bmma":
        assert torch.equal(simulate(case, "imma", seed=5)[0], y)


@pytest.mark.parametrize(
    "bits,group,tokens", [(2, 128, 1), (2, 256, 2), (2, 128, 8), (2, 64, 1), (4, 128, 1)]
)
def test_bits_do_not_depend_on_how_many_tiles_a_block_takes(bits, group, tokens):
    # 68 rows: five tiles of 16, three of 32; one multiprocessor has two blocks.
    case = matrix(bits, 68, 1280, group, tokens)
    y, _ = simulate(case, processors=1)
    assert_rounding(y, expected(case), case)
    for processors in (2, 64):
        assert torch.equal(simulate(case, processors=processors, seed=processors)[0], y)


@pytest.mark.parametrize("tokens", range(1, 17))
@pytest.mark.parametrize("gemv", ["bmma", "imma"])
def test_every_number_of_tokens_with_both_kernels(tokens, gemv):
    case = matrix(2, 18, 640, 128, tokens)
    y, name = simulate(case, gemv)
    assert name == "gemv_" + gemv
    assert_rounding(y, expected(case), case)


@pytest.mark.parametrize("bits,out,features,group", SHAPES)
def test_integer_sums_are_exact(bits, out, features, group):
    """With scales of 1 every partial sum is an integer that float32 holds."""
    case = matrix(bits, out, features, group, 3)
    case["scale"].fill_(1), case["a_scale"].fill_(1), case["bias"].zero_()
    want = expected(case)
    assert want.abs().max() < 2**24
    for gemv in ("bmma", "imma") if bits == 2 and group % 128 == 0 else ("imma",):
        assert torch.equal(simulate(case, gemv)[0], want)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [128, 1024])
def test_extreme_sums(bits, group):
    """All products of one sign and the largest magnitude, in each code."""
    for code in range(4):
        case = matrix(bits, 16, 1024, group, 2)
        case["a_codes"].fill_(0x88)  # -8
        case["weight"].fill_(code * 0x55 if bits == 2 else 0x88)
        if bits == 2:
            case["levels"].copy_(torch.tensor([-128, 127, -127, 126], dtype=torch.int8))
        case["scale"].fill_(1), case["a_scale"].fill_(1), case["bias"].zero_()
        for gemv in ("bmma", "imma") if bits == 2 else ("imma",):
            assert torch.equal(simulate(case, gemv)[0], expected(case))


def test_a_token_does_not_depend_on_the_others_or_on_the_kernel():
    case = matrix(2, 22, 1664, 128, 16)
    together, name = simulate(case)
    assert name == "gemv_imma"
    for token in (0, 5, 15):
        alone = {**case, "a_codes": case["a_codes"][token:][:1], "a_scale": case["a_scale"][token:][:1]}
        one, name = simulate(alone)
        assert name == "gemv_bmma"
        assert torch.equal(one[0], together[token])


@pytest.mark.parametrize("gemv,tokens", [("bmma", 2), ("imma", 5)])
def test_repeated_runs_are_the_same_bits(gemv, tokens):
    case = matrix(2, 20, 2176, 128, tokens)
    first = simulate(case, gemv, seed=0)[0]
    for seed in range(1, 6):
        assert torch.equal(simulate(case, gemv, seed=seed)[0], first)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("gemv", ["bmma", "imma"])
def test_output_dtypes(dtype, gemv):
    case = matrix(2, 19, 512, 128, 2)
    wide = simulate(case, gemv)[0]
    y = simulate(case, gemv, out_dtype=dtype)[0]
    assert torch.equal(y, wide.to(getattr(torch, dtype)))
    residual = torch.randn(2, 19).to(y.dtype)
    assert torch.equal(simulate(case, gemv, out_dtype=dtype, residual=residual)[0], y + residual)


def test_float16_overflows_to_infinity_as_in_torch():
    case = matrix(2, 16, 512, 128, 1)
    case["a_scale"].fill_(1e6)
    assert torch.equal(simulate(case, out_dtype="float16")[0], simulate(case)[0].half())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group,act_group", [(128, 32), (64, 64), (32, 160), (128, 64), (640, 128)])
def test_activation_groups(bits, group, act_group):
    case = matrix(bits, 10, 640, group, 3, act_group)
    y, _ = simulate(case)
    assert_rounding(y, expected(case), case)


def test_no_bias():
    case = matrix(2, 16, 256, 128, 1)
    with_bias = simulate(case)[0]
    case["bias"] = None
    torch.testing.assert_close(simulate(case)[0], expected(case))
    assert not torch.equal(simulate(case)[0], with_bias)


def test_choice_of_kernel():
    case = matrix(2, 16, 512, 128, 1)
    assert simulate(case, arch=80)[1] == simulate(case, arch=90)[1] == "gemv_bmma"
    assert simulate(case, arch=100)[1] == simulate(case, arch=120)[1] == "gemv_imma"
    assert simulate(matrix(2, 16, 512, 128, 3))[1] == "gemv_imma"
    assert simulate(matrix(2, 16, 512, 64, 1))[1] == "gemv_imma"
    assert simulate(matrix(4, 16, 512, 128, 1))[1] == "gemv_imma"
    # Bit-planes of a long row do not fit a small GPU's shared memory.
    assert simulate(matrix(2, 1, 1 << 16, 128, 2))[1] == "gemv_imma"
    with pytest.raises(RuntimeError, match="W2A4_GEMV=bmma"):
        simulate(matrix(2, 16, 512, 64, 1), "bmma")


def test_shapes_no_kernel_takes():
    with pytest.raises(RuntimeError, match="group_size=48 with activation groups of 96"):
        simulate(matrix(2, 4, 96, 48, 1))


@pytest.mark.parametrize("name,bytes", [("weight", 16), ("a_codes", 16), ("levels", 4)])
def test_misaligned_pointers(name, bytes):
    case = matrix(2, 4, 256, 128, 1)
    room = torch.zeros(case[name].numel() + 17, dtype=case[name].dtype)
    start = -room.data_ptr() % 16 + bytes // 2
    moved = room[start : start + case[name].numel()].view(case[name].shape)
    case[name] = moved.copy_(case[name])
    with pytest.raises(RuntimeError, match=f"{name} starts at an address that is not a multiple of {bytes}"):
        simulate(case)


@pytest.mark.slow
def test_with_sanitizers():
    """Reads or writes out of bounds, and undefined behaviour, in the kernels."""
    runtime = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not Path(runtime.stdout.strip()).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    environment = {
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(TESTS),
    }
    done = subprocess.run(
        [sys.executable, "-m", "support.simt_sanitized", str(build("sanitized"))],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
