"""Texts, windows, and every way a text can be wrong."""

import json
import sys

import pytest
import torch

import w2a4
from support.tiny_models import tiny_llama, tiny_tokenizer
from w2a4.errors import CalibrationError
from w2a4.evaluate import data
from w2a4.evaluate.perplexity import perplexity
from w2a4.train.run import train


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_builtin_text_is_cut_in_two_disjoint_parts():
    calibration, evaluation = data.builtin_text()
    assert data.builtin_text() == (calibration, evaluation)
    from pydoc_data.topics import topics

    paragraphs = [text.split(data.SEPARATOR) for text in (calibration, evaluation)]
    whole = data.SEPARATOR.join(topics[k] for k in sorted(topics)).split(data.SEPARATOR)
    assert not set(paragraphs[0]) & set(paragraphs[1])
    assert paragraphs[1] == whole[-len(paragraphs[1]) :]
    later = set(paragraphs[1])
    assert paragraphs[0] == [part for part in whole[: -len(paragraphs[1])] if part not in later]
    # SmolLM2 reads about 4.1 characters a token: 32 x 1024 tokens to calibrate, 16 x 2048 to evaluate.
    assert len(calibration) > 5 * 32 * 1024
    assert len(evaluation) > 5 * 16 * 2048


def test_load_text_of_each_kind(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\u2028three", encoding="utf-8")
    assert data.load_text(tmp_path / "a.txt", "evaluation") == "one\ntwo\u2028three"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("one", "tw\u2028o")]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert data.load_text(str(tmp_path / "a.jsonl"), "evaluation") == "one\n\ntw\u2028o"
    assert data.load_text(["one", "two"], "evaluation") == "one\n\ntwo"
    assert data.load_text("builtin", "calibration") == data.builtin_text()[0]
    assert data.load_text("builtin", "evaluation") == data.builtin_text()[1]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), file)
    assert data.read_text(file) == "one\n\ntwo"
    parquet.write_table(pyarrow.table({"body": ["one"]}), file)
    with pytest.raises(CalibrationError, match="no parquet file with a column 'text'"):
        data.read_text(file)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(CalibrationError, match="pip install pyarrow"):
        data.read_text(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt' does not exist"),
        ("Salesforce/wikitext", None, "or hub:NAME for a data set of the hub"),
        ("a.csv", b"text", "ends in '.csv'"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n ", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"body": 1}', "line 2.*body.*field 'text'"),
        ("a.jsonl", b"not json", "line 1"),
        ("a.jsonl", b'["text"]', "line 1"),
        ("a.jsonl", b'{"text": 3}', "3, not a string"),
    ],
)
def test_bad_text_files_are_named(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        data.read_text(file)


def test_empty_documents():
    with pytest.raises(CalibrationError, match="2 calibration documents given are empty"):
        data.load_text(["", " "], "calibration")


def test_describe_text_holds_no_directory(tmp_path):
    assert data.describe_text(tmp_path / "wiki.txt", "abc").startswith(
        "wiki.txt, 3 characters, sha256 ba7816bf8f01"
    )
    assert data.describe_text("builtin", "x").startswith("builtin (pydoc_data.topics of Python 3.")
    assert data.describe_text(["a", "b"], "a\n\nb").startswith("2 documents")


@pytest.mark.parametrize("bos", [True, False])
def test_token_stream_has_bos_once(bos):
    tokenizer = tiny_tokenizer(bos)
    plain = tokenizer("an example", add_special_tokens=False)["input_ids"]
    ids, has_bos = data.token_stream(tokenizer, "an example")
    assert has_bos is bos
    assert ids.dtype == torch.long
    assert ids.tolist() == ([tokenizer.bos_token_id] if bos else []) + plain
    if bos:
        assert torch.equal(data.token_stream(tokenizer, "<s>an example")[0], ids)


@pytest.mark.parametrize("text", ["a</s>b c", "</s>a</s></s>b</s>", "</s>", ""])
def test_token_stream_of_documents_is_that_of_their_text(text, monkeypatch):
    monkeypatch.setattr(data, "DOCUMENTS", 2)
    tokenizer = tiny_tokenizer()
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert data.token_stream(tokenizer, text)[0].tolist() == [tokenizer.bos_token_id, *whole]


def test_windows_drop_the_tail_and_do_not_overlap(tokenizer):
    ids, _ = data.token_stream(tokenizer, data.builtin_text()[0][:3000])
    for seqlen in (2, 7, len(ids) - 1, len(ids)):
        windows = data.windows(tokenizer, data.builtin_text()[0][:3000], seqlen)
        assert windows.shape == (len(ids) // seqlen, seqlen)
        assert torch.equal(windows.flatten(), ids[: windows.numel()])
    with pytest.raises(CalibrationError, match=rf"{len(ids)} tokens .* seqlen={len(ids) + 1}"):
        data.windows(tokenizer, data.builtin_text()[0][:3000], len(ids) + 1)
    with pytest.raises(CalibrationError, match="seqlen=1"):
        data.windows(tokenizer, "text", 1)


def test_calibration_windows_are_spread_and_seeded(tokenizer):
    text = data.builtin_text()[0][:8000]
    ids, _ = data.token_stream(tokenizer, text)
    torch.manual_seed(1)
    first = data.calibration_windows(tokenizer, text, 5, 31, seed=3)
    torch.manual_seed(2)
    assert torch.equal(data.calibration_windows(tokenizer, text, 5, 31, seed=3), first)
    assert not torch.equal(data.calibration_windows(tokenizer, text, 5, 31, seed=4), first)
    stretch = len(ids) // 5
    for index, window in enumerate(first):
        part = ids[index * stretch : (index + 1) * stretch]
        assert any(torch.equal(part[start : start + 31], window) for start in range(len(part) - 30))


def test_calibration_text_that_just_fits_and_one_token_less(tokenizer):
    text = data.builtin_text()[0][:4000]
    ids, _ = data.token_stream(tokenizer, text)
    windows = data.calibration_windows(tokenizer, text, len(ids) // 10, 10)
    assert windows.shape == (len(ids) // 10, 10)
    with pytest.raises(CalibrationError, match=rf"{len(ids)} tokens.*calib_samples=3.*need {3 * len(ids)}"):
        data.calibration_windows(tokenizer, text, 3, len(ids))
    with pytest.raises(CalibrationError, match="calib_samples=1"):
        data.calibration_windows(tokenizer, "", 1, 4)


class Hub:
    """Stands in for the package `datasets`, which is not installed where this is tested."""

    def __init__(self, records, error=None):
        self.records, self.error, self.asked = records, error, []

    def load_dataset(self, name, config, split, streaming):
        self.asked.append((name, config, split))
        assert streaming
        if self.error is not None:
            raise self.error
        return iter(self.records)


@pytest.fixture
def hub(monkeypatch):
    def install(*args, **kwargs):
        module = Hub(*args, **kwargs)
        monkeypatch.setitem(sys.modules, "datasets", module)
        data._read_hub.cache_clear()
        return module

    return install


def test_data_sets_of_the_hub(hub, monkeypatch):
    module = hub([{"text": "one"}, {"text": ""}, {"text": "two"}, {"text": "three"}])
    monkeypatch.setattr(data, "HUB_CHARACTERS", 6)
    for source in ("hub:a/b", "hub:a/b,c", "hub:a/b:test", "hub:a/b,c:train[:9]"):
        assert data.load_text(source, "calibration") == "one\n\n\n\ntwo"
    assert module.asked == [
        ("a/b", None, "train"), ("a/b", "c", "train"), ("a/b", None, "test"), ("a/b", "c", "train[:9]")
    ]  # fmt: skip
    data.load_text(source, "evaluation")
    assert len(module.asked) == 4  # read once
    assert data.describe_text("hub:a/b,c", "x").startswith("hub:a/b,c, 1 characters")


@pytest.mark.parametrize(
    "records,error,message",
    [
        ([{"content": "one"}], None, "no field 'text'"),
        ([{"text": ""}], None, "is empty"),
        ([], ConnectionError("no network\nat all"), r"cannot read 'hub:a/b' .*: no network$"),
        ([], ValueError(), "ValueError"),
    ],
)
def test_bad_data_sets(records, error, message, hub):
    hub(records, error)
    with pytest.raises(CalibrationError, match=message):
        data.load_text("hub:a/b", "calibration")


def test_data_sets_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    data._read_hub.cache_clear()
    with pytest.raises(CalibrationError, match="pip install datasets"):
        data.load_text("hub:a/b", "calibration")


def test_tokens_that_only_the_tokenizer_knows_are_refused(tokenizer, tmp_path):
    """One that was added to the tokenizer and not to the model's embeddings, wherever a text goes in."""
    tokenizer.add_tokens(["<|new|>"])
    text = ["the <|new|> fox " * 200]
    new = tokenizer.convert_tokens_to_ids("<|new|>")
    model = tiny_llama(
        dtype=torch.float32, vocab_size=new, hidden_size=64, intermediate_size=128, head_dim=16
    )
    recipe = w2a4.Recipe.load("w4a4kv4").override(calib_samples=2, calib_seqlen=16)
    training = recipe.override(**{"training.data": str(tmp_path / "text.txt"), "training.steps": 1})
    (tmp_path / "text.txt").write_text(text[0])
    learned = recipe.override(**{"rotation.r1": "learned", "rotation_learning.seqlen": 16})
    for call in (
        lambda: w2a4.quantize(model, tokenizer, recipe, text, progress=False),
        lambda: perplexity(model, tokenizer, text, 16, progress=False),
        lambda: train(model, tokenizer, training, tmp_path / "work", ["the fox " * 200], progress=False),
        lambda: w2a4.quantize(model, tokenizer, learned, text, progress=False),
    ):
        with pytest.raises(CalibrationError, match=f"token {new}, and the model knows 0..{new - 1}"):
            call()
