"""The testbed: trained once, the same for one seed, and outliers that change nothing but activations."""

import dataclasses
import warnings

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

import w2a4
from benchmarks.experiments import testbed
from benchmarks.experiments.outliers import four_bit_inputs, input_shape, plant_outliers, principal_directions
from support.tiny_models import tiny_llama
from w2a4.evaluate.data import builtin_text
from w2a4.evaluate.perplexity import perplexity

TINY = testbed.Settings(
    hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, head_dim=8, context=32, batch=2, steps=6
)  # fmt: skip
TEXTS = [
    "", "plain", " two  spaces\n\n\ttab", "naïve Straße 東京 \U0001d11e \U0001f469\u200d\U0001f467",
    "\x00\x01\x7f\x80\xa0\xad\u2028\ufeff\uffff", "<|endoftext|> <s> ▁ Ġ", "".join(map(chr, range(0x180))),
    "\U0010ffff\u0301e\u0301\r\n",
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, outside of the user's."""
    monkeypatch.setenv("W2A4_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(**arguments):
    return testbed.load(progress=False, **{"settings": TINY, **arguments})


def same(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def spiky_llama(dtype=torch.float32, **overrides):
    """Random, with a byte's vocabulary and widths that have room for outliers."""
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny_llama(dtype=dtype, **{**sizes, **overrides})


def some_ids() -> torch.Tensor:
    return torch.tensor(list(builtin_text()[1].encode()[:256])).view(2, 128)


@torch.no_grad()
def logits(model):
    return model(input_ids=some_ids(), use_cache=False).logits


def relative(changed, exact) -> float:
    return ((changed - exact).norm() / exact.norm()).item()


class TestCache:
    def test_the_second_load_does_not_train(self, cache, monkeypatch):
        first, _ = load()
        assert list(cache.iterdir()) == [cache / "testbed"]
        monkeypatch.setattr(testbed, "train", None)
        second, tokenizer = load()
        assert same(first, second) and tokenizer("a", add_special_tokens=False)["input_ids"] == [97]
        assert second.dtype == torch.float32 and not second.training
        assert str(cache) not in second.config._name_or_path

    @pytest.mark.parametrize(
        ("file", "damage"),
        [
            ("model.safetensors", "cut"),
            ("model.safetensors", "flipped"),
            ("config.json", "gone"),
            ("tokenizer.json", "flipped"),
            (testbed.MANIFEST, "cut"),
            (testbed.MANIFEST, "gone"),
        ],
    )
    def test_a_damaged_file_is_made_again(self, file, damage):
        first, _ = load()
        path = testbed.cache_directory(0, TINY) / file
        content = path.read_bytes()
        half = len(content) // 2
        if damage == "gone":
            path.unlink()
        else:
            flipped = bytes([content[half] ^ 1])
            path.write_bytes(content[:half] + (flipped + content[half + 1 :] if damage == "flipped" else b""))
        with pytest.warns(UserWarning, match="damaged"):
            second, _ = load()
        assert same(first, second)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load()

    def test_what_is_trained_names_the_place(self):
        places = {testbed.cache_directory(seed, TINY) for seed in (0, 1)}
        places |= {
            testbed.cache_directory(0, dataclasses.replace(TINY, **{field.name: 1}))
            for field in dataclasses.fields(TINY)
        }
        assert len(places) == 2 + len(dataclasses.fields(TINY))

    def test_without_the_variable_it_is_the_users_cache(self, monkeypatch, tmp_path):
        monkeypatch.delenv("W2A4_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert testbed.cache_directory(0, TINY).parent == tmp_path / "w2a4" / "testbed"


class TestTraining:
    def test_a_seed_gives_one_model(self):
        one, again, other = (testbed.build(TINY, seed) for seed in (0, 0, 1))
        for model, seed in ((one, 0), (again, 0), (other, 1)):
            testbed.train(model, TINY, seed, progress=False)
            torch.rand(3)
        assert same(one, again) and not same(one, other)

    def test_the_global_generator_stays(self):
        before = torch.get_rng_state()
        load(outliers=True)
        assert torch.equal(torch.get_rng_state(), before)

    def test_it_learns(self):
        model = testbed.build(TINY, 0)
        before = logits(model)
        testbed.train(model, dataclasses.replace(TINY, steps=40, lr=1e-2), 0, progress=False)
        targets = some_ids()[:, 1:].flatten()
        loss = [
            torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), targets)
            for x in (before, logits(model))
        ]
        assert loss[1] < loss[0] - 1

    def test_a_window_of_every_batch_begins_with_bos(self):
        ids = next(testbed.training_windows(TINY, 0))
        assert ids.shape == (TINY.batch, TINY.context + 1)
        assert (ids == testbed.BOS_ID).nonzero().tolist() == [[0, 0]]


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
    def test_tokens_are_bytes(self, text, tmp_path):
        tokenizer = testbed.byte_tokenizer()
        tokenizer.save_pretrained(tmp_path)
        for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            ids = each(text, add_special_tokens=False)["input_ids"]
            assert ids == list(text.encode())
            assert each.decode(ids) == text
            assert each(text)["input_ids"] == [testbed.BOS_ID, *ids]
            assert each.decode([testbed.BOS_ID, *ids], skip_special_tokens=True) == text
            assert each.bos_token_id == each.eos_token_id == testbed.BOS_ID and len(each) == 257


class TestOutliers:
    @pytest.mark.parametrize(
        "overrides", [{}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}]
    )
    def test_the_function_stays_in_float64(self, overrides):
        model = spiky_llama(torch.float64, **overrides)
        before = logits(model)
        assert relative(logits(plant_outliers(model)), before) < 1e-10
        assert model.config.to_dict().keys() == spiky_llama().config.to_dict().keys()

    def test_the_function_stays_in_float32(self):
        model, _ = load()
        before = logits(model)
        assert relative(logits(plant_outliers(model)), before) < 1e-5

    def test_they_are_there_until_rotated_away(self):
        model = spiky_llama()
        plain = input_shape(model)
        planted = input_shape(plant_outliers(model))
        rotated = input_shape(w2a4.rotate(model))
        for kind in ("norms", "o_proj", "down_proj"):
            (kurtosis, peak), (planted_kurtosis, planted_peak) = plain[kind], planted[kind]
            assert planted_kurtosis > 1.4 * kurtosis and planted_peak > 1.1 * peak, kind
            assert rotated[kind][0] < 6 and rotated[kind][1] < 0.75 * planted_peak, kind

    def test_four_bits_suffer_until_rotated(self):
        model = spiky_llama()
        exact = logits(model)

        def error() -> float:
            with four_bit_inputs(model):
                return relative(logits(model), exact)

        plain = error()
        planted = (plant_outliers(model), error())[1]
        rotated = (w2a4.rotate(model), error())[1]
        assert planted > 1.5 * plain and rotated < planted / 1.5
        assert relative(logits(model), exact) < 1e-4  # the hooks are gone

    def test_principal_directions(self):
        model = spiky_llama()
        turn = principal_directions(model)
        assert torch.allclose(turn.T @ turn, torch.eye(64, dtype=torch.float64), atol=1e-12)

    def test_seeds_choose_other_channels(self):
        one, again, other = (plant_outliers(spiky_llama(), seed=seed) for seed in (0, 0, 1))
        assert same(one, again) and not same(one, other)


def test_it_goes_through_the_package(tmp_path):
    model, tokenizer = load(outliers=True)
    w2a4.quantize(
        model, tokenizer, w2a4.Recipe(calib_samples=2, calib_seqlen=32, gptq_refine=1), progress=False
    )
    w2a4.save(model, tokenizer, tmp_path / "packed")
    loaded, loaded_tokenizer = w2a4.load_model(tmp_path / "packed")
    scores = [
        perplexity(*pair, seqlen=64, windows=4, progress=False)["perplexity"]
        for pair in ((model, tokenizer), (loaded, loaded_tokenizer))
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5) and 1 < scores[0] < 1000


def test_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr(testbed, "Settings", lambda: TINY)
    monkeypatch.setattr(testbed, "WINDOWS", 2)
    result = CliRunner().invoke(testbed.main, ["--outliers", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "bits a byte" in result.output and "planted, then rotated" in result.output
    model, _ = w2a4.load_model(tmp_path / "out")
    assert same(model, load(outliers=True)[0])
    again = CliRunner().invoke(testbed.main, ["--out", str(tmp_path / "out")])
    assert again.exit_code == 1 and "exists already" in again.output
