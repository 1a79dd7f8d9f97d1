"""How long a call takes: the clock, the copies of data that keep it out of a cache, the medians.

On the CPU, calls of ours and of the peers take turns, and each sample is long enough for the clock. On
CUDA each workload is captured once in a graph of many launches, and the graphs take turns.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle as cycle_of
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Cold data is spread over so many times the last-level cache.
COLD_FACTOR = 5
#: Samples of which the median is taken; on the CPU as many of them as fit the time, and five at least.
REPEATS, LEAST_REPEATS = 20, 5
#: Launches in one CUDA graph: so many of what is short, and at least a few of what is long, so that it takes
#: some GRAPH_MS. All copies of cold data are in it in any case.
LAUNCHES, LEAST_LAUNCHES, GRAPH_MS = 64, 8, 15.0
#: Shortest sample on the CPU, in seconds: far above the clock's resolution.
SAMPLE_SECONDS = 1e-3
#: Bytes that all copies together may fill on the CPU, and how many of one workload there may be. On a GPU
#: each is a launch in a graph: thousands take seconds to capture, and of a peer in many ops many seconds.
MAX_BYTES = 6 << 30
MAX_COPIES = {"cpu": 8192, "cuda": 1024}
#: Samples are called noisy where the middle half of them spreads by more than this factor.
NOISY = 1.5


class Copies:
    """The same data as often as wanted, each time at another address.

    Args:
        items: what a call gets: tensors, or objects that hold them.
        bytes: of one copy; by default that of the tensors in `items`.
    """

    def __init__(self, *items: Any, bytes: int | None = None) -> None:
        self.bytes = tensor_bytes(*items) if bytes is None else bytes
        self._copies = [items]

    def take(self, count: int) -> list[tuple]:
        """The first `count` copies; they are kept."""
        while len(self._copies) < count:
            self._copies.append(copy.deepcopy(self._copies[0]))
        return self._copies[:count]


@dataclass
class Workload:
    """`call(*copy)` is what is timed, one copy of `data` after another."""

    name: str
    call: Callable[..., object]
    data: Copies

    def calls(self, count: int) -> list[Callable[[], object]]:
        return [partial(self.call, *items) for items in self.data.take(count)]


def copies_on(device: str, bytes: int) -> list[Workload]:
    """Ways to copy that read and write so many bytes in all, of the same data; on a GPU those of kernels.

    There `copy_` is a memcpy, which in a CUDA graph reaches only two thirds of what a kernel does.
    """
    if device == "cpu":
        source = torch.empty(max(bytes // 2, 1), dtype=torch.uint8).random_()
        return [Workload("copy", torch.Tensor.copy_, Copies(torch.zeros_like(source), source))]
    source = torch.empty(-(-bytes // 32), 4, dtype=torch.int32, device=device).random_()
    target = torch.zeros_like(source)
    kinds = [(target, source), (target.view(torch.int64), source.view(torch.int64))]
    return [Workload("copy", _copy_by_kernel, Copies(*pair)) for pair in kinds]


def _copy_by_kernel(target: torch.Tensor, source: torch.Tensor) -> None:
    """Elementwise, in vectors of 16 bytes."""
    torch.add(source, 0, out=target)


def tensor_bytes(*items: Any) -> int:
    """Bytes of the tensors among these."""
    return sum(item.numel() * item.element_size() for item in items if isinstance(item, torch.Tensor))


@cache
def last_level_cache(device: str) -> int:
    """Bytes of the CPU's largest cache as Linux tells it (32 MB where it does not), or of the GPU's L2."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [_bytes_of(file) for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 << 20)


def _bytes_of(file: Path) -> int:
    text = file.read_text().strip()
    return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]] if text[-1].isalpha() else int(text)


