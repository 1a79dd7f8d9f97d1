"""benchmarks.bench_decode: tokens checked before the clock, sides by turns, and what it writes."""

import functools
import json
import sys

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bench_decode, bench_engine, random_llama, shapes, targets, timeline
from benchmarks.shapes import Model
from support import bench
from support.tiny_models import tiny_model, tiny_tokenizer
from w2a4.cli import demo
from w2a4.runtime.engine import Engine, inference

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = {"tokens_per_second", "first_token_ms", "ratio"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A random float LLaMA whose first token would end the text."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model(hidden_size=64, intermediate_size=96)
    ids = tiny_tokenizer()(demo.PROMPT, return_tensors="pt")["input_ids"]
    model.generation_config.eos_token_id = int(model(ids).logits[0, -1].argmax())
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory):
    return bench_decode.pack(str(plain), tmp_path_factory.mktemp("packed") / "tiny-w2")


answer = functools.partial(bench.answer, bench_decode.main)


def test_it_packs_checks_and_measures(plain, tmp_path, monkeypatch):
    arguments = ["--model", plain, "--tokens", 5, "--repeats", 3, "--json", tmp_path / "r.json"]
    monkeypatch.setattr(sys, "argv", ["bench_decode", *map(str, arguments)])
    code, output = answer(*arguments)
    assert code == 0 and "Medians of 3 rounds" in output and "generate, float32" in output
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"commit", "versions", "cpu", "date"} <= set(result["meta"])
    assert result["meta"]["command"].endswith(f"bench_decode --model {plain} --tokens 5 --repeats 3 --json "
                                              f"{tmp_path / 'r.json'}")  # fmt: skip
    assert result["correct"] and result["tokens"] == 5 and result["recipe"]["weight_method"] == "rtn"
    assert len(result["rounds"]) == 3
    for of in result["rounds"]:
        assert set(of) == set(bench_decode.SIDES)
        assert all(0 < side["first"] < side["seconds"] for side in of.values())
    assert [set(side) for side in result["summary"].values()] == [SIDE] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_no_time_if_tokens_differ(plain, packed, tmp_path, monkeypatch):
    right = bench_decode.evaluate.generate

    def wrong(*arguments):
        new = right(*arguments)
        return torch.cat([new[:-1], new[-1:] ^ 1])

    monkeypatch.setattr(bench_decode.evaluate, "generate", wrong)
    file = tmp_path / "r.json"
    code, output = answer("--model", plain, "--packed", packed, "--tokens", 3, "--json", file)
    assert code == 1 and "other tokens, so no times" in output and "tokens/s" not in output
    result = json.loads(file.read_text())
    assert result["correct"] is False and "rounds" not in result and "summary" not in result


def test_sides_take_turns_after_a_short_run_of_each():
    calls = []

    def generate(name):
        def run(inputs, count, streamer):
            calls.append((name, count))
            for _ in range(count + 1 if streamer else 0):
                streamer.put(None)
            return torch.zeros(count)

        return run

    rounds = bench_decode.measure({name: generate(name) for name in "abc"}, None, 7, 3)
    assert calls == [(name, 2) for name in "abc"] + [(name, 7) for name in "abcbcacab"]
    assert len(rounds) == 3


def test_medians_and_ratios():
    runs = [bench_decode.Run(seconds, seconds / 4) for seconds in (1.0, 2.0, 4.0)]
    rounds = [{"engine": runs[0], "generate": runs[0], "float32": run} for run in (runs[2], runs[0], runs[1])]
    found = bench_decode.summary(rounds, 8)
    assert (found["engine"]["tokens_per_second"], found["engine"]["first_token_ms"]) == (8.0, 250.0)
    assert (found["float32"]["tokens_per_second"], found["float32"]["first_token_ms"]) == (4.0, 500.0)
    assert found["float32"]["ratio"] == {"median": 2.0, "least": 1.0, "most": 4.0}
    assert found["generate"]["ratio"]["median"] == 1.0


