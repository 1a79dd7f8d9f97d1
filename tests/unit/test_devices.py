"""Which device a name means, and memory held."""

import re
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from support.paths import CSRC
from w2a4.errors import W2A4Error
from w2a4.ops import devices
from w2a4.ops.devices import pick_device
from w2a4.runtime.graphs import StepGraphs


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
    code = "from w2a4.ops.devices import peak_memory_mb; print(peak_memory_mb())"
    # What earlier tests held and freed may hide part of the growth, never more than that.
    grown = torch.ones(int(before) * 2**20, dtype=torch.uint8)
    assert devices.peak_memory_mb() > grown.nbytes / 1e6
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 20 < float(child.stdout) < devices.peak_memory_mb() - 0.5 * grown.nbytes / 1e6


class Recorder:
    """In place of torch's streams and graphs on a machine with two GPUs: which device each went to."""

    def __init__(self, monkeypatch):
        self.current, self.calls = 0, []
        for name in ("Stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, self.maker(name))
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "device", self.on)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.on(stream.index))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

    def index(self, device) -> int:
        device = torch.device("cuda", device) if isinstance(device, int) else device
        return self.current if device is None or device.index is None else device.index

    def maker(self, name):
        def make(device=None):
            made = SimpleNamespace(index=self.index(device), wait_stream=self.wait)
            made.replay = lambda: self.calls.append(("replay", self.current))
            self.calls.append((name, made.index))
            return made

        return make

    def wait(self, stream):
        self.calls.append(("wait", stream.index))

    def current_stream(self, device=None):
        return SimpleNamespace(index=self.index(device), wait_stream=self.wait)

    @contextmanager
    def on(self, device):
        before, self.current = self.current, self.index(device)
        yield
        self.current = before

    @contextmanager
    def graph(self, graph, pool, stream):
        self.calls.append(("capture", stream.index))
        with self.on(stream.index):
            yield


@pytest.mark.parametrize("index", [0, 1])
def test_graphs_are_of_the_device_of_the_model(index, monkeypatch):
    """Whichever is current: torch's streams, and the graph that is captured on one, are of that otherwise."""
    record, steps = Recorder(monkeypatch), []

    def step(tokens, bound):
        steps.append((record.current, tokens.tolist(), bound))
        return tokens + 1

    graphs = StepGraphs(step, [torch.zeros(2)], batch=2, capacity=512)
    graphs.device = torch.device("cuda", index)
    assert graphs.run(torch.tensor([5, 6]), 9).tolist() == [6, 7]
    assert steps == [(index, [5, 6], 256)] * 2, "once outside, once in the capture"
    kinds = [kind for kind, _ in record.calls]
    assert {where for _, where in record.calls} == {index} and record.current == 0
    assert kinds == ["Stream", "wait", "wait", "CUDAGraph", "capture", "replay"]
    graphs.run(torch.tensor([7, 8]), 10)
    assert record.calls[6:] == [("replay", index)] and len(steps) == 2


def test_every_launcher_takes_its_device_from_a_tensor():
    """What the CUDA runtime takes for the current device is asked nowhere but where it is set."""
    ops = re.findall(r"(\w+)\(const \w+Params& p\);", (CSRC / "cuda/kernels.h").read_text())
    assert len(ops) == 8
    entries = "".join(path.read_text() for path in CSRC.glob("entry_*.cpp"))
    for op in ops:
        calls = re.findall(rf"[^\n]*\n[^\n]*kernels::{op}\(p\)", entries)
        assert calls, op
    for name in ("entry_a4.cpp", "entry_kv4.cpp", "entry_w8.cpp"):
        body = (CSRC / name).read_text()
        guards = re.findall(r"const OnDeviceOf device\(\w+\);", body)
        assert len(guards) == body.count("p.device = device.index;") > 0, name
        # The device is in the parameters before a kernel sees them.
        for before in re.split(r"const OnDeviceOf device\(\w+\);", body)[1:]:
            assert before.index("p.device = device.index;") < before.index("kernels::"), name
    for path in CSRC.glob("cuda/*.cu"):
        text = path.read_text()
        assert re.search(r"use_device\((plan\.args\.)?p\.device\)", text), path.name
        launches = re.findall(r"\blaunch<[^;]*?>\(([^;]*);", text)
        assert launches and all(re.match(r'(name|"\w+"), device,', launch) for launch in launches), path.name
    asked = {path.name for path in CSRC.rglob("*.*") if "cudaGetDevice(" in path.read_text()}
    assert asked == {"runtime.cpp"}
