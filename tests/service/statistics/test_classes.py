"""Single classes: Wilson, Fisher and Holm against hand values and statsmodels."""

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from service.statistics.classes import holm, two_proportions_p, wilson
from service.statistics.interval import Interval


def test_wilson_by_hand() -> None:
    interval = wilson(9, 10)
    assert (interval.lower, interval.upper) == pytest.approx((0.596, 0.982), abs=5e-4)
    assert wilson(0, 0) == Interval(0, 1)


@given(st.integers(1, 5000), st.data(), st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_against_statsmodels(n: int, data: st.DataObject, confidence: float) -> None:
    k = data.draw(st.integers(0, n))
    interval = wilson(k, n, confidence)
    assert (interval.lower, interval.upper) == pytest.approx(
        proportion_confint(k, n, alpha=1 - confidence, method="wilson"), abs=1e-12
    )


def test_fisher_by_hand() -> None:
    # The lady tasting tea: three of four guessed, 34 of 70 tables at least as unlikely.
    assert two_proportions_p(3, 4, 1, 4) == pytest.approx(34 / 70)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_fisher_by_counting_tables(right_1: int, wrong_1: int, right_0: int, wrong_0: int) -> None:
    n_1, n_0, right = right_1 + wrong_1, right_0 + wrong_0, right_1 + right_0
    tables = {k: comb(n_1, k) * comb(n_0, right - k) for k in range(max(0, right - n_0), min(n_1, right) + 1)}
    expected = sum(count for count in tables.values() if count <= tables[right_1]) / sum(tables.values())
    assert two_proportions_p(right_1, n_1, right_0, n_0) == pytest.approx(expected)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 0.5))
def test_holm_rejects_what_its_procedure_does(p_values: list[float], alpha: float) -> None:
    """The procedure: from the least on, reject while p <= alpha / (how many are left); then stop for good."""
    rejected, left = set(), len(p_values)
    for index in sorted(range(left), key=p_values.__getitem__):
        if p_values[index] * left > alpha:
            break
        rejected.add(index)
        left -= 1
    assert {index for index, p in enumerate(holm(p_values)) if p <= alpha} == rejected
