"""`tools/fuzz.py` in small: no case of a kind that this package answers for ends in a fault."""

import json
import subprocess
import sys
import time

import pytest

from support.paths import ROOT
from tools import fuzz
from tools.fuzzing import outcome
from tools.fuzzing.outcome import BAD, run_forked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(
    "kind,count",
    [
        ("ops", 160),
        ("commands", 80),
        ("checkpoints", 60),
        ("kills", 1),
    ],
)
def test_no_faults(kind, count, folder):
    outcomes = fuzz.run(kind, range(count), folder)
    assert [o.seed for o in outcomes] == [*range(count)]
    assert not [o.to_dict() for o in outcomes if o.result in BAD]


def test_faults_are_told_apart():
    def case(seed):
        if seed == 1:
            raise outcome.Silent("off")
        if seed == 2:
            raise KeyError("x")
        if seed == 3:
            import ctypes

            ctypes.string_at(0)
        if seed == 4:
            time.sleep(9)
        if seed == 5:
            raise outcome.Partial("half")
        return ("refused" if seed == 6 else "right"), ""

    found = list(run_forked(case, range(8), 1.0))
    assert [o.seed for o in found] == [*range(8)]
    assert [o.result for o in found] == [
        "right", "silent difference", "raw traceback", "crash", "hang", "partial output", "refused", "right",
    ]  # fmt: skip
    assert found[3].note == "SIGSEGV" and "KeyError" in found[2].note
    assert outcome.counts(found)["right"] == 2


def test_one_case_again(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "fuzz.py"), "ops", "--json", str(tmp_path / "f.json")]
    subprocess.run([*command, "--count", "5", "--seed", "7"], check=True, capture_output=True)
    many = json.loads((tmp_path / "f.json").read_text())
    assert many["counts"]["right"] + many["counts"]["refused"] == 5
    done = subprocess.run([*command, "--only", "9"], check=True, capture_output=True, text=True)
    (one,) = json.loads((tmp_path / "f.json").read_text())["cases"]
    assert one["note"] == many["cases"][2]["note"] and done.stdout.startswith("9: ")
