"""How full kernels keep a GPU: the arithmetic, what launch plans say, and that a drop is found."""

import json
import os
import shutil

import click
import pytest
from click.testing import CliRunner

from benchmarks.gates import residency, sass, sass_gate
from benchmarks.shapes import MODELS

H100, A100 = residency.DEVICES[90], residency.DEVICES[80]

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"
)


@pytest.mark.parametrize(
    ("device", "registers", "threads", "shared", "blocks"),
    [
        (H100, 32, 256, 0, 8),  # 64 warps
        (H100, 64, 256, 0, 4),
        (H100, 65, 256, 0, 3),  # 72 a lane: 28 warps
        (H100, 128, 256, 0, 2),
        (H100, 129, 512, 0, 0),  # 136 a lane: 12 warps, of 16
        (H100, 255, 256, 0, 1),
        (H100, 16, 32, 0, 32),
        (H100, 32, 256, 48 << 10, 4),
        (H100, 32, 256, 227 << 10, 1),
        (H100, 32, 256, (227 << 10) + 1, 0),
        (H100, 76, 256, 76544, 3),  # the reserved KB just fits three times
        (H100, 76, 256, 76544 + 320, 2),
        (A100, 32, 256, 48 << 10, 3),
        (A100, 32, 256, 164 << 10, 0),
    ],
)
def test_blocks_resident(device, registers, threads, shared, blocks):
    assert residency.blocks_resident(device, registers, threads, shared) == blocks


def launch(kernel="gemv_bmma_kernel<1, false>", blocks=688, shared=76544, planned=0, features=4096):
    call = residency.Call("", "linear_w2a4", f"11008x{features}", 1, features)
    return residency.Launch(call, kernel, blocks, 256, shared, planned, 1, 1, 4)


def examine(*arguments, registers=76, static=0, **changes):
    return residency.examine(launch(*arguments, **changes), 90, sass.Resources(registers, 0, 0, 0, static))


def test_waves_and_their_tail():
    row = examine()
    assert (row.resident, row.warps, row.breaches) == (3, 24, ())
    assert row.waves == pytest.approx(688 / (3 * 132)) and row.tail == pytest.approx(row.waves / 2)
    assert examine(blocks=3 * 132).tail == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registers": 96}, "has 2 blocks a multiprocessor, floor 3"),
        ({"shared": 80000}, "has 2 blocks a multiprocessor, floor 3"),
        ({"static": 1024}, "has 2 blocks a multiprocessor, floor 3"),
        ({"shared": 240000}, "cannot run: 256 threads, 76 registers, 240000 bytes"),
        ({"planned": 4}, "has 3 blocks a multiprocessor, and its grid is made for 4"),
    ],
)
def test_a_drop_is_a_breach(changes, message):
    assert examine(**changes).breaches == (message,)
    assert message in residency.summary([examine(**changes)])[0]


def test_more_inputs_have_a_lower_floor_and_a_new_kernel_needs_one():
    assert examine(shared=80000, features=28672).breaches == ()
    with pytest.raises(click.ClickException, match="has no floor"):
        examine("new_kernel")


def test_names_of_kernels():
    template = (
        "std::integral_constant<void (*)(w2a4::cuda::QuantizeArgs), &(void w2a4::cuda::"
        "hadamard_quantize_kernel<w2a4::cuda::Float16, true, (w2a4::cuda::Mix)2>(w2a4::cuda::QuantizeArgs))>"
    )
    assert residency.kernel_of(template) == "hadamard_quantize_kernel<Float16, true, 2>"
    plain = "std::integral_constant<void (*)(w2a4::cuda::AttentionArgs), &w2a4::cuda::merge_kv4_kernel>"
    assert residency.kernel_of(plain) == "merge_kv4_kernel"


@needs_compiler
def test_what_the_plans_say():
    asked = list(dict.fromkeys(call for model in MODELS.values() for call in residency.calls(model)))
    found = {}
    for one in residency.plan(asked, 90):
        found.setdefault((one.call.op, one.call.shape, one.call.tokens), []).append(one)
        residency.floor_of(one, 90)
    assert len(found) == len(asked), "every call is served"

    def of(op, shape, tokens=1):
        (one,) = found[op, shape, tokens]
        return one.kernel, one.blocks, (one.least_stages, one.most_stages, one.ring)

    # Stages are those of a tile; blocks of gemv_bmma have up to two of 688 tiles, of gemv_imma of 344.
    assert of("linear_w2a4", "4096x4096") == ("gemv_bmma_kernel<1, false>", 256, (1, 1, 3))
    assert of("linear_w2a4", "4096x11008") == ("gemv_bmma_kernel<1, false>", 256, (2, 3, 3))
    assert of("linear_w2a4", "11008x4096") == ("gemv_bmma_kernel<1, false>", 344, (1, 1, 3))
    assert of("linear_w2a4", "11008x4096", 16) == ("gemv_imma_kernel<2, 1, 2, false>", 2 * 172, (2, 2, 3))
    assert of("linear_w4a4", "11008x4096") == ("gemv_imma_kernel<4, 1, 2, false>", 172, (4, 4, 3))
    (few,), (many,) = (found["rope_append_kv4", "32x32x128", tokens] for tokens in (8, 2048))
    assert (few.kernel, few.blocks) == ("rope_append_kv4_kernel<Float16, 4>", 8 * 96 // 4)
    assert (many.kernel, many.blocks) == ("rope_append_kv4_wide_kernel<Float16, 8>", 2048)
    assert [one.kernel for one in found["attention_kv4", "32x32x128 of 4096", 1]] == [
        "attention_kv4_kernel<1, 4, true>",
        "merge_kv4_kernel",
    ]


@needs_compiler
def test_a_plan_that_refuses_a_call_is_told():
    call = residency.Call("linear_w8 1 128 99999999", "linear_w8", "", 1, 1)
    with pytest.raises(click.ClickException, match="refuses a call: linear_w8 1 128 99999999.*shared memory"):
        residency.plan([call], 90)


@needs_compiler
def test_the_command(monkeypatch, tmp_path):
    """With kernels that all take so many registers."""

    class Everything(dict):
        def __missing__(self, kernel):
            return sass.Resources(32, 0, 0, 0, 0)

    monkeypatch.setattr(residency, "kernel_resources", lambda arch: Everything())
    path = tmp_path / "out.json"
    run = CliRunner().invoke(residency.main, ["--arch", "90", "--json", str(path)])
    assert run.exit_code == 0, run.output
    assert "llama-2-7b and llama-3-8b on H100" in run.output and "14336x4096" in run.output
    rows = json.loads(path.read_text())["launches"]
    assert len({row["launch"]["kernel"] for row in rows}) > 15 and all(row["resident"] for row in rows)

    monkeypatch.setattr(residency, "FLOORS", (residency.Floor("", 33, 33),))
    run = CliRunner().invoke(residency.main, ["--arch", "90"])
    assert run.exit_code == 1 and "floor 33 (sm_90)" in run.output
    run = CliRunner().invoke(residency.main, ["--arch", "70"])
    assert run.exit_code == 1 and "no limits are known of sm_70" in run.output


def test_every_kernel_that_is_planned_is_one_that_is_gated():
    """The names of both come from the same sources."""
    sources = "".join(path.read_text() for path in sass_gate.SOURCES.glob("*.cuh"))
    for floor in residency.FLOORS:
        for name in floor.pattern.removeprefix("^").split("|^"):
            assert name.split("<")[0] in sources, floor
