"""What a user can type, send or cut off: each ends in a result or in one line."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from click.testing import CliRunner
from test_cli import SMALL, plain, quantized  # noqa: F401  fixtures

from w2a4.cli import main
from w2a4.config import Recipe
from w2a4.errors import RecipeError

COMMAND = [sys.executable, "-c", "from w2a4_command import main; main()"]
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
