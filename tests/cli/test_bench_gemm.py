"""`benchmarks.bench_gemm`, what it measures, and that it finds errors; its numbers are nobody's test."""

import json

from benchmarks import bench_gemm, harness, targets, timing
from support.bench import answer, row
from w2a4 import ops


def test_cliffs_are_times_over_the_next_tile():
    times = {1: 1.0, 7: 1.1, 8: 1.2, 9: 2.0, 16: 1.6, 17: 9.0, 64: 5.0, 72: 1.0, 65: 8.0}
    rows = [row(tokens=m, us=us, dtype="bfloat16", peer=None, ratio=None) for m, us in times.items()]
    rows += [row(tokens=8, us=0.1, dtype="bfloat16", shape="64x64")]
    assert sorted(targets._cliffs(rows)) == sorted([1 / 1.2, 1.1 / 1.2, 1.2 / 1.6, 2 / 1.6, 5.0])
    (cliff,) = [target for target in targets.targets(rows) if "next whole tile" in target.name]
    assert cliff.measured == 5 and cliff.met is False


def test_the_gemm_is_measured_for_every_number_of_tokens():
    cases = bench_gemm.plan(harness.Options(device="cuda", quick=True))
    first = [case.tokens for case in cases[:10]]
    assert first == [2048] * 10, "five shapes, both ops"
    of_one = {case.tokens for case in cases if case.shape == "4096x4096" and case.op == "linear_w4a4"}
    assert of_one == {2048, *range(1, 65)}
    assert {case.tokens for case in bench_gemm.plan(harness.Options(tokens=(3,), quick=True))} == {3}


def test_the_benchmark_of_gemms_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "MAX_BYTES", 1 << 20)
    result = tmp_path / "result.json"
    copy = harness.Row("copy", "1", 1, "uint8", "cold", 1.0, None, None, None, 2, 2.0, 1.0, 20, True)
    monkeypatch.setattr(harness, "copy_row", lambda device: copy)
    code, output = answer(
        bench_gemm.main, "--quick", "--shapes", "96x64", "--tokens", "1,20", "--json", result
    )
    assert code == 0, output
    rows = json.loads(result.read_text())["rows"][1:]
    assert all(row["correct"] for row in rows)
    assert {(row["op"], row["tokens"], row["peer"]) for row in rows} == {
        (op, tokens, peer)
        for op in bench_gemm.OPS for tokens in (1, 20) for peer in ("torch.float32", "torch._int_mm")
    }  # fmt: skip


def test_a_gemm_that_is_off_by_one_is_found(monkeypatch):
    case = next(iter(bench_gemm.plan(harness.Options(shapes=((96, 64),), tokens=(5,)))))
    assert case.build().check()
    right = ops.linear_w2a4
    # An error that hides in the rounding of other checks: one unit of one integer sum.
    monkeypatch.setattr(ops, "linear_w2a4", lambda *args: right(*args) + args[1] * args[4].float().amin(1))
    assert not case.build().check()
