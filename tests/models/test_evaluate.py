"""Perplexity against its definition, generation, and runs in a process of their own."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from support.packed import packed_model, prompt
from support.tiny_models import tiny_model, tiny_tokenizer
from w2a4.errors import CalibrationError, W2A4Error
from w2a4.evaluate import data
from w2a4.evaluate import perplexity as evaluate

TEXT = data.builtin_text()[1][:500]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def by_definition(model, tokenizer, seqlen: int) -> float:
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    losses = []
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        window = torch.tensor([ids[start : start + seqlen]])
        with torch.no_grad():
            logits = model(window).logits.double()
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="none"))
    return torch.cat(losses).mean().exp().item()


@pytest.mark.parametrize(("seqlen", "chunk"), [(2, 256), (33, 7), (64, 63), (64, 64), (129, 256)])
def test_perplexity_is_its_definition(model, tokenizer, monkeypatch, seqlen, chunk):
    monkeypatch.setattr(evaluate, "LOGITS_CHUNK", chunk)
    result = evaluate.perplexity(model, tokenizer, [TEXT], seqlen, progress=False)
    assert result["perplexity"] == pytest.approx(by_definition(model, tokenizer, seqlen), rel=1e-5)
    tokens = len(data.token_stream(tokenizer, TEXT)[0])
    assert (result["windows"], result["seqlen"]) == (tokens // seqlen, seqlen)
    assert result["tokens"] == result["windows"] * seqlen
    assert result["bos"] is True
    assert result["text"].startswith("1 documents")


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tokenizer):
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate.perplexity(model, tokenizer, [TEXT], 32, windows=3, progress=False)
    assert result["perplexity"] == pytest.approx(300, rel=1e-6)
    assert result["windows"] == 3


def test_a_head_that_is_more_than_a_linear_is_run_whole(tokenizer):
    """Gemma 2 caps its logits; the head alone would give other numbers."""
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, sliding_window=64, layer_types=None,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    result = evaluate.perplexity(model, tokenizer, [TEXT], 32, progress=False)
    assert result["perplexity"] == pytest.approx(by_definition(model, tokenizer, 32), rel=1e-5)


def test_logits_of_a_llama_are_made_in_parts(model, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluate, "LOGITS_CHUNK", 10)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    evaluate.perplexity(model, tokenizer, [TEXT], 64, windows=2, progress=False)
    handle.remove()
    assert max(sizes) == 10


def test_training_mode_comes_back(model, tokenizer):
    model.train()
    evaluate.perplexity(model, tokenizer, [TEXT], 32, windows=1, progress=False)
    assert model.training
    model.eval()
    evaluate.perplexity(model, tokenizer, [TEXT], 32, windows=1, progress=False)
    assert not model.training


def test_tokenizer_without_bos(model):
    result = evaluate.perplexity(model, tiny_tokenizer(bos=False), [TEXT], 32, windows=1, progress=False)
    assert result["bos"] is False


def test_builtin_text_and_progress(model, tokenizer, capsys):
    result = evaluate.perplexity(model, tokenizer, seqlen=16, windows=2)
    assert result["text"].startswith("builtin (pydoc_data.topics")
    shown = capsys.readouterr()
    assert "perplexity" in shown.err and shown.out == ""
    evaluate.perplexity(model, tokenizer, seqlen=16, windows=2, progress=False)
    assert capsys.readouterr().err == ""


def test_bad_evaluations(model, tokenizer, tmp_path):
    with pytest.raises(CalibrationError, match="windows=0"):
        evaluate.perplexity(model, tokenizer, [TEXT], windows=0)
    with pytest.raises(CalibrationError, match="does not exist"):
        evaluate.perplexity(model, tokenizer, tmp_path / "no.txt")
    with pytest.raises(CalibrationError, match="seqlen=2048"):
        evaluate.perplexity(model, tokenizer, ["short"])


def test_generation(model, tokenizer):
    result = evaluate.generation_speed(model, tokenizer, "The language", 5)
    inputs = tokenizer("The language", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=1)
    new = expected[0, inputs["input_ids"].shape[1] :]
    assert result["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert result["tokens"] == len(new) <= 5
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"])
    with pytest.raises(W2A4Error, match="prompt '' has no tokens"):
        evaluate.generation_speed(model, tokenizer, "", 5)
    with pytest.raises(W2A4Error, match="max_new_tokens=0"):
        evaluate.generation_speed(model, tokenizer, "The", 0)


@pytest.mark.parametrize("ends", ["none", "one", "list"])
def test_greedy_tokens_are_those_of_transformers(ends):
    packed, ids = packed_model(), prompt()
    first = packed.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    # The third token ends the text, alone or as one of a list.
    third = int(first[2])
    packed.generation_config.eos_token_id = {"none": None, "one": third, "list": [third, 130]}[ends]
    want = packed.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert torch.equal(evaluate.generate(packed, {"input_ids": ids}, 12), want)
    assert (len(want) == 12) == (ends == "none")


def test_reply_with_and_without_a_chat_template(model, monkeypatch):
    seen = []

    def generate(model, inputs, *rest):
        seen.append(inputs["input_ids"])
        return inputs["input_ids"][0, :0]

    monkeypatch.setattr(evaluate, "generate", generate)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "he"},
    ]
    tokenizer = tiny_tokenizer()
    assert evaluate.reply(model, tokenizer, messages, 4) == ""
    assert tokenizer.decode(seen[-1][0]) == "hi\nho\nhe\n"
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    evaluate.reply(model, tokenizer, messages, 4)
    assert tokenizer.decode(seen[-1][0]) == "<s>[user]hi[assistant]ho[user]he[assistant]"


def test_a_failing_process_is_reported(tmp_path, capfd):
    with pytest.raises(W2A4Error, match="failed with exit code 1"):
        evaluate.measured_apart(["info", str(tmp_path / "none")])
    assert "holds no config.json" in capfd.readouterr().err
