"""The words, their order, and what exchanging the arms does to them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.statistics.comparison import Comparison, LabelFree, Paired, TwoArms
from service.statistics.interval import Interval
from service.statistics.verdict import invalid_reasons, verdict, verdict_of


@pytest.mark.parametrize(
    ("seen", "word", "worse"),
    [
        (Paired(0, 0, 0), "insufficient_data", False),
        (Paired(99, 0, 99), "insufficient_data", False),
        (Paired(100, 0, 100), "inferior", True),
        (Paired(60, 54, 4000), "undecided", False),
        (Paired(75, 75, 5000), "non_inferior", False),
        (Paired(40, 15, 2000), "undecided", True),
        (Paired(200, 20, 4000), "inferior", True),
        (Paired(20, 200, 4000), "superior", False),
        # Surely worse, and surely by less than the margin.
        (Paired(500, 250, 200_000), "non_inferior", True),
        (LabelFree(0, 609), "undecided", False),
        (LabelFree(0, 610), "non_inferior", False),
        (LabelFree(600, 1000), "undecided", False),
        (LabelFree(150, 5000), "undecided", False),
        # Labels for the disagreements alone say what labels for all would.
        (LabelFree(150, 5000, 75, 75), "non_inferior", False),
        (LabelFree(220, 4000, 200, 20), "inferior", True),
        (LabelFree(220, 4000, 20, 200), "superior", False),
        (TwoArms(4450, 5000, 4500, 5000), "undecided", False),
        (TwoArms(99, 99, 5000, 5000), "insufficient_data", False),
        (TwoArms(5000, 5000, 99, 99), "insufficient_data", False),
        (TwoArms(40_500, 45_000, 40_500, 45_000), "non_inferior", False),
        (TwoArms(4000, 5000, 4500, 5000), "inferior", True),
        (TwoArms(4500, 5000, 4000, 5000), "superior", False),
    ],
)
def test_words(seen: Comparison, word: str, worse: bool) -> None:
    assert verdict(seen, 0.01) == (word, worse)


@pytest.mark.parametrize(
    ("lower", "upper", "word", "worse"),
    [
        (-0.03, -0.011, "inferior", True),
        # A bound on the border is not past it.
        (-0.03, -0.01, "undecided", True),
        (-0.01, 0.03, "undecided", False),
        (-0.009, 0.0, "non_inferior", False),
        (-0.009, -0.001, "non_inferior", True),
        (0.0, 0.02, "non_inferior", False),
        (0.001, 0.02, "superior", False),
    ],
)
def test_rules(lower: float, upper: float, word: str, worse: bool) -> None:
    assert verdict_of(Interval(lower, upper), 100, 0.01) == (word, worse)


def test_invalid_comes_before_everything() -> None:
    for seen in (Paired(0, 0, 0), Paired(200, 20, 4000)):
        assert verdict(seen, 0.01, is_invalid=True) == ("invalid", False)


counts = st.integers(0, 400)


@given(st.one_of(st.builds(lambda b, c, n: Paired(b, c, b + c + n), counts, counts, st.integers(0, 20_000))))
def test_a_candidate_is_worse_exactly_if_the_control_would_be_superior(seen: Paired) -> None:
    word, worse = verdict(seen, 0.01)
    mirrored, _ = verdict(Paired(seen.only_candidate, seen.only_control, seen.n), 0.01)
    if word != "insufficient_data":
        assert worse is (mirrored == "superior")
        assert not (word == "superior" and worse)


@given(st.integers(0, 400), st.integers(0, 20_000), st.data())
def test_labels_never_refute_what_was_concluded_without_them(
    disagreements: int, same: int, data: st.DataObject
) -> None:
    n = disagreements + same
    if verdict(LabelFree(disagreements, n), 0.01)[0] == "non_inferior":
        b = data.draw(st.integers(0, disagreements))
        c = data.draw(st.integers(0, disagreements - b))
        assert verdict(Paired(b, c, n), 0.01)[0] in ("non_inferior", "superior")


@pytest.mark.parametrize(
    ("seen", "method", "units", "fewest"),
    [
        (Paired(1, 2, 30), "paired_betting", 30, 30),
        (LabelFree(1, 30), "label_free", 30, 30),
        (TwoArms(9, 10, 19, 20), "two_arm_sequence", 30, 10),
    ],
)
def test_what_a_comparison_says_of_itself(seen: Comparison, method: str, units: float, fewest: float) -> None:
    assert (seen.method, seen.units, seen.fewest) == (method, units, fewest)


def test_estimates_are_candidate_minus_control() -> None:
    assert Paired(10, 30, 1000).difference(0.01)[0] == pytest.approx(0.02)
    assert TwoArms(95, 100, 180, 200).difference(0.01)[0] == pytest.approx(0.05)
    assert LabelFree(10, 1000).difference(0.01)[0] == 0
    assert LabelFree(10, 1000, 6, 2).difference(0.01)[0] == pytest.approx(-0.004)


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({}, []),
        ({"sample_ratio": True}, ["sample_ratio"]),
        ({"label_ratio": True, "revision_mixed": True}, ["label_ratio", "revision_mixed"]),
        ({"dropped": 1}, []),  # exactly 0.1 %
        ({"dropped": 2}, ["dropped"]),
        ({"dropped": 1, "recorded": 0}, ["dropped"]),
        ({"recorded": 0}, []),
    ],
)
def test_reasons_to_conclude_nothing(change: dict[str, Any], reasons: list[str]) -> None:
    facts: dict[str, Any] = {"sample_ratio": False, "label_ratio": False, "dropped": 0, "recorded": 999}
    assert list(invalid_reasons(**{**facts, **change})) == reasons
