"""The benchmarks' own arithmetic, parsers and programs; their numbers are nobody's test."""

import json
import subprocess
import sys

import click
import pytest
import torch

from benchmarks import (
    bench_gemm,
    bench_gemv,
    bench_hadamard,
    bench_kv4,
    bench_quantize,
    checks,
    files,
    harness,
    mma_rate,
    peers,
    shapes,
    targets,
    timing,
)
from benchmarks.gates import sass, sass_gate
from support.bench import answer, row
from support.paths import ROOT
from w2a4 import ops
from w2a4.format.hadamard import HadamardSpec, dense_hadamard, had_k_matrix
from w2a4.ops import reference
from w2a4.ops.packing import pack

# shapes


def test_shapes_follow_from_the_dimensions():
    linears = shapes.MODELS["llama-3-8b"].linears()
    assert linears["k_proj"] == (1024, 4096) and linears["down_proj"] == (4096, 14336)
    seven = {str(shape) for shape in shapes.linear_shapes(["llama-2-7b"])}
    assert seven == {"4096x4096", "11008x4096", "4096x11008", "22016x4096"}
    every = shapes.linear_shapes(shapes.MODELS)
    assert len(set(every)) == len(every)
    assert set(targets.GEMV_RATIOS) <= {str(shape) for shape in every}


def test_groups_divide_the_inputs():
    assert shapes.group_size(4096) == 128 and shapes.group_size(576) == 64 and shapes.group_size(90) == 90
    assert all(shape.features % shape.group == 0 for shape in shapes.linear_shapes(shapes.MODELS))


def test_hadamard_sizes_are_those_of_the_models_and_of_others():
    assert {64, 576, 1536, 8960, 11008, 13824, 14336, 28672, 53248, 18944} <= set(shapes.hadamard_sizes())
    assert shapes.hadamard_sizes(["llama-2-7b"]) == [128, 11008]


# timing


def test_copies_fill_five_caches_or_reach_a_limit():
    assert timing.copies_for(10 << 20, 32 << 20) == (16, False)
    assert timing.copies_for(1 << 30, 32 << 20) == (1, False)
    assert timing.copies_for(10 << 20, 32 << 20, max_bytes=40 << 20) == (4, True)
    assert timing.copies_for(100, 32 << 20) == (timing.MAX_COPIES["cpu"], True)
    assert timing.copies_for(1 << 40, 32 << 20) == (1, False), "one copy is always there"


def test_copies_are_equal_and_apart():
    data = timing.Copies(torch.randn(4), torch.randn(2, 2))
    assert data.bytes == 32
    taken = data.take(3)
    assert len(taken) == 3 and len({items[0].data_ptr() for items in taken}) == 3
    assert all(torch.equal(items[1], taken[0][1]) for items in taken)
    assert data.take(2)[0] is taken[0]


def test_times_are_medians_of_turns():
    order = []
    loads = [timing.Workload(name, lambda _, n=name: order.append(n), timing.Copies(torch.ones(1)))
             for name in ("a", "b")]  # fmt: skip
    us, repeats, _ = timing.median_us(loads, "cpu", cold=False)
    assert len(us) == 2 and all(0 < value < 1e4 for value in us) and repeats == timing.REPEATS
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert len(turns) >= 2 * timing.REPEATS, "the workloads must take turns"
    _, repeats, _ = timing.median_us(loads, "cpu", cold=False, seconds=0)
    assert repeats == timing.LEAST_REPEATS
    assert timing._is_noisy([1.0] * 10 + [2.0] * 10) and not timing._is_noisy([1.0] * 20)


# checks and peers


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("size,block,k", [
    (1, 1, 1), (2, 2, 1), (64, 64, 1), (128, 128, 1), (32, 16, 1), (12, 12, 12), (96, 96, 12), (24, 12, 12),
    (576, 576, 36), (112, 56, 28), (1376, 1376, 172),
])  # fmt: skip
def test_the_factorised_reference_is_the_dense_one(size, block, k, transpose):
    """Of odd and even powers of two, of a K alone, and of blocks."""
    x, spec = torch.randn(2, 3, size), HadamardSpec(size, block, k)
    want = reference.hadamard(x.double(), had_k_matrix(k), block, transpose)
    got = checks.reference_hadamard(x, spec, transpose)
    torch.testing.assert_close(got, want, atol=1e-13, rtol=0)
    if k in (12, 28, 172):  # not symmetric
        assert not torch.allclose(got, checks.reference_hadamard(x, spec, not transpose))


