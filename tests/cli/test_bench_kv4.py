"""The benchmark of the 4-bit KV cache: its cases, its check, its target, a run."""

import json
import subprocess
import sys

import pytest

from benchmarks import bench_kv4, harness, targets
from support.paths import ROOT
from w2a4.ops import reference


def test_cases_are_models_contexts_and_sequences():
    shapes = (4, 2, 16, 40), (4, 2, 16, 50)
    cases = bench_kv4.plan(harness.Options(shapes=shapes, tokens=(3,)))
    assert [(case.op, case.shape, case.tokens) for case in cases] == [
        ("rope_append_kv4", "4x2x16", 3),
        ("attention_kv4", "4x2x16x40", 3),
        ("attention_kv4", "4x2x16x50", 3),
        ("prefill_kv4", "4x2x16x40", 3),
        ("prefill_kv4", "4x2x16x50", 3),
    ]
    cases = bench_kv4.plan(harness.Options(device="cuda"))
    found = {case.shape for case in cases if case.op == "attention_kv4"}
    assert {"32x32x128x1024", "32x8x128x32768", "32x8x64x4096"} < found and len(found) == 9


@pytest.mark.parametrize("name,case_op", [
    ("attention_kv4", "attention_kv4"), ("attention_kv4", "prefill_kv4"),
    ("rope_append_kv4", "rope_append_kv4"),
])  # fmt: skip
def test_a_wrong_result_is_seen(name, case_op, monkeypatch):
    right = getattr(reference, name)
    monkeypatch.setattr(bench_kv4.ops, name, right)
    (case,) = (
        case
        for case in bench_kv4.plan(harness.Options(shapes=((4, 2, 32, 300),), tokens=(2,)))
        if case.op == case_op
    )
    subject = case.build()
    assert subject.check()
    for load in (subject.ours, *subject.peers):
        load.calls(1)[0]()
    monkeypatch.setattr(bench_kv4.ops, name, lambda *args: right(*args) * 1.001)
    assert not subject.check()


def test_the_target_is_that_of_long_contexts():
    fixed = dict(op="attention_kv4", tokens=1, dtype="float16", cache="cold", us=2.0, bytes=1, gbps=1.0,
                 peer="sdpa.float16", correct=True)  # fmt: skip
    rows = [
        fixed | {"shape": "32x8x128x32768", "ratio": 2.75},
        fixed | {"shape": "32x8x128x4096", "ratio": 1},
    ]
    (target,) = (t for t in targets.targets(rows) if t.name.startswith("attention_kv4"))
    assert (target.wanted, target.measured, target.met) == (">= 2.5", 2.75, True)


def test_the_program_runs(tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.bench_kv4", "--shapes", "4x2x64x300", "--tokens", "1",
               "--quick", "--threads", "1", "--json", str(result)]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    rows = json.loads(result.read_text())["rows"]
    assert {(row["op"], row["peer"]) for row in rows if row["correct"]} == {
        ("copy", None), ("rope_append_kv4", "copy"), ("attention_kv4", "copy"),
        ("attention_kv4", "sdpa.float32"), ("prefill_kv4", "sdpa.float32"),
    }  # fmt: skip
