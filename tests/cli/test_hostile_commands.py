"""What a user can type, send or cut off: each ends in a result or in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from click.testing import CliRunner

from support.commands import SMALL
from w2a4.cli.main import main
from w2a4.errors import RecipeError
from w2a4.quantization import job as pipeline
from w2a4.recipe import Recipe

COMMAND = [sys.executable, "-c", "from w2a4.cli import run; run()"]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def check_refused(*arguments, input=None) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], input=input)
    assert isinstance(done.exception, SystemExit) and done.exit_code in (1, 2), done.exception
    last = done.stderr.strip().splitlines()[-1]
    assert last.lower().startswith("error: ")
    return last


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "DIR", "--prompt", "a\udcffb"),
        ("info", "a\udcff"),
        ("quantize", "DIR", "--out", "b\udcfe"),
    ],
)
def test_arguments_that_are_not_utf8(arguments, quantized):  # noqa: F811
    given = [quantized[0] if part == "DIR" else part for part in arguments]
    assert "is not UTF-8" in check_refused(*given)


@pytest.mark.parametrize(
    "name,value",
    [("seed", 2**64), ("top-k", "1.5"), ("top-p", "nan"), ("temperature", "nan"), ("temperature", "inf"),
     ("max-new-tokens", 2**31), ("max-new-tokens", "nan"), ("max-new-tokens", 2**20), ("seed", "9" * 5000)],
)  # fmt: skip
def test_numbers_of_generate(name, value, quantized):  # noqa: F811
    assert name.replace("-", "_") in check_refused(
        "generate", quantized[0], "--prompt", "a", f"--{name}", value
    ).replace("-", "_")


def test_a_tiny_temperature_is_greedy(quantized):  # noqa: F811
    def text(*options):
        done = CliRunner().invoke(
            main, ["generate", str(quantized[0]), "--prompt", "a", "--max-new-tokens", "4", *options]
        )
        assert done.exit_code == 0
        return done.stdout

    assert text("--temperature", "1e-40", "--seed", "1") == text()


@pytest.mark.parametrize("data", [b"\xff\n", b"fine\n\xc3(\n"])
def test_chat_with_bytes_that_are_not_utf8(data, quantized):  # noqa: F811
    assert "the input is not UTF-8" in check_refused("chat", quantized[0], "--max-new-tokens", 1, input=data)


@pytest.mark.parametrize(
    "setting",
    ["name=2001-99-99", "rotation.seed=" + "9" * 20, "rotation.seed=" + "9" * 5000, "gptq_refine=4294967295",
     "name=[[[" + "[" * 3000, "calib_samples=" + "9" * 400, "gptq_damp=" + "9" * 400, "kv_clip=.nan"],
)  # fmt: skip
def test_settings(setting, plain, tmp_path):  # noqa: F811
    assert len(check_refused("quantize", plain, "--out", tmp_path / "out", *SMALL, "--set", setting)) < 20000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [b"1: 2\nfoo: 3\n", b"name: 2001-99-99\n", b'name: "\\ud800"\n', b"name: caf\xe9\n", b"[" * 3000,
     b"rotation: {1: 2}\n", b"rotation: {seed: " + b"9" * 5000 + b"}\n"],
)  # fmt: skip
def test_recipe_files(content, tmp_path):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError):
        Recipe.load(tmp_path / "r.yaml")


def test_seeds_below_0_still_serve():
    recipe = Recipe.load("w2a4kv4").override(**{"rotation.seed": -(2**32) + 1})
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    "name,content",
    [
        ("a.jsonl", b'{"text": "a\\ud800b"}\n'),
        ("a.jsonl", b"[" * 100000),
        ("a.jsonl", b'{"text": ' + b"9" * 5000),
    ],
)
def test_texts(name, content, quantized, tmp_path):  # noqa: F811
    (tmp_path / name).write_bytes(content)
    check_refused("eval", quantized[0], "--text", tmp_path / name, "--seqlen", 4)


@pytest.mark.parametrize("after", [0.05, 0.6, 2.0])
def test_interrupted_at_any_moment(after, quantized):  # noqa: F811
    arguments = ["chat", str(quantized[0])]
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    up = 5 * (time.perf_counter() - begun)  # before that, Python itself may not be up on a busy machine
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=ENVIRONMENT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    if after > max(up, 0.1):
        assert "Traceback" not in error and process.returncode == 130, error


def test_a_closed_pipe_is_quiet(quantized):  # noqa: F811
    arguments = [
        "generate",
        str(quantized[0]),
        "--prompt",
        "a",
        "--max-new-tokens",
        "200",
        "--temperature",
        "9",
    ]
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    error = process.stderr.read().decode()
    process.wait(60)
    assert "Traceback" not in error and "Exception" not in error


def test_closed_input(quantized):  # noqa: F811
    command = " ".join([sys.executable, "-m", "w2a4.cli", "chat", str(quantized[0]), "<&-"])
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.returncode == 0, done.stderr


def quantization(**values):
    """A change of a config's `quantization_config`."""
    return lambda config: config["quantization_config"].update(values)


