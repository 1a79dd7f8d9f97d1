"""Recipes: defaults, overrides, YAML, and errors that quote the key and the value."""

import dataclasses
import importlib.resources
import os
import time

import pytest
import yaml

from w2a4.cli.options import parse_settings
from w2a4.errors import RecipeError
from w2a4.format.groups import resolve_group_size
from w2a4.recipe import RECIPES, Recipe, RotationConfig, RotationLearning, Training


def test_named_recipes():
    assert set(RECIPES) == {
        "w4a4kv4", "w4a4kv4-qat", "w2a4kv4", "w2a4kv4-rcp", "w2a4kv4-rcp-quick", "w2a4kv4-rcp-block",
    }  # fmt: skip
    for name, recipe in RECIPES.items():
        assert Recipe.load(name) is recipe
        assert recipe.name == name
        assert (recipe.act_bits, recipe.kv_bits, recipe.weight_method) == (4, 4, "gptq")
    assert (RECIPES["w4a4kv4"].weight_bits, RECIPES["w2a4kv4"].weight_bits) == (4, 2)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_yaml_and_dict_round_trip(recipe, tmp_path):
    other = recipe.override(**{"rotation.r4": "none", "group_size": 32, "kv_clip": 1, "gptq_damp": 0.05})
    for each in (recipe, other):
        each.to_yaml(tmp_path / "recipe.yaml")
        assert Recipe.load(tmp_path / "recipe.yaml") == each
        assert Recipe.from_dict(each.to_dict()) == each
    assert other.kv_clip == 1.0 and isinstance(other.kv_clip, float)


