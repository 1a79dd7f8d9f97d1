"""What the kernels are to reach on an H200, held against measured rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: Least ratio to cuBLAS float16 of linear_w2a4: one token, cold, in a graph.
GEMV_RATIOS = {
    "4096x4096": 2.7,
    "4096x11008": 4.2,
    "11008x4096": 4.2,
    "14336x4096": 4.7,
    "28672x4096": 5.4,
    "8192x28672": 6.0,
}
#: What is expected of them as the kernels stand.
GEMV_PREDICTED = {
    "4096x4096": (2.5, 3.0),
    "4096x11008": (3.8, 4.2),
    "11008x4096": (3.8, 4.2),
    "14336x4096": (3.7, 4.1),
    "28672x4096": (4.3, 5.0),
    "8192x28672": (5.0, 5.5),
}


@dataclass
class Target:
    """A target; `measured` and `met` are None if no row tells.

    Attributes:
        predicted: the range that arithmetic on machine code gave before anything was measured, if any.
    """

    name: str
    wanted: str
    measured: float | None
    met: bool | None
    predicted: tuple[float, float] | None = None


Range = tuple[float, float]


def at_least(name: str, bound: float, values: Iterable[float], predicted: Range | None = None) -> Target:
    """Met if the smallest of the values is not below the bound."""
    worst = min(values, default=None)
    return Target(name, f">= {bound:g}", worst, None if worst is None else worst >= bound, predicted)


def at_most(name: str, bound: float, values: Iterable[float], predicted: Range | None = None) -> Target:
    """Met if the largest of the values is not above the bound."""
    worst = max(values, default=None)
    return Target(name, f"<= {bound:g}", worst, None if worst is None else worst <= bound, predicted)


def known_copy(lines: list[dict]) -> float | None:
    """GB/s of a copy by `mma_rate`'s own kernel, if that ran before."""
    return max((line["copy_gbps"] for line in lines if line.get("copy_gbps")), default=None)


def targets(rows: list[dict], copy_gbps: float | None = None) -> list[Target]:
    """Every target that the benchmarks' rows can tell; only cold rows count, and only correct ones.

    Args:
        copy_gbps: what else is known of the bandwidth of a copy, see `known_copy`.
    """
    good = [row for row in rows if row["correct"] and row["us"] and row["cache"] == "cold"]
    gemv = [row for row in good if row["op"] == "linear_w2a4" and row["dtype"] == "float16"]
    one = [row for row in gemv if row["tokens"] == 1]
    copies = [row["gbps"] for row in good if row["op"] == "copy"] + [copy_gbps] * (copy_gbps is not None)
    return [
        *(
            at_least(f"linear_w2a4 {shape} against cuBLAS float16", ratio,
                     [r["ratio"] for r in one if r["shape"] == shape and r["peer"] == "cublas.float16"],
                     GEMV_PREDICTED[shape])
            for shape, ratio in GEMV_RATIOS.items()
        ),
        at_least("linear_w2a4 of 50 MB and more, share of the copy's bandwidth", 0.75,
                 [r["gbps"] / max(copies) for r in one if r["bytes"] >= 50e6 and copies]),
        at_most("linear_w2a4, time of 8 tokens over time of 1", 1.25, _against(gemv, one, tokens=8),
                (1.3, 1.45)),
        at_most("hadamard of 16 MB and more, time over that of a copy", 1.15,
                [1 / r["ratio"] for r in good
                 if r["op"] == "hadamard" and r["peer"] == "copy" and r["bytes"] >= 16 << 20], (1.5, 2.0)),
        at_most("hadamard_a4, time over that of hadamard", 1.0, _fused_over_plain(rows)),
        at_least("attention_kv4 of 32768 keys against SDPA float16", 2.5,
                 [r["ratio"] for r in good if r["op"] == "attention_kv4"
                  and r["shape"].endswith("x32768") and r["peer"] == "sdpa.float16"], (2.0, 2.6)),
        at_least("linear of 2048 tokens and more against cuBLAS bfloat16", 1.3,
                 [r["ratio"] for r in good if r["op"] in ("linear_w2a4", "linear_w4a4")
                  and r["tokens"] >= 2048 and r["peer"] == "cublas.bfloat16"], (0.65, 0.8)),
        at_least("linear of 2048 tokens and more against torch._int_mm", 1.0,
                 [r["ratio"] for r in good if r["op"] in ("linear_w2a4", "linear_w4a4")
                  and r["tokens"] >= 2048 and r["peer"] == "torch._int_mm"]),
        at_least("decoding with llama-2-7b's shape against 16 bits", 3.0,
                 [r["ratio"] for r in good if _is_7b(r) and r["tokens"] == 1 and r["ratio"]], (2.3, 2.7)),
        at_most("peak memory with it at 4k context, of 16 bits'", 0.22,
                [r["peak_bytes"] / r["peer_peak_bytes"] for r in good
                 if _is_7b(r) and r["context"] == 4096 and r["peak_bytes"] and r["peer_peak_bytes"]]),
        *(
            at_least(f"linear_w2a4 at one token against {peer}", 1.0,
                     [r["ratio"] for r in one if r["peer"] == peer])
            for peer in ("humming.w2a16", "humming.w2a8", "gemlite.a16w2")
        ),
        at_most("linear of 1 to 64 tokens, time over that of the next whole tile", 1.15, _cliffs(good)),
    ]  # fmt: skip


def _is_7b(row: dict) -> bool:
    return row["op"] == "decode" and row["shape"] == "llama-2-7b"


def _against(many: list[dict], one: list[dict], tokens: int) -> list[float]:
    """Times of so many tokens over the time of one, by shape."""
    single = {row["shape"]: row["us"] for row in one}
    return [r["us"] / single[r["shape"]] for r in many if r["tokens"] == tokens and r["shape"] in single]


#: Tokens of the smallest tile: fewer are computed as if they were so many.
TILE = 8


def _cliffs(rows: list[dict]) -> list[float]:
    """Times of M tokens over those of M + 1 rounded up to a whole tile, which does more work."""
    linears = [row for row in rows if row["op"] in ("linear_w2a4", "linear_w4a4")]
    us = {(row["op"], row["shape"], row["dtype"], row["tokens"]): row["us"] for row in linears}
    above = {key: (*key[:-1], (key[-1] // TILE + 1) * TILE) for key in us if key[-1] <= 64}
    return [us[key] / us[next_tile] for key, next_tile in above.items() if next_tile in us]


def _fused_over_plain(rows: list[dict]) -> list[float]:
    """Of the same width, tokens, dtype and cache, hot ones too: one token is never cold."""
    plain = {_case(row): row["us"] for row in rows if row["op"] == "hadamard" and row["us"]}
    return [
        row["us"] / plain[_case(row)]
        for row in rows
        if row["op"] == "hadamard_a4" and row["us"] and _case(row) in plain
    ]


def _case(row: dict) -> tuple:
    return row["shape"], row["tokens"], row["dtype"], row["cache"]