def of_recipe(**values):
    return lambda config: config["quantization_config"]["recipe"].update(values)


WRONG = {"text": "zz", "number": 7, "list": [1], "true": True, "infinity": float("inf")}


def check_config(directory, change, commands):
    """Each command refuses the directory while its config.json is changed."""
    path = directory / "config.json"
    was = path.read_text()
    config = json.loads(was)
    change(config)
    path.write_text(json.dumps(config))
    try:
        for command in commands:
            check_refused(command, directory)
    finally:
        path.write_text(was)


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_configs_with_parts_that_are_no_mappings(value, quantized):  # noqa: F811
    for change in (
        lambda config: config.update(quantization_config=value),
        quantization(recipe=value),
        quantization(provenance=value),
        of_recipe(rotation=value),
    ):
        check_config(quantized[0], change, ("verify", "info"))


@pytest.mark.parametrize(
    "key", ["hidden_size", "head_dim", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
)
@pytest.mark.parametrize("value", ["zz", {"a": 1}, [1]], ids=["text", "mapping", "list"])
def test_sizes_that_are_none(key, value, quantized):  # noqa: F811
    commands = ("verify",) if key == "num_key_value_heads" else ("verify", "info")  # info needs the others
    check_config(quantized[0], lambda config: config.update({key: value}), commands)


@pytest.mark.parametrize("value", [7, True, {"a": 1}, "LlamaForCausalLM", [1], None])
def test_info_of_odd_architectures(value, quantized, tmp_path):  # noqa: F811
    directory = shutil.copytree(quantized[0], tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text()) | {"architectures": value}
    (directory / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(main, ["info", str(directory)])
    assert done.exit_code == 0 and (": 1," if value == [1] else ": unknown,") in done.stdout


@pytest.mark.parametrize("text", ["[]", "5", "{", '"text"', '{"x": 1}', "null"])
def test_reports_that_are_none(text, quantized, tmp_path):  # noqa: F811
    directory = shutil.copytree(quantized[0], tmp_path / "copy")
    (directory / "report.json").write_text(text)
    assert "report" in check_refused("info", directory)
    assert "report" in check_refused("generate", directory, "--prompt", "a")


def test_reports_with_a_part_of_another_kind(quantized, tmp_path):  # noqa: F811
    directory = shutil.copytree(quantized[0], tmp_path / "copy")
    path = directory / "report.json"
    report = json.loads(path.read_text())
    (measured,) = report["evaluation"]["after"]
    wrong = {
        "layers": [None, 5, "x", {}, [5], [{"a": 1}], [report["layers"][0] | {"relative_error": "x"}]],
        "recipe": [None, 5, []], "sizes": [[], {"total": "x"}], "seconds": [None, "x", True],
        "evaluation": [
            5, {"after": 5}, {"after": [5]}, {"after": measured | {"perplexity": "x"}},
            {"before": {"seqlen": 1}},
            {"after": [measured, measured | {"low": "x"}]}, {"after": [measured | {"losses": ["x"]}]},
            {"before": [measured | {"text": 5}]}, {"before": [measured | {"tokens_sha256": 5}]},
        ],
        "training": [5, {"text": 5}], "versions": [None, 5], "source": [5],
    }  # fmt: skip
    for key, values in wrong.items():
        for value in values:
            path.write_text(json.dumps(report | {key: value}))
            assert f"report.json is not a report: {key}" in check_refused("info", directory)


@pytest.mark.parametrize("text", ["[]", "{", '{"loss": 1}', '{"source": "x", "layers": 5}'])
def test_a_foreign_report_beside_the_source_is_ignored(text, plain, tmp_path):  # noqa: F811
    source = shutil.copytree(plain, tmp_path / "source")
    (source / "report.json").write_text(text)
    out = tmp_path / "out"
    for arguments in (["info", source], ["quantize", source, "--out", out, *SMALL], ["info", out]):
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.stderr


# What stands in generation_config.json and config.json of the source


@pytest.mark.parametrize(
    "key, value",
    [("bad_words_ids", [[99999]]), ("sequence_bias", [[[99999], -5.0]]), ("eos_token_id", [[1]]),
     ("eos_token_id", "x"), ("eos_token_id", 1.5)],
)  # fmt: skip
def test_generation_configs(key, value, quantized, tmp_path):  # noqa: F811
    directory = shutil.copytree(quantized[0], tmp_path / "copy")
    (directory / "generation_config.json").write_text(json.dumps({key: value}))
    assert f"generation_config.{key}=" in check_refused("generate", directory, "--prompt", "a")


def test_attention_weights_are_refused_before_the_work(plain, tmp_path, monkeypatch):  # noqa: F811
    source = shutil.copytree(plain, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"output_attentions": True}
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(pipeline, "calibration_ids", None)  # where the work begins
    out = tmp_path / "out"
    assert "output_attentions" in check_refused("quantize", source, "--out", out, *SMALL)
    assert not out.exists()
