"""The CUDA kernels of paged caches of 4-bit keys and values, run on a CPU lane by lane."""

import pytest
import torch

from support.kv4 import HALF, packed, paged
from support.numerics import assert_close
from support.simt_arrays import NEEDS_PYBIND11
from support.simt_kv4 import ALWAYS, NEVER, append, attend, caches, poisoned, rope_append
from w2a4.ops import reference

pytestmark = NEEDS_PYBIND11

#: Negative ones are skipped, and so are those beyond the cache, which nobody has looked at on a device.
OUTSIDE = [-1, -(2**62), 2**62]


def assert_in_slots(codes, params, slots, x):
    """The tokens of x `[batch, heads, tokens, head_dim]` lie in their slots, and nothing anywhere else."""
    want, size = reference.quantize_kv4(x, 0.95), codes.shape[2]
    free = torch.ones(len(codes), size, dtype=torch.bool)
    for b, row in enumerate(slots.tolist()):
        for token, slot in enumerate(row):
            if 0 <= slot < len(codes) * size:
                free[slot // size, slot % size] = False
                assert_close(codes[slot // size, :, slot % size], want[0][b, :, token])
                assert_close(params[slot // size, :, slot % size], want[1][b, :, token])
    for t in (codes, params):
        assert all(poisoned(t[block, :, position]) for block, position in free.nonzero().tolist())


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("seed", [1, 2])
def test_append_kv4(size, seed):
    x = torch.randn(3, 2, 4, 30)
    codes, params, intact = caches(-(-12 // size) + 1, 2, size, 30)
    slots = torch.randperm(len(codes) * size)[:12].view(3, 4)
    slots[1, :3] = torch.tensor(OUTSIDE)
    slots[2, 3] = len(codes) * size
    append(x, codes, params, slots=slots, seed=seed)
    assert intact()
    assert_in_slots(codes, params, slots, x)


@pytest.mark.parametrize("wide", [NEVER, ALWAYS])
@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("block", [64, 1])
def test_rope_append_kv4(wide, size, block):
    qkv, angles = torch.randn(2, 3, 5 * 64).half(), torch.randn(2, 3, 64)
    args = qkv, angles.cos(), angles.sin(), None, block
    plain = [t for _ in "kv" for t in caches(2, 1, 3, 64)[:2]]
    (k_codes, k_params, k_intact), (v_codes, v_params, v_intact) = (
        caches(16 // size, 1, size, 64) for _ in "kv"
    )
    pages = k_codes, k_params, v_codes, v_params
    slots = torch.randperm(16)[:6].view(2, 3)
    slots[0, 1], slots[1, 0] = OUTSIDE[1], OUTSIDE[2]
    q = rope_append(*args, plain, 0, q_heads=3, wide=wide)
    assert_close(rope_append(*args, pages, 0, q_heads=3, wide=wide, slots=slots, seed=3), q)
    assert k_intact() and v_intact()
    for page, want in zip(pages, plain, strict=True):
        for b, row in enumerate(slots.tolist()):
            for token, slot in enumerate(row):
                if 0 <= slot < 16:
                    assert_close(page[slot // size, :, slot % size], want[b, :, token])
        assert sum(not poisoned(t) for t in page.transpose(1, 2).flatten(0, 1)) == 4


@pytest.mark.parametrize("size", [1, 6, 16, 32, 256])
@pytest.mark.parametrize(
    "repeat,tokens,head_dim,keys",
    [(1, 1, 64, [300, 1, 257]), (4, 1, 128, [256, 300, 31]), (2, 3, 80, [299, 3, 258]),
     (1, 2, 30, [33, 2, 70]), (3, 1, 256, [260, 17, 1])],
)  # fmt: skip
@pytest.mark.parametrize("split", [True, False])
def test_attention_kv4(size, repeat, tokens, head_dim, keys, split):
    """Also of what lies in no sequence: `paged` poisons it."""
    length, starts = max(keys), torch.tensor(keys) - tokens
    q, kv = torch.randn(3, 2 * repeat, tokens, head_dim).half(), packed(3, 2, length, head_dim)
    pages, table = paged(kv, keys, size)
    want = attend(q, kv, length, starts=starts, split=split)
    assert_close(attend(q, pages, length, starts=starts, split=split, table=table, seed=size), want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [0, 1, 4, 18, 260])
@pytest.mark.parametrize("size", [6, 16])
def test_attention_kv4_with_a_mask_and_sinks(causal, sinks, size):
    """Sinks stand before a paged cache, where they replace the first entries of another."""
    q, kv, mask = torch.randn(2, 4, 3, 32), packed(2, 2, 270, 32), torch.rand(2, 1, 3, 270) > 0.5
    given = tuple(torch.randn(2, 2, 2, sinks, 32)) if sinks else None
    pages, table = paged([t[:, :, sinks:] for t in kv], [270 - sinks, 262 - sinks], size)
    starts = torch.tensor([267, 259])
    want = attend(q, kv, 270, mask, causal, sinks=given, starts=starts)
    assert_close(attend(q, pages, 270, mask, causal, sinks=given, starts=starts, table=table), want)


@pytest.mark.parametrize("offset,width", [(0, 40), (8, 40), (1, 35), (16, 48)])
@pytest.mark.parametrize("size", [2, 16])
def test_attention_kv4_of_strided_pages(offset, width, size):
    """Codes and params as parts of wider rows, so that copies are of 16 bytes, of 8 and of one."""
    q, kv = torch.randn(1, 2, 1, 64).half(), packed(1, 2, 270, 64)
    pages, table = paged(kv, [270], size)
    want = attend(q, kv, 270)
    moved = []
    for t in pages:
        room = torch.zeros(*t.shape[:3], t.shape[3] + width, dtype=t.dtype)
        moved.append(room[..., offset : offset + t.shape[3]].copy_(t))
    assert_close(attend(q, moved, 270, table=table), want)


@pytest.mark.parametrize("bad", [-1, -(2**31), 2**31 - 1, 20])
@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize("head_dim", [64, 80, 30])
def test_a_block_that_is_not_there_makes_nan_in_the_sequence_that_names_it(bad, size, head_dim):
    q, kv = torch.randn(2, 2, 1, head_dim).to(HALF), packed(2, 1, 20, head_dim)
    pages, table = paged(kv, [20, 20], size, spare=0)
    want = attend(q, pages, 20, table=table)
    table[1, 1] = bad
    got = attend(q, pages, 20, table=table)
    assert_close(got[:1], want[:1])
    assert got[1].isnan().all()
    hidden = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    hidden[..., size : 2 * size] = False  # who does not see it
    assert attend(q, pages, 20, hidden, table=table).isfinite().all()


def test_what_no_kernel_takes_is_refused():
    codes, params = torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, 1, 1, 2, dtype=HALF)
    kv = [codes.expand(2**31, 1, 1, 1), params.expand(2**31, 1, 1, 2)] * 2
    with pytest.raises(RuntimeError, match=r"2147483648 blocks of 1 tokens; .* fewer than 2\*\*31"):
        attend(torch.randn(1, 1, 1, 2), kv, 1, table=torch.zeros(1, 1, dtype=torch.int32))
