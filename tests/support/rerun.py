"""In place of CUDA graphs, where there is no GPU: does again what was captured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from w2a4.runtime.graphs import PromptGraphs, StepGraphs


class Rerun:
    """Leaves what comes out where it was at first, as a graph does."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run, self.out = run, run()

    def replay(self) -> None:
        self.out.copy_(self.run())


def rerun_graphs(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Bounds of steps and lengths of prompts that are captured from here on."""
    bounds, lengths = [], []

    def capture_step(graphs: StepGraphs, bound: int) -> tuple[Rerun, Tensor]:
        bounds.append(bound)
        graph = Rerun(lambda: graphs.step(graphs.tokens, bound))
        for counter in graphs.counters:
            counter -= 1
        return graph, graph.out

    def capture_prompt(graphs: PromptGraphs, ids: Tensor) -> tuple[Rerun, Tensor]:
        lengths.append(ids.shape[1])
        graph = Rerun(lambda: graphs.read(ids, graphs.last))
        return graph, graph.out

    monkeypatch.setattr(StepGraphs, "capture", capture_step)
    monkeypatch.setattr(PromptGraphs, "capture", capture_prompt)
    return bounds, lengths
