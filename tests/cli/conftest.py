"""Directories that the commands are called with."""

import json

import pytest

from support.commands import SMALL, save_plain, succeed


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A float LLaMA with its tokenizer, as transformers writes it."""
    return save_plain(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """What `w2a4 quantize --eval` made of it, and its JSON."""
    out = tmp_path_factory.mktemp("out")
    result = succeed(
        "quantize", plain, "--out", out / "q", "--recipe", "w2a4kv4", *SMALL, "--set", "gptq_damp=5e-2",
        "--calib", "builtin", "--eval", "builtin", "--eval-windows", 1, "--json", out / "q.json",
    )  # fmt: skip
    return out / "q", json.loads((out / "q.json").read_text()), result
