"""CUDA graphs of what the engine does: a step of decoding, and short prompts, padded to few lengths.

Python launches the ops of a short prompt more slowly than a GPU runs them, those of a step far more slowly.
A graph is launched as one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import W2A4Error
from ..ops import devices
from ..ops.dispatch import DECODE_TOKENS, GEMV_TOKENS

#: Tokens of all prompts together that are read by a graph. The GPU needs longer for more than Python does:
#: 109 ms and 65 for 4096 of Llama-2-7B on an H200; 8.5 and 40 for 128.
MOST_PROMPT_TOKENS = 1024

#: Lengths that prompts are padded to: up to a fourth more tokens, and a third below 64.
PROMPT_SIZES = (
    8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024,
)  # fmt: skip

#: Tokens of all prompts together up to which one kernel serves, and beyond which another does, which may
#: round a token's last bits otherwise: one and two tokens have GEMVs of their own (`gemv_plan.h`); the GEMV
#: and the GEMM share the rest; clusters transform up to 64 tokens (`hadamard_cluster_plan.h`); and 1024 are
#: decoded before (`tiles.py`). All else that depends on the number of tokens, as tiles do, leaves bits alone.
LAST_OF_KERNELS = (1, 2, GEMV_TOKENS, 64, 1023)
#: The same of the tokens of each prompt, in attention.
LAST_OF_ATTENTION = (1, DECODE_TOKENS)


def padded_length(batch: int, tokens: int, capacity: int) -> int | None:
    """Tokens that prompts of so many each are padded to, so that the same kernels serve; None: too many."""
    if batch * tokens > MOST_PROMPT_TOKENS or tokens > capacity:
        return None
    ends = [end // batch for end in (*LAST_OF_KERNELS, MOST_PROMPT_TOKENS)]
    ends += [*PROMPT_SIZES, *LAST_OF_ATTENTION, capacity]
    return min(end for end in ends if end >= tokens)


class Captures:
    """Captures CUDA graphs that share memory, so what one returns is valid until the next replay of any.

    Memory is reused only on the stream that it was made on, so there is one stream.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.stream: Any = None

    def capture(
        self, device: torch.device, run: Callable[[], Tensor], restore: Callable[[], None], what: str
    ) -> tuple[Any, Tensor]:
        """A graph of `run`, not replayed yet, and what it returns; the device is the current one.

        Args:
            restore: called after a first `run` outside of the graph.
            what: is captured, for an error.

        Raises:
            W2A4Error: it cannot be captured.
        """
        if self.pool is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        stream = self.stream
        # Once outside: kernels are loaded and libraries get their workspaces then. It writes what the
        # replay will write.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        restore()
        graph = torch.cuda.CUDAGraph()
        try:
            # Left to itself, torch captures on a stream of the device that was current at its first capture.
            with torch.cuda.graph(graph, pool=self.pool, stream=stream):
                out = run()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise W2A4Error(
                f"{what} cannot be captured as a CUDA graph ({reason}); give Engine(model, cuda_graphs=False)"
            ) from error
        return graph, out


class StepGraphs:
    """A step of decoding as CUDA graphs, each captured when it is first needed.

    How many blocks look at the cache is part of a graph, so there is one for every power of two that bounds
    the lengths; the lengths themselves are read on the device.

    Args:
        step: `(tokens int64 [batch], bound) -> logits`.
        counters: what a step advances, on the device of the model, which need not be the current one.
        batch: sequences.
        capacity: the largest bound.
        captures: shared with other graphs, or None.
    """

    LEAST = 256

    def __init__(
        self,
        step: Callable[[Tensor, int], Tensor],
        counters: list[Tensor],
        batch: int,
        capacity: int,
        captures: Captures | None = None,
    ):
        self.step, self.counters, self.capacity = step, counters, capacity
        self.device, self.captures = counters[0].device, captures or Captures()
        self.tokens = torch.empty(batch, dtype=torch.long, device=self.device)
        self.captured: dict[int, tuple[Any, Tensor]] = {}

    def run(self, tokens: Tensor, length: int) -> Tensor:
        """Logits of the step after which the longest sequence has `length` tokens, valid until the next."""
        bound = min(self.capacity, max(self.LEAST, 1 << (length - 1).bit_length()))
        with devices.current(self.device):
            self.tokens.copy_(tokens)
            if bound not in self.captured:
                self.captured[bound] = self.capture(bound)
            graph, logits = self.captured[bound]
            graph.replay()
        return logits

    def capture(self, bound: int) -> tuple[Any, Tensor]:
        """A graph of the step, which is not run, and its logits; the device of the model is current."""
        before = [counter.clone() for counter in self.counters]

        def restore() -> None:
            for counter, value in zip(self.counters, before, strict=True):
                counter.copy_(value)

        run = functools.partial(self.step, self.tokens, bound)
        return self.captures.capture(self.device, run, restore, "a step of decoding")


class PromptGraphs:
    """Short prompts of one length as CUDA graphs, one for every length that they are padded to.

    Each is captured when such prompts come a second time, so that a single one is not made slower. Padding
    is on the right: no token sees what is behind it, so the others have the bits that they have without.

    Args:
        read: `(ids int64 [batch, tokens], last int64 [1]) -> logits` after token `last`, of prompts in place
            of what was there before.
        batch: prompts.
        capacity: tokens of the cache.
        device: of the model, which need not be the current one.
        captures: shared with other graphs.
    """

    def __init__(
        self,
        read: Callable[[Tensor, Tensor], Tensor],
        batch: int,
        capacity: int,
        device: torch.device,
        captures: Captures,
    ):
        self.read, self.batch, self.capacity = read, batch, capacity
        self.device, self.captures = device, captures
        self.last = torch.zeros(1, dtype=torch.long, device=device)
        self.met: set[int] = set()
        self.captured: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def run(self, ids: Tensor) -> Tensor | None:
        """Logits `[batch, vocabulary]` after prompts `[batch, tokens]`; None if no graph is to read them."""
        tokens = ids.shape[1]
        size = padded_length(self.batch, tokens, self.capacity)
        if size is None or size not in self.met:
            self.met.update([] if size is None else [size])
            return None
        with devices.current(self.device):
            self.last.fill_(tokens - 1)
            padded = torch.nn.functional.pad(ids, (0, size - tokens))
            if size in self.captured:
                graph, place, logits = self.captured[size]
                place.copy_(padded)
            else:
                try:
                    graph, logits = self.capture(padded)
                except W2A4Error as error:
                    self.capacity = 0  # of graphs, from now on
                    warnings.warn(f"prompts are read without CUDA graphs, and slower: {error}", stacklevel=2)
                    return None
                self.captured[size] = graph, padded, logits
            graph.replay()
            return logits.clone()  # steps write where it lies

    def capture(self, ids: Tensor) -> tuple[Any, Tensor]:
        """A graph that reads prompts, and its logits; the device of the model is current."""
        run = functools.partial(self.read, ids, self.last)
        return self.captures.capture(self.device, run, lambda: None, "reading a prompt")
