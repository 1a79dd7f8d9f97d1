"""The engine: the tokens of `model.generate`, for one prompt and for many of different lengths."""

import pytest
import torch

import w2a4
from support.packed import packed_model, prompt
from support.rerun import rerun_graphs
from support.tiny_models import tiny_llama
from w2a4.errors import W2A4Error
from w2a4.runtime import engine, graphs, sequences
from w2a4.runtime.engine import Engine, Sampling

PROMPTS = [prompt(tokens=n, seed=n)[0] for n in (9, 1, 30, 9)]


def by_transformers(model, ids, count: int = 12) -> torch.Tensor:
    """Greedy continuation, int64 `[n]`."""
    out = model.generate(ids[None], max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :]


def assert_same(got, want) -> None:
    assert [tokens.tolist() for tokens in got] == [tokens.tolist() for tokens in want]


RECIPES = {
    "w2": {},
    "w3": {"weight_bits": 3},
    "w4 row": {"weight_bits": 4, "group_size": -1, "weight_method": "rtn"},
    "no r3, r4": {"rotation.r3": "none", "rotation.r4": "none"},
    "random r3": {"rotation.r3": "random"},
    "sinks": {"sink_tokens": 2},
    "16-bit cache": {"kv_bits": 16},
    "16-bit activations": {"act_bits": 16},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_tokens_are_those_of_transformers(recipe):
    model = packed_model(**recipe)
    want = [by_transformers(model, ids) for ids in PROMPTS]
    assert_same(Engine(model).generate(PROMPTS, 12), want)
    assert_same(Engine(model).generate([PROMPTS[0], PROMPTS[3]], 12), [want[0], want[3]])


MANY = [prompt(tokens=1 + 7 * n % 29, seed=n)[0] for n in range(37)]

QUEUES = {
    "packed": {},
    "prefix": {"prefix_tokens": 2},
    "no r3, r4": {"rotation.r3": "none", "rotation.r4": "none"},
    "sinks": {"sink_tokens": 2},  # and the next: 16 after 16
    "16-bit cache": {"kv_bits": 16},
}


@pytest.mark.parametrize("recipe", QUEUES.values(), ids=QUEUES)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_more_prompts_than_go_side_by_side(recipe, count):
    """Each gives what it gives alone, whenever it begins, whoever ended before it and whoever is left."""
    model = packed_model(**recipe)
    alone = Engine(model)
    whole = [alone.generate([ids], count)[0] for ids in MANY]
    stops = [int(whole[0][-1]), int(whole[5][0])]  # some end before `count`, one of them at once
    want = [alone.generate([ids], count, stop_tokens=stops)[0] for ids in MANY]
    seen = [[] for _ in MANY]
    got = Engine(model).generate(
        MANY, count, stop_tokens=stops, on_token=lambda i, token: seen[i].append(token)
    )
    assert_same(got, want)
    assert seen == [tokens.tolist() for tokens in want]
    assert count == 1 or len({len(tokens) for tokens in want}) > 1


def test_sequences_that_have_ended_are_not_computed(monkeypatch):
    model, steps = packed_model(), []
    advance = sequences.PackedSequences.advance
    monkeypatch.setattr(
        sequences.PackedSequences, "advance", lambda self, t: steps.append(len(t)) or advance(self, t)
    )
    whole = Engine(model).generate(MANY[:20], 8)
    assert steps == [16] * 7 + [4] * 7 and all(len(tokens) == 8 for tokens in whole)


def test_rules_follow_a_sequence_to_its_place():
    model = packed_model()
    model.generation_config.repetition_penalty, model.generation_config.min_new_tokens = 1.3, 3
    stops = [int(tokens[0]) for tokens in Engine(model).generate(MANY[:3], 1)]
    want = [Engine(model).generate([ids], 6, stop_tokens=stops)[0] for ids in MANY]
    assert_same(Engine(model).generate(MANY, 6, stop_tokens=stops), want)
    assert all(len(tokens) >= 3 for tokens in want)


def test_sinks_of_sequences_of_different_lengths():
    model, prompts = packed_model(sink_tokens=2), [PROMPTS[0], PROMPTS[2]]
    assert_same(Engine(model).generate(prompts, 12), [by_transformers(model, ids) for ids in prompts])


def test_steps_as_graphs(monkeypatch):
    """What is captured: a step under a bound on the lengths, with tokens and lengths in fixed places."""
    bounds, _ = rerun_graphs(monkeypatch)
    monkeypatch.setattr(graphs.StepGraphs, "LEAST", 16)
    monkeypatch.setattr(engine.ops, "has_cuda_kernels", lambda device: True)
    model = packed_model()
    want = [by_transformers(model, ids) for ids in PROMPTS]
    eng = Engine(model, max_length=48)
    assert_same(eng.generate(PROMPTS, 12), want)
    assert bounds == [32, 48]
    assert_same(eng.generate(PROMPTS[:1], 12), want[:1])
    assert bounds == [32, 48, 16, 32]
    assert_same(eng.generate(PROMPTS[3:], 12), want[3:])
    assert bounds == [32, 48, 16, 32], "graphs of the call before serve again"
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert_same(eng.generate(PROMPTS[3:], 12), want[3:])
    assert bounds == [32, 48, 16, 32, 16, 32], "a weight lies elsewhere"
    assert_same(Engine(model, cuda_graphs=False).generate(PROMPTS, 12), want)
    assert len(bounds) == 6


def test_a_float_model_in_a_static_cache(monkeypatch):
    """Its steps, as they are captured on a CUDA device."""
    rerun_graphs(monkeypatch)
    model = tiny_llama(dtype=torch.float32, vocab_size=131, eos_token_id=None).eval()
    rows = [PROMPTS[0], PROMPTS[3]]
    assert not sequences.StaticSequences.serves(model, PROMPTS) and not sequences.StaticSequences.serves(
        packed_model(), rows
    )
    if not sequences.StaticSequences.serves(model, rows):
        pytest.skip("transformers 4 counts the tokens of a static cache on the host")
    static = None
    with engine.inference(model):
        for prompts in (rows, rows[::-1]):
            want = [by_transformers(model, ids) for ids in prompts]
            if static is None:
                static = sequences.StaticSequences(model, prompts, 48)
            else:
                assert static.fits(model, prompts) and not static.fits(model, prompts[:1])
                static.begin(prompts)
            got = [static.logits.argmax(-1)]
            for _ in range(11):
                static.advance(got[-1])
                got.append(static.logits.argmax(-1))
            assert_same(torch.stack(got, 1), want)


def test_a_float_model():
    model = tiny_llama(dtype=torch.float32, vocab_size=131, eos_token_id=None).eval()
    want = [by_transformers(model, ids) for ids in PROMPTS]
    assert_same(Engine(model).generate(PROMPTS, 12), want)


def test_a_hook_is_called():
    model, calls = packed_model(), []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert_same(Engine(model).generate(PROMPTS[:1], 4), [by_transformers(packed_model(), PROMPTS[0], 4)])
    assert len(calls) == 4


def steer(module, args, out):
    return out + torch.linspace(-3, 3, out.shape[-1])


def replace_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def derive(layer):
    class Louder(type(layer)):
        def forward(self, *args, **kwargs):
            return 1.5 * super().forward(*args, **kwargs)

    layer.__class__ = Louder


CHANGES = {
    "hook of a layer": lambda model: model.model.layers[1].register_forward_hook(steer),
    "pre-hook of a layer": lambda model: model.model.layers[1].register_forward_pre_hook(
        lambda module, args: (2 * args[0], *args[1:])
    ),
    "forward of a layer": lambda model: replace_forward(model.model.layers[0]),
    "class of a layer": lambda model: derive(model.model.layers[0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_others_do_to_a_layer_is_done(change):
    """Whoever steers activations hooks into layers, not into what is in them."""
    model = packed_model()
    before = by_transformers(model, PROMPTS[0], 8)
    change(model)
    want = by_transformers(model, PROMPTS[0], 8)
    assert not torch.equal(want, before)
    assert_same(Engine(model).generate(PROMPTS[:1], 8), [want])


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_a_part_of_a_layer_in_another_module(part):
    model = packed_model()
    layer = model.model.layers[1]
    setattr(layer, part, Wrapper(getattr(layer, part)))
    want = by_transformers(model, PROMPTS[0], 6)
    assert_same([want], [by_transformers(packed_model(), PROMPTS[0], 6)])
    assert_same(Engine(model).generate(PROMPTS[:1], 6), [want])


def test_hooks_of_the_model_are_called():
    model, calls = packed_model(), []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    replaced = model.model.forward
    model.model.forward = lambda *args, **kwargs: calls.append("decoder") or replaced(*args, **kwargs)
    Engine(model).generate(PROMPTS[:1], 3)
    assert calls == ["before", "decoder"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(stop_tokens=5), "stop_tokens=5: give a list of token ids, or None"),
        (dict(stop_tokens=["a"]), r"stop_tokens=\['a'\]: give a list"),
        (dict(sampling={}), None),
        (dict(sampling={"temperature": 1}), "sampling={'temperature': 1}: give a Sampling"),
        (dict(prompts=None), "prompts=None: give a list of prompts"),
        (dict(prompts=(n for n in range(2))), "prompts=<generator"),
        (dict(prompts=[torch.empty(3, dtype=torch.long, device="meta")]), "prompt 0 is a meta tensor"),
        (dict(prompts=[torch.tensor([1, 0, 2]).to_sparse()]), "prompt 0 is a sparse tensor"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments, message):
    arguments = dict(prompts=PROMPTS[:1], max_new_tokens=2) | arguments
    if message is None:  # nothing asked for is greedy
        assert len(Engine(packed_model()).generate(**arguments)[0]) == 2
        return
    with pytest.raises(W2A4Error, match=message):
        Engine(packed_model()).generate(**arguments)


def test_a_long_prompt_in_chunks(monkeypatch):
    model = packed_model()
    want = Engine(model).generate(PROMPTS, 8)
    monkeypatch.setattr(sequences, "PREFILL_CHUNK", 7)
    assert_same(Engine(model).generate(PROMPTS, 8), want)


def test_stop_tokens_and_callback():
    model, seen = packed_model(), []
    whole = Engine(model).generate(PROMPTS, 12)
    stop = int(whole[0][3])
    first = [tokens[: tokens.tolist().index(stop) + 1] if stop in tokens else tokens for tokens in whole]
    got = Engine(model).generate(PROMPTS, 12, stop_tokens=[stop], on_token=lambda *pair: seen.append(pair))
    assert_same(got, first)
    assert [[t for row, t in seen if row == i] for i in range(4)] == [tokens.tolist() for tokens in got]
    model.generation_config.eos_token_id = stop
    assert_same(Engine(model).generate(PROMPTS, 12), first)


def test_training_mode_and_gradients_are_left_alone():
    model = packed_model().train()
    Engine(model).generate(PROMPTS[:1], 2)
    assert model.training and torch.is_grad_enabled()


def test_a_part_in_training_mode_is_evaluated():
    model = packed_model().eval()
    part = model.model.layers[1].train()
    with engine.inference(model):
        assert not any(module.training for module in model.modules())
    assert not part.training, "the mode that comes back is that of the whole model"


LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(4000, 1)


def shares(sampling: Sampling) -> list[float]:
    generator = sampling.generator(LOGITS.device)
    return (sampling.pick(LOGITS, generator).bincount(minlength=4) / len(LOGITS)).tolist()


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (Sampling(), [0, 1, 0, 0]),
        (Sampling(1.0, seed=1), LOGITS[0].softmax(0).tolist()),
        (Sampling(2.0, seed=1), (LOGITS[0] / 2).softmax(0).tolist()),
        (Sampling(1.0, top_k=1, seed=1), [0, 1, 0, 0]),
        (Sampling(1.0, top_k=2, seed=1), [0, *torch.tensor([3.0, -1e9, 2.0]).softmax(0).tolist()]),
        # The most probable token has 0.64 of it all, the first two 0.88.
        (Sampling(1.0, top_p=0.6, seed=1), [0, 1, 0, 0]),
        (Sampling(1.0, top_p=0.7, seed=1), [0, *torch.tensor([3.0, -1e9, 2.0]).softmax(0).tolist()]),
        (Sampling(1.0, top_p=0.9, seed=1), torch.tensor([-1e9, 3.0, 1.0, 2.0]).softmax(0).tolist()),
        (Sampling(1.0, top_k=9, top_p=1.0, seed=1), LOGITS[0].softmax(0).tolist()),
        # Of the first three the first has 0.67, with the second 0.91.
        (Sampling(1.0, top_k=3, top_p=0.66, seed=1), [0, 1, 0, 0]),
    ],
)
@pytest.mark.parametrize("candidates", [2, 512])
def test_sampling(candidates, sampling, want, monkeypatch):
    monkeypatch.setattr(engine, "CANDIDATES", candidates)  # 2 are too few for some, and all are sorted
    assert shares(sampling) == pytest.approx(want, abs=0.03)  # four standard deviations of 4000 draws
    assert shares(sampling) == shares(sampling)


def test_sampled_text_repeats_with_its_seed():
    eng = Engine(packed_model())
    first, again, other = (eng.generate(PROMPTS, 8, Sampling(1.0, seed=seed)) for seed in (3, 3, 4))
    assert_same(first, again)
    assert [t.tolist() for t in first] != [t.tolist() for t in other]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "0 prompts: give one or more"),
        ([[1], []], {}, r"prompt 1 has shape \[0\]"),
        ([[1, 131]], {}, r"prompt 0 has tokens from 1 to 131, not all in 0\.\.130"),
        (
            [[1] * 60],
            {"max_new_tokens": 5},
            "prompt 0 has 60 tokens; with max_new_tokens=5 the cache of max_length=64",
        ),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_requests(prompts, options, message):
    with pytest.raises(W2A4Error, match=message):
        Engine(packed_model(), max_length=64).generate(prompts, **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize("count", [1.5, float("nan"), float("inf"), True, "3", None, 2**70, -(2**70)])
def test_numbers_of_tokens_that_are_none(count):
    with pytest.raises(W2A4Error, match="max_new_tokens="):
        Engine(packed_model(), max_length=64).generate([[1]], count)


@pytest.mark.parametrize("length", [1.5, float("nan"), "64", 2**70, True, 1])
def test_lengths_that_are_none(length):
    with pytest.raises(W2A4Error, match="max_length="):
        Engine(packed_model(), max_length=length)


@pytest.mark.parametrize("prompt_", [[1.5], "text", [[1], [2, 3]], None, [2**70], [True], torch.ones(2)])
def test_prompts_that_are_no_ids(prompt_):
    with pytest.raises(W2A4Error, match="prompt 0"):
        Engine(packed_model()).generate([prompt_], 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", list(range(0, 131, 5))),
        ("repetition_penalty", 1.8),
        ("no_repeat_ngram_size", 1),
        ("suppress_tokens", list(range(3, 90))),
        ("begin_suppress_tokens", list(range(3, 120))),
        ("bad_words_ids", [[i] for i in range(3, 60)] + [[70, 71]]),
        ("sequence_bias", [[[5], 4.0], [[9, 11], 3.0]]),
        ("min_new_tokens", 8),
        ("min_length", 20),
    ],
)
def test_the_generation_config_is_followed(key, value):
    model = packed_model()
    model.generation_config.eos_token_id = list(range(0, 131, 7))
    setattr(model.generation_config, key, value)
    want = [by_transformers(model, ids) for ids in PROMPTS]
    assert_same(Engine(model).generate(PROMPTS, 12), want)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_beams", 4), ("forced_eos_token_id", 2), ("guidance_scale", 1.5), ("stop_strings", ["a"]),
     ("max_time", 1.0), ("penalty_alpha", 0.5), ("repetition_penalty", -1.0), ("sequence_bias", "x"),
     ("bad_words_ids", [[131]]), ("bad_words_ids", [[5, 131]]), ("sequence_bias", [[[131], 1.0]]),
     ("eos_token_id", [[1]]), ("eos_token_id", "x"), ("eos_token_id", [1.5])],
)  # fmt: skip
def test_what_is_not_followed_is_refused(key, value, monkeypatch):
    model = packed_model()
    setattr(model.generation_config, key, value)
    monkeypatch.setattr(Engine, "sequences", None)  # it would read the prompts
    with pytest.raises(W2A4Error, match=f"generation_config.{key}="):
        Engine(model).generate(PROMPTS, 2)


