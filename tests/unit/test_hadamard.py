"""Hadamard construction: exact in integers, right sizes, fast transform = dense matrix."""

import warnings

import pytest
import torch

from w2a4.errors import RotationError
from w2a4.format.hadamard import (
    MAX_K,
    HadamardSpec,
    apply_hadamard,
    dense_hadamard,
    had_k_matrix,
    hadamard_k,
    hadamard_spec,
)

#: Width -> K part. Intermediate and hidden sizes of published models.
SIZES = {
    576: 36, 768: 12, 896: 28, 960: 60, 1024: 1, 1536: 12, 2048: 1, 2560: 20, 3072: 12, 4096: 1, 4864: 76,
    5120: 20, 5504: 172, 5632: 44, 5888: 92, 6912: 108, 7424: 116, 8192: 1, 8960: 140, 9728: 76, 9984: 156,
    10240: 20, 11008: 172, 12288: 12, 13824: 108, 14336: 28, 16384: 1, 17920: 140, 18432: 36, 18944: 148,
    20480: 20, 21504: 84, 24576: 12, 25600: 100, 27648: 108, 28672: 28, 53248: 52,
}  # fmt: skip
#: Width -> block, where no K <= MAX_K is there.
BLOCK_DIAGONAL = {8640: 64, 13440: 128, 13696: 128, 29568: 128}


@pytest.mark.parametrize("n, k", SIZES.items())
def test_spec_uses_one_block_of_the_smallest_k(n, k):
    assert hadamard_spec(n) == HadamardSpec(n, n, k)


@pytest.mark.parametrize("n, block", BLOCK_DIAGONAL.items())
def test_unknown_order_falls_back_to_power_of_two_blocks_and_says_so_once(n, block):
    hadamard_spec.cache_clear()
    with pytest.warns(UserWarning, match=f"order {n} .* {n // block} blocks of {block}"):
        assert hadamard_spec(n) == HadamardSpec(n, block, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hadamard_spec(n)


def test_every_constructible_k_is_exactly_hadamard():
    built = []
    for k in range(1, MAX_K + 1):
        h = hadamard_k(k)
        if h is None:
            continue
        built.append(k)
        assert h.dtype == torch.int8 and h.shape == (k, k) and h.is_contiguous()
        assert (h.abs() == 1).all()
        # Sums of at most 256 signs: exact in float32.
        assert torch.equal(h.float() @ h.float().T, k * torch.eye(k))
    assert built == [1, 2, *(k for k in range(4, MAX_K + 1, 4) if k not in (188, 236))]


@pytest.mark.parametrize("k", [344, 540, 924, 1232])
def test_larger_orders_can_be_built(k):
    h = hadamard_k(k).double()
    assert torch.equal(h @ h.T, k * torch.eye(k, dtype=torch.float64))


@pytest.mark.parametrize("k", [-4, 0, 3, 6, 188, 428])
def test_orders_that_cannot_be_built(k):
    assert hadamard_k(k) is None
    with pytest.raises(RotationError, match=str(k)):
        had_k_matrix(k)


def test_had_k_matrix_is_cached_and_none_for_one():
    assert had_k_matrix(1) is None
    assert had_k_matrix(28, torch.device("cpu")) is had_k_matrix(28, torch.device("cpu"))


def test_matrices_never_change():
    """Checkpoints store K only: the same K must give the same matrix forever."""
    weights = torch.arange(1, 257, dtype=torch.float64)

    def digest(k):
        h = hadamard_k(k).double()
        return int(weights[:k] @ h @ (weights[:k] * weights[:k]))

    assert {k: digest(k) for k in (12, 20, 28, 36, 92, 108, 140, 156, 172)} == {
        12: 5930, 20: 38818, 28: 134182, 36: -100296, 92: 125898918,
        108: 15074910, 140: 36774814, 156: -828933378, 172: 1598552950,
    }  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 64, 12, 28, 36 * 4, 44 * 2, 92, 172 * 2, 8 * 7])
@pytest.mark.parametrize("transpose", [False, True])
def test_fast_equals_dense(n, transpose):
    spec = hadamard_spec(n)
    x = torch.randn(3, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    h = dense_hadamard(spec)
    expected = x @ (h.T if transpose else h)
    torch.testing.assert_close(apply_hadamard(x, spec, transpose), expected, rtol=0, atol=1e-13)


def test_the_k_parts_tested_are_not_all_symmetric():
    assert not torch.equal(hadamard_k(28), hadamard_k(28).T)
    assert not torch.equal(hadamard_k(172), hadamard_k(172).T)
    assert torch.equal(hadamard_k(36), hadamard_k(36).T)


@pytest.mark.filterwarnings("ignore:no Hadamard matrix")
@pytest.mark.parametrize("n", [46, 8 * 47, 7])
def test_block_diagonal_transform(n):
    spec = hadamard_spec(n)
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(apply_hadamard(x, spec), x @ dense_hadamard(spec), rtol=0, atol=1e-13)
    ones = torch.ones(spec.block_size, spec.block_size, dtype=torch.bool)
    assert torch.equal(dense_hadamard(spec) != 0, torch.block_diag(*[ones] * (n // spec.block_size)))


@pytest.mark.parametrize("n", [576, 2048, 3072, 5120])
def test_orthogonality(n):
    spec = hadamard_spec(n)
    identity = apply_hadamard(dense_hadamard(spec), spec, transpose=True)
    assert (identity - torch.eye(n, dtype=torch.float64)).abs().max() <= 1e-13


@pytest.mark.parametrize("n", [576, 3072, 11008])
def test_fast_transform_and_its_transpose_are_inverse(n):
    spec = hadamard_spec(n)
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = apply_hadamard(x, spec)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(apply_hadamard(y, spec, transpose=True), x, rtol=0, atol=1e-13)


def test_wrong_width_quotes_the_shape():
    with pytest.raises(RotationError, match=r"\(2, 10\).*width 12"):
        apply_hadamard(torch.zeros(2, 10), hadamard_spec(12))
    with pytest.raises(RotationError, match="width 0"):
        hadamard_spec(0)
