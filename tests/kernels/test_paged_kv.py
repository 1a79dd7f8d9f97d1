"""Paged caches of 4-bit keys and values: the ops give the bits that they give on contiguous caches."""

import pytest
import torch

from support.kv4 import NAN, packed, paged
from support.op_arguments import assert_refused, bad_arguments, opcheck, replaced
from w2a4 import ops
from w2a4.ops import reference

SIZES = [1, 7, 16, 32, 64]  # of a block


def empty_pages(blocks, heads, size, head_dim):
    codes = torch.full((blocks, heads, size, head_dim // 2), 9, dtype=torch.uint8)
    return codes, torch.full((blocks, heads, size, 2), 7.0, dtype=torch.float16)


def shuffled_slots(blocks, size, batch, tokens):
    """Slots all different, some of them negative."""
    slots = torch.randperm(blocks * size)[: batch * tokens].view(batch, tokens)
    slots[torch.rand(slots.shape) < 0.2] = -1
    return slots


def written(pages, slots, x):
    """What `pages` are when `x`, codes or params `[batch, heads, tokens, …]`, lies in slots."""
    want, size = pages.clone(), pages.shape[2]
    for b, row in enumerate(slots.tolist()):
        for token, slot in enumerate(row):
            if slot >= 0:
                want[slot // size, :, slot % size] = x[b, :, token]
    return want


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch,tokens", [(1, 1), (1, 13), (3, 5), (2, 0)])
@pytest.mark.parametrize("op", [ops.append_kv4, reference.append_kv4])
def test_append_kv4(size, batch, tokens, op):
    blocks = -(-batch * tokens // size) + 2
    x, slots = torch.randn(batch, 3, tokens, 32), shuffled_slots(blocks, size, batch, tokens)
    codes, params = empty_pages(blocks, 3, size, 32)
    want = [written(t, slots, new) for t, new in zip((codes, params), ops.quantize_kv4(x, 0.9), strict=True)]
    op(x, codes, params, 0, 0.9, None, slots)
    assert torch.equal(codes, want[0]) and torch.equal(params, want[1])
    codes, params = empty_pages(blocks, 3, size, 32)
    op(x, codes, params, 0, 0.9, None, slots.flatten())  # as vLLM has them
    assert torch.equal(codes, want[0]) and torch.equal(params, want[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [64, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_append_kv4(size, block, dtype):
    batch, tokens, heads, blocks = 3, 5, 2, 16
    qkv = torch.randn(batch, tokens, (4 + 2 * heads) * 64).to(dtype)
    angles, slots = torch.randn(batch, tokens, 64), shuffled_slots(blocks, size, batch, tokens)
    fixed = qkv, angles.cos(), angles.sin(), None, block
    plain = [t for _ in "kv" for t in empty_pages(batch, heads, tokens, 64)]
    pages = [t for _ in "kv" for t in empty_pages(blocks, heads, size, 64)]
    q = ops.rope_append_kv4(*fixed, *plain, 0, 0.9)
    want = [written(page, slots, t) for page, t in zip(pages, plain, strict=True)]
    assert torch.equal(ops.rope_append_kv4(*fixed, *pages, 0, 0.9, None, slots), q)
    assert all(torch.equal(got, one) for got, one in zip(pages, want, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "tokens,starts", [(1, [0, 69, 30]), (1, [63, 64, 31]), (5, [65, 0, 1]), (65, [5, 140, 0]), (1, None)]
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_kv4(size, tokens, starts, causal, sinks, masked):
    keys = [70] * 3 if starts is None else [start + tokens for start in starts]
    length = max(keys)
    q, kv = torch.randn(3, 4, tokens, 32), packed(3, 2, length, 32)
    starts = None if starts is None else torch.tensor(starts)
    sink = tuple(torch.randn(2, 3, 2, sinks, 32)) if sinks else (None, None)
    mask = torch.rand(3, 1, tokens, length) < 0.7 if masked else None
    pages, table = paged([t[:, :, sinks:] for t in kv], [max(0, n - sinks) for n in keys], size)
    for op in (ops.attention_kv4, reference.attention_kv4):
        want = op(q, *kv, length, mask, causal, 0.2, *sink, starts)
        assert torch.equal(op(q, *pages, length, mask, causal, 0.2, *sink, starts, table), want)


@pytest.mark.parametrize("head_dim", [2, 30, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_attention_kv4_of_other_heads(head_dim, dtype):
    q, kv = torch.randn(2, 6, 3, head_dim).to(dtype), packed(2, 2, 131, head_dim)
    pages, table = paged(kv, [131, 100], 16)
    starts = torch.tensor([128, 97])
    want = ops.attention_kv4(q, *kv, 131, None, True, 0.2, None, None, starts)
    assert torch.equal(ops.attention_kv4(q, *pages, 131, None, True, 0.2, None, None, starts, table), want)


def test_one_tensor_holds_all_of_a_slot():
    """Codes and params of a token next to each other, key before value, as vLLM's cache of bytes has them."""
    size, heads, head_dim, blocks = 16, 2, 32, 5
    cache = torch.zeros(blocks, heads, size, head_dim + 8, dtype=torch.uint8)
    k_codes, k_params, v_codes, v_params = cache.split([head_dim // 2, 4, head_dim // 2, 4], -1)
    kv = k_codes, k_params.view(torch.float16), v_codes, v_params.view(torch.float16)
    apart = [torch.zeros_like(t) for t in kv]
    x, slots = torch.randn(2, 1, heads, 20, head_dim), torch.randperm(blocks * size)[:20]
    for caches in (kv, apart):
        ops.append_kv4(x[0], *caches[:2], 0, 0.9, None, slots)
        ops.append_kv4(x[1], *caches[2:], 0, 0.9, None, slots)
    assert all(torch.equal(one, other) for one, other in zip(kv, apart, strict=True))
    q, table = torch.randn(1, 4, 3, head_dim), torch.tensor([[3, 1, 4]], dtype=torch.int32)
    args = 40, None, True, 0.2, None, None, None, table
    assert torch.equal(ops.attention_kv4(q, *kv, *args), ops.attention_kv4(q, *apart, *args))


def test_decoding_through_slots_and_tables_is_decoding_in_a_contiguous_cache():
    """Two sequences that grow by turns; blocks are given out as they are needed."""
    size, heads, head_dim, free = 4, 2, 16, iter(torch.randperm(12).tolist())
    pages = [t for _ in "kv" for t in empty_pages(12, heads, size, head_dim)]
    plain = [t for _ in "kv" for t in empty_pages(2, heads, 24, head_dim)]
    table, lengths = torch.full((2, 6), -1, dtype=torch.int32), torch.tensor([0, 0])
    for tokens in (5, 1, 1, 2, 1, 7, 1):
        qkv, angles = torch.randn(2, tokens, 8 * head_dim), torch.randn(2, tokens, head_dim)
        positions = lengths[:, None] + torch.arange(tokens)
        for b, row in enumerate(positions.tolist()):
            for column in {p // size for p in row}:
                if table[b, column] < 0:
                    table[b, column] = next(free)
        slots = table.gather(1, positions // size) * size + positions % size
        fixed = qkv, angles.cos(), angles.sin(), None, head_dim
        q = ops.rope_append_kv4(*fixed, *plain, 17, 0.9, lengths)
        assert torch.equal(ops.rope_append_kv4(*fixed, *pages, 0, 0.9, None, slots), q)
        length = int(lengths.max()) + tokens
        want = ops.attention_kv4(q, *plain, length, None, True, 0.2, None, None, lengths)
        got = ops.attention_kv4(q, *pages, length, None, True, 0.2, None, None, lengths, table)
        assert torch.equal(got, want)
        lengths += tokens


def bad_calls():
    x, slots = torch.randn(1, 2, 3, 16), torch.tensor([[4, -1, 0]])
    codes, params = empty_pages(2, 2, 4, 16)
    append = [x, codes, params, 0, 0.9, None, slots]
    yield "append_kv4", replaced(append, 6, slots.int()), "slots has dtype int32, expected int64"
    yield "append_kv4", replaced(append, 6, slots[:, :2]), r"slots has shape \[1, 2\], expected \[1, 3\]"
    yield "append_kv4", replaced(append, 6, slots + 4), "slots holds 8 for token 0 of sequence 0.*less than 8"
    yield (
        "append_kv4",
        replaced(append, 6, slots + 2**62),
        "slots holds .* expected less than 8 of 2 blocks of 4",
    )
    yield "append_kv4", replaced(append, 3, 1), "slots say where tokens go, and so do start=1; pass start=0"
    yield "append_kv4", replaced(append, 5, torch.tensor([0])), "slots say.*and starts; pass"
    yield "append_kv4", replaced(append, 2, params[:, :, :3]), r"params has shape \[2, 2, 3, 2\].*4 tokens"
    yield "append_kv4", replaced(append, 2, params[:1]), r"params has shape \[1, 2, 4, 2\]"
    yield "append_kv4", replaced(append, 6, slots.new_zeros(1, 6)[:, ::2]), "slots.*contiguous"
    qkv, angles, kv = torch.randn(1, 3, 96), torch.ones(1, 3, 16), [*empty_pages(2, 2, 4, 16)] * 2
    kv = [t.clone() for t in kv]
    rope = [qkv, angles, angles, None, 16, *kv, 0, 0.9, None, slots]
    yield "rope_append_kv4", replaced(rope, 12, slots.int()), "slots has dtype int32"
    yield "rope_append_kv4", replaced(rope, 12, slots + 4), "slots holds 8 for token 0 of sequence 0"
    fewer = [t[:1] for t in kv[2:]]
    yield "rope_append_kv4", [*rope[:7], *fewer, *rope[9:]], "v_codes has shape.*the blocks of k_codes"
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    attention = [torch.randn(1, 4, 3, 16), *kv, 7, None, True, 0.25, None, None, None, table]
    yield (
        "attention_kv4",
        replaced(attention, 12, table.long()),
        "block_table has dtype int64, expected int32",
    )
    yield "attention_kv4", replaced(attention, 12, table[0]), r"block_table has shape \[2\], expected \[1, "
    yield "attention_kv4", replaced(attention, 12, table[:0]), r"block_table has shape \[0, 2\]"
    yield (
        "attention_kv4",
        replaced(attention, 12, table + 1),
        r"block_table\[0, 0\]=2, expected 0 to 1.*7 keys",
    )
    yield "attention_kv4", replaced(attention, 12, -table), r"block_table\[0, 0\]=-1, expected 0 to 1"
    yield (
        "attention_kv4",
        replaced(attention, 12, table[:, :1]),
        "length=7, but block_table has 1 blocks of 4",
    )
    yield "attention_kv4", replaced(attention, 3, kv[2][:1]), "v_codes has shape"
    yield "attention_kv4", replaced(attention, 4, kv[3][:, :, :3]), "v_params has shape.*>= 4"


@pytest.mark.parametrize("name,args,message", bad_arguments(bad_calls()))
def test_bad_argument(name, args, message):
    assert_refused(name, args, message)


def test_the_reference_refuses_what_lies_outside():
    kv = [t for _ in "kv" for t in empty_pages(2, 2, 4, 16)]
    with pytest.raises(RuntimeError, match="slots up to 8, expected less than 8"):
        reference.append_kv4(torch.randn(1, 2, 1, 16), *kv[:2], 0, 0.9, None, torch.tensor([8]))
    with pytest.raises(RuntimeError, match="slots say"):
        reference.append_kv4(torch.randn(1, 2, 1, 16), *kv[:2], 1, 0.9, None, torch.tensor([7]))
    table = torch.tensor([[0, 2]], dtype=torch.int32)
    args = torch.randn(1, 4, 1, 16), *kv
    with pytest.raises(RuntimeError, match="block_table holds 2, expected 0 to 1"):
        reference.attention_kv4(*args, 5, None, True, 0.2, None, None, None, table)
    assert reference.attention_kv4(*args, 4, None, True, 0.2, None, None, None, table).isfinite().all()


def test_nan_shows_only_in_sequences_that_see_it():
    q, kv = torch.randn(2, 4, 1, 32), packed(2, 2, 40, 32)
    pages, table = paged(kv, [40, 40], 16)
    clean = ops.attention_kv4(q, *pages, 40, None, True, 0.2, None, None, None, table)
    pages[1][int(table[1, 2])] = NAN
    dirty = ops.attention_kv4(q, *pages, 40, None, True, 0.2, None, None, None, table)
    assert torch.equal(dirty[0], clean[0]) and dirty[1].isnan().all()


def opcheck_calls():
    kv = [t for _ in "kv" for t in empty_pages(3, 2, 4, 16)]
    slots, table = torch.tensor([[7, -1, 0]]), torch.tensor([[2, 0]], dtype=torch.int32)
    yield "append_kv4", (torch.randn(1, 2, 3, 16), *kv[:2], 0, 0.9, None, slots)
    angles = torch.ones(1, 3, 16)
    caches = [t.clone() for t in kv]
    yield "rope_append_kv4", (torch.randn(1, 3, 96), angles, angles, None, 16, *caches, 0, 0.9, None, slots)
    yield "attention_kv4", (torch.randn(1, 4, 3, 16), *kv, 7, None, True, 0.25, None, None, None, table)


@pytest.mark.parametrize("name,args", list(opcheck_calls()))
def test_opcheck(name, args):
    opcheck(name, args)
