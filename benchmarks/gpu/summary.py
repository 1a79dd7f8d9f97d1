"""What a run came to: its stages, the targets, what is missing, and what surprises most. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.files import read_lines
from benchmarks.targets import Target, known_copy, targets

Line = dict[str, Any]
#: Surprises that are told.
MOST = 3
#: Two ways to measure the bandwidth of a copy give the same but for this share.
COPIES_AGREE = 0.07


def rows_of(lines: list[Line]) -> list[Line]:
    """Measurements among the lines, as in the benchmarks' JSON.

    Of what was repeated the last one counts, and ours alone only where no peer came to stand beside it.
    """
    found: dict[tuple, Line] = {}
    for line in lines:
        if "op" in line and "us" in line and "bytes" in line:
            case = tuple(line.get(name) for name in ("op", "shape", "tokens", "dtype", "cache", "context"))
            found[(*case, line.get("peer"))] = line
    beside = {tuple(case) for *case, peer in found if peer is not None}
    return [line for (*case, peer), line in found.items() if peer is not None or tuple(case) not in beside]


def statuses(lines: list[Line]) -> dict[str, Line]:
    """The last status of each stage."""
    return {line["stage"]: line for line in lines if "status" in line}


def failures(lines: list[Line]) -> list[str]:
    """What was wrong: rows, smoke cases and tests that are not right, by name."""
    wrong = [
        f"{line['op']} {line['shape']}, {line['tokens']} tokens: {line.get('error') or 'a wrong result'}"
        f"{place(line)}"
        for line in lines
        if line.get("correct") is False and "op" in line
    ]
    tests = [
        f"{line['test']}: {line.get('message') or line['outcome']}"
        for line in lines
        if "test" in line and line.get("outcome") not in ("passed", "skipped")
    ]
    layouts = [
        f"the fragment of {name} does not lie as documented"
        for line in lines
        for name, holds in line.get("layouts", {}).items()
        if not holds
    ]
    return [*layouts, *bandwidths(lines), *dict.fromkeys(wrong), *dict.fromkeys(tests)]


def bandwidths(lines: list[Line]) -> list[str]:
    """Nothing, or that the copy which every bound comes from is not the one that `mma_rate` measured."""
    known = known_copy(lines)
    copies = [line["gbps"] for line in lines if line.get("op") == "copy" and line.get("gbps")]
    if known is None or not copies or abs(max(copies) / known - 1) <= COPIES_AGREE:
        return []
    return [f"a copy: {max(copies):.0f} GB/s by the benches' kernel, {known:.0f} by mma_rate's"]


def surprises(lines: list[Line], found: list[Target]) -> list[str]:
    """What nobody expected, the largest first: wrong results, broken stages, figures off their prediction."""
    wrong = failures(lines)
    told = [f"{len(wrong)} wrong, the first: {wrong[0]}"] if wrong else []
    told += [
        f"{name} {line['status']}: {line.get('why', '')}"
        for name, line in statuses(lines).items()
        if line["status"] in ("died", "stopped")
    ]
    off = sorted(
        ((distance(target), target) for target in found if distance(target) > 0), key=lambda pair: -pair[0]
    )
    told += [
        f"{target.name}: {target.measured:.2f}, predicted {target.predicted[0]:g} to {target.predicted[1]:g}"
        for _, target in off
    ]
    return told[:MOST]


def distance(target: Target) -> float:
    """How far, as a logarithm, a figure is from the range that was predicted."""
    if target.predicted is None or not target.measured:
        return 0.0
    low, high = target.predicted
    return max(math.log(low / target.measured), math.log(target.measured / high), 0.0)


def place(line: Line) -> str:
    """Where what is told of was raised, if that is known."""
    return f", at {' > '.join(line['where'][-3:])}" if line.get("where") else ""


def missing(lines: list[Line], found: list[Target]) -> list[str]:
    """Stages that gave nothing or not all, and targets that no row tells."""
    out = [
        f"{name} ({line['status']}{': ' + line['why'] if line.get('why') else ''}{place(line)})"
        for name, line in statuses(lines).items()
        if line["status"] != "ok"
    ]
    out += [f"{line['peer']} on {line['shape']}: {line['peer_error']}{place(line)}"
            for line in lines if line.get("peer_error")]  # fmt: skip
    return out + [target.name for target in found if target.measured is None]


def summary(results: Path) -> str:
    """Everything, for people."""
    lines, _ = read_lines(results)
    if not lines:
        return f"{results} holds no results"
    found = targets(rows_of(lines), known_copy(lines))
    stages = [(name, line["status"], line.get("seconds", ""), line.get("why", "")[:80])
              for name, line in statuses(lines).items()]  # fmt: skip
    met = {None: "not measured", True: "yes", False: "NO"}
    shown = [
        (
            t.name,
            t.wanted,
            t.measured,
            f"{t.predicted[0]:g} to {t.predicted[1]:g}" if t.predicted else "",
            met[t.met],
        )
        for t in found
    ]
    outcomes = Counter(line["outcome"] for line in lines if "test" in line)
    parts = [
        tabulate(stages, ("stage", "status", "seconds", "why"), disable_numparse=True),
        tabulate(shown, ("target", "wanted", "measured", "predicted", "met"), floatfmt=".2f"),
        "tests: " + (", ".join(f"{count} {name}" for name, count in outcomes.items()) or "none ran"),
        listed("Missing", missing(lines, found)),
        listed("Wrong", failures(lines)[:20]),
        listed("Largest surprises", surprises(lines, found)),
    ]
    return "\n\n".join(part for part in parts if part)


def trained(lines: list[Line]) -> str:
    """What training came to: perplexities by text and state, steps, and what the model writes."""
    found = {
        (line["text"], line["state"]): line["perplexity"] for line in lines if line.get("op") == "perplexity"
    }
    states = list(dict.fromkeys(state for _, state in found))
    rows = [
        (text, *(found.get((text, state)) for state in states)) for text in dict.fromkeys(t for t, _ in found)
    ]
    parts = [tabulate(rows, ("perplexity on", *states), floatfmt=".2f")]
    for line in lines:
        if line.get("op") == "trained":
            rate = line["tokens"] / line["seconds"]
            parts.append(f"{line['steps']} steps, {line['tokens']} tokens, {rate:,.0f} a second")
        if line.get("op") == "writes":
            parts.append(f"{line['state']}: {line['prompt']}{line['text']}")
    return "\n\n".join([*parts, listed("Not done", missing(lines, []))])


def listed(title: str, items: list[str]) -> str:
    return f"{title}:\n" + "\n".join(f"- {item}" for item in items or ["none"])
