"""benchmarks.smoke, rehearsed on the CPU: its cases, its lines, what becomes of wrong and of broken ones."""

import functools
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import faults, isolate, smoke, smoke_cases
from support import bench
from support.paths import ROOT
from w2a4.ops.table import OPS

FIELDS = ["stage", "case", "op", "shape", "tokens", "dtype", "kernel", "correct", "seconds", "error"]

#: The program with cases of its own among the small ones.
PLANTED = """
import os, signal, sys, time
from benchmarks import smoke, smoke_cases
from benchmarks.smoke_cases import Case

def crash():
    os.kill(os.getpid(), signal.SIGSEGV)

def leave():
    os._exit(3)

def cases(device, small):
    calls = {"wrong": lambda: False, "raises": lambda: 1 / 0, "crash": crash, "right": lambda: True,
             "hangs": lambda: time.sleep(100), "leaves": leave, "last": lambda: True}
    return [Case(name, "1x1", 1, "float32", "cpu", lambda device, call=call: (call, bool))
            for name, call in calls.items()]

smoke_cases.plan = cases
smoke.PROGRAM = (__file__,)
smoke.main()
"""


answer = functools.partial(bench.answer, smoke.main)


def read(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(list(line) == FIELDS and line["stage"] == "smoke" for line in lines)
    return lines


def planted(folder, *arguments):
    (folder / "planted.py").write_text(PLANTED)
    command = [
        sys.executable,
        str(folder / "planted.py"),
        "--device",
        "cpu",
        "--jsonl",
        "x.jsonl",
        *arguments,
    ]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    lines = read(folder / "x.jsonl")
    assert len({line["case"] for line in lines}) == len(lines), "a case has one line"
    return done.returncode, {line["op"]: line for line in lines}, done.stdout + done.stderr


def test_every_small_case_is_right(tmp_path):
    path = tmp_path / "lines.jsonl"
    code, output = answer("--device", "cpu", "--small", "--jsonl", path)
    lines = read(path)
    assert code == 0, output
    assert [line["case"] for line in lines] == [case.name for case in smoke_cases.plan("cpu", True)]
    ran = [line for line in lines if line["kernel"] != "triton"]
    assert all(line["correct"] is True and line["error"] is None for line in ran)
    for line in (line for line in lines if line["kernel"] == "triton"):
        assert line["correct"] is None and line["error"].startswith("left out: ")
        assert f"left-out {line['case']}" in output


def test_cases_on_a_gpu_are_every_op_and_kernel():
    cases = smoke_cases.plan("cuda", False)
    assert len({case.name for case in cases}) == len(cases)
    kernels = {(case.op, case.kernel) for case in cases}
    compiled = ("linear_w8", "quantize_a4", "rmsnorm_a4", "hadamard", "hadamard_a4", "silu_mul_hadamard_a4",
                "rope_append_kv4", "append_kv4", "quantize_kv4", "attention_kv4")  # fmt: skip
    triton = ("linear_w2a4", "linear_w4a4", "attention_kv4", "fake_quant_a4", "fake_quant_kv4", "ldp",
              "distillation_loss")  # fmt: skip
    gemv = {("linear_w2a4", "gemv_bmma"), ("linear_w2a4", "gemv_imma"), ("linear_w4a4", "gemv_imma")}
    assert kernels == {(op, "cuda") for op in compiled} | {(op, "triton") for op in triton} | gemv
    # What w2a4._cuda registers, or it is not loaded.
    assert {*compiled, "linear_w2a4", "linear_w4a4"} == {n for n, op in OPS.items() if "cuda" in op.kernels}
    shapes = {case.shape for case in cases}
    assert {"4096x4096", "11008x4096", "28672", "32x8x128x4096", "32x8x64x4096"} <= shapes
    assert {1, 8, 16, 64} <= {case.tokens for case in cases}


@pytest.mark.parametrize("case", smoke_cases.launches(), ids=lambda case: case.name)
def test_small_launches_are_right_too(case):
    call, check = case.build("cpu")
    assert check(call())


def test_launches_are_told():
    code, output = answer("--device", "cpu", "--launches", "--only", "hadamard,linear_w8")
    assert code == 0 and output.count("ok ") == 21 and "ok linear_w8-33x576-3-bfloat16-cuda" in output


def test_a_wrong_op_is_told(tmp_path, monkeypatch):
    right = torch.ops.w2a4.hadamard.default
    monkeypatch.setattr(smoke_cases.ops, "hadamard", lambda *args: right(*args) * 1.01)
    path = tmp_path / "lines.jsonl"
    code, output = answer("--device", "cpu", "--small", "--jsonl", path, "--only", "hadamard,quantize_a4")
    assert code == 1 and "not all is right" in output
    for line in read(path):
        assert line["correct"] is (line["op"] == "quantize_a4")
        assert line["error"] == (None if line["correct"] else "not what the reference says")


def test_what_is_broken_costs_no_other_case(tmp_path):
    code, lines, output = planted(tmp_path, "--isolate", "--limit", "3")
    assert code == 1, output
    assert list(lines) == ["wrong", "raises", "crash", "right", "hangs", "leaves", "last"]
    assert [op for op, line in lines.items() if line["correct"]] == ["right", "last"]
    assert lines["raises"]["error"].startswith("ZeroDivisionError: division by zero (at ")
    assert lines["crash"]["error"] == "the process was ended by SIGSEGV"
    assert lines["hangs"]["error"] == "took more than 3 s" and 3 <= lines["hangs"]["seconds"] < 20
    assert lines["leaves"]["error"] == "the process left after a fault of the GPU"
    assert output.count("in another process") == 3


def test_after_a_fault_the_process_is_left(tmp_path, monkeypatch, capfd):
    """The case that faulted has its line first, and is named."""
    fault = "CUDA error: an illegal memory access was encountered"

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(smoke, "device_fault", lambda: fault)
    monkeypatch.setattr(smoke.os, "_exit", leave)
    path = tmp_path / "lines.jsonl"
    cases = smoke.select(smoke_cases.plan("cpu", True), "quantize_kv4")
    with pytest.raises(SystemExit) as left:
        smoke.run(cases, "cpu", path)
    assert left.value.code == faults.FAULT == 3
    (line,) = read(path)
    assert line["correct"] is False and "illegal memory access" in line["error"]
    assert f"{line['case']} faulted" in capfd.readouterr().err


def test_a_program_that_does_not_start_is_not_tried_again(tmp_path):
    lost = []
    command = [sys.executable, "-c", "raise SystemExit(5)"]
    assert not isolate.run(command, ["a", "b"], 1.0, lambda *told: lost.append(told))
    assert [(name, error) for name, _, error in lost] == [("a", "the process exited with 5")] + [
        ("b", "the process exited with 5")
    ]


def test_it_answers_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in answer()[1]
    assert "no case and no op is called nothing" in answer("--only", "hadamard,nothing")[1]
    code, output = answer("--device", "cpu", "--small", "--list")
    assert code == 0 and "linear_w2a4-64x256-1-float16-cpu" in output.split()


def test_errors_tell_where_they_began():
    def raised() -> Exception:
        try:
            try:
                torch.zeros(2) @ torch.zeros(3)
            except RuntimeError as error:
                raise ValueError("of that") from error
        except ValueError as error:
            return error

    (place,) = faults.frames(raised())
    line = inspect.getsourcelines(raised)[1] + 3
    assert place == f"tests/cli/test_smoke.py:{line} in raised: torch.zeros(2) @ torch.zeros(3)"
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    *ours, last = faults.frames(caught.value)
    assert ours[-1].startswith("tests/cli/test_smoke.py:") and "json/decoder.py:" in last
    assert faults.frames(ValueError("never raised")) == []
