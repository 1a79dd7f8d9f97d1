"""GGUF: the logits of the model it was made of, or a refusal that names the key or tensor."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import w2a4
from support.families import tiny_family
from support.packed import prompt
from support.tiny_models import LLAMA3_ROPE, tiny_llama
from w2a4.errors import CheckpointError

gguf = pytest.importorskip("gguf")

SIZES = dict(hidden_size=64, intermediate_size=96, vocab_size=131, num_attention_heads=4)
STEMS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def architecture_of(config):
    """llama.cpp has none for Mistral."""
    return "llama" if config.model_type == "mistral" else config.model_type


def tensor_of(name, value, config):
    """A tensor's name and values in GGUF, where rows of a LLaMA's q and k are in pairs."""
    module, _, leaf = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}", value
    layer, _, stem = module.removeprefix("model.layers.").partition(".")
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    if stem in heads and architecture_of(config) == "llama":
        paired = value.reshape(heads[stem], 2, -1, *value.shape[1:]).swapaxes(1, 2)
        value = np.ascontiguousarray(paired.reshape(value.shape))
    return f"blk.{layer}.{STEMS[stem]}.{leaf}", value


def add_tokenizer(writer, size, byte_level):
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(size - 3))]
    if byte_level:
        words[3:7] = ["a", "b", "ab", "aba"]
        writer.add_token_merges(["a b", "ab a"])
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3, *[6] * (len(words) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def write(path, model, keys=None, extra=None, drop=()):
    config, architecture = model.config, architecture_of(model.config)
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "block_count": config.num_hidden_layers, "context_length": 512,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": 10000.0,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    named = {f"{architecture}.{key}": value for key, value in numbers.items()} | (keys or {})
    for key, value in named.items():
        if value is not None:
            kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kinds.get(type(value), writer.add_array)(key, value)
    add_tokenizer(writer, config.vocab_size, byte_level=architecture.startswith("qwen"))
    tensors = dict(tensor_of(n, v.float().numpy(), config) for n, v in model.state_dict().items())
    for name, value in (tensors | (extra or {})).items():
        if name not in drop:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(**changes):
    return tiny_llama(dtype=torch.float32, **{**SIZES, **changes})


def factors(model):
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    return {"rope_freqs.weight": (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)}


def assert_same(path, model):
    loaded, _ = w2a4.load_model(path)
    ids = prompt(1, 100)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    return loaded


def test_plain_and_tied(tmp_path):
    assert_same(write(tmp_path / "plain.gguf", llama()), llama())
    tied = llama(tie_word_embeddings=True)
    assert_same(write(tmp_path / "tied.gguf", tied, drop=("output.weight",)), tied)
    neutral = {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "split.count": 1}
    assert_same(write(tmp_path / "neutral-00001-of-00001.gguf", llama(), neutral), llama())


def test_a_file_is_parsed_once_and_gguf_is_left_as_it_was(tmp_path, monkeypatch):
    opened, original = [], gguf.GGUFReader

    class Counted(original):
        def __init__(self, path, *arguments):
            opened.append(path)
            super().__init__(path, *arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    write(tmp_path / "model.gguf", llama())
    w2a4.load_model(tmp_path / "model.gguf")
    assert len(opened) == 1
    assert gguf.GGUFReader is Counted and not hasattr(gguf.get_tensor_name_map, "cache_info")


def test_threads_that_load_leave_gguf_as_it_was(tmp_path):
    original = gguf.GGUFReader, gguf.get_tensor_name_map
    models = [llama(), llama(intermediate_size=64)]
    for index, model in enumerate(models):
        write(tmp_path / f"{index}.gguf", model)
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(lambda i: w2a4.load_model(tmp_path / f"{i}.gguf")[0], range(2)))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == original
    for made, model in zip(loaded, models, strict=True):
        assert torch.equal(made.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("length, factor", [(64, 8.0), (8192, 32.0), (128, 4.0)])
def test_factors_of_llama3(tmp_path, length, factor):
    scaling = {**LLAMA3_ROPE, "factor": factor, "original_max_position_embeddings": length}
    model = llama(rope_scaling=scaling)
    loaded = assert_same(write(tmp_path / "m.gguf", model, extra=factors(model)), model)
    loaded.save_pretrained(tmp_path / "out")
    again = type(loaded).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("kind", ["linear", None])
def test_linear_scaling(tmp_path, kind):
    model = llama(rope_scaling={"rope_type": "linear", "factor": 4.0})
    keys = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
    assert_same(write(tmp_path / "m.gguf", model, keys), model)


ONES = np.ones(64, dtype=np.float32)


@pytest.mark.parametrize(
    "how, match",
    [
        (dict(keys={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}), "'yarn'"),
        (dict(keys={"llama.rope.scaling.yarn_beta_fast": 32.0}), "yarn_beta_fast"),
        (dict(keys={"llama.expert_count": 8}), "expert_count = 8.*mixture of experts"),
        (dict(keys={"llama.logit_scale": 2.0}), "logit_scale"),
        (dict(keys={"llama.attention.value_length": 8}), "value_length = 8"),
        (dict(keys={"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}), "count = 8"),
        (dict(keys={"llama.attention.head_count_kv": [2, 2]}), "head_count_kv = .*one whole number"),
        (dict(keys={"llama.block_count": 100000}), "block_count = 100000"),
        (dict(keys={"llama.block_count": None}), "block_count = None"),
        (dict(keys={"split.count": 2, "split.no": 0}), "one of 2 files"),
        (dict(extra={"blk.0.attn_q.bias": ONES}), "attn_q.bias.*biases"),
        (dict(extra={"blk.0.ffn_gate_inp.weight": ONES}), "ffn_gate_inp.*experts"),
        (dict(extra={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}), "rope_freqs.weight"),
        (dict(extra={"rope_freqs.weight": ONES[:4]}), "the 4 factors"),
        (dict(extra={"rope_factors_long.weight": ONES[:8]}), "rope_factors_long"),
        (dict(drop=("blk.1.ffn_up.weight",)), "lacks blk.1.ffn_up.weight"),
        (dict(drop=("token_embd.weight",)), "token_embd|vocab_size"),
        (dict(extra={"output_norm.weight": ONES[:32]}), r"output_norm.weight is \[32\]"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused(tmp_path, how, match):
    with pytest.raises(CheckpointError, match=match):
        w2a4.load_model(write(tmp_path / "m.gguf", llama(), **how))


# Other families


#: A case: the family, its case in `support.families`, changes of it, and keys of the file.
FAMILIES = {
    "qwen2": ("qwen2", "plain", {}, {"qwen2.attention.key_length": 32}),
    "qwen2 of one kv head": ("qwen2", "plain", {"num_key_value_heads": 1, "tie_word_embeddings": False},
                             {"qwen2.attention.key_length": 32}),
    "qwen2 linear": ("qwen2", "plain", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
                     {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}),
    "qwen2 without its kv heads": ("qwen2", "plain", {"num_key_value_heads": 6},
                                   {"qwen2.attention.head_count_kv": None}),
    "qwen3": ("qwen3", "plain", {}, {"qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32}),
    "mistral": ("mistral", "plain", {}, {"general.name": "mistral"}),
    "phi3": ("phi3", "plain", {"tie_word_embeddings": False}, {
        "phi3.attention.sliding_window": 0, "phi3.rope.scaling.original_context_length": 256}),
    "phi3 with a window": ("phi3", "window", {}, {"phi3.attention.sliding_window": 16}),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_families(case, tmp_path):
    family, kind, changes, keys = FAMILIES[case]
    model = tiny_family(family, kind, **changes)
    drop = ("output.weight",) if model.config.tie_word_embeddings else ()
    path = write(tmp_path / "m.gguf", model, keys, drop=drop)
    loaded, _ = w2a4.load_model(path)
    assert loaded.config.model_type == ("llama" if family == "mistral" else family)
    for given in (prompt(1, 3), prompt(2, 100)):
        with torch.inference_mode():
            torch.testing.assert_close(loaded(given).logits, model(given).logits, rtol=1e-6, atol=1e-6)
    names = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(names[name], value), name
    loaded.save_pretrained(tmp_path / "out")
    saved = type(loaded).from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        torch.testing.assert_close(saved(given).logits, model(given).logits, rtol=1e-6, atol=1e-6)


HEADS = np.ones(32, dtype=np.float32)


@pytest.mark.parametrize(
    "family, how, match",
    [
        ("qwen2", dict(drop=("blk.0.attn_q.bias",)), "lacks blk.0.attn_q.bias"),
        ("qwen2", dict(extra={"blk.1.attn_v.bias": HEADS[:8]}), r"attn_v.bias is \[8\], its keys say \[64\]"),
        ("qwen2", dict(extra={"blk.0.attn_q_norm.weight": HEADS}), "attn_q_norm"),
        ("qwen2", dict(keys={"qwen2.attention.sliding_window": 64}), "qwen2.attention.sliding_window = 64"),
        ("qwen2", dict(keys={"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}), "'yarn'"),
        ("qwen2", dict(keys={"qwen2.attention.layer_norm_rms_epsilon": None}), "rms_epsilon = None"),
        ("qwen2", dict(keys={"qwen2.expert_count": 8}), "qwen2.expert_count = 8.*mixture of experts"),
        ("qwen3", dict(drop=("blk.2.attn_k_norm.weight",)), "lacks blk.2.attn_k_norm.weight"),
        ("qwen3", dict(extra={"blk.0.attn_q.bias": HEADS}), "attn_q.bias.*biases"),
        ("qwen3", dict(keys={"qwen3.rope.scaling.attn_factor": 1.5}), "attn_factor = 1.5"),
        ("phi3", dict(extra={"rope_factors_long.weight": HEADS[:16]}), "rope_factors_long"),
        ("phi3", dict(extra={"rope_freqs.weight": HEADS[:16]}), "rope_freqs.weight, which .* this family"),
        ("phi3", dict(keys={"phi3.rope.scaling.factor": 2.0}), "factor = 2, which .* this family"),
        ("phi3", dict(keys={"phi3.rope.dimension_count": 24, "phi3.attention.key_length": 32}), "count = 24"),
        ("phi3", dict(keys={"phi3.attention.sliding_window": 0.5}), "sliding_window"),
        ("mistral", dict(keys={"llama.attention.sliding_window": 16}), "llama.attention.sliding_window = 16"),
        ("mistral", dict(keys={"llama.attention.head_count_kv": None}), "head_count_kv = None"),
        (
            "smollm3",
            dict(),
            "architecture 'smollm3'; from GGUF, w2a4 reads 'llama', 'phi3', 'qwen2', 'qwen3'",
        ),
        ("qwen3", dict(keys={"split.count": 2}), "one of 2 files"),
    ],
)
def test_what_other_families_do_not_have_is_refused(family, how, match, tmp_path):
    model = tiny_family(family, "plain")
    prefix = architecture_of(model.config)
    how = {**how, "keys": {f"{prefix}.attention.key_length": 32, **how.get("keys", {})}}
    drop = ("output.weight", *how.pop("drop", ()))
    with pytest.raises(CheckpointError, match=match):
        w2a4.load_model(write(tmp_path / "m.gguf", model, drop=drop, **how))


def test_a_parameter_that_the_file_does_not_set_is_refused(tmp_path, monkeypatch):
    """What transformers drops without a word: here the names of a version of gguf that lacks one."""
    model = tiny_family("qwen3")
    path = write(tmp_path / "m.gguf", model, drop=("output.weight",))
    original = gguf.get_tensor_name_map

    class Lacking:
        def __init__(self, *arguments):
            self.whole = original(*arguments)

        def get_name(self, name, *rest):
            return None if "q_norm" in name else self.whole.get_name(name, *rest)

    monkeypatch.setattr(gguf, "get_tensor_name_map", Lacking)
    with pytest.raises(CheckpointError, match="no tensor in m.gguf for model.layers.0.self_attn.q_norm"):
        w2a4.load_model(path)


def test_files_of_a_split_model_by_their_names_and_truncated_ones(tmp_path):
    path = write(tmp_path / "m-00002-of-00003.GGUF", llama())
    with pytest.raises(CheckpointError, match="one of 3 files"):
        w2a4.load_model(path)
    whole = write(tmp_path / "m.gguf", llama()).read_bytes()
    for keep in (0, 3, 100, len(whole) // 2, len(whole) - 5000):
        (tmp_path / "m.gguf").write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match="truncated|damaged|cannot load"):
            w2a4.load_model(tmp_path / "m.gguf")
