"""What an evaluation text has in common with the text that a model is fitted on."""

import warnings

import pytest

from w2a4.errors import CalibrationError
from w2a4.evaluate import data, overlap


def words(start: int, count: int) -> str:
    return " ".join(f"word{number}" for number in range(start, start + count))


def test_shared_is_its_definition():
    text, other = f"{words(0, 30)} {words(100, 30)}", f"{words(500, 9)} {words(5, 20)} {words(105, 11)}"
    mine, theirs = text.split(), other.split()
    runs = {tuple(theirs[i : i + 12]) for i in range(len(theirs) - 11)}
    hits = [tuple(mine[i : i + 12]) in runs for i in range(len(mine) - 11)]
    assert overlap.shared(text, other) == pytest.approx(sum(hits) / len(hits))
    assert sum(hits) == 20 - 11


def test_eleven_words_in_a_row_are_not_shared():
    assert overlap.shared(words(0, 60), f"{words(500, 20)} {words(0, 11)} {words(600, 20)}") == 0
    assert overlap.shared(words(0, 60), words(0, 60)) == 1
    assert overlap.shared(words(0, 11), words(0, 11)) == 0  # too short for one shingle


def test_order_counts_and_case_and_punctuation_do_not():
    backwards = " ".join(reversed(words(0, 40).split()))
    assert overlap.shared(words(0, 40), backwards) == 0
    assert overlap.shared(words(0, 40), words(0, 40).upper().replace(" ", ",\n- ")) == 1


@pytest.mark.parametrize("source", data.PACKAGED)
def test_the_parts_of_a_packaged_text_share_less_than_is_warned_of(source):
    calibration, evaluation = (data.load_text(source, part) for part in ("calibration", "evaluation"))
    assert overlap.shared(evaluation, calibration) < overlap.WARN_FROM / 2
    assert overlap.shared(calibration, evaluation) < overlap.WARN_FROM / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overlap.warn_of_overlap(list(data.PACKAGED), {"calibration": source})


@pytest.mark.parametrize(("common", "warned"), [(11, False), (19, False), (25, True), (989, True)])
def test_a_warning_from_one_per_cent_names_share_and_texts(tmp_path, common, warned):
    """Of 1000 words, `common` in a row are in the training text: `common` - 11 of 989 shingles."""
    (tmp_path / "judged.txt").write_text(words(0, 1000))
    (tmp_path / "fitted.txt").write_text(f"{words(5000, 500)} {words(100, common)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = {"calibration": ["nothing in common"], "training": tmp_path / "fitted.txt"}
        overlap.warn_of_overlap([["other words"], tmp_path / "judged.txt"], fitted)
    assert len(caught) == warned
    for warning in caught:
        shared = min(common, 900) - 11
        assert str(warning.message).startswith(
            f"{shared / 989:.1%} of the evaluation text 'judged.txt' stand in the training text 'fitted.txt'"
        )


def test_a_missing_text_is_told():
    with pytest.raises(CalibrationError, match="'none.txt' does not exist"):
        overlap.warn_of_overlap(["none.txt"], {})
    with pytest.raises(CalibrationError, match="'none.txt' does not exist"):
        overlap.warn_of_overlap([], {"calibration": "none.txt"})


def test_of_a_checkpoint_the_report_names_what_it_was_fitted_on(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(words(0, 100))
    with pytest.warns(UserWarning, match="fitted on the evaluation text 'a.txt' itself"):
        overlap.warn_of_known([path], {"calibration": data.describe_text(path, words(0, 100))})
    path.write_text(data.load_text("builtin", "calibration"))
    line = data.describe_text("builtin", "as of another Python")
    with pytest.warns(UserWarning, match=r"100.0% of the evaluation text 'a.txt' .* training text 'builtin'"):
        overlap.warn_of_known([path], {"calibration": "b.txt", "training": line})
