"""benchmarks.gpu_train and the stages it shares with gpu_suite: repetition, and a rehearsal on the CPU."""

import json
import sys

import click
import pytest
import torch
from click.testing import CliRunner
from test_benchmarks import row
from tiny_llama import tiny_llama

from benchmarks import gpu_suite, gpu_train, stages
from benchmarks.tiny_llama import byte_tokenizer
from w2a4.cli import main as w2a4

SMALL = [
    word
    for setting in (
        "training.steps=2", "training.batch_size=2", "training.seqlen=32", "training.data=builtin",
        "training.init=lloyd", "calib_samples=2", "calib_seqlen=32", "gptq_refine=0",
    )
    for word in ("--set", setting)
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "PARTS", tmp_path)
    monkeypatch.setattr(stages, "POLL", 0.1)
    monkeypatch.setattr(gpu_train, "TRAINED", tmp_path / "trained")
    monkeypatch.setattr(gpu_train, "FITTED", tmp_path / "gptq")
    return tmp_path


def python(name, code, budget, **rest):
    return stages.Stage(name, (sys.executable, "-c", code), budget, **rest)


def test_a_stage_that_overruns_is_stopped_and_what_it_wrote_stays(folder):
    part = folder / "slow.json"
    content = json.dumps({"rows": [row()]})
    code = f"import time; open({str(part)!r}, 'w').write({content!r}); time.sleep(60)"
    plan = [python("slow", code, 1, part=part), stages.Stage("absent", ("no-such-program",), 1)]
    looks = []
    outcomes = stages.run(plan, lambda so_far: looks.append(len(so_far)))
    assert [outcome.status for outcome in outcomes] == ["stopped", "failed"] and looks.count(1) > 1
    result = gpu_suite.merged(outcomes, plan)
    assert result["rows"] == [row()] and "all 1 rows are correct" in gpu_suite.summary(result)


def test_a_repeated_command_skips_goes_on_or_begins_anew(folder):
    plan = []
    for repeated in ("skip", "go on", "anew"):
        part = folder / f"{repeated}.json"
        part.write_text("1")
        code = f"from pathlib import Path; p = Path({str(part)!r}); p.write_text('2' if p.exists() else '3')"
        plan.append(python(repeated, code, 20, part=part, repeated=repeated))
    outcomes = stages.run(plan, len)
    assert [outcome.status for outcome in outcomes] == ["skipped", "ok", "ok"]
    assert [stage.part.read_text() for stage in plan] == ["1", "2", "3"]


def test_all_share_a_limit_and_nothing_follows_what_was_needed(folder):
    slow = python("slow", "import time; time.sleep(60)", 60, needed=True)
    outcomes = stages.run([slow, python("next", "", 60)], len, limit=0.5)
    assert [(outcome.name, outcome.status) for outcome in outcomes] == [("slow", "stopped")]


def test_a_run_is_rehearsed_on_the_cpu(folder):
    """Its stages that are commands of w2a4, in this process."""
    tiny_llama(dtype=torch.float32, vocab_size=257, hidden_size=64, intermediate_size=128,
               head_dim=16).save_pretrained(folder / "model")  # fmt: skip
    byte_tokenizer().save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text("Numbers are written in the decimal system. " * 60)
    plan = gpu_train.training(str(folder / "model"), str(text), "cpu", SMALL)
    ours, last = [stage for stage in plan if "w2a4.cli" in stage.command], plan[-1]
    assert ours == plan[:-1] and "benchmarks.bench_training" in last.command
    for stage in ours:
        done = CliRunner().invoke(w2a4, list(stage.command[3:]))
        assert done.exit_code == 0, (stage.name, done.output, done.stderr)
    outcomes = [stages.Outcome(stage.name, stage.shown(), "ok", 1.0) for stage in plan]
    result = gpu_train.merged(outcomes, plan)
    assert [step for step, _ in result["parts"]["train"]["training"]["perplexities"]] == [0, 1, 2]
    shown = gpu_train.summary(result)
    for words in ("train, perplexity before", "train, perplexity after", "gptq, perplexity after",
                  "full_on_text", "gptq_writes: Python is", "trained_writes: Python is"):  # fmt: skip
        assert words in shown


def test_comparisons_read_the_beginning_of_what_the_teacher_wrote(folder):
    plan = gpu_train.comparisons("model", "cuda", SMALL, ablations=True, rotations=True)
    assert [stage.name for stage in plan] == ["ablations", "hadamard", "learned"]
    assert f"training.data={gpu_train.SHORT}" in plan[0].command and plan[0].repeated == "go on"
    with pytest.raises(click.ClickException, match="run this first without --ablations"):
        gpu_train.shorten(folder / "none", folder / "short")
    written = folder / "written"
    written.write_text("".join(f"{line}\n" for line in range(gpu_train.DOCUMENTS + 5)))
    gpu_train.shorten(written, folder / "short")
    assert len((folder / "short").read_text().splitlines()) == gpu_train.DOCUMENTS


def test_it_answers_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def answer(*arguments):
        return CliRunner().invoke(gpu_train.main, ["model", *arguments])

    assert "--json FILE is missing" in answer().output
    done = answer("--json", "x.json")
    assert done.exit_code == 1 and "torch" in done.output and "sees 0 GPUs" in done.output
    assert "w2a4kv4-rcp" in answer("--dry-run").output
    assert "--grid rotations" in answer("--dry-run", "--rotations").output