@pytest.mark.parametrize(
    "spec",
    [HadamardSpec(64, 64, 1), HadamardSpec(32, 16, 1), HadamardSpec(96, 96, 12), HadamardSpec(24, 12, 12)],
)
def test_every_hadamard_is_the_same(spec):
    x = torch.randn(5, spec.size, dtype=torch.float64)
    want = x @ dense_hadamard(spec)
    dense = x.unflatten(-1, (-1, spec.block_size)) @ peers.dense_hadamard(spec, torch.float64, "cpu")
    for got in (dense.flatten(-2), peers.eager_hadamard(x, spec), checks.reference_hadamard(x, spec)):
        torch.testing.assert_close(got, want, atol=1e-13, rtol=0)
    y = ops.hadamard(x.float(), had_k_matrix(spec.k), spec.block_size)
    assert checks.hadamard_agrees(y, x.float(), spec)
    y[-1, 3] += 1e-3
    assert not checks.hadamard_agrees(y, x.float(), spec)


def test_eager_quantisation_is_the_op():
    x, clip = torch.randn(7, 64), torch.tensor([0.9])
    got, want = peers.eager_quantize_a4(x, clip), ops.quantize_a4(x, clip)
    assert checks.codes_agree(got, want, exact=True)


def test_codes_may_be_off_by_one_and_rarely():
    codes, scale = reference.quantize_a4(torch.randn(8, 512), torch.tensor([0.9]))
    for change, agrees in ((0x01, True), (0x04, False)):
        other = codes.clone()
        other[0, 0] ^= change  # the first code: by one, by four
        assert checks.codes_agree((other, scale), (codes, scale), exact=False) is agrees
        assert not checks.codes_agree((other, scale), (codes, scale), exact=True)
    assert not checks.codes_agree((codes, scale * 1.01), (codes, scale), exact=False)
    assert not checks.codes_agree((codes ^ 1, scale), (codes, scale), exact=False)


def test_a_wrong_output_is_found():
    codes, scale = reference.quantize_a4(torch.randn(3, 64), torch.tensor([0.9]))
    weight = pack(torch.randint(-8, 8, (9, 64), dtype=torch.int8), 4)
    weights = weight, torch.rand(9, 2).half()
    y = ops.linear_w4a4(codes, scale, *weights, None, 32, torch.float32)
    assert checks.linear_agrees("linear_w4a4", y, codes, scale, weights, 32)
    y[2, 8] = y[2, 8].nextafter(torch.tensor(9e9))
    assert not checks.linear_agrees("linear_w4a4", y, codes, scale, weights, 32)


# harness

FIELDS = "op shape tokens dtype cache us peer peer_us ratio bytes gbps bound repeats correct".split()


def case(correct: bool) -> harness.Case:
    data = timing.Copies(torch.randn(64))
    loads = [timing.Workload(name, torch.sum, data) for name in ("sum", "torch")]
    return harness.Case(
        "sum", "64", 1, "float32", lambda: harness.Subject(loads[0], loads[1:], 256, lambda: correct)
    )


def test_a_row_is_what_the_json_holds():
    (row,) = harness.measure(case(True), harness.Options(), copy_gbps=2.0)
    entries = row.to_dict()
    assert [name for name in entries if name != "note"] == FIELDS
    assert entries["ratio"] == entries["peer_us"] / entries["us"]
    assert entries["bound"] == pytest.approx(256 / 2.0 / 1e3), "bytes / (GB/s) in microseconds"
    assert entries["gbps"] == pytest.approx(256 / entries["us"] / 1e3)
    assert entries["cache"] == "hot", "so little data is never cold"
    json.dumps(entries)


def test_shapes_take_the_place_of_models():
    options = harness.Options(shapes=((64, 32), (96, 64)), tokens=(3,))
    assert {(case.shape, case.tokens) for case in bench_gemv.plan(options)} == {("64x32", 3), ("96x64", 3)}
    for bench in (bench_hadamard, bench_quantize):
        assert {case.shape for case in bench.plan(harness.Options(shapes=((64,),)))} == {"64"}


