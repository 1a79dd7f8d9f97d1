"""`replace_linears` on models of transformers: what they save is loaded by their own class, to the bit."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import w2a4
from support.packed import packed_model
from support.tiny_models import tiny_llama, tiny_model, tiny_tokenizer
from w2a4.cli.main import main as command
from w2a4.errors import CheckpointError, W2A4Error
from w2a4.format.manifest import FORMAT_VERSION, Replacement, read_manifest

pytestmark = [pytest.mark.doors, pytest.mark.usefixtures("one_thread")]

TEXT = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SMALL = {key: TEXT[key] for key in TEXT if key != "num_key_value_heads"}

#: Of a case: the class, the model type and keywords of its configuration.
MODELS = {
    "gpt_neox": ("GPTNeoXForCausalLM", "gpt_neox", SMALL),
    "opt": ("OPTForCausalLM", "opt", {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 32}),
    "bert": ("BertForMaskedLM", "bert", SMALL),
    "bert classifier": ("BertForSequenceClassification", "bert", {**SMALL, "num_labels": 3}),
    "t5": ("T5ForConditionalGeneration", "t5", {
        "vocab_size": 131, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", {**TEXT, "head_dim": 16, "sliding_window": 8}),
    "mixtral": ("MixtralForCausalLM", "mixtral", {
        **TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "vit": ("ViTForImageClassification", "vit", {
        **SMALL, "image_size": 16, "patch_size": 4, "num_labels": 5}),
    "resnet": ("ResNetForImageClassification", "resnet", {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
        "num_labels": 4}),
    "siglip": ("SiglipModel", "siglip", {
        "text_config": {**SMALL, "projection_size": 64, "pad_token_id": 0},
        "vision_config": {**SMALL, "image_size": 16, "patch_size": 4}}),
    "llava": ("LlavaForConditionalGeneration", "llava", {
        "text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 130,
        "vision_config": {**SMALL, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}}),
    "llama": ("LlamaForCausalLM", "llama", TEXT),
    "tied llama": ("LlamaForCausalLM", "llama", {**TEXT, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", TEXT),
}  # fmt: skip


def model_of(case):
    name, kind, values = MODELS[case]
    torch.manual_seed(1)
    model = getattr(transformers, name)(AutoConfig.for_model(kind, **values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(case, dtype=torch.float32):
    ids = torch.randint(3, 131, (2, 7), generator=torch.Generator().manual_seed(2))
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    if case in ("vit", "resnet"):
        return {"pixel_values": image}
    if case == "siglip":
        return {"pixel_values": image, "input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": ids} if case == "t5" else {"input_ids": ids}


def outputs(model, case):
    with torch.inference_mode():
        found = model(**inputs(case, model.dtype))
    return found.logits_per_image if case == "siglip" else found.logits


def packed_names(model):
    kinds = (w2a4.W2A4Linear, w2a4.W4A4Linear)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def saved(tmp_path, case="gpt_neox", **arguments):
    model = w2a4.replace_linears(model_of(case), **arguments)
    model.save_pretrained(tmp_path / "m")
    return model, tmp_path / "m"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", MODELS)
def test_saved_and_loaded_to_the_bit(case, dtype, tmp_path):
    model_of(case).save_pretrained(tmp_path / "plain")
    plain = getattr(transformers, MODELS[case][0]).from_pretrained(tmp_path / "plain", dtype=dtype)
    model = w2a4.replace_linears(copy.deepcopy(plain), bits=2)
    expected = outputs(model, case)
    assert expected.isfinite().all() and not torch.equal(expected, outputs(plain, case))
    model.save_pretrained(tmp_path / "m")
    assert w2a4.verify(tmp_path / "m")["compared"]
    loaded = type(plain).from_pretrained(tmp_path / "m", dtype="auto")
    assert type(loaded).__name__ == type(plain).__name__ and loaded.dtype == dtype
    assert packed_names(loaded) == packed_names(model)
    assert torch.equal(outputs(loaded, case), expected)
    loaded.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("case", ["gpt_neox", "t5", "mixtral", "vit"])
def test_another_dtype_at_load_is_that_of_a_cast(case, tmp_path):
    model, directory = saved(tmp_path, case, bits=4)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = type(model).from_pretrained(directory, dtype=dtype)
        for (name, value), (_, other) in zip(
            model.named_parameters(), loaded.named_parameters(), strict=True
        ):
            if name.endswith((".scale", ".levels", ".act_clip")) or not value.is_floating_point():
                assert torch.equal(value, other), name
        assert loaded.dtype == dtype and outputs(loaded, case).isfinite().all()


@pytest.mark.parametrize("arguments", [dict(bits=3), dict(bits=3, weight_grid="uniform"), dict(bits=4)])
def test_other_bits_and_grids(arguments, tmp_path):
    model, directory = saved(tmp_path, "qwen2", group_size=32, **arguments)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(outputs(loaded, "qwen2"), outputs(model, "qwen2"))


def test_kinds_side_by_side_and_skipped(tmp_path):
    model = model_of("gpt_neox")
    w2a4.replace_linears(model, bits=4, group_size=32, skip=("embed_out", "query_key_value"))
    w2a4.replace_linears(model, bits=2, group_size=-1, skip=("gpt_neox.layers.0.attention.query_key_value",))
    kinds = model.config.quantization_config.manifest.kinds
    assert type(model.gpt_neox.layers[0].attention.query_key_value) is nn.Linear
    assert kinds["gpt_neox.layers.1.attention.query_key_value"].weight_bits == 2
    assert kinds["gpt_neox.layers.1.mlp.dense_h_to_4h"].group_size == 32 and kinds.keys() == packed_names(
        model
    )
    model.save_pretrained(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(outputs(loaded, "gpt_neox"), outputs(model, "gpt_neox"))
    assert loaded.config.quantization_config.manifest == model.config.quantization_config.manifest


def test_tied_weights_and_what_stays_in_float32_are_left_alone():
    bert = w2a4.replace_linears(model_of("bert"))
    assert type(bert.cls.predictions.decoder) is nn.Linear
    assert bert.cls.predictions.decoder.weight is bert.bert.embeddings.word_embeddings.weight
    t5 = packed_names(w2a4.replace_linears(model_of("t5")))
    assert t5 and not any(name.endswith((".wo", "lm_head")) for name in t5)
    tied = w2a4.replace_linears(model_of("tied llama"), skip=())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "lm_head" in packed_names(w2a4.replace_linears(model_of("llama"), skip=()))
    with pytest.raises(ValueError, match="no nn.Linear outside .* but for those that are tied"):
        everything = [name.rpartition(".")[2] for name in packed_names(tied)]
        w2a4.replace_linears(model_of("tied llama"), skip=(*everything,))


def test_linears_whose_weight_the_code_reads_are_left_alone(tmp_path):
    config = AutoConfig.for_model("mamba", vocab_size=131, hidden_size=64, num_hidden_layers=2, state_size=8)
    model = w2a4.replace_linears(transformers.MambaForCausalLM(config).eval())
    kinds = {name.rpartition(".")[2]: type(m) for name, m in model.backbone.layers[0].mixer.named_children()}
    assert kinds["dt_proj"] is nn.Linear and kinds["in_proj"] is w2a4.W2A4Linear
    expected = outputs(model, "mamba")
    model.save_pretrained(tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m", dtype="auto")
    assert torch.equal(outputs(loaded, "mamba"), expected)


def test_models_split_among_processes_are_refused(tmp_path):
    model, directory = saved(tmp_path)
    config = AutoConfig.from_pretrained(directory)
    config.distributed_config = {"tp_size": 2}
    with pytest.raises(CheckpointError, match="tensor parallelism"):
        type(model).from_pretrained(directory, config=config)


def test_copies_pickles_and_a_second_class(tmp_path):
    model, _ = saved(tmp_path)
    expected = outputs(model, "gpt_neox")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, "gpt_neox"), expected)
        other.save_pretrained(tmp_path / "copy")
        assert type(model).from_pretrained(tmp_path / "copy").dtype == model.dtype
    fresh = type(model)(model_of("gpt_neox").config)
    assert not packed_names(fresh) and not isinstance(fresh, type(model))


def test_rotated_or_quantised_models_are_refused_unchanged():
    rotated = w2a4.rotate(tiny_llama())
    before = {type(module) for module in rotated.modules()}
    for model in (rotated, packed_model(head_bits=16)):
        with pytest.raises(W2A4Error, match="rotated or quantised already.*'w2a4'"):
            w2a4.replace_linears(model, skip=())
    assert {type(module) for module in rotated.modules()} == before
    other = model_of("gpt_neox")
    other.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(W2A4Error, match="'awq'"):
        w2a4.replace_linears(other)
    with pytest.raises(W2A4Error, match="quantised already"):
        w2a4.quantize(w2a4.replace_linears(model_of("llama")), None, "w2a4kv4")


def test_saving_is_refused_where_it_could_not_be_loaded(tmp_path):
    model, _ = saved(tmp_path)
    for arguments in (dict(variant="x"), dict(save_original_format=True)):
        with pytest.raises(W2A4Error, match=next(iter(arguments))):
            model.save_pretrained(tmp_path / "no", **arguments)
    assert not (tmp_path / "no").exists()


# Hostile checkpoints


def edited(directory, change):
    """Change config.json; the tensors lose their digests, which would tell any change first."""
    tensors = directory / "model.safetensors"
    save_file(load_file(tensors), tensors)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def part(**values):
    return lambda config: config["quantization_config"]["manifest"]["replaced"][0].update(values)


def manifest(**values):
    return lambda config: config["quantization_config"]["manifest"].update(values)


def more_names(*names):
    return lambda c: c["quantization_config"]["manifest"]["replaced"][0]["names"].extend(names)


CHANGES = {
    "an unknown name": (more_names("gpt_neox.layers.7.mlp.dense_4h_to_h"), "layers.7.*not packed codes"),
    "a module that is no linear": (more_names("gpt_neox.embed_in"), "embed_in.*not packed codes"),
    "a name twice": (
        lambda c: more_names(*c["quantization_config"]["manifest"]["replaced"][0]["names"])(c), "2 times"),
    "a long name": (more_names("x" * 100_000), "was replaced, but its weight is missing"),
    "a name that is a number": (more_names(3), "names holds 3"),
    "no names": (part(names=[]), "names holds nothing"),
    "names no list": (part(names="embed_out"), "names='embed_out': give a list"),
    "five bits": (part(weight_bits=5), "weight_bits=5: give one of 2, 3, 4"),
    "other bits": (part(weight_bits=4, grid="uniform"), "expected U8|not what|weight_bits"),
    "another grid": (part(grid="uniform"), "grid='uniform' with weight_bits=2: give 'codebook'"),
    "16 activation bits": (part(act_bits=16), "act_bits|does not ask for"),
    "act_bits of 8": (part(act_bits=8), "act_bits=8: give one of 4, 16"),
    "another group size": (part(group_size=16), "levels is I8"),
    "a group that does not divide": (part(group_size=48), "group_size=48"),
    "no group size": (part(group_size=0), "group_size=0"),
    "an unknown key": (part(clip=1), "unknown manifest key"),
    "replaced no list": (manifest(replaced={}), "replaced={}: give a list"),
    "nothing replaced": (manifest(replaced=[]), "replaced is empty"),
    "a fact of another kind": (manifest(kv_bits=4), "unknown manifest key 'kv_bits'"),
    "another class": (manifest(model_class="OPTForCausalLM"), "OPTForCausalLM|model_class"),
    "another family": (manifest(family="opt"), "family='opt'"),
    "another size": (lambda c: c.update(hidden_size=128), "hidden_size|expected|does not belong"),
    "layers": (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "fewer layers": (lambda c: c.update(num_hidden_layers=1), "layers.1|num_hidden_layers"),
    "a newer format": (
        lambda c: c["quantization_config"].update(format_version=FORMAT_VERSION + 1), "upgrade w2a4"),
}  # fmt: skip


@pytest.mark.parametrize("change, match", CHANGES.values(), ids=CHANGES)
def test_a_changed_config_is_refused(change, match, tmp_path):
    model, directory = saved(tmp_path)
    edited(directory, change)
    with pytest.raises(CheckpointError, match=match):
        type(model).from_pretrained(directory)
    with pytest.raises(CheckpointError):
        w2a4.verify(directory)


def test_sizes_in_a_part_of_a_config_are_refused_before_anything_is_built(tmp_path):
    model, directory = saved(tmp_path, "llava")
    edited(directory, lambda config: config["text_config"].update(num_hidden_layers=10**9))
    for read in (type(model).from_pretrained, w2a4.verify):
        with pytest.raises(CheckpointError, match="text_config.num_hidden_layers=1000000000"):
            read(directory)


def test_tensors_are_checked_as_those_of_any_packed_model(tmp_path):
    model, directory = saved(tmp_path)
    path, name = directory / "model.safetensors", "gpt_neox.layers.0.mlp.dense_4h_to_h"
    good = load_file(path)
    changes = {
        "scale": good[f"{name}.scale"].float(), "levels": good[f"{name}.levels"].flip(-1),
        "act_clip": torch.tensor([float("nan")]), "weight": good[f"{name}.weight"].to(torch.int8),
        "bias": None,
    }  # fmt: skip
    for key, value in changes.items():
        changed = {**good, f"{name}.{key}": value}
        save_file({k: v for k, v in changed.items() if v is not None}, path)
        for read in (type(model).from_pretrained, w2a4.verify):
            with pytest.raises(CheckpointError, match=f"{name}.*{key}|replaced"):
                read(directory)
    save_file(good, path)
    assert torch.equal(
        outputs(type(model).from_pretrained(directory), "gpt_neox"), outputs(model, "gpt_neox")
    )


def test_other_classes_and_doors(tmp_path, capsys):
    model, directory = saved(tmp_path)
    with pytest.raises(
        CheckpointError, match="of a 'GPTNeoXForCausalLM' were replaced.*loads as GPTNeoXModel"
    ):
        transformers.AutoModel.from_pretrained(directory)
    with pytest.raises(CheckpointError, match="on disk"):
        AutoModelForCausalLM.from_pretrained(
            directory, device_map={"": "disk"}, offload_folder=tmp_path / "o"
        )
    command(["verify", str(directory)], standalone_mode=False)
    command(["info", str(directory)], standalone_mode=False)
    told = capsys.readouterr().out
    assert "all as they were written" in told and f"{len(packed_names(model))} linears replaced" in told


def test_a_language_model_goes_through_the_doors_of_w2a4(tmp_path):
    model = tiny_model(hidden_size=64, intermediate_size=96)
    w2a4.save(w2a4.replace_linears(model), tiny_tokenizer(), tmp_path / "m")
    loaded, tokenizer = w2a4.load_model(tmp_path / "m")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    engine = w2a4.Engine(loaded, max_length=64)
    assert torch.equal(engine.generate([ids[0].tolist()], 8)[0], expected)
    for refused in (w2a4.rotate, lambda m: w2a4.prepare(m, tokenizer, "w2a4kv4-rcp")):
        with pytest.raises(W2A4Error, match="quantised.* already; start from the original"):
            refused(loaded)


def test_a_plain_module_stays_plain():
    model = w2a4.replace_linears(nn.Sequential(nn.Linear(64, 64)))
    assert type(model) is nn.Sequential


def test_the_manifest_is_plain_data(tmp_path):
    model, directory = saved(tmp_path, bits=4, group_size=32)
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    found = read_manifest(quantization)
    assert isinstance(found, Replacement) and found == model.config.quantization_config.manifest
    assert found.to_dict() == quantization["manifest"] and quantization["format_version"] == FORMAT_VERSION
