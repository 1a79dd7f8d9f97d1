"""The engine on a CUDA device: eager, as CUDA graphs, and beside `generate` with and without torch.compile.

All need a GPU; `python -m benchmarks.gpu_run run` runs them. Compiling a model takes half a minute, so
tests that do are marked slow.
"""

import dataclasses

import pytest
import torch

from benchmarks.bench_engine import greedy
from benchmarks.random_llama import packed_llama
from benchmarks.shapes import MODELS
from support.packed import packed_model, prompt
from support.watch import LONG, SLOW
from w2a4.ops import dispatch
from w2a4.runtime.engine import Engine, Sampling, inference
from w2a4.runtime.graphs import padded_length
from w2a4.runtime.layer import packed_layers
from w2a4.runtime.sequences import PackedSequences

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_kernels")]

RECIPES = {"w2": {}, "w4": {"weight_bits": 4, "group_size": -1}, "sinks": {"sink_tokens": 2}}


def tokens_of(outputs) -> list[list[int]]:
    return [output.tolist() for output in outputs]


@LONG
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-2-7b"])
def test_graphs_give_the_tokens_of_generate(name):
    """Two layers of a published shape, random: captured, eager, and by transformers; the second time with
    what was captured at first. Prompts are long enough for the same kernels together and alone."""
    shape = dataclasses.replace(MODELS[name], layers=2)
    model = packed_llama(shape, 512, "cuda", torch.float16)
    generator = torch.Generator("cuda").manual_seed(1)
    prompts = [
        torch.randint(shape.vocabulary, (n,), device="cuda", generator=generator) for n in (60, 20, 60)
    ]
    want = [greedy(model, ids[None], 30)[0, len(ids) :].tolist() for ids in prompts]
    graphs = Engine(model)
    assert tokens_of(Engine(model, cuda_graphs=False).generate(prompts, 30)) == want
    for _ in range(2):
        assert tokens_of(graphs.generate(prompts, 30)) == want
        assert tokens_of(graphs.generate(prompts[:1], 30)) == want[:1]


@SLOW
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_route_gives_the_same_tokens(recipe, dtype):
    model = packed_model(**recipe).to("cuda", dtype)
    prompts = [prompt(tokens=n, seed=n)[0] for n in (9, 30, 9)]
    options = dict(max_new_tokens=300, do_sample=False)
    want = [model.generate(ids[None].cuda(), **options)[0, len(ids) :].tolist() for ids in prompts]
    static = [
        model.generate(ids[None].cuda(), cache_implementation="static", **options)[0, len(ids) :].tolist()
        for ids in prompts  # a CUDA device is one where transformers compiles
    ]
    graphs, eager = Engine(model), Engine(model, cuda_graphs=False)
    assert tokens_of(eager.generate(prompts, 300)) == want
    for _ in range(2):  # the second time with what is captured; 300 tokens need two graphs
        assert tokens_of(graphs.generate(prompts, 300)) == want
        assert tokens_of(graphs.generate(prompts[:1], 300)) == want[:1]
    assert static == want


@SLOW
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-2-7b"])
def test_routes_agree_on_published_shapes(name, dtype):
    """Two layers of them, random: engine, and `generate` eager and compiled."""
    shape = dataclasses.replace(MODELS[name], layers=2)
    model = packed_llama(shape, 512, "cuda", dtype)
    ids = torch.randint(
        shape.vocabulary, (1, 60), device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )
    want = greedy(model, ids, 40)[0, 60:]
    (engine,) = Engine(model).generate(list(ids), 40)
    options = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    compiled = model.generate(ids, cache_implementation="static", **options)[0, 60:]
    assert tokens_of([engine.cuda(), compiled]) == tokens_of([want, want])


