"""Short prompts as CUDA graphs, padded on the right: what there is to see of that without a GPU."""

import re

import pytest
import torch

from support.packed import packed_model, prompt
from support.paths import CSRC
from support.rerun import rerun_graphs
from w2a4 import ops
from w2a4.errors import W2A4Error
from w2a4.ops.dispatch import DECODE_TOKENS, GEMV_TOKENS
from w2a4.runtime import engine, graphs, sequences
from w2a4.runtime.engine import Engine
from w2a4.runtime.graphs import LAST_OF_ATTENTION, LAST_OF_KERNELS, MOST_PROMPT_TOKENS, padded_length
from w2a4.runtime.layer import packed_layers

CAPACITY = 96


def number_of(name: str, path: str) -> int:
    """A constant of the CUDA sources."""
    return int(re.search(rf"constexpr int {name} = (\d+);", (CSRC / path).read_text())[1])


def ids_of(batch: int, tokens: int) -> torch.Tensor:
    return prompt(batch, tokens, seed=tokens)


def packed_sequences(model, ids: torch.Tensor, capacity: int = CAPACITY, graphs: bool = True):
    return sequences.PackedSequences(model, list(ids), capacity, packed_layers(model), graphs=graphs)


def test_ends_are_those_of_the_kernels():
    clusters = number_of("kMostTokens", "cuda/hadamard_cluster_plan.h")
    assert {1, number_of("kBmmaTokens", "cuda/gemv_plan.h"), GEMV_TOKENS, clusters} <= {*LAST_OF_KERNELS}
    assert {1, DECODE_TOKENS} == {*LAST_OF_ATTENTION}
    # Up to so many keys attention has nothing to divide; a division could depend on the number of queries.
    assert number_of("kChunkKeys", "cuda/attention_kv4_parts.cuh") >= DECODE_TOKENS
    pytest.importorskip("triton")
    from w2a4.triton_kernels import tiles

    assert tiles.INT8_TOKENS - 1 in LAST_OF_KERNELS


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("capacity", [1, 50, 300, 4096])
def test_padding_never_changes_a_kernel(batch, capacity):
    for tokens in range(1, MOST_PROMPT_TOKENS // batch + 2):
        size = padded_length(batch, tokens, capacity)
        if tokens > capacity or batch * tokens > MOST_PROMPT_TOKENS:
            assert size is None
            continue
        assert tokens <= size <= capacity and batch * size <= MOST_PROMPT_TOKENS
        assert size <= max(8, 2 * tokens - 1, 1.34 * tokens)
        for end in LAST_OF_KERNELS:
            assert (batch * tokens <= end) == (batch * size <= end)
        for end in LAST_OF_ATTENTION:
            assert (tokens <= end) == (size <= end)
        assert padded_length(batch, size, capacity) == size


def test_few_lengths_are_captured():
    sizes = {padded_length(1, tokens, 4096) for tokens in range(1, MOST_PROMPT_TOKENS + 1)}
    assert len(sizes) == 24
    assert [padded_length(1, n, 4096) for n in (1, 2, 3, 16, 17, 64, 65, 1023, 1024, 1025)] == [
        1, 2, 8, 16, 32, 64, 80, 1023, 1024, None
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 16, 17, 33, 64, 65, 80, 95])
@pytest.mark.parametrize("fused", [True, False])
def test_padded_prompts_have_the_bits_of_others(tokens, batch, fused, monkeypatch):
    """Logits, what the cache holds of the prompt, and what is decoded behind it."""
    if not fused:
        monkeypatch.setattr(ops, "has_layer_kernel", lambda x: False)
    _, lengths = rerun_graphs(monkeypatch)
    model, ids = packed_model(), ids_of(batch, tokens)
    with engine.inference(model):
        eager = packed_sequences(model, ids, graphs=False)
        padded = packed_sequences(model, ids_of(batch, 90))
        for _ in range(3):  # once as ever, once captured, once replayed
            padded.begin(list(ids))
            assert padded.longest == tokens and padded.lengths.tolist() == [tokens] * batch
            assert torch.equal(padded.logits, eager.logits)
            for store, other in zip(padded.cache.stores, eager.cache.stores, strict=True):
                assert store.bound == other.bound == tokens and store.lengths is padded.lengths
                for side, wanted in zip(store.view(store.lengths), other.view(other.lengths), strict=True):
                    assert side.bound == tokens and side.earlier is padded.lengths and side.sink is None
                    assert torch.equal(side.codes[:, :, :tokens], wanted.codes[:, :, :tokens])
                    assert torch.equal(side.params[:, :, :tokens], wanted.params[:, :, :tokens])
            for _ in range(min(3, CAPACITY - tokens)):
                token = eager.logits.argmax(-1)
                eager.advance(token)
                padded.advance(token)
                assert torch.equal(padded.logits, eager.logits)
            eager.begin(list(ids))
    # 95 are padded to the 96 that there is room for, as the 90 were that came at first.
    assert lengths == [padded_length(batch, tokens, CAPACITY)]


