"""Reports, sizes from headers alone, and the model card."""

import importlib.metadata
import json
import os
import re

import pytest
import torch
import yaml
from safetensors.torch import save_file

from w2a4.errors import CheckpointError
from w2a4.evaluate import quality, report
from w2a4.evaluate.report import Report
from w2a4.ops.packing import packed_width
from w2a4.recipe import RECIPES, Recipe

# Odd on purpose: 13 does not fill a byte of 2-bit codes, 3 heads of 6 are not hidden_size.
HIDDEN, INNER, HEADS, HEAD_DIM, VOCAB = 13, 22, 3, 6, 17
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_attention_heads": HEADS, "head_dim": HEAD_DIM,
}  # fmt: skip


def packed_tensors(bits: int) -> dict[str, torch.Tensor]:
    """One decoder layer's worth of packed tensors, the whole row a group."""
    shapes = {
        "self_attn.q_proj": (18, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    tensors = {}
    for name, (rows, columns) in shapes.items():
        name = f"model.layers.0.{name}"
        tensors[f"{name}.weight"] = torch.zeros(rows, packed_width(columns, bits), dtype=torch.uint8)
        tensors[f"{name}.scale"] = torch.ones(rows, 1, dtype=torch.float16)
        tensors[f"{name}.act_clip"] = torch.ones(1)
        if bits < 4:
            tensors[f"{name}.levels"] = torch.zeros(rows, 1, 2**bits, dtype=torch.int8)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(18)
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(HIDDEN)
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.zeros(VOCAB, HIDDEN, dtype=torch.int8)
        tensors[f"{name}.scale"] = torch.ones(VOCAB, dtype=torch.float16)
    return tensors


def write_checkpoint(directory, bits=2, shards=1, **quantization):
    directory.mkdir(exist_ok=True)
    config = {
        "quant_method": "w2a4", "format_version": 1, "w2a4_version": "0.1.0",
        "recipe": Recipe(weight_bits=bits).to_dict(), "rotation": {"online": {}},
        "provenance": {"source": "tiny"}, **quantization,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": config}))
    tensors = packed_tensors(bits)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return tensors
    names = sorted(tensors)
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tensors


@pytest.mark.parametrize(("bits", "shards"), [(2, 1), (2, 3), (3, 1), (4, 1)])
def test_summary_counts_every_byte_and_weight(tmp_path, bits, shards):
    tensors = write_checkpoint(tmp_path / "c", bits, shards)
    summary = report.checkpoint_summary(tmp_path / "c")
    assert summary["quantized"] and summary["architecture"] == "LlamaForCausalLM"
    size = summary["bytes"]
    assert (
        size["total"] == sum(t.nbytes for t in tensors.values()) == sum(size[part] for part in report.PARTS)
    )
    linears = 18 * HIDDEN + HIDDEN * 18 + INNER * HIDDEN + HIDDEN * INNER
    rows = 18 + HIDDEN + INNER + HIDDEN
    assert summary["weights"] == {"linears": linears, "model": linears + 18 + 2 * HIDDEN + 2 * VOCAB * HIDDEN}
    assert size["levels"] == (rows * 2**bits if bits < 4 else 0)
    assert size["scales"] == rows * 2
    codes = sum(t.nbytes for name, t in tensors.items() if name.endswith("proj.weight"))
    assert size["codes"] == codes
    assert size["norms"] == 2 * HIDDEN * 4
    assert size["biases"] == 18 * 4
    assert size["other"] == 4 * 4
    assert size["embeddings"] == size["head"] == VOCAB * (HIDDEN + 2)
    assert summary["bits_per_weight"]["linears"] == (codes + size["levels"] + size["scales"]) * 8 / linears
    assert summary["bits_per_weight"]["model"] == size["total"] * 8 / summary["weights"]["model"]
    assert len(summary["files"]) == shards


def test_bits_a_weight_of_the_format():
    """2 + 48 / g, 3 + 80 / g and 4 + 16 / g, as the stored form promises."""
    for bits, group, expected in ((2, 128, 2.375), (2, 64, 2.75), (3, 128, 3.625), (4, 64, 4.25)):
        tensors = {
            "x.up_proj.weight": ("U8", (8, 256 * bits // 8)),
            "x.up_proj.scale": ("F16", (8, 256 // group)),
            **({"x.up_proj.levels": ("I8", (8, 256 // group, 2**bits))} if bits < 4 else {}),
        }
        measured = report.measure_tensors(tensors, {"hidden_size": 256})
        assert measured["bits_per_weight"]["linears"] == expected


def test_summary_of_a_plain_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 8), "model.norm.weight": torch.ones(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    summary = report.checkpoint_summary(tmp_path)
    assert not summary["quantized"]
    assert summary["bits_per_weight"] == {"linears": None, "model": 32.0}
    assert summary["bytes"]["kept"] == 4 * 8 * 4
    assert "not quantised; bits a weight: 32.000" in report.summary_text(summary)


def test_summary_text_names_everything(tmp_path):
    write_checkpoint(tmp_path / "c")
    text = report.summary_text(report.checkpoint_summary(tmp_path / "c"))
    for part in ("bits a weight", "R1 random_hadamard", "R4 hadamard", "source: tiny", "lm_head", "levels"):
        assert part in text


def damage(directory, how):
    file = directory / "model.safetensors"
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "shard":
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-1.safetensors"}})
        )
    elif how == "index":
        (directory / "model.safetensors.index.json").write_text("[]")
    elif how == "config":
        (directory / "config.json").write_text("{")
    elif how == "no config":
        (directory / "config.json").unlink()
    else:
        file.write_bytes({
            "truncated": content[:-1], "longer": content + b"x", "header": content[:20], "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1\n" * 4,
        }[how])  # fmt: skip


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "'model.safetensors' is missing"),
        ("shard", "'model-1.safetensors' is missing"),
        ("index", "no safetensors index"),
        ("config", "is not JSON"),
        ("no config", "holds no config.json"),
        ("truncated", r"has \d+ bytes, its header says \d+"),
        ("longer", r"has \d+ bytes, its header says \d+"),
        ("header", "header is damaged"),
        ("empty", "header is damaged"),
        ("text", "header is damaged"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path, how, message):
    write_checkpoint(tmp_path / "c")
    damage(tmp_path / "c", how)
    with pytest.raises(CheckpointError, match=message):
        report.checkpoint_summary(tmp_path / "c")


def test_config_of_another_model(tmp_path):
    write_checkpoint(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(CheckpointError, match="rows of 4 bytes hold 16 codes of 2 bits, .* 64"):
        report.checkpoint_summary(tmp_path / "c")


def full_report(**changes) -> Report:
    measured = {
        "perplexity": 23.456,
        "seqlen": 2048,
        "windows": 8,
        "tokens": 16384,
        "bos": True,
        "text": "wiki.txt",
    }
    made = Report(
        recipe=RECIPES["w2a4kv4"].to_dict(), source="/home/someone/models/tiny", calibration="builtin",
        seed=3, sizes={"codes": 10**6, "levels": 10**5}, seconds=12.5, peak_memory_mb=900.0,
        **changes,
    )  # fmt: skip
    made.add_evaluation([measured], [{**measured, "perplexity": 198.7}])
    made.add_layer("model.layers.0.self_attn.q_proj", 2, 64, 0.05)
    made.add_layer("model.layers.1.self_attn.q_proj", 2, 64, torch.tensor(0.15))
    made.add_layer("model.layers.0.mlp.down_proj", 2, 128, 0.2)
    return made


def test_a_report_with_one_text_as_dicts_is_brought_to_lists(tmp_path):
    """As versions before several texts wrote it, and as report.json of a checkpoint still holds it."""
    old = full_report().to_dict()
    old["evaluation"] = {key: old["evaluation"][key][0] for key in ("before", "after")}
    del old["evaluation"]["after"]["in_domain"]
    (tmp_path / "report.json").write_text(json.dumps(old))
    made = Report.from_json(tmp_path / "report.json")
    assert made == full_report()
    assert made.evaluation["ratios"] == [
        {"text": "wiki.txt", "ratio": pytest.approx(198.7 / 23.456), "low": None, "high": None}
    ]
    for part in ("23.46", "198.70", "8.47", "8 windows of 2048 (16384 tokens)", quality.ONE_TEXT):
        assert part in report.quality_of(made)
    only = Report.from_dict(old | {"evaluation": {"before": None, "after": old["evaluation"]["after"]}})
    assert only.evaluation["before"] == [] and "198.70" in report.quality_of(only)


def test_texts_of_the_fit_are_marked():
    made = full_report()
    measured = made.evaluation["before"][0]
    made.training = {"text": "other.txt, 9 characters, sha256 00"}
    assert made.fitted_on == {"calibration": "builtin", "training": "other.txt, 9 characters, sha256 00"}
    texts = ("wiki.txt", "other.txt", "builtin (pydoc_data.topics of Python 3.11.7)")
    after = [measured | {"text": f"{text}, 9 characters, sha256 11"} for text in texts]
    made.add_evaluation(after, after)
    assert [result["in_domain"] for result in made.evaluation["after"]] == [False, True, True]
    card = report.model_card(made)
    for name in ("| wiki.txt |", "| other.txt, in domain |", "| builtin, in domain |"):
        assert name in re.sub(" +", " ", card)
    assert quality.ONE_TEXT not in card


def test_report_round_trip(tmp_path):
    made = full_report()
    assert Report.from_dict(made.to_dict()) == made
    assert Report.from_json(made.to_json(tmp_path / "report.json")) == made
    assert Report.from_json(tmp_path / "report.json") == made
    assert Report.from_dict({**made.to_dict(), "of a later version": 1}) == made
    assert made.versions["torch"] == importlib.metadata.version("torch")
    for wrong in ("{}", "{"):
        with pytest.raises(CheckpointError):
            Report.from_json(wrong)


def test_source_holds_no_directory(tmp_path):
    assert full_report().source == "tiny"
    assert report.source_name("owner/model-1.5") == "owner/model-1.5"
    assert report.source_name(str(tmp_path) + "/") == tmp_path.name
    assert report.source_name("../models/tiny") == report.source_name("./tiny") == "tiny"
    assert report.source_name("") == ""


def test_a_relative_directory_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert report.source_name("models/tiny") == "tiny"
    assert report.source_name(".") == tmp_path.name


def test_layers_table_gathers_kinds():
    lines = report.layers_table(full_report()).splitlines()
    assert re.split(r"\s{2,}", lines[2].strip()) == ["q_proj", "2", "2", "64", "10.00%", "15.00%"]
    assert "down_proj" in lines[3]


@pytest.mark.parametrize("source", ["tiny", "owner/model"])
def test_model_card(source):
    made = full_report()
    made.source = source
    card = report.model_card(made)
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert "license" not in front
    assert front.get("base_model") == (source if "/" in source else None)
    for part in ("import w2a4", "from_pretrained", "23.46", "198.70", "weight_bits: 2", "random_hadamard"):
        assert part in card
    for part in ("8 windows of 2048 (16384 tokens), BOS once", "## Limitations", "without training", "1.00"):
        assert part in card
    assert "/home" not in card


def test_model_card_of_an_unmeasured_model():
    card = report.model_card(Report(recipe=RECIPES["w4a4kv4"].to_dict(), source="tiny"))
    assert "was not measured" in card
    assert "Two-bit" not in card


def test_json_is_strict_and_written_whole(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    report.write_json(file, {"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": "ä"}})
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": None, "b": [None, 1.5], "c": {"d": "ä"}}
    for content in (b"\x89PNG\r\n\x00", "ä\r\n"):
        report.write_atomically(tmp_path / "other", content)
        raw = content if isinstance(content, bytes) else content.encode()
        assert (tmp_path / "other").read_bytes() == raw
    (tmp_path / "other").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report.write_json(file, {"a": 1})
    assert json.loads(file.read_text(encoding="utf-8"))["c"] == {"d": "ä"}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