def test_every_field_can_be_overridden():
    others = {
        "name": "x", "smooth": 0.5, "weight_bits": 4, "weight_grid": "uniform",
        "weight_method": "rtn", "group_size": -1,
        "act_bits": 16, "act_clip": 0.8, "act_codes": "symmetric", "act_group_size": 64,
        "o_proj_act": "token", "kv_bits": 16,
        "kv_clip": 1.0, "sink_tokens": 4, "prefix_tokens": 0, "head_bits": 16,
        "embed_bits": 16, "gptq_damp": 0.1, "gptq_block": 64, "gptq_act_order": False, "gptq_refine": 0,
        "gptq_target": "full", "first_token": 0.5, "calib_samples": 3, "calib_seqlen": 8,
        "rotation.r1": "none", "rotation.r2": "random",
        "rotation.r3": "none", "rotation.r4": "hadamard", "rotation.r4_blocks": 2,
        "rotation.seed": 7,
        "rotation.learned": "r.safetensors",
        "rotation_learning.objective": "kurtosis", "rotation_learning.steps": 7,
        "rotation_learning.lr": 0.5, "rotation_learning.schedule": "cosine",
        "rotation_learning.momentum": 0.9, "rotation_learning.max_grad_norm": 2.0,
        "rotation_learning.batch_size": 2,
        "rotation_learning.seqlen": 64, "rotation_learning.init": "random",
        "rotation_learning.weights": "recipe",
        "training.route": "block", "training.init": "lloyd", "training.grid": "uniform",
        "training.block_steps": 3,
        "training.keep_codes": False,
        "training.learn_act_clip": False, "training.loss": "kl", "training.teacher_top": 8,
        "training.steps": 3,
        "training.batch_size": 2, "training.seqlen": 64, "training.micro_batch": -1, "training.lr": 1e-4,
        "training.quantizer_lr": 0.0, "training.schedule": "linear", "training.warmup": 0.5,
        "training.weight_decay": 0.1, "training.max_grad_norm": 2.0, "training.gradient_checkpointing": False,
        "training.data": "x.txt", "training.minutes": 2.0,
    }  # fmt: skip
    nested = {"rotation": RotationConfig, "rotation_learning": RotationLearning, "training": Training}
    fields = {f.name for f in dataclasses.fields(Recipe)} - set(nested)
    fields |= {f"{name}.{f.name}" for name, cls in nested.items() for f in dataclasses.fields(cls)}
    assert set(others) == fields
    flat = Recipe().override(**others).to_dict()
    for key, value in others.items():
        section, _, leaf = key.rpartition(".")
        assert (flat[section] if section else flat)[leaf] == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2}, "unknown recipe key 'bits'; known keys: name, rotation.r1"),
        ({"rotation.r5": "none"}, "unknown recipe key 'rotation.r5'"),
        ({"name.x": 1}, "unknown recipe key 'name.x'"),
        ({"weight_bits": 5}, "weight_bits=5: give one of 2, 3, 4, 16"),
        (
            {"weight_bits": 4, "weight_grid": "codebook"},
            "weight_grid='codebook' with weight_bits=4: a codebook",
        ),
        ({"weight_grid": "lloyd"}, "weight_grid='lloyd': give one of 'auto', 'codebook', 'uniform'"),
        ({"weight_bits": "2"}, "weight_bits='2'"),
        ({"group_size": 2}, "group_size=2"),
        ({"group_size": "big"}, "group_size='big'"),
        ({"group_size": True}, "group_size=True"),
        ({"act_clip": 0.0}, "act_clip=0.0"),
        ({"act_clip": 1.5}, r"act_clip=1.5: give a number in \(0, 1\]"),
        ({"act_clip": float("nan")}, "act_clip=nan"),
        ({"act_clip": "best"}, "act_clip='best'"),
        ({"smooth": -0.1}, r"smooth=-0.1: give a number in \[0, 1\]; 0 is off"),
        ({"smooth": 1.5}, "smooth=1.5"),
        ({"smooth": float("nan")}, "smooth=nan"),
        ({"gptq_refine": -1}, "gptq_refine=-1"),
        ({"first_token": -0.5}, "first_token=-0.5"),
        ({"gptq_damp": 1}, "gptq_damp=1.0"),
        ({"calib_seqlen": 1}, "calib_seqlen=1: give a number >= 2"),
        ({"calib_samples": 0}, "calib_samples=0"),
        ({"gptq_act_order": "yes"}, "gptq_act_order='yes'"),
        ({"rotation.r3": "learned"}, "r3='learned'"),
        ({"rotation.r1": "learnt"}, "r1='learnt': give one of 'none', 'hadamard'"),
        (
            {"rotation_learning.objective": "loss"},
            "objective='loss': give one of 'network', 'distill', 'kurtosis'",
        ),
        ({"rotation_learning.steps": 0}, "steps=0: give a number >= 1"),
        ({"rotation_learning.lr": 0}, "lr=0.0: give a number > 0"),
        ({"rotation_learning.lr": float("nan")}, "lr=nan"),
        ({"rotation_learning.schedule": "step"}, "schedule='step': give one of 'linear', 'cosine'"),
        ({"rotation_learning.momentum": 1.0}, r"momentum=1.0: give a number in \[0, 1\)"),
        ({"rotation_learning.max_grad_norm": 0}, "max_grad_norm=0.0: give a number > 0"),
        ({"rotation_learning.batch_size": 0}, "batch_size=0: give a number >= 1"),
        ({"rotation_learning.seqlen": 1}, "seqlen=1: give a number >= 2"),
        ({"rotation_learning.init": "learned"}, "init='learned': give one of 'none', 'hadamard'"),
        ({"rotation_learning.weights": "2"}, "weights='2': give one of 'full', 'recipe'"),
        ({"rotation_learning.rate": 1}, "unknown recipe key 'rotation_learning.rate'"),
        ({"rotation": "none"}, "rotation='none': give a mapping of r1"),
        ({"training.teacher_top": -1}, "training.teacher_top=-1: give a number >= 0"),
        ({"training.steps": 0}, "training.steps=0: give a number >= 1"),
        ({"training.micro_batch": 0}, "training.micro_batch=0: give -1 or a number >= 1"),
        ({"training.lr": -1}, "training.lr=-1.0: give a number >= 0"),
        ({"training.warmup": 1}, r"training.warmup=1.0: give a number in \[0, 1\)"),
        ({"training.max_grad_norm": 0}, "training.max_grad_norm=0.0: give a number > 0"),
        ({"training.loss": "mse"}, "loss='mse': give one of 'cakld'"),
    ],
)
def test_wrong_overrides_are_quoted(changes, message):
    with pytest.raises(RecipeError, match=message):
        Recipe().override(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "holds list, not a mapping"),
        ("a: [", "is not YAML"),
        ("weight: 3", "unknown recipe key 'weight'"),
    ],
)
def test_wrong_recipe_files(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(tmp_path / "r.yaml")


def test_unknown_recipe_and_missing_file(tmp_path):
    with pytest.raises(
        RecipeError, match="unknown recipe 'w3'; named recipes: w2a4kv4, .*, w4a4kv4-qat; or give"
    ):
        Recipe.load("w3")
    with pytest.raises(RecipeError, match="does not exist"):
        Recipe.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("weight_bit", "'weight_bits'"),
        ("training.stpes", "'training.steps'"),
        ("rotation.r5", "'rotation.r4'"),
        ("steps", "'rotation_learning.steps' or 'training.steps'"),
    ],
)
def test_unknown_keys_name_those_that_are_spelled_nearly_so(tmp_path, key, near):
    section, _, leaf = key.rpartition(".")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({section: {leaf: 3}} if section else {leaf: 3}))
    for way in (
        lambda: Recipe().override(**{key: 3}),
        lambda: Recipe().override(**parse_settings([f"{key}=3"])),
        lambda: Recipe.load(tmp_path / "r.yaml"),
    ):
        with pytest.raises(RecipeError, match=f"unknown recipe key '{key}'.*; did you mean {near}\\?$"):
            way()