def test_no_time_without_a_correct_result():
    (row,) = harness.measure(case(False), harness.Options(), copy_gbps=2.0)
    assert not row.correct and row.us is row.ratio is row.gbps is row.peer_us is None
    assert "NO" in harness.table([row])


def test_a_wrong_result_fails_the_program(monkeypatch, capsys):
    copy = harness.Row("copy", "1", 1, "uint8", "cold", 1.0, None, None, None, 2, 2.0, 1.0, 20, True)
    monkeypatch.setattr(harness, "copy_row", lambda device: copy)
    with pytest.raises(SystemExit) as failure:
        harness.command("A test.", lambda options: [case(False)], "WIDTH")(["--threads", "1"])
    output = capsys.readouterr()
    assert failure.value.code == 1
    assert "copy" in output.out and "wrong results, so no times: sum 64, 1 tokens" in output.err


def test_json_is_replaced_in_one_step(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": 1})
    files.write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(click.ClickException, match="cannot write"):
        files.write_json(tmp_path / "no/a.json", {})


def test_metadata_names_machine_versions_and_commit():
    meta = harness.metadata("cpu")
    assert list(meta) == ["device", "driver", "clocks", "cpu", "versions", "commit", "date"]
    assert meta["driver"] is None and meta["versions"]["torch"]


# machine code, compiled for sm_90 by nvcc 13.0

SYNCHRONOUS = """
		Function : _Z16gemv_bmma_kernelPK5uint4PK5uint2Pii
        /*0080*/              @!P0 BRA 0x220 ;                                  /* 0x0000000000648947 */
                                                                                /* 0x001fec0003800000 */
        /*0090*/                   LDC R9, c[0x0][0x214] ;
        /*00f0*/                   ULDC.64 UR8, c[0x0][0x218] ;
        /*0100*/                   IMAD.U32 R18, RZ, RZ, UR8 ;
        /*0110*/                   IMAD.U32 R19, RZ, RZ, UR9 ;
        /*0120*/                   IMAD.MOV.U32 R16, RZ, RZ, R0 ;
        /*0130*/                   IMAD.MOV.U32 R17, RZ, RZ, R9 ;
        /*0140*/                   LDG.E.64.CONSTANT R18, desc[UR6][R18.64] ;
        /*0150*/                   LDG.E.EF.128 R8, desc[UR6][R16.64] ;
        /*0160*/                   LDG.E.EF.128 R12, desc[UR6][R16.64+0x200] ;
        /*0170*/                   UIADD3 UR4, UR4, 0x40, URZ ;
        /*0180*/                   ISETP.LE.AND P0, PT, R20, UR4, PT ;
        /*0190*/                   UIADD3 UR8, UP0, UR8, 0x200, URZ ;
        /*01a0*/                   IADD3 R0, P1, R16, 0x400, RZ ;
        /*01b0*/                   UIADD3.X UR9, URZ, UR9, URZ, UP0, !UPT ;
        /*01c0*/                   BMMA.168256.AND.POPC R4, R8.ROW, R18.COL, R4 ;
        /*01d0*/                   IMAD.X R9, RZ, RZ, R17, P1 ;
        /*01e0*/                   NOP ;
        /*01f0*/                   BMMA.168256.AND.POPC R4, R12.ROW, R18.COL, R4 ;
        /*0200*/                   NOP ;
        /*0210*/              @!P0 BRA 0x100 ;
        /*0220*/                   IADD3 R4, R6, R5, R4 ;
        /*0250*/                   STG.E desc[UR6][R2.64], R7 ;
        /*0260*/                   EXIT ;
        /*0270*/                   BRA 0x270;
        /*0280*/                   NOP;
"""

ASYNCHRONOUS = """
.text._Z13copies_kernelPK5uint4Piii:
        /*0080*/              @!P0 BRA `(.L_x_0) ;
        /*00b0*/                   I2F.U32.RP R8, UR9 ;
        /*0120*/                   MUFU.RCP R8, R8 ;
        /*0160*/                   F2I.FTZ.U32.TRUNC.NTZ R7, R6 ;
        /*01b0*/                   HFMA2.MMA R9, -RZ, RZ, 0, 0 ;
.L_x_1:
        /*01c0*/                   IADD3 R10, R6.reuse, 0x1, RZ ;
        /*0280*/              @!PT LDS RZ, [RZ] ;
        /*02b0*/                   LDGSTS.E.BYPASS.128 [R15], desc[UR6][R6.64] ;
        /*02c0*/                   LDGSTS.E.BYPASS.128 [R17], desc[UR6][R6.64+0x200] ;
        /*02d0*/                   LDGDEPBAR ;
        /*02e0*/                   MOV R6, R10 ;
        /*02f0*/                   DEPBAR.LE SB0, 0x2 ;
        /*0300*/                   LDS R13, [R13] ;
        /*0350*/               @P1 VIADD R16, R16, -UR9 ;
        /*03b0*/                   IMAD.IADD R11, R14, 0x1, R11 ;
        /*03c0*/              @!P1 BRA `(.L_x_1) ;
.L_x_0:
        /*03d0*/                   STG.E desc[UR6][R2.64], R11 ;
        /*03e0*/                   EXIT ;
"""

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z13copies_kernelPK5uint4Piii' for 'sm_90'
ptxas info    : Function properties for _Z13copies_kernelPK5uint4Piii
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers, 2048 bytes smem
ptxas info    : Compiling entry function '_Z10bad_kernelPKfPdii' for 'sm_90'
ptxas info    : Function properties for _Z10bad_kernelPKfPdii
    160 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 160 bytes cumulative stack size
"""


def body(text):
    ((_, instructions),) = sass.parse_sass(text).items()
    return instructions


def listing(*lines):
    """Instructions at 0x10, 0x20, ... of lines such as "@P0 BRA 0x10"."""
    rows = [f"        /*{16 * (n + 1):04x}*/   {line} ;" for n, line in enumerate(lines)]
    return body("\t\tFunction : f\n" + "\n".join(rows))


def test_ptxas_resources():
    kernels = sass.parse_ptxas(PTXAS)
    assert kernels["_Z13copies_kernelPK5uint4Piii"] == sass.Resources(22, 0, 0, 0, 2048)
    assert kernels["_Z10bad_kernelPKfPdii"] == sass.Resources(32, 160, 8, 16, 0)


def test_main_loop_of_loads_to_registers():
    loop = sass.main_loop(body(SYNCHRONOUS))
    assert (loop[0].address, loop[-1].address, len(loop)) == (0x100, 0x210, 18)
    assert sass.mma_count(loop) == 2
    assert sass.loads_in_flight(loop) == 2
    assert [i.load_bytes for i in loop if i.load_bytes] == [8, 16, 16]
    assert [i.opcode for i in sass.side_loads(loop)] == ["LDG.E.64.CONSTANT"]
    assert not sass.slow_instructions(loop) and not sass.local_accesses(loop)


def test_main_loop_of_asynchronous_copies_and_labels():
    instructions = body(ASYNCHRONOUS)
    loop = sass.main_loop(instructions)
    assert (loop[0].address, loop[-1].address) == (0x1C0, 0x3C0)
    assert sass.mma_count(instructions) == 0, "HFMA2.MMA is no tensor-core instruction"
    assert sass.loads_in_flight(loop) == 2 * 3, "two groups stay under way, a third is issued"
    assert not sass.slow_instructions(loop)
    assert sass.slow_instructions(instructions) == ["I2F.U32.RP", "MUFU.RCP", "F2I.FTZ.U32.TRUNC.NTZ"]


def test_loops_are_natural_and_the_innermost_with_an_mma_counts():
    instructions = listing(
        "MOV R1, R2",
        "MOV R3, R4",  # 0x20: the outer loop
        "IMMA.16832.S8.S8 R4, R8.ROW, R14.COL, R4",  # 0x30: the inner one
        "@P1 BRA 0xa0",  # out of line, and back
        "BRA.DIV UR4, 0xc0",
        "@P0 BRA 0x30",
        "BRA.U UP0, 0x20",
        "EXIT",
        "NOP",
        "MUFU.RCP R8, R8",  # 0xa0
        "BRA 0x50",
        "CALL.REL.NOINC 0xe0",  # 0xc0: a warp that diverged
        "BRA 0x60",
        "RET.REL.NODEC R2 0x0",
    )
    inner, outer = sorted(sass.loops(instructions), key=len)
    assert [i.address for i in inner] == [0x30, 0x40, 0x50, 0x60, 0xA0, 0xB0]
    assert {i.address for i in outer} - {i.address for i in inner} == {0x20, 0x70}
    assert sass.main_loop(instructions) == inner
    assert sass.slow_instructions(inner) == ["MUFU.RCP"]


def test_of_loops_with_as_many_mma_the_longest_or_the_shortest_is_meant():
    mma = "IMMA.16832.S8.S8 R4, R8.ROW, R20.COL, R4"
    instructions = listing("NOP", mma, "@P0 BRA 0x20", mma, "NOP", "@P0 BRA 0x40", "EXIT")
    assert [i.address for i in sass.main_loop(instructions)] == [0x40, 0x50, 0x60]
    assert [i.address for i in sass.main_loop(instructions, shortest=True)] == [0x20, 0x30]


def test_loads_that_are_used_one_iteration_later():
    loop = listing(
        "IMMA.16832.S8.S8 R4, R8.ROW, R20.COL, R4",
        "LDG.E.128 R8, desc[UR6][R2.64]",
        "IMMA.16832.S8.S8 R4, R12.ROW, R20.COL, R4",
        "LDG.E.128 R12, desc[UR6][R2.64+0x200]",
        "@P0 BRA 0x10",
    )
    assert sass.loads_in_flight(sass.main_loop(loop)) == 2


def test_what_is_slow_or_local():
    fast = (
        "DEPBAR.LE SB0, 0x1",
        "I2FP.F32.S32 R1, R1",
        "HADD2.F32 R1, -RZ, R2.H0_H0",
        "@P0 CALL.REL.NOINC 0x40",
    )
    slow = listing("DADD R2, R4, R6", *fast, "F2F.F32.F64 R1, R2", "CALL.REL.NOINC 0x500")
    assert sass.slow_instructions(slow) == ["DADD", "F2F.F32.F64", "CALL.REL.NOINC"]
    assert sass.local_accesses(listing("LDL.64 R2, [R1]", "STL [R1], R2", "LDS R1, [R2]")) == 2
    assert [sass.warps_per_multiprocessor(n) for n in (20, 32, 33, 128, 255)] == [64, 64, 51, 16, 8]


def test_the_gate_counts_instructions_a_weight():
    good = sass.Resources(24, 0, 0, 0, 0)
    report = sass_gate.examine(
        "void w2a4::cuda::gemv_bmma_kernel<1, false>(int)", 90, good, body(SYNCHRONOUS)
    )
    assert report.kernel == "gemv_bmma_kernel<1, false>" and report.mma == 2
    assert report.per_weight == pytest.approx(18 * 32 / (2 * 16 * 256 / 3))
    assert report.breaches == ["has 2 loads under way before the first is needed, least 4"]
    bad = sass.Resources(200, 8, 4, 4, 0)
    report = sass_gate.examine("gemv_bmma_kernel<1, true>", 80, bad, body(ASYNCHRONOUS))
    assert (
        "has no BMMA.168256 in a loop" in report.breaches
        and "spills 8 bytes, has 8 bytes of stack, accesses them 0 times" in report.breaches
    )
    assert "uses 200 registers, limit 128" in report.breaches
    report = sass_gate.examine("gemv_bmma_kernel<1, true>", 100, good, body(ASYNCHRONOUS))
    assert not report.breaches, "sm_100 has no BMMA and gets the other kernel"
    assert not sass_gate.examine("any_other_kernel", 90, good, body(ASYNCHRONOUS)).breaches


def test_names_of_kernels_are_short():
    for name in ("void w2a4::cuda::(anonymous namespace)::f<a::B, (a::C)2>(a::P<1>)", "f<a::B, 2>(int)"):
        assert sass_gate.short(name) == "f<B, 2>"
    assert sass_gate.short("g(int, float)") == "g"


def test_launches_need_a_stream_and_nothing_waits():
    good = "kernel<<<dim3(a, b), f(1, 2), 0, current_stream()>>>(p); cudaMemcpyAsync(); // cudaMalloc"
    assert sass.launch_breaches(good) == []
    bad = "k<<<1, 2>>>(); k<<<1, 2, 0, 0>>>(); cudaMalloc(&p, 1); cudaDeviceSynchronize(); cudaMemcpy(a);"
    assert len(sass.launch_breaches(bad)) == 5
    assert sass.launch_breaches("cudaLaunchKernelEx(&config, kernel)") == [
        "cudaLaunchKernelEx without a stream"
    ]


def test_launches_of_this_repository():
    sources = [
        path for path in (ROOT / "csrc/cuda").glob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")
    ]
    if not sources:
        pytest.skip("there are no CUDA sources")
    assert sass_gate.check_launches(sources) == []


# the suite for a GPU


def test_targets_take_the_worst_row_and_only_correct_cold_ones():
    rows = [row(), row(ratio=2.0, cache="hot"), row(ratio=2.0, correct=False, us=None), row(tokens=8, us=2.6),
            row(op="hadamard", shape="8192", peer="copy", ratio=0.9, bytes=1 << 25),
            row(op="hadamard", shape="576", peer="copy", ratio=0.5, bytes=1 << 25)]  # fmt: skip
    found = {target.name: target for target in targets.targets(rows)}
    one = found["linear_w2a4 4096x4096 against cuBLAS float16"]
    assert (one.wanted, one.measured, one.met) == (">= 2.7", 3.0, True)
    assert found["linear_w2a4 8192x28672 against cuBLAS float16"].met is None
    eight = found["linear_w2a4, time of 8 tokens over time of 1"]
    assert eight.measured == pytest.approx(1.3) and not eight.met
    hadamard = found["hadamard of 16 MB and more, time over that of a copy"]
    assert hadamard.measured == 2.0 and not hadamard.met


# programs


def test_programs_answer_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi and no nvcc
    for bench in (bench_gemm, bench_gemv, bench_hadamard, bench_kv4, bench_quantize):
        code, output = answer(bench.main, "--help")
        assert code == 0 and f"python -m {bench.__name__}" in output
        code, output = answer(bench.main, "--device", "cuda")
        assert code == 1 and "torch sees no CUDA device here" in output
    assert (
        "--tune measures tiles of the Triton GEMM: it needs --device cuda"
        in answer(bench_gemm.main, "--tune")[1]
    )
    assert "'1,x' is not a list" in answer(bench_gemv.main, "--tokens", "1,x")[1]
    assert "'64' is not a list of OUTxIN" in answer(bench_gemv.main, "--shapes", "64")[1]
    assert "'64x0' is not a list of OUTxIN" in answer(bench_gemv.main, "--shapes", "64x0")[1]
    assert "'64x32' is not a list of WIDTH" in answer(bench_hadamard.main, "--shapes", "64x32")[1]
    assert "'ninety' is not a list" in answer(sass_gate.main, "--arch", "ninety")[1]
    assert "no NVIDIA GPU here" in answer(mma_rate.main)[1]
    assert "nvcc is neither on PATH" in answer(mma_rate.main, "--compile-only", "90")[1]


def test_a_benchmark_runs(tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.bench_hadamard", "--models", "smollm2-135m", "--tokens", "4",
               "--threads", "1", "--json", str(result)]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    content = json.loads(result.read_text())
    assert list(content) == ["meta", "rows"]
    assert all(set(FIELDS) <= set(entry) <= {*FIELDS, "note"} for entry in content["rows"])
    measured = {(entry["op"], entry["shape"], entry["peer"]) for entry in content["rows"] if entry["correct"]}
    assert {("hadamard", "1536", "copy"), ("hadamard", "64", "dense")} < measured
    assert content["rows"][0]["op"] == "copy" and "1536" in run.stdout


def test_copies_on_a_gpu_are_kernels():
    for way in timing.copies_on("meta", 1000):
        assert way.data.bytes == 1024 and way.call is not torch.Tensor.copy_
        way.calls(2)[1]()
    source, target = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    timing._copy_by_kernel(target, source)
    assert torch.equal(target, source)