def test_a_config_that_samples_is_told():
    model = packed_model()
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.6
    with pytest.warns(UserWarning, match=r"samples \(temperature=0.6"):
        greedy = Engine(model).generate(PROMPTS, 4)
    assert_same(Engine(packed_model()).generate(PROMPTS, 4), greedy)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-9, 1e300])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([[1.0, 3.0, float("-inf"), 2.0]]).repeat(500, 1)
    picked = Sampling(temperature, seed=0).pick(logits, torch.Generator().manual_seed(0))
    assert set(picked.tolist()) == ({1} if temperature < 1 else {0, 1, 3})


def test_logits_that_overflow_are_told_with_the_layer():
    model = packed_model()
    model.model.layers[1].input_layernorm.weight.data.fill_(1e9)
    with pytest.raises(W2A4Error, match=r"logits hold NaN \(model.layers.1: (keys|values) beyond 65504"):
        Engine(model).generate(PROMPTS[:1], 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"seed": 2**64}, "seed=1844"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"top_k": True}, "top_k=True"),
    ],
)
def test_bad_sampling(values, message):
    with pytest.raises(W2A4Error, match=message):
        Sampling(**values)


def test_a_cache_longer_than_the_positions():
    model = packed_model()
    with pytest.raises(
        W2A4Error, match=f"max_length=99999: give a number from 2 to {model.config.max_position_embeddings}"
    ):
        Engine(model, max_length=99999)
    assert w2a4.Engine is Engine


def test_rope_that_depends_on_how_long_a_sequence_is():
    """Longer than 16 tokens, all positions turn by other angles."""
    half = [1.0] * 16, [4.0] * 16
    scaling = {"rope_type": "longrope", "short_factor": half[0], "long_factor": half[1], "factor": 4.0,
               "original_max_position_embeddings": 16}  # fmt: skip
    model = packed_model({"rope_scaling": scaling, "max_position_embeddings": 64})
    want = by_transformers(model, PROMPTS[0], 16)
    assert_same(Engine(model).generate([PROMPTS[0]], 16), [want])
