"""`w2a4 doctor`: what it says of this machine, and when it fails."""

import json

import pytest
import torch
from click.testing import CliRunner

from w2a4 import ops
from w2a4.cli import doctor
from w2a4.cli.main import main
from w2a4.ops import library, selftest

compiled = pytest.mark.skipif(not ops.has_training_kernels(torch.zeros(1)), reason="no compiled kernels")


def run(*arguments):
    return CliRunner().invoke(main, ["doctor", "--device", "cpu", *arguments])


@compiled
def test_what_it_says(tmp_path):
    done = run("--json", str(tmp_path / "found.json"))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["versions"]["torch"] == torch.__version__ and not found["errors"]
    assert found["machine"]["instruction_set"] in ("base", "avx2", "avxvnni", "avx512", "avx512vnni")
    assert found["ops"]["linear_w2a4"] == {"kernel": "cpu", "right": True, "why": ""}
    right = sum(bool(each["right"]) for each in found["ops"].values())
    assert f"All {right} ops that have a kernel on cpu are right." in done.output


def test_a_wrong_op_is_an_error(monkeypatch):
    monkeypatch.setattr(selftest, "run", lambda device: {"snap": selftest.Verdict("cpu", False, "it is off")})
    done = run()
    assert done.exit_code == 1
    assert "error: these ops are wrong on cpu, please report it: snap (it is off)" in done.output


def test_nothing_built(monkeypatch):
    monkeypatch.setattr(library, "cpu_module", None)
    monkeypatch.setattr(selftest, "run", lambda device: {})
    done = run()
    assert done.exit_code == 1
    assert f"error: nothing was built, so that every op is slow: {library.HOW_TO_BUILD}" in done.output


def found(**changes):
    about = {"threads": 1, "cores": 2}
    return {"ops": {}, "device": "cpu", "gpu": [], "machine": about, "versions": {}} | changes


@compiled
@pytest.mark.parametrize(
    "changes, said",
    [
        ({"machine": {"threads": 8, "cores": 2}}, "8 threads on 2 cores"),
        ({"gpu": [{"name": "a GPU"}]}, "CUDA kernels are not loaded"),
        ({"versions": {"transformers": "99.1"}}, "transformers 99.1 was not tested, install transformers"),
    ],
)
def test_warnings(changes, said, monkeypatch):
    monkeypatch.setattr(library, "cuda_module", None)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["transformers>=4.57.6,<5.25"])
    warnings, errors = doctor.judge(found(**changes))
    assert len(warnings) == 1 and said in warnings[0] and not errors
    assert doctor.judge(found()) == ([], [])
