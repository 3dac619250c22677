"""Sample ratio mismatch: hand values, the chi-square of SciPy, and the fairness of the sequential alarm."""

from math import exp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from service.statistics.srm import SrmResult, log_srm_e_value, srm


@pytest.mark.parametrize(
    ("counts", "weights", "chi_square", "p_value", "e_value", "alarm"),
    [
        ([5000, 5200], [50, 50], 3.9216, 0.04767, 1.782, False),
        ([5000, 5500], [50, 50], 23.81, 1.0635e-6, 15_561, True),
        ([880, 120], [90, 10], 4.444, 0.035015, 1.995, False),
    ],
)
def test_by_hand(
    counts: list[float], weights: list[float], chi_square: float, p_value: float, e_value: float, alarm: bool
) -> None:
    result = srm(counts, weights)
    found = (result.chi_square, result.p_value, result.e_value)
    assert found == pytest.approx((chi_square, p_value, e_value), rel=3e-4)
    assert result.alarm is alarm


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=4), st.data())
def test_chi_square_is_that_of_scipy(counts: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 100), min_size=len(counts), max_size=len(counts)))
    result = srm(counts, weights)
    expected = np.array(weights) / sum(weights) * sum(counts)
    assert (result.chi_square, result.p_value) == pytest.approx(tuple(chisquare(counts, expected)), rel=1e-9)


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_exchanged_arms_are_the_same_arms(first: int, second: int) -> None:
    one, other = srm([first, second], [70, 30]), srm([second, first], [30, 70])
    assert (one.chi_square, one.e_value) == pytest.approx((other.chi_square, other.e_value))


def test_evidence_is_fair_under_the_promised_shares() -> None:
    """Its mean over everything that six units can do is 1."""
    mean = 0.0
    for outcome in np.ndindex(*[2] * 6):
        firsts = 6 - sum(outcome)
        mean += 0.9**firsts * 0.1 ** (6 - firsts) * exp(float(log_srm_e_value([firsts, 6 - firsts], [0.9, 0.1])))
    assert mean == pytest.approx(1)


def test_no_units_and_arms_without_weight() -> None:
    assert srm([0, 0], [50, 50]) == SrmResult(0.0, 1.0, 1.0, False)
    assert srm([500, 0], [100, 0]).e_value == pytest.approx(1)
    assert not srm([500, 0], [100, 0]).alarm
    assert srm([500, 1], [100, 0]).alarm


def test_all_units_in_one_of_two_arms_are_an_alarm() -> None:
    assert not srm([10, 0], [50, 50]).alarm
    assert srm([200, 0], [50, 50]).alarm
