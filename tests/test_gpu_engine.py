"""The engine on a CUDA device: eager, as CUDA graphs, and beside `generate` with and without torch.compile.

All need a GPU; `python -m benchmarks.gpu_run run` runs them. Compiling a model takes half a minute, so
tests that do are marked slow.
"""

import dataclasses

import pytest
import torch
from packed import packed_model, prompt
from watch import LONG, SLOW

from benchmarks.bench_engine import greedy
from benchmarks.random_llama import packed_llama
from benchmarks.shapes import MODELS
from w2a4 import ops
from w2a4.engine import Engine, Sampling

pytestmark = pytest.mark.gpu

RECIPES = {"w2": {}, "w4": {"weight_bits": 4, "group_size": -1}, "sinks": {"sink_tokens": 2}}


@pytest.fixture(autouse=True)
def _needs_the_extension():
    if not ops.has_cuda_kernels(torch.device("cuda")):
        pytest.fail(f"w2a4._cuda is not loaded: {ops.build_info()}")


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
    """Two layers of them, random: engine, `generate` eager and compiled, and a full forward pass."""
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
    # The prompt's and the decoder's kernels sum in other orders, so a tie may fall the other way.
    with torch.inference_mode():
        logits = model(torch.cat([ids[0], want])[None], use_cache=False).logits[0, 59:-1].float()
    gap = logits.amax(-1) - logits.gather(1, want[:, None])[:, 0]
    assert bool((gap < 0.05 * logits.std()).all())


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
