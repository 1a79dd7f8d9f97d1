"""`KVStore`: one sequence, several of different lengths, and one of fixed size hold the same bits."""

import pytest
import torch

from w2a4.errors import W2A4Error
from w2a4.format.online import OnlineRotation
from w2a4.runtime.attention import packed_attention
from w2a4.runtime.kv_store import KVSettings, KVStore

HEADS, DIM = 2, 16


def settings(sinks=0):
    return KVSettings(4, 0.95, sinks, OnlineRotation("hadamard", DIM, name="r3"))


def states(batch, tokens):
    return torch.randn(2, batch, HEADS, tokens, DIM).unbind()


@pytest.mark.parametrize("sinks", [0, 3])
def test_a_fixed_store_gives_what_a_growing_one_gives(sinks):
    grows, fixed = KVStore(settings(sinks), 4), KVStore(settings(sinks), 20, fixed=True)
    for tokens in (5, 1, 7, 2):
        new, q = states(2, tokens), torch.randn(2, 4, tokens, DIM)
        want = packed_attention(q, *grows.append(*new), None, 0.3)
        assert torch.equal(packed_attention(q, *fixed.append(*new), None, 0.3), want)
    assert grows.bound == 15 and fixed.lengths.tolist() == [15, 15] and fixed.bound == fixed.capacity == 20
    assert grows.capacity == 20 and grows.kept_sinks == fixed.kept_sinks == sinks


@pytest.mark.parametrize("sinks", [0, 3])
def test_sequences_written_through_slots_are_those_of_stores_of_their_own(sinks):
    together, lengths = KVStore(settings(sinks), 12), [4, 9, 6]
    together.allocate(torch.empty(0), 3, HEADS, DIM)
    alone, slots = [KVStore(settings(sinks), 1) for _ in lengths], [together.slot(i) for i in range(3)]
    for own, slot, tokens in zip(alone, slots, lengths, strict=True):
        new = states(1, tokens)
        own.append(*new)
        slot.append(*new)
    together.join(slots)
    counts = torch.tensor(lengths)
    together.share(counts, max(lengths))
    for _ in range(3):
        new, q = states(3, 1), torch.randn(3, 4, 1, DIM)
        got = packed_attention(q, *together.append(*new), None, 0.3)
        for b, own in enumerate(alone):
            view = own.append(*(x[b : b + 1] for x in new))
            assert torch.equal(packed_attention(q[b : b + 1], *view, None, 0.3), got[b : b + 1])
        counts += 1  # the caller's
    assert together.bound == 12 and together.lengths is counts
    together.clear()
    assert together.bound == 0 and together.lengths is None and together.capacity == 12


def test_a_slot_does_not_grow():
    """It would leave the store that it writes into."""
    store = KVStore(settings(), 4)
    store.allocate(torch.empty(0), 2, HEADS, DIM)
    with pytest.raises(RuntimeError, match=r"start=0 with 5 tokens.*capacity 4|start=0, expected 0 to -1"):
        store.slot(1).append(*states(1, 5))


def test_qkv_is_appended_as_its_parts_are():
    """RoPE of angle 0, so that what is left is R3."""
    whole, parts = KVStore(settings(), 8), KVStore(settings(), 8)
    qkv, ones = torch.randn(2, 3, 8 * DIM), torch.ones(1, 3, DIM)
    query, *view = whole.append_qkv(qkv, HEADS, ones, torch.zeros_like(ones))
    q, k, v = qkv.unflatten(-1, (8, DIM)).transpose(1, 2).split([4, 2, 2], 1)
    other = parts.append(parts.settings.rotate(k), v)
    want = packed_attention(parts.settings.rotate(q), *other, None, 0.3)
    assert torch.equal(packed_attention(query, *view, None, 0.3), want)
    sinks = KVStore(settings(2), 8)
    assert sinks.append_qkv(qkv, HEADS, ones, ones) is None and sinks.keys is None


def test_crop_map_and_bytes():
    store = KVStore(settings(2), 10)
    assert store.nbytes() == 0 and store.overflowing() is None
    store.append(*states(2, 10))
    token = HEADS * 2 * (DIM // 2 + 4)
    assert store.nbytes() == 2 * 10 * token + 2 * 2 * HEADS * 2 * DIM * 4
    store.map(lambda t: t.repeat_interleave(2, 0))
    assert store.keys.codes.shape[0] == store.values.sink.shape[0] == 4
    store.crop(1)
    assert store.bound == 1 and store.kept_sinks == 1
    key, value = states(4, 1)
    store.append(key, value * 1e9)
    assert store.overflowing() == "values"


def test_a_fixed_store_refuses_a_first_call_below_its_sinks():
    with pytest.raises(W2A4Error, match="first call has 2 tokens, and sink_tokens=3"):
        KVStore(settings(3), 8, fixed=True).append(*states(1, 2))
