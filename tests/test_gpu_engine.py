"""The engine on a CUDA device: eager, as CUDA graphs, and beside `generate` with and without torch.compile.

All need a GPU; `python -m benchmarks.gpu_suite` runs them.
"""

import pytest
import torch
from packed import packed_model, prompt

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


def test_sampling_does_not_depend_on_graphs():
    model, prompts = packed_model().cuda(), [prompt(tokens=9)[0]]
    sampling = Sampling(0.8, top_k=20, top_p=0.9, seed=1)
    graphs, eager = (Engine(model, cuda_graphs=on).generate(prompts, 40, sampling) for on in (True, False))
    assert tokens_of(graphs) == tokens_of(eager)
