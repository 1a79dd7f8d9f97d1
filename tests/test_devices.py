"""Which device a name means, and memory held."""

import subprocess
import sys

import pytest
import torch

from w2a4 import devices
from w2a4.devices import pick_device
from w2a4.errors import W2A4Error


@pytest.fixture
def gpus(monkeypatch):
    """As on a machine with two GPUs."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_a_gpu_if_there_is_one(gpus):
    assert pick_device() == pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")


def test_each_process_has_its_own_gpu(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cuda:0") == torch.device("cuda:0")


def test_else_the_cpu(no_gpu):
    assert pick_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:x", "", "meta"])
def test_no_such_kind(name):
    with pytest.raises(W2A4Error, match=f"device '{name}': give cpu, cuda or cuda:N"):
        pick_device(name)


def test_no_such_gpu(gpus):
    with pytest.raises(W2A4Error, match="device 'cuda:2': torch .* sees 2 GPUs"):
        pick_device("cuda:2")


def test_no_gpu_at_all(no_gpu):
    with pytest.raises(W2A4Error, match="device 'cuda': torch .* sees 0 GPUs"):
        pick_device("cuda")


def test_peak_memory_is_of_this_process_alone():
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    before = devices.peak_memory_mb()
    assert before > block.nbytes / 1e6
    code = "from w2a4.devices import peak_memory_mb; print(peak_memory_mb())"
    # What earlier tests held and freed may hide part of the growth, never more than that.
    grown = torch.ones(int(before) * 2**20, dtype=torch.uint8)
    assert devices.peak_memory_mb() > grown.nbytes / 1e6
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 20 < float(child.stdout) < devices.peak_memory_mb() - 0.5 * grown.nbytes / 1e6
