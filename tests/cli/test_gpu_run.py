"""benchmarks.gpu_run: what a stage costs that fails, what a bare machine lacks, what comes back."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import w2a4
from benchmarks import files, gpu_run, timeline
from benchmarks.experiments.testbed import byte_tokenizer
from benchmarks.gpu import again, headline, install, pack, payload, plan, small, summary
from benchmarks.gpu.install import GPU, Carried
from benchmarks.gpu.session import Session, Stage, python
from benchmarks.targets import targets
from support.bench import row
from support.gpu_session import session
from support.paths import ROOT, TESTS
from support.tiny_models import tiny_llama
from w2a4.train.linear import fake_quant_linears


def statuses(folder):
    lines, _ = files.read_lines(folder / "results.jsonl")
    return {name: line["status"] for name, line in summary.statuses(lines).items()}, lines


def test_what_fails_hangs_or_dies_costs_itself_only(tmp_path):
    names = ["first", "hangs", "second", "dies", "fails", "leaves", "last"]
    ran = session(tmp_path)
    ran.run([Stage("alone", 9, python("-c", "print('alone')")), *(Stage(name, 2) for name in names),
             Stage("broken", 9, python("-c", "raise OSError('no disk')")),
             Stage("absent", 9, ("no-such-program",)),
             Stage("slow", 1, python("-c", "import time; time.sleep(60)"))])  # fmt: skip
    found, lines = statuses(tmp_path)
    assert found == {
        "alone": "ok", "first": "ok", "hangs": "stopped", "second": "ok", "dies": "died", "fails": "failed",
        "leaves": "failed", "last": "ok", "broken": "failed", "absent": "failed", "slow": "stopped",
    }  # fmt: skip
    why = {line["stage"]: line["why"] for line in lines if line.get("why")}
    assert why["dies"] == "of SIGSEGV" and "no more" in why["leaves"] and "OSError: no disk" in why["broken"]
    process = {line["stage"]: line["pid"] for line in lines if "pid" in line}
    assert process["second"] == process["dies"] and process["fails"] == process["leaves"]
    assert len(set(process.values())) == 4, "one more after each that took the process with it"


def test_the_package_is_built_anew_once_if_the_shared_process_does_not_start(tmp_path):
    ran, calls = session(tmp_path, program="raise ImportError('libcuda')"), []
    ran.rebuild = lambda: calls.append(1) or True
    ran.run([Stage("a", 5), Stage("b", 5)])
    found, lines = statuses(tmp_path)
    assert calls == [1] and found == {"a": "failed", "b": "failed"}
    assert "ImportError: libcuda" in lines[0]["why"]


def test_time_is_cut_from_the_end(tmp_path):
    ran = session(tmp_path, seconds=7)
    slow = python("-c", "import time; time.sleep(3)")
    ran.run([Stage("first", 9, slow), Stage("second", 9, slow), Stage("third", 9, slow)])
    found, lines = statuses(tmp_path)
    assert found == {"first": "ok", "second": "left out", "third": "left out"}
    assert lines[-1]["why"] == "no time left"


def test_a_killed_run_leaves_what_it_knew(tmp_path):
    """As when the machine is taken away: the stages that ended, and the rows of the one that did not."""
    code = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from support.gpu_session import session
from benchmarks.gpu.session import Stage
session(Path({str(tmp_path)!r})).run([Stage("first", 9), Stage("hangs", 60)])
"""
    run = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    for _ in range(600):
        found, lines = statuses(tmp_path)
        if any(line.get("stage") == "hangs" and "pid" in line for line in lines):
            break
        time.sleep(0.1)
    run.kill()
    run.wait()
    child = next(line["pid"] for line in lines if line["stage"] == "hangs" and "pid" in line)
    os.kill(child, signal.SIGKILL)
    found, lines = statuses(tmp_path)
    assert found == {"first": "ok"} and lines[-1]["pid"] == child


def test_lines_that_were_cut_off_are_closed_and_passed_over(tmp_path):
    path = tmp_path / "lines"
    assert files.read_lines(path) == ([], 0)
    files.append_line(path, {"a": 1, "b": float("nan"), "c": Path("d")})
    path.write_bytes(path.read_bytes() + b'{"cut": ')
    (line,), end = files.read_lines(path)
    assert line == {"a": 1, "b": None, "c": "d"}
    files.append_line(path, {"a": 2})
    assert files.read_lines(path, end)[0] == [{"a": 2}]