def test_unknown_sections_name_the_nearest():
    with pytest.raises(RecipeError, match="unknown recipe key 'trainig.lr'.*did you mean 'training.lr'"):
        Recipe().override(**{"trainig.lr": 1})
    with pytest.raises(RecipeError, match="unknown recipe key 'trainig'.*did you mean 'training'"):
        Recipe.from_dict({"trainig": {"lr": 1}})


def test_keys_that_are_near_none_get_no_proposal():
    with pytest.raises(RecipeError, match="unknown recipe key 'zzz'.*training.minutes$"):
        Recipe().override(zzz=1)


def test_unknown_names_get_the_nearest():
    with pytest.raises(RecipeError, match=r"did you mean 'w2a4kv4-rcp'\?$"):
        Recipe.load("w2a4kv4-rpc")
    with pytest.raises(RecipeError, match="yaml file$"):
        Recipe.load("zzz")


def test_named_recipes_are_files_that_say_what_they_are_for():
    folder = importlib.resources.files("w2a4.recipe")
    names = {file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")}
    assert names == set(RECIPES) and list(RECIPES) == sorted(RECIPES)
    for name, recipe in RECIPES.items():
        text = folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        assert text.startswith("# ") and recipe == Recipe.from_dict(yaml.safe_load(text))


def test_recipe_yaml_may_name_only_what_differs(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"weight_bits": 4, "rotation": {"r4": "none"}}))
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert (recipe.weight_bits, recipe.rotation.r4, recipe.rotation.r1) == (4, "none", "random_hadamard")


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().act_bits = 16
    assert RotationConfig("none", "none", "none", "none").is_identity
    assert not RotationConfig().is_identity


def test_a_learned_rotation_may_lack_its_file():
    """It is learned first then."""
    assert Recipe().override(**{"rotation.r1": "learned"}).rotation.learned is None


def test_resolve_group_size():
    assert [resolve_group_size(n, "auto") for n in (128, 576, 96, 90)] == [128, 64, 32, 90]
    assert resolve_group_size(90, -1) == 90
    assert resolve_group_size(96, 48) == 48
    with pytest.raises(
        RecipeError, match=r"group_size=128 does not divide in_features=576; use one of \[64, 32, -1\]"
    ):
        resolve_group_size(576, 128)


@pytest.mark.parametrize(
    "text, match",
    [
        ("name: [&a [x], *a]", r"alias \*a"),
        ("a: &a {weight_bits: 2}\nrotation:\n  <<: *a", r"alias \*a"),
        ("name: " + "[" * 20_000, "not YAML"),
        ("1: 2\nname: x\nfoo: y", "unknown recipe key 1"),
        (f"name: {[['x' * 1000] * 50]}", "name=.*give a value of type str"),
        ("# " + "x" * (2 << 20), "2097154 bytes"),
    ],
    ids=["alias", "merge", "deep", "keys of several types", "long value", "long file"],
)
def test_hostile_recipes_are_refused_at_once_and_briefly(tmp_path, text, match):
    (tmp_path / "r.yaml").write_text(text)
    started = time.perf_counter()
    with pytest.raises(RecipeError, match=match) as error:
        Recipe.load(tmp_path / "r.yaml")
    assert time.perf_counter() - started < 1.5 and len(str(error.value)) < 2500


def test_aliases_of_aliases_are_not_expanded(tmp_path):
    bomb = ", ".join(["&a0 [x, x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
    (tmp_path / "r.yaml").write_text(f"name: [{bomb}]")
    with pytest.raises(RecipeError, match="alias"):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="not a YAML value"):
        parse_settings([f"name=[{bomb}]"])
    nested = ["x"] * 9
    for _ in range(12):
        nested = [nested] * 9
    with pytest.raises(RecipeError) as error:
        Recipe(name=nested)
    assert len(str(error.value)) < 500


def test_a_recipe_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "dir.yaml").mkdir()
    for name in ("fifo.yaml", "dir.yaml"):
        with pytest.raises(RecipeError, match=f"{name}.*no regular file"):
            Recipe.load(tmp_path / name)