def test_what_cannot_be_measured_is_said_in_a_line(plain, tmp_path):
    assert "python -m benchmarks.bench_decode" in answer("--help")[1]
    code, output = answer("--model", tmp_path / "none")
    assert code == 1 and "Error: " in output and "Traceback" not in output
    code, output = answer("--model", plain, "--packed", plain)
    assert code == 1 and f"{plain} is not packed by w2a4" in output
    assert answer("--tokens", 1)[0] == answer("--repeats", 0)[0] == 2
    with pytest.raises(bench_decode.click.ClickException, match="2 tokens came out instead of 3"):
        bench_decode.timed(lambda *_: torch.zeros(2), None, 3)


TINY = Model(64, 96, 4, 2, 16, 2, 131)


@pytest.mark.parametrize("recipe", ["w2a4kv4", "w4a4kv4"])
def test_random_models_have_activations_of_a_common_size(recipe):
    model = random_llama.packed_llama(TINY, 64, "cpu", torch.float32, recipe)
    spread = model(torch.arange(32)[None]).logits.std().item()
    assert 0.2 < spread < 5
    assert (
        bench_engine.moved_bytes(model, 100, 2) - bench_engine.moved_bytes(model, 0, 2)
        == 2 * 100 * 2 * 2 * 24
    )


def test_bench_engine(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "smollm2-135m", TINY)
    monkeypatch.setattr(bench_engine, "REPEATS", 2)
    out = tmp_path / "r.json"
    options = ["--contexts", "8,40", "--tokens", 3, "--batch", 2, "--json", out]
    result = CliRunner().invoke(bench_engine.main, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    copy, *rows = json.loads(out.read_text())["rows"]
    assert copy["op"] == "copy" and [row["context"] for row in rows] == [8, 40]
    for row in rows:
        assert row["correct"] and row["tokens"] == 2 and row["ratio"] == row["peer_us"] / row["us"]
        assert row["first_ms"] > 0 and row["peer_first_ms"] > 0 and row["peak_bytes"] is None
    assert all(target.met is None for target in targets.targets(rows))
    monkeypatch.setattr(bench_engine, "is_right", lambda *_: False)
    result = CliRunner().invoke(bench_engine.main, [str(option) for option in options])
    assert result.exit_code == 1 and "give other tokens: no time above counts" in result.output
    result = CliRunner().invoke(bench_engine.main, ["--contexts", "5000"])
    assert "--contexts 5000: at most 4096 on a CPU" in result.output


def test_timeline(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "smollm2-135m", TINY)
    out = tmp_path / "t.json"
    result = CliRunner().invoke(timeline.main, ["--json", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    calls = {kernel["kernel"]: kernel["calls"] for kernel in found["kernels"]}
    assert calls["w2a4::decoder_layers"] == calls["w2a4::linear_w8"] == 1
    assert 0 < sum(kernel["us"] for kernel in found["kernels"]) and found["step_us"] > 0 < found["bound_us"]
    assert "w2a4::decoder_layers" in result.output and "a copy of what it reads" in result.output


def test_places_in_the_cache():
    """What is measured at a context is what is measured after reading as much."""
    model = random_llama.packed_llama(TINY, 64, "cpu", torch.float32)
    ids = bench_engine.prompts(131, 2, 20)
    with inference(model):
        read = Engine(model).sequences(ids, 8)
        token = read.logits.argmax(-1)
        read.advance(token)
        moved = Engine(model).sequences([row[:5] for row in ids], 40)
        whole = Engine(model).sequences(ids, 8)
        for into, of in zip(moved.cache.layers, whole.cache.layers, strict=True):
            for side in ("keys", "values"):
                for name in ("codes", "params"):
                    getattr(getattr(into, side), name)[:, :, :20] = getattr(getattr(of, side), name)[
                        :, :, :20
                    ]
        bench_engine.place_at(moved, 20)
        moved.advance(token)
    assert torch.equal(moved.logits, read.logits)