# what a machine lacks


@pytest.fixture
def carried(tmp_path):
    folder = tmp_path / "carried"
    folder.mkdir()
    facts = {"wheel": "w2a4.whl", "peers": {"gemlite": ["gemlite.whl"]}, "archs": [90], "commit": "abc"}
    for name in ("w2a4.whl", "gemlite.whl", "mma_rate_sm_90"):
        (folder / name).touch()
    (folder / install.MANIFEST).write_text(json.dumps(facts))
    return folder


H100 = GPU("H100", 90, 79.6, "580")


def test_what_is_missing_is_told(carried, monkeypatch):
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    here = Carried.read(carried)
    lacks = install.missing_here(H100, here)
    assert {"nvcc", "ncu", "compute-sanitizer", "humming", "xdist"} <= set(lacks) and "gemlite" not in lacks
    assert "mma_rate" not in lacks and "memory" not in lacks
    lacks = install.missing_here(GPU("A10", 86, 22.0, "580"), here)
    assert "22 GB" in lacks["memory"] and "sm_86" in lacks["mma_rate"]
    assert "it needs a GPU" in install.missing_here(None, None)["gpu"]


def test_no_gpu_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(gpu_run.main, ["run", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "no NVIDIA GPU here" in result.output and "--device cpu" in result.output
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_a_line(carried, tmp_path):
    def answer(*arguments):
        result = CliRunner().invoke(gpu_run.main, [str(argument) for argument in arguments])
        assert result.exit_code and isinstance(result.exception, SystemExit), result.exception
        return result.output

    run = ("run", "--device", "cpu", "--out")
    assert "there is no manifest.json" in answer(*run, tmp_path / "o", "--carry", tmp_path)
    (carried / "gemlite.whl").unlink()
    assert "gemlite.whl did not travel" in answer(*run, tmp_path / "o", "--carry", carried)
    (tmp_path / "file").touch()
    assert "give a folder that can be written" in answer(*run, tmp_path / "file/out")
    again = ("again", "--device", "cpu", "--out", tmp_path / "o")
    assert "nothing to do" in answer(*again)
    assert "'64' is not OUTxIN" in answer(*again, "--tune", "64")
    assert "give both" in answer(*again, "--a", tmp_path / "file")
    assert "it tells of no tests" in answer(*again, "--from", tmp_path / "file")
    assert "there is no payload.json" in answer(
        "train", "--device", "cpu", "--out", tmp_path / "o", "--carry", carried
    )


@pytest.mark.parametrize("arch,works,order", [
    (90, True, ["install", "install gemlite"]),
    (90, False, ["install", "build", "install gemlite"]),
    (100, True, ["build", "install gemlite"]),
])  # fmt: skip
def test_where_the_wheel_does_not_serve_the_sources_are_built(
    carried, tmp_path, monkeypatch, arch, works, order
):
    did = []

    def pip(session, name, site, what, seconds=0):
        did.append(name)
        assert name != "build" or {
            "setup.py",
            "LICENSE",
            "pyproject.toml",
            "csrc",
            "w2a4",
            "kernels",
        } <= {path.name for path in what[0].iterdir()}
        return works or name != "install"

    monkeypatch.setattr(install, "pip_install", pip)
    ran = session(tmp_path / "out")
    site = install.install(ran, Carried.read(carried), GPU("a GPU", arch, 80, "580"))
    assert did == order
    first, second, *_ = ran.environment["PYTHONPATH"].split(os.pathsep)
    assert (first, second) == (str(site), str(ROOT)) and ran.environment["PYTHONSAFEPATH"] == "1"
    told = statuses(tmp_path / "out")[0] if arch == 100 else {"install": "left out"}
    assert told == {"install": "left out"}


def test_neither_installed_nor_built(carried, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "pip_install", lambda *a, **k: False)
    with pytest.raises(click.ClickException, match="neither installed from w2a4.whl nor built here"):
        install.install(session(tmp_path / "out"), Carried.read(carried), H100)


# stages


def test_the_plan_fits_and_keeps_its_order(carried):
    stages = plan.stages(Path("out"), Carried.read(carried), 90, "cuda")
    names = [stage.name for stage in stages]
    assert names == ["mma_rate", "smoke", "gemv", "engine", "kv4", "hadamard", "gemm", "tests",
                     "memcheck", "racecheck", "ncu", "humming", "gemlite", "train", "step"]  # fmt: skip
    shared = [stage.name for stage in stages if stage.command is None]
    assert set(shared) <= set(headline.STAGES) and names.index("gemm") - names.index("gemv") == 4
    assert "mma_rate_sm_90" in " ".join(stages[0].command)
    assert gpu_run.BUDGET < 10


def test_a_part_of_the_plan(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(Session, "run", lambda session, stages: ran.extend(stage.name for stage in stages))
    arguments = ["run", "--device", "cpu", "--out", str(tmp_path), "--only"]
    result = CliRunner().invoke(gpu_run.main, [*arguments, "kv4, smoke"])
    assert ran == ["smoke", "kv4"], result.output
    result = CliRunner().invoke(gpu_run.main, [*arguments, "kv4,gem"])
    assert result.exit_code == 2 and "'kv4,gem': 'gem' is no stage; there are mma_rate, smoke," in " ".join(
        result.output.replace("│", " ").split()
    )


def test_rows_of_the_headline_stages(tmp_path):
    headline.work(["gemv", "nonsense"], tmp_path / "r", "cpu", variant="a")
    lines, _ = files.read_lines(tmp_path / "r")
    rows = [line for line in lines if line["stage"] == "gemv" and "op" in line]
    assert {(line["op"], line["tokens"]) for line in rows} >= {("linear_w2a4", 1), ("linear_w2a4", 8)}
    assert all(line["correct"] and line["us"] and line["peer_us"] and line["variant"] == "a" for line in rows)
    found = {line["stage"]: line for line in lines if "status" in line}
    assert found["gemv"]["status"] == "ok" and "KeyError" in found["nonsense"]["why"]


def test_a_case_that_raises_is_a_wrong_row(tmp_path):
    run = headline.Run(tmp_path / "r", "cpu", gbps=1.0, stage="s")

    def build():
        raise RuntimeError("cannot\nsecond line")

    run.measure([headline.Case("op", "1x1", 1, "float32", build)])
    ((line,), _) = files.read_lines(tmp_path / "r")
    assert line["correct"] is False and line["error"] == "RuntimeError: cannot"
    assert line["where"][-1].endswith('in build: raise RuntimeError("cannot\\nsecond line")')
    assert "test_gpu_run.py" in summary.failures([line])[0]


def test_a_peer_that_fails_costs_its_own_rows_only(tmp_path, monkeypatch):
    def broken(x, out, group):
        raise ValueError("not on this device")

    monkeypatch.setitem(headline.peers.PROJECTS, "theirs", (broken,))
    headline.project("theirs", headline.Run(tmp_path / "r", "cpu", gbps=1.0, stage="theirs"))
    lines, _ = files.read_lines(tmp_path / "r")
    assert summary.failures(lines) == [] and all(line["us"] for line in lines if "op" in line)
    told = summary.missing(lines, [])
    assert told[0].startswith("theirs on 128x64: ValueError: not on this device, at ") and len(told) == 2


def test_the_copy_is_that_of_mma_rate():
    rate = {"stage": "mma_rate", "copy_gbps": 4195.4}
    copy = row(op="copy", shape="1", cache="cold", gbps=2714.0, us=1.0)
    assert summary.bandwidths([rate, copy]) == [
        "a copy: 2714 GB/s by the benches' kernel, 4195 by mma_rate's"
    ]
    assert summary.bandwidths([rate, {**copy, "gbps": 4100.0}]) == summary.bandwidths([copy]) == []
    gemv = row(op="linear_w2a4", shape="28672x4096", tokens=1, dtype="float16", cache="cold", us=1.0,
               bytes=int(6e7), gbps=2097.7)  # fmt: skip
    share = next(t for t in targets([copy, gemv], 4195.4) if "share" in t.name)
    assert share.measured == 0.5


def test_kernels_stand_beside_their_bytes():
    shape = headline.TINY
    model = headline.packed_llama(shape, 64, "cpu", torch.float32)
    kernels = [{"kernel": "w2a4::cuda::gemv_imma_kernel<1>", "us": 30.0, "calls": 4},
               {"kernel": "gemv_bmma_kernel", "us": 10.0, "calls": 4},
               {"kernel": "merge_kv4_kernel", "us": 2.0, "calls": 2},
               {"kernel": "elsewhere", "us": 1.0, "calls": 1}]  # fmt: skip
    found = timeline.bounded(kernels, shape, 32, model, gbps=1.0)
    packed = sum(p.nbytes for n, p in model.model.layers.named_parameters() if "norm" not in n)
    assert found[0]["bound_us"] + found[1]["bound_us"] == pytest.approx(packed / 1e3)
    assert found[0]["times_bound"] == found[1]["times_bound"] == pytest.approx(40 / (packed / 1e3))
    assert found[2]["bound_us"] == pytest.approx(shape.layers * 128 * 4 / 1e3)
    assert found[3]["bound_us"] is None and found[3]["times_bound"] is None


def test_the_sanitizer_sees_our_kernels_alone():
    stage = plan.sanitizer("racecheck", 50)
    command = stage.command
    assert command[:3] == ("compute-sanitizer", "--tool", "racecheck")
    assert command[command.index("--kernel-name") + 1] == "kns=w2a44cuda"
    assert command[-4:] == ("benchmarks.smoke", "--device", "cuda", "--launches")
    assert stage.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # As a compiler mangles the namespace that every kernel is in.
    bodies = [path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cuh")]
    kernels = [text for text in bodies if "__global__" in text]
    assert kernels and all("namespace w2a4::cuda {" in text for text in kernels)
    profiled = [name for name in plan.PROFILED if any(f"{name}_kernel(" in text for text in kernels)]
    assert profiled == list(plan.PROFILED), "ncu would wait for a kernel that there is not"


def test_the_tests_for_a_gpu_are_found():
    assert set(plan.gpu_tests()) == {f"tests/gpu/test_gpu{name}.py" for name in
                                     ("", "_engine", "_gemm", "_kv4", "_training")}  # fmt: skip


# what is told


def test_the_summary_names_targets_gaps_and_surprises(tmp_path):
    lines = [
        {"stage": "gemv", **row()},
        {"stage": "gemv", **row(shape="8192x28672", ratio=2.0)},
        {"stage": "gemv", **row(shape="8192x28672", ratio=2.1)},
        {"stage": "gemv", "seconds": 3, "status": "ok"},
        {"stage": "engine", "seconds": 90, "status": "stopped", "why": "not done within its 90 s"},
        {"stage": "ncu", "status": "left out", "why": "ncu is not on PATH"},
        {"stage": "tests", "test": "tests/a.py::b", "outcome": "failed", "message": "1 != 2"},
        {"stage": "tests", "test": "tests/a.py::c", "outcome": "passed"},
        {"stage": "smoke", "op": "hadamard", "shape": "64", "tokens": 1, "correct": False, "error": "off"},
    ]
    for line in lines:
        files.append_line(tmp_path / "r", line)
    text = summary.summary(tmp_path / "r")
    found = targets(summary.rows_of(lines))
    wide = next(target for target in found if "8192x28672" in target.name)
    assert wide.measured == 2.1 and wide.met is False, "a row that was measured again counts once"
    assert summary.surprises(lines, found) == [
        "2 wrong, the first: hadamard 64, 1 tokens: off",
        "engine stopped: not done within its 90 s",
        "linear_w2a4 8192x28672 against cuBLAS float16: 2.10, predicted 5 to 5.5",
    ]
    for words in ("ncu (left out: ncu is not on PATH)", "tests: 1 failed, 1 passed", "tests/a.py::b: 1 != 2",
                  "- decoding with llama-2-7b's shape against 16 bits"):  # fmt: skip
        assert words in text
    assert "holds no results" in summary.summary(tmp_path / "none")


def test_what_the_second_command_repeats_and_compares(tmp_path):
    results = tmp_path / "r"
    for name, outcome in (
        ("a.py::x", "failed"),
        ("a.py::y", "passed"),
        ("a.py::z[1]", "timeout"),
        ("a.py::x", "passed"),
    ):
        files.append_line(results, {"test": name, "outcome": outcome})
    assert again.failed_tests(results) == ["a.py::z[1]"]
    stage = again.repeat(["a.py::z[1]"], results)
    assert stage.environment["CUDA_LAUNCH_BLOCKING"] == "1" and f"{ROOT}/a.py::z[1]" in stage.command
    lines = [row(variant=variant, us=us, peer=None) for variant, us in (("a", 4.0), ("b", 3.0), ("a", 2.0))]
    assert again.comparison(lines).split()[-3:] == ["2.00", "3.00", "1.50"]


# what travels


def test_a_payload_comes_together_or_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "PIECE", 4096)
    whole, parts, there = tmp_path / "whole", tmp_path / "parts", tmp_path / "there"
    (whole / "model").mkdir(parents=True)
    (whole / "model/weights").write_bytes(os.urandom(9000))
    parts.mkdir(), there.mkdir()
    made = payload.split(whole, parts)
    assert len(made) > 2 and sorted(path.name for path in parts.iterdir()) == [path.name for path in made]
    for part in made[:-1]:
        for path in part.iterdir():
            (there / path.name).write_bytes(path.read_bytes())
    with pytest.raises(click.ClickException, match=f"payload.{len(made)} of {len(made)} pieces did not come"):
        payload.join(there, tmp_path / "out")
    last = there / f"payload.{len(made)}"
    last.write_bytes(b"other")
    with pytest.raises(click.ClickException, match="not those of one `pack`"):
        payload.join(there, tmp_path / "out")
    last.write_bytes((made[-1] / last.name).read_bytes())
    payload.join(there, tmp_path / "out")
    assert (tmp_path / "out/model/weights").read_bytes() == (whole / "model/weights").read_bytes()


def test_what_does_not_fit_a_call_is_refused(tmp_path, monkeypatch):
    (tmp_path / "w.whl").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(pack, "CALL", pack.SPARE + pack.tree_bytes() + (4 << 20))
    pack.check_size(tmp_path)
    monkeypatch.setattr(pack, "CALL", pack.SPARE + pack.tree_bytes() + (2 << 20))
    with pytest.raises(click.ClickException, match="what a call may carry"):
        pack.check_size(tmp_path)
    monkeypatch.setattr(pack, "COMMAND", 20)
    with pytest.raises(click.ClickException, match="20 can be sent"):
        pack.run_command(tmp_path)


def test_a_folder_is_not_made_over_something_else(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(click.ClickException, match="not made by `gpu_run pack`"):
        pack.begin(tmp_path)
    if (ROOT / ".git").exists():
        with pytest.raises(click.ClickException, match="git does not ignore it"):
            pack.begin(ROOT / "tests/no-such-folder")
    pack.begin(tmp_path / "new")
    pack.begin(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [install.MANIFEST]


def test_a_small_checkpoint_becomes_the_model_that_was_trained(tmp_path):
    shape = dict(dtype=torch.float32, vocab_size=257, hidden_size=64, intermediate_size=128, head_dim=16)
    tiny_llama(**shape).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = w2a4.load_model(tmp_path / "model")
    recipe = w2a4.Recipe.load("w2a4kv4-rcp").override(
        **{"training.init": "lloyd", "calib_samples": 2, "calib_seqlen": 32}
    )
    w2a4.prepare(model, tokenizer, recipe, progress=False)
    with torch.no_grad():  # a step of training
        for linear in fake_quant_linears(model).values():
            linear.weight.mul_(1.1)
            linear.act_clip.mul_(0.9)
    assert small.write(model, recipe, 7, tmp_path) > 0
    want = w2a4.convert(model)
    assert small.restore(str(tmp_path / "model"), tmp_path, tmp_path / "out") == 7
    got, _ = w2a4.load_model(tmp_path / "out")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(got(ids).logits, want(ids).logits)
    (tmp_path / small.NAME.format(1)).unlink()
    with pytest.raises(w2a4.W2A4Error, match="holds nothing, not all"):
        small.restore(str(tmp_path / "model"), tmp_path, tmp_path / "out2")