def test_lengths_in_turn(monkeypatch):
    """Graphs of prompts and of steps share what they write to; a short prompt comes after a long one."""
    bounds, lengths = rerun_graphs(monkeypatch)
    monkeypatch.setattr(graphs.StepGraphs, "LEAST", 16)
    monkeypatch.setattr(engine.ops, "has_cuda_kernels", lambda device: True)
    model = packed_model()
    prompts = [list(ids_of(1, tokens)) for tokens in (5, 40, 7, 33, 60)]
    plain = Engine(model, cuda_graphs=False)
    want = [plain.generate(rows, 6)[0].tolist() for rows in prompts]
    eng = Engine(model, max_length=CAPACITY)
    for _ in range(2):
        for rows, tokens in zip(prompts, want, strict=True):
            assert eng.generate(rows, 6)[0].tolist() == tokens
    assert lengths == [8, 48, 64] and {*bounds} == {16, 64, 96}
    both = [prompts[0][0], prompts[1][0]]  # of different lengths, so one by one as ever
    for _ in range(3):
        assert [out.tolist() for out in eng.generate(both, 6)] == want[:2]
    assert lengths == [8, 48, 64]


def test_prompts_that_cannot_be_captured_are_read_as_ever(monkeypatch):
    rerun_graphs(monkeypatch)

    def refuse(prompts, ids):
        prompts.read(ids, prompts.last)  # as before any capture
        raise W2A4Error("out of memory")

    model, ids = packed_model(), ids_of(1, 9)
    with engine.inference(model):
        eager = packed_sequences(model, ids, graphs=False)
        steps = packed_sequences(model, ids)
        monkeypatch.setattr(graphs.PromptGraphs, "capture", refuse)
        with pytest.warns(UserWarning, match="read without CUDA graphs, and slower: out of memory"):
            steps.begin(list(ids))
        for _ in range(2):
            assert torch.equal(steps.logits, eager.logits)
            for layer, other in zip(steps.cache.layers, eager.cache.layers, strict=True):
                assert torch.equal(layer.keys.codes[:, :, :9], other.keys.codes[:, :, :9])
            steps.begin(list(ids))


def test_logits_of_a_prompt_stay(monkeypatch):
    rerun_graphs(monkeypatch)
    model, ids = packed_model(), ids_of(1, 9)
    with engine.inference(model):
        steps = packed_sequences(model, ids)
        steps.begin(list(ids))
        first = steps.logits
        kept = first.clone()
        steps.begin(list(ids_of(1, 11)))
        assert torch.equal(first, kept) and not torch.equal(steps.logits, kept)


@pytest.mark.parametrize(
    ("recipe", "on", "there"),
    [({}, True, True), ({}, False, False), ({"sink_tokens": 2}, True, False),
     ({"rotation.r3": "random"}, True, True)],
)  # fmt: skip
def test_who_gets_graphs_of_prompts(recipe, on, there):
    model = packed_model(**recipe)
    with engine.inference(model):
        assert (packed_sequences(model, ids_of(1, 9), graphs=on).prompts is not None) == there


def test_no_graphs_of_prompts_with_dynamic_rope():
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = packed_model({"rope_scaling": scaling, "max_position_embeddings": 64})
    with engine.inference(model):
        steps = packed_sequences(model, ids_of(1, 9), 48)
    assert steps.prompts is None and steps.graphs is None
