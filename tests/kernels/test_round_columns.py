"""`round_columns`: the bits of its reference, and what GPTQ and coordinate descent make of it."""

import pytest
import torch

from support.op_arguments import assert_refused, bad_arguments, opcheck, replaced
from w2a4 import ops
from w2a4.ops import reference
from w2a4.quantization.fit.gptq import _solve

GROUPS = 3


def arguments(columns: int, out: int, points: int, current: bool, *bits: int) -> tuple:
    generator = torch.Generator().manual_seed(columns + out)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    grid = randn(GROUPS, points, out).sort(1).values
    if points == 1:
        grid = grid.abs() / 4 + 0.01
    else:
        grid[1, 1] = grid[1, 2]  # two levels of one value
    group = torch.randint(0, GROUPS, (columns,), generator=generator)
    base = randn(columns, out) if current else None
    return randn(columns, out), randn(columns, columns) / 8, base, grid, group, *bits


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("points", [(1,), (4,), (8,), (1, 2), (1, 3), (1, 8)], ids=str)
@pytest.mark.parametrize(("columns", "out"), [(1, 1), (7, 5), (64, 64), (33, 150), (128, 96)])
def test_bits_are_those_of_the_reference(columns, out, points, current):
    args = arguments(columns, out, points[0], current, *points[1:])
    work = args[0].clone()
    (codes, change), want = ops.round_columns(*args), reference.round_columns(*args)
    assert torch.equal(codes, want[0]) and torch.equal(change, want[1]) and torch.equal(args[0], work)
    assert len(codes.unique()) > 1 or codes.numel() == 1


@pytest.mark.parametrize("points", [4, 8])
def test_without_coupling_it_is_the_nearest_value(points):
    work, _, _, grid, group = arguments(40, 30, points, False)
    codes, change = ops.round_columns(work, torch.zeros(40, 40), None, grid, group)
    distance = (grid[group] - work[:, None]).abs()
    torch.testing.assert_close(change.abs(), distance.amin(1), rtol=0, atol=1e-6)
    assert torch.equal(distance.gather(1, codes[:, None].long())[:, 0], distance.amin(1))


@pytest.mark.parametrize("points", [1, 4, 8])
def test_opcheck(points):
    opcheck("round_columns", arguments(8, 6, points, True))


def bad_calls():
    good = arguments(8, 6, 4, True)
    yield "round_columns", replaced(good, 0, good[0].double()), "work has dtype float64"
    yield "round_columns", replaced(good, 0, good[0].T), "work of shape.*not contiguous"
    yield "round_columns", replaced(good, 1, good[1][:7].contiguous()), r"coupling has shape \[7, 8\]"
    yield "round_columns", replaced(good, 2, good[2][:7]), r"current has shape \[7, 6\]"
    yield "round_columns", replaced(good, 3, good[3][:, :3].contiguous()), r"grid has shape \[3, 3, 6\]"
    yield "round_columns", (*good, 9), "bits=9, expected 2 to 8"
    yield "round_columns", replaced(good, 4, good[4].int()), "group has dtype int32|group has dtype Int"
    yield "round_columns", replaced(good, 4, good[4] + GROUPS), r"group\[0\] is \d, expected 0 to 2"


@pytest.mark.parametrize("name,args,message", bad_arguments(bad_calls()))
def test_bad_arguments(name, args, message):
    assert_refused(name, args, message)


@pytest.mark.parametrize("n", [1, 4, 8])
def test_solve(n):
    basis = torch.randn(50, n, 2 * n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    matrix, want = basis @ basis.mT + 0.1 * torch.eye(n), basis[..., 0]
    right = (matrix @ want[..., None])[..., 0]
    torch.testing.assert_close(_solve(matrix.permute(1, 2, 0), right.T), want.T)