def gaps(model, ids: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far `new` tokens behind a prompt are from the likeliest, by a pass without cache; its logits."""
    with torch.inference_mode():
        logits = model(torch.cat([ids, new])[None], use_cache=False).logits[0, len(ids) - 1 : -1].float()
    return logits.amax(-1) - logits.gather(1, new[:, None])[:, 0], logits


@LONG
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-2-7b"])
def test_decoding_is_as_near_a_full_pass_as_kernels_are_to_each_other(name, dtype, monkeypatch):
    """Random models are chaotic: another order of a sum turns a 4-bit code, which turns others.

    So what was decoded is compared with prompts' kernels, and these with decoders' kernels on the same
    tokens. Where two passes differ by `error`, their best tokens do by about as much: 0.9 to 1.3 times
    where activations were disturbed by their last bits, and 5 to 8 times by a pass on another prompt.
    """
    torch.manual_seed(0)
    shape = dataclasses.replace(MODELS[name], layers=2)
    model = packed_llama(shape, 512, "cuda", dtype)
    for layer in model.model.layers:  # what a token is says less then, and what came before more
        queries = shape.heads * shape.head_dim
        layer.self_attn.qkv_proj.scale.data[:queries].mul_(4)
        layer.self_attn.o_proj.scale.data.mul_(4)
    ids = torch.randint(shape.vocabulary, (60,), generator=torch.Generator().manual_seed(1)).cuda()
    new = Engine(model).generate([ids], 40)[0].cuda()
    own, logits = gaps(model, ids, new)
    others, _ = gaps(model, torch.cat([ids[:-1].flip(0), ids[-1:]]), new)
    monkeypatch.setattr(dispatch, "backend", "cuda")
    error = (gaps(model, ids, new)[1] - logits).square().mean().sqrt()
    figures = [float(x / logits.std()) for x in (own.mean(), others.mean(), error)]
    assert own.mean() <= 2.5 * error, figures
    assert others.mean() > 2.5 * error, figures  # or a wrong cache would not show


#: Around the ends of kernels and of what prompts are padded to.
LENGTHS = (5, 16, 17, 60, 64, 65, 100, 128, 200)


def random_prompts(vocabulary: int, batch: int, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [*torch.randint(vocabulary, (batch, tokens), generator=generator).cuda()]


@LONG
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-2-7b"])
def test_prompts_as_graphs_give_the_tokens_of_generate(name, batch):
    """Read eagerly, captured, and replayed; long ones behind short ones and the other way round; by two
    engines in turn."""
    shape = dataclasses.replace(MODELS[name], layers=2)
    model = packed_llama(shape, 512, "cuda", torch.float16)
    prompts = {n: random_prompts(shape.vocabulary, batch, n) for n in LENGTHS}
    want = {n: greedy(model, torch.stack(rows), 12)[:, n:].tolist() for n, rows in prompts.items()}
    engines = Engine(model, max_length=256), Engine(model, max_length=512)
    for order in (LENGTHS, LENGTHS[::-1], LENGTHS):
        for n in order:
            for engine in engines:
                assert tokens_of(engine.generate(prompts[n], 12)) == want[n], n
    for engine in engines:
        lengths = {padded_length(batch, n, engine.max_length) for n in LENGTHS}
        assert engine._kept.prompts.captured.keys() == lengths


@LONG
@pytest.mark.parametrize("batch", [1, 2, pytest.param(5, marks=SLOW)])
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-2-7b"])
def test_prompts_as_graphs_have_the_bits_of_eager_ones(name, batch):
    """Logits, and what the cache holds."""
    shape = dataclasses.replace(MODELS[name], layers=2)
    model = packed_llama(shape, 1100, "cuda", torch.float16)
    lengths = [1, 2, 3, *LENGTHS, 130, 333, 900, 1023, 1024]
    lengths = [n for n in lengths if padded_length(batch, n, 1100)]
    parts = packed_layers(model)
    with inference(model):
        kept = PackedSequences(model, random_prompts(shape.vocabulary, batch, 1030), 1100, parts, graphs=True)
        for n in (*lengths, *lengths[::-1]):
            rows = random_prompts(shape.vocabulary, batch, n)
            eager = PackedSequences(model, rows, 1100, parts)
            for _ in range(2):
                kept.begin(rows)
                assert torch.equal(kept.logits, eager.logits), n
                for layer, other in zip(kept.cache.layers, eager.cache.layers, strict=True):
                    for side, wanted in ((layer.keys, other.keys), (layer.values, other.values)):
                        assert torch.equal(side.codes[:, :, :n], wanted.codes[:, :, :n]), n
                        assert torch.equal(side.params[:, :, :n], wanted.params[:, :, :n]), n
            kept.advance(kept.logits.argmax(-1))
            eager.advance(eager.logits.argmax(-1))
            assert torch.equal(kept.logits, eager.logits), n
        assert kept.prompts.captured.keys() == {padded_length(batch, n, 1100) for n in lengths}


@SLOW
def test_memory_is_the_same_after_a_thousand_requests():
    model, held = packed_model().cuda(), []
    engine = Engine(model, max_length=64)
    for request in range(1000):
        engine.generate([prompt(tokens=3 + request % 20, seed=request)[0]], 4)
        if request in (99, 999):
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[0] == held[1]


def test_sampling_does_not_depend_on_graphs():
    model, prompts = packed_model().cuda(), [prompt(tokens=9)[0]]
    sampling = Sampling(0.8, top_k=20, top_p=0.9, seed=1)
    graphs, eager = (Engine(model, cuda_graphs=on).generate(prompts, 40, sampling) for on in (True, False))
    assert tokens_of(graphs) == tokens_of(eager)
