"""More prompts than are continued side by side: where a sequence ends, the next prompt takes its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from .constraints import Constraints
from .sequences import PackedSequences

#: `(logits [rows, vocabulary], rules of these rows) -> tokens int64 [rows]`.
Pick = Callable[[Tensor, Constraints], Tensor]


def continued(
    model: Any, sequences: PackedSequences, rows: list[Tensor], count: int, stops: Collection[int], pick: Pick
) -> Iterator[tuple[int, int]]:
    """Tokens of all prompts as they come: (prompt index, token).

    A sequence that ends makes room at once, between two steps. When no prompt waits, those left go on alone.

    Args:
        sequences: of the first `sequences.batch` prompts, which have been read; for which `renews` holds.
        rows: all prompts, int64 `[n]` each.
        count: tokens of each, at most; a token of `stops` ends it before.
    """
    places, waiting = [*range(sequences.batch)], deque(range(sequences.batch, len(rows)))
    rules = Constraints(model, rows[: sequences.batch], stops)
    had = [0] * len(rows)

    def ends(index: int, token: int) -> bool:
        had[index] += 1
        return token in stops or had[index] >= count

    tokens = pick(sequences.logits, rules).tolist()
    while True:
        yield from zip(places, tokens, strict=True)
        ended = [ends(*pair) for pair in zip(places, tokens, strict=True)]
        for place in reversed([i for i, over in enumerate(ended) if over]):
            while waiting:
                index = waiting.popleft()
                own = Constraints(model, [rows[index]], stops)
                (token,) = pick(sequences.renew(place, rows[index]), own).tolist()
                yield index, token
                if not ends(index, token):
                    places[place], tokens[place] = index, token
                    rules.put(place, own)
                    break
            else:
                sequences.drop(place)
                rules.drop(place)
                for each in (places, tokens):  # the last one moves there
                    each[place] = each[-1]
                    each.pop()
        if not places:
            return
        sequences.advance(torch.tensor(tokens, device=sequences.lengths.device))
        tokens = pick(sequences.logits, rules).tolist()