def copies_for(
    bytes: int, cache_bytes: int, max_bytes: int = MAX_BYTES, device: str = "cpu"
) -> tuple[int, bool]:
    """How many copies fill `COLD_FACTOR` caches, and whether a limit made them fewer."""
    wanted = math.ceil(COLD_FACTOR * cache_bytes / max(bytes, 1))
    allowed = min(max_bytes // max(bytes, 1), MAX_COPIES[device])
    return max(min(wanted, allowed), 1), wanted > max(allowed, 1)


def can_be_cold(bytes: int, device: str) -> bool:
    """Is this more than what always stays in a cache, e.g. the activations of one token?"""
    return bytes * MAX_COPIES[device] >= COLD_FACTOR * last_level_cache(device)


class Times(NamedTuple):
    """Median microseconds a call of each workload, of so many samples, and what to know about them."""

    us: list[float]
    repeats: int
    note: str | None


def median_us(workloads: list[Workload], device: str, cold: bool, seconds: float = math.inf) -> Times:
    """Time workloads that take turns, on the CPU for about so many seconds."""
    budget = _memory_budget(device) // len(workloads)
    counts = [copies_for(w.data.bytes, last_level_cache(device), budget, device) for w in workloads]
    calls = [w.calls(count if cold else 1) for w, (count, _) in zip(workloads, counts, strict=True)]
    samples = _cuda_us(calls) if device == "cuda" else _cpu_us(calls, not cold, seconds)
    notes = []
    if cold and any(capped for _, capped in counts):
        notes.append(f"at the limit of memory: less than {COLD_FACTOR} caches of data")
    if any(_is_noisy(sample) for sample in samples):
        notes.append(f"noisy: the middle half of the samples spreads by more than {NOISY} times")
    return Times([statistics.median(sample) for sample in samples], len(samples[0]), "; ".join(notes) or None)


def _is_noisy(sample: list[float]) -> bool:
    first, _, third = statistics.quantiles(sample, n=4)
    return third > NOISY * first


def _memory_budget(device: str) -> int:
    if device == "cuda":
        return min(2 * MAX_BYTES, torch.cuda.mem_get_info()[0] // 2)
    memory = Path("/proc/meminfo")
    available = [line for line in memory.read_text().splitlines() if line.startswith("MemAvailable")] \
        if memory.exists() else []  # fmt: skip
    return min(MAX_BYTES, int(available[0].split()[1]) * 1024 // 2) if available else MAX_BYTES


def _cpu_us(calls: list[list[Callable]], warm: bool, seconds: float) -> list[list[float]]:
    """As many samples of each; the workloads take turns, so that a slow spell hits all of them."""
    streams = [cycle_of(copies) for copies in calls]
    inner = [_calls_a_sample(stream) for stream in streams]
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    for repeat in range(REPEATS):
        if repeat >= LEAST_REPEATS and time.perf_counter() > end:
            break
        for stream, count, sample in zip(streams, inner, samples, strict=True):
            if warm:
                next(stream)()  # the workload before this one took the cache
            batch = list(islice(stream, count))
            start = time.perf_counter()
            for call in batch:
                call()
            sample.append((time.perf_counter() - start) / count * 1e6)
    return samples


def _calls_a_sample(stream) -> int:
    """Calls that fill `SAMPLE_SECONDS`, from the second of two unless the first is far longer."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        next(stream)()
        seconds = time.perf_counter() - start
        if seconds > 20 * SAMPLE_SECONDS:
            break
    return max(1, min(1000, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))


def _cuda_us(calls: list[list[Callable]]) -> list[list[float]]:
    launches = [max(_launches(copies[0]), len(copies)) for copies in calls]
    graphs = [_capture(copies, count) for copies, count in zip(calls, launches, strict=True)]
    samples: list[list[float]] = [[] for _ in calls]
    for repeat in range(REPEATS + 2):  # the first two only warm up
        for graph, count, sample in zip(graphs, launches, samples, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if repeat >= 2:
                sample.append(start.elapsed_time(stop) / count * 1e3)
    return samples


def _launches(call: Callable) -> int:
    """How many of a call fill a graph; the first one compiles and tunes, the second is timed."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return min(LAUNCHES, max(LEAST_LAUNCHES, math.ceil(GRAPH_MS / max(start.elapsed_time(stop), 1e-3))))


def _capture(copies: list[Callable], launches: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls. Handles, work spaces and tuned kernels are made before it is captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in copies[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle_of(copies), launches):
            call()
    return graph
