"""Two processes that share a training, FSDP2 over gloo: the result of one, resuming, and errors."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.commands import FEW_STEPS, SMALL, save_plain, succeed
from support.paths import ROOT, TESTS
from support.training_runs import Letters, llama, small_recipe, stream
from w2a4.errors import TrainingError
from w2a4.train import run
from w2a4.train.checkpoints import last_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


#: Both ways add the same gradients of the same parts; halving and a sum of two do not depend on the order.
#: The norm that clips them does: it is a sum over parts of parameters, right to some 1e-7 in float32. AdamW
#: divides by gradients as large, so that weights differ by 1e-7 of a step, and losses by less than:
SAME = 1e-5


def start(*command, **variables):
    """A process of `python command` with one thread."""
    path = os.pathsep.join([str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def pair(*command, **variables):
    """Exit codes and stderr of two processes that no launcher ends when one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), **variables}
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [start(*command, RANK=rank, LOCAL_RANK=rank, **both, **meet) for rank in ("0", "1")]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors


def assert_same_model(one, two, ids):
    """Packed models whose losses and logits are equal."""
    reports = [json.loads((path / "report.json").read_text())["training"] for path in (one, two)]
    assert reports[0]["losses"] == pytest.approx(reports[1]["losses"], rel=SAME)
    assert reports[0]["steps"] == reports[1]["steps"] and reports[0]["tokens"] == reports[1]["tokens"]
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (one, two))
    # A code at the border of its cell may turn over: one of many in each row.
    assert (a - b).norm() < 1e-2 * a.norm()


def test_the_command_gives_the_same_with_two_processes(tmp_path):
    plain = save_plain(tmp_path / "plain")
    arguments = ("train", plain, *SMALL, *FEW_STEPS, "--set", "training.micro_batch=1")
    succeed(*arguments, "--out", tmp_path / "one")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    two = start(*launcher, "-m", "w2a4.cli", *arguments, "--out", tmp_path / "two")
    shown, errors = two.communicate(timeout=120)
    assert two.returncode == 0, errors
    assert shown.count(f"written to {tmp_path / 'two'}") == 1 and shown.count("2 steps in") == 1
    assert_same_model(tmp_path / "one", tmp_path / "two", torch.arange(3, 20)[None])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "plain", "two"]


def test_two_processes_stop_together_and_go_on(tmp_path):
    """One process's error in step 3 stops both; a second start ends where one uninterrupted process does."""
    codes, errors = pair("-m", "support.distributed_run", tmp_path, POISON="3")
    assert codes == [1, 1] and all("TrainingError: step 3: the loss is nan" in error for error in errors)
    checkpoints = tmp_path / "work" / "checkpoints"
    assert last_checkpoint(checkpoints).name == "checkpoint-2"
    recipe = small_recipe(steps=4, batch_size=4, micro_batch=2)
    with pytest.raises(TrainingError, match="run with WORLD_SIZE=2, and this one has 1; start 2"):
        run.train(llama(), Letters(), recipe, tmp_path / "work", progress=False)
    codes, errors = pair("-m", "support.distributed_run", tmp_path)
    assert codes == [0, 0], errors
    whole = run.train(llama(), Letters(), recipe, tmp_path / "whole", progress=False)
    whole.save_pretrained(tmp_path / "one")
    assert_same_model(tmp_path / "one", tmp_path / "packed", stream(20)[None])


def test_blocks_are_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="training.route=block runs in one process; there are 2"):
        run.train(llama(), Letters(), small_recipe(route="block"), tmp_path, progress=False)
