"""Texts, windows, and every way a text can be wrong."""

import bz2
import json
import re
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


def test_general_text_is_packaged_and_its_parts_share_nothing():
    calibration, evaluation = (
        data.load_text("general", "calibration"),
        data.load_text("general", "evaluation"),
    )
    # 128 windows of 2048 tokens of SmolLM2, which reads 4.2 characters a token here, and 22 to evaluate.
    assert len(calibration) > 4.2 * 128 * 2048 and len(evaluation) > 4.2 * 22 * 2048
    assert data.GENERAL.stat().st_size <= 400_000

    def shingles(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 12]) for i in range(len(words) - 11)}

    assert not shingles(calibration) & shingles(evaluation)
    records = [json.loads(line) for line in bz2.decompress(data.GENERAL.read_bytes()).splitlines()]
    found = {part: [r for r in records if r["part"] == part] for part in ("calibration", "evaluation")}
    ordered = [sorted(part, key=lambda record: record["position"]) for part in found.values()]
    assert [data.SEPARATOR.join(r["text"] for r in part) for part in ordered] == [calibration, evaluation]
    sources = [{record["source"] for record in part} for part in ordered]
    assert not sources[0] & sources[1]
    books = [
        {source.split(":")[0] for source in part if source.startswith("standardebooks")} for part in sources
    ]
    assert len(books[0]) > 10 and len(books[1]) > 3 and not books[0] & books[1]


def test_every_source_of_the_general_text_has_a_licence_in_its_readme():
    readme = data.GENERAL.with_name("README.md").read_text(encoding="utf-8")
    records = [json.loads(line) for line in bz2.decompress(data.GENERAL.read_bytes()).splitlines()]
    repositories = {record["source"].split(":")[0] for record in records}
    for repository in repositories:
        owner, name = repository.split("/")
        if owner == "standardebooks":
            title = name.partition("_")[2].replace("-", " ")
            assert title in readme.lower().replace(".", ""), repository
        else:
            assert f"[{repository}]" in readme
    for part, unit in (("calibration", "402 excerpts"), ("evaluation", "The 70 of")):
        count = sum(record["part"] == part for record in records)
        assert str(count) in unit and unit in readme


def test_a_prefix_of_the_general_text_is_a_fair_sample():
    records = [json.loads(line) for line in bz2.decompress(data.GENERAL.read_bytes()).splitlines()]
    fitted = sorted((r for r in records if r["part"] == "calibration"), key=lambda r: r["position"])

    def share(of, start):
        return sum(record["source"].startswith(start) for record in of) / len(of)

    for start in ("standardebooks/", "factbook/", "LukeSmithxyz/"):
        assert share(fitted[:100], start) == pytest.approx(share(fitted, start), abs=0.03)


def test_load_text_of_each_kind(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\u2028three", encoding="utf-8")
    assert data.load_text(tmp_path / "a.txt", "evaluation") == "one\ntwo\u2028three"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("one", "tw\u2028o")]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert data.load_text(str(tmp_path / "a.jsonl"), "evaluation") == "one\n\ntw\u2028o"
    assert data.load_text(["one", "two"], "evaluation") == "one\n\ntwo"
    assert data.load_text("builtin", "calibration") == data.builtin_text()[0]
    assert data.load_text("builtin", "evaluation") == data.builtin_text()[1]
    assert data.load_text("general", "evaluation") == data.general_text()[1]


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


def test_a_text_that_repeats_itself_is_refused_for_fitting(tmp_path):
    line = "the quick brown fox jumps over the lazy dog"
    repeated, few = "\n".join([line] * 100), "\n".join([line] * 55)
    (tmp_path / "lines.txt").write_text(repeated)
    with pytest.raises(
        CalibrationError, match="'lines.txt' repeats itself: only 9 of its 889 runs of 12 words"
    ):
        data.load_text(tmp_path / "lines.txt", "calibration")
    with pytest.raises(CalibrationError, match="'100 calibration documents' repeats .*or 'general'"):
        data.load_text([line] * 100, "calibration")
    assert data.load_text([line] * 100, "evaluation")  # whoever measures on it knows what is in it
    assert data.load_text([few], "calibration") == few  # 495 words
    for new, refused in ((60, True), (160, False)):  # 8 % and 16 % of the runs say something new
        text = " ".join([*map(str, range(new)), *(["again"] * (1000 - new))])
        if refused:
            with pytest.raises(CalibrationError, match=rf"only {new + 1} of its 989"):
                data.load_text([text], "calibration")
        else:
            assert data.load_text([text], "calibration") == text


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
    text = ["the <|new|> fox " * 160]
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
