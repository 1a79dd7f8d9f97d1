"""Measurements side by side: intervals, ratios of the same windows, what counts as in domain, tables."""

import math

import pytest
import torch

from w2a4.evaluate import quality


def measured(losses=(2.0, 3.0), text="wiki.txt, 99 characters, sha256 0123456789ab", **changes):
    low, high = quality.interval([losses])
    return {
        "perplexity": math.exp(sum(losses) / len(losses)), "low": low, "high": high, "losses": list(losses),
        "seqlen": 2048, "windows": len(losses), "tokens": 2048 * len(losses), "tokens_sha256": "abc",
        "bos": True, "text": text, **changes,
    }  # fmt: skip


def test_interval_covers_the_mean_as_often_as_it_says():
    """Windows from a known distribution: about 95 % of intervals hold the true value."""
    draw = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(200):
        low, high = quality.interval([(3 + torch.randn(40, generator=draw)).tolist()])
        assert low < high
        held += low < math.exp(3) < high
    assert 180 <= held <= 198


def test_interval_does_not_depend_on_nor_move_the_global_generator():
    losses = [[1.0, 2.0, 4.0, 3.0]]
    torch.manual_seed(5)
    first, state = quality.interval(losses), torch.get_rng_state()
    torch.manual_seed(6)
    assert quality.interval(losses) == first
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_interval_scales_with_what_windows_differ_by():
    assert quality.interval([[2.0, 2.0, 2.0]]) == pytest.approx((math.exp(2), math.exp(2)))
    widths = [high - low for low, high in (quality.interval([[3 - d, 3.0, 3 + d]]) for d in (0.1, 0.5))]
    assert widths[1] > 3 * widths[0]
    (low, high), means = quality.interval([[1.0, 3.0], [1.0, 3.0]]), quality.interval([[1.0, 3.0]])
    assert (low, high) == pytest.approx(means)  # rows take the same draws
    # Rows whose differences cancel leave nothing to resample, but for the mean of exponentials.
    assert quality.interval([[0.0, 0.0], [1.0, 1.0]]) == pytest.approx(((1 + math.e) / 2,) * 2)


@pytest.mark.parametrize("losses", [[3.0], [], [1.0, math.inf], [1.0, math.nan], [1.0, None]])
def test_no_interval_of_one_window_nor_of_what_is_not_finite(losses):
    assert quality.interval([losses]) == (None, None)


def test_ratio_is_of_paired_windows():
    """Windows that differ much, and all by the same factor: the ratio has no spread, unpaired it would."""
    full, made = measured((1.0, 2.0, 5.0)), measured((1.5, 2.5, 5.5))
    found = quality.ratio(made, full)
    assert found["ratio"] == found["low"] == pytest.approx(found["high"]) == pytest.approx(math.exp(0.5))
    assert made["high"] / full["low"] > 10
    shuffled = quality.ratio(measured((5.5, 1.5, 2.5)), full)
    assert shuffled["ratio"] == pytest.approx(found["ratio"]) and shuffled["high"] > 2 * shuffled["low"]


@pytest.mark.parametrize(
    ("changes", "interval", "value"),
    [
        ({"tokens_sha256": None}, False, True),  # of an earlier version
        ({"losses": None}, False, True),
        ({"losses": [1.0, None]}, False, True),  # infinity, as JSON holds it
        ({"tokens_sha256": "other"}, False, False),  # of another tokenizer, or other windows
        ({"perplexity": None}, False, False),
        ({"perplexity": math.inf}, False, False),
        ({}, True, True),
    ],
)
def test_what_a_ratio_needs(changes, interval, value):
    full, made = measured(), measured((3.0, 3.0)) | changes
    found = quality.ratio(made, full)
    assert (found["ratio"] is not None) == value
    assert (found["low"] is not None) == (found["high"] is not None) == interval


BUILTIN = "builtin (pydoc_data.topics of Python 3.{}.7), 99 characters, sha256 0123456789ab"
HUB = "hub:owner/set,raw:{}, 99 characters, sha256 0123456789ab"
DOCUMENTS = "2 documents, 99 characters, sha256 {}"


@pytest.mark.parametrize(
    ("text", "fitted", "same"),
    [
        (BUILTIN.format(11), BUILTIN.format(12), True),
        (BUILTIN.format(11), "the teacher's own, from builtin", True),
        (HUB.format("test"), HUB.format("train"), True),
        (HUB.format("test"), "hub:owner/other, 99 characters, sha256 0123456789ab", False),
        (BUILTIN.format(11), "general, 99 characters, sha256 0123456789ab", False),
        ("wiki.txt, 9 characters, sha256 00", "wiki.txt, 8 characters, sha256 11", True),
        ("wiki.txt, 9 characters, sha256 00", "64 x 512 tokens", False),
        (DOCUMENTS.format("00"), DOCUMENTS.format("00"), True),
        (DOCUMENTS.format("00"), DOCUMENTS.format("11"), False),
    ],
)
def test_in_domain_is_what_has_the_source_of_a_fitted_text(text, fitted, same):
    for fitted_on in ({"calibration": fitted}, {"calibration": "other.txt", "training": fitted}):
        assert quality.marked([measured(text=text)], fitted_on)[0]["in_domain"] is same
    assert quality.marked([measured(text=text)], {})[0]["in_domain"] is False


def table_of(text: str) -> list[list[str]]:
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("-: |")]


def test_the_table_has_every_text_and_model_and_what_to_know():
    texts = [BUILTIN.format(11), "wiki.txt, 9 characters, sha256 00"]
    full = [measured((1.0, 2.0, 3.0), text) for text in texts]
    made = quality.marked(
        [measured((2.0, 2.5, 3.5), text) for text in texts], {"calibration": BUILTIN.format(12)}
    )
    shown = quality.quality_text({quality.FULL_PRECISION: full, "made": made}, markdown=True)
    head, *rows = table_of(shown)
    assert head == ["text", "model", "perplexity", "95 %", "ratio", "ratio, 95 %"]
    assert [row[:2] for row in rows] == [
        ["builtin", "full precision"], ["builtin, in domain", "made"],
        ["wiki.txt", "full precision"], ["wiki.txt", "made"],
    ]  # fmt: skip
    assert rows[0][2:] == ["7.39", quality.between(full[0]), "-", "-"]
    ratio = quality.ratio(made[0], full[0])
    assert rows[1][4:] == [f"{math.exp(2 / 3):.2f}", quality.between(ratio)]
    assert ratio["low"] < ratio["ratio"] < ratio["high"]
    for part in (*texts, "3 windows of 2048 (6144 tokens), BOS once", "In domain: the model was calibrated"):
        assert part in shown
    assert quality.ONE_TEXT not in shown


def test_one_text_is_called_one():
    shown = quality.quality_text({"made": [measured()]})
    assert quality.ONE_TEXT in shown and "ratio," not in shown and "In domain" not in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (23.456, "23.46"), (1912.3, "1,912"), (123456.0, "1.2e+05"), (float("inf"), "inf")],
)
def test_numbers(value, text):
    assert quality.number(value) == text
