"""benchmarks.bench_draft: the original's tokens with a draft, and what is counted."""

import functools
import json

import click
import pytest
import torch

from benchmarks import bench_decode, bench_draft
from support import bench
from support.tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
answer = functools.partial(bench.answer, bench_draft.main)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random float LLaMA and itself, packed."""
    plain = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(hidden_size=64, intermediate_size=96).save_pretrained(plain)
    tiny_tokenizer().save_pretrained(plain)
    return str(plain), bench_decode.pack(str(plain), tmp_path_factory.mktemp("packed") / "tiny-w2")


def test_it_compares_and_counts(models, tmp_path):
    plain, packed = models
    code, output = answer(
        "--model", plain, "--packed", packed, "--prompts", 2, "--tokens", 6, "--drafted", "1,3",
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0 and "times as fast" in output
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["text"], row["drafted"]) for row in rows] == [
        ("general", 1), ("general", 3), ("builtin", 1), ("builtin", 3)
    ]  # fmt: skip
    for row in rows:
        assert 0 <= row["accepted"] <= 1 and 1 <= row["tokens_a_look"] <= row["drafted"] + 1
        assert row["speedup"]["least"] <= row["speedup"]["median"] <= row["speedup"]["most"]


def test_a_draft_of_itself_is_always_accepted(models):
    plain, _ = models
    full, tokenizer = bench_decode.load(plain)
    pair = bench_draft.Pair(full, bench_decode.load(plain)[0])
    (ids,) = bench_draft.prompts(tokenizer, "one two three four five six " * 40, 1)
    rows = bench_draft.measure(pair, {"text": [ids]}, 9, [2])
    assert ids.shape == (1, bench_draft.PROMPT_TOKENS)
    assert rows[0]["tokens_a_look"] == 3 and rows[0]["accepted"] == 1


def test_other_tokens_are_an_error(models):
    plain, packed = models
    full, tokenizer = bench_decode.load(plain)
    pair = bench_draft.Pair(full, bench_decode.load(packed)[0])
    (ids,) = bench_draft.prompts(tokenizer, "one two three four five six " * 40, 1)
    tokens, _ = pair.generate(ids, 4, 0)
    with torch.no_grad():
        last = full(torch.cat([ids[0], tokens[:2]])[None]).logits[0, -1]
    other = tokens.clone()
    other[2] = int(last.argmin())
    with pytest.raises(click.ClickException, match="token 3 is another"):
        pair.check(ids, tokens, other)
