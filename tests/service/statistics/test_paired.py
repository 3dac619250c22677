"""Paired tests: hand values, oracles, and what must hold of any counts."""

from fractions import Fraction
from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from statsmodels.stats.contingency_tables import mcnemar

from service.statistics.evidence import MOST, from_log
from service.statistics.interval import Interval
from service.statistics.paired import (
    betting_e_value,
    betting_interval,
    label_free_interval,
    log_betting_e_value,
    mcnemar_p,
    tango_interval,
    tango_z,
)

Z = 1.959964


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, int, int]:
    b, c, same = draw(st.integers(0, 300)), draw(st.integers(0, 300)), draw(st.integers(0, 5000))
    return b, c, b + c + same


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(6, 1, 16 / 128), (10, 2, 158 / 4096), (8, 0, 0.0078125), (40, 15, 0.00101585), (0, 0, 1), (5, 5, 1)],
)
def test_mcnemar_by_hand(b: int, c: int, p: float) -> None:
    assert mcnemar_p(b, c) == pytest.approx(p, abs=5e-9)


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_mcnemar_against_statsmodels(b: int, c: int) -> None:
    if b + c:
        assert mcnemar_p(b, c) == pytest.approx(mcnemar([[0, b], [c, 0]], exact=True).pvalue, abs=1e-12)
    assert mcnemar_p(b, c) == mcnemar_p(c, b)


@pytest.mark.parametrize(
    ("counts", "bounds"),
    [
        ((30, 22, 1000), (-0.022805, 0.006345)),
        ((15, 15, 1000), (-0.011358, 0.011358)),
        # Without discordance the limits are +-z^2 / (n + z^2).
        ((0, 0, 10), (-0.277533, 0.277533)),
        ((10, 0, 10), (-1, -0.444934)),
    ],
)
def test_tango_by_hand(counts: tuple[int, int, int], bounds: tuple[float, float]) -> None:
    interval = tango_interval(*counts)
    assert (interval.lower, interval.upper) == pytest.approx(bounds, abs=1e-6)


def test_least_sample_that_tango_calls_non_inferior() -> None:
    assert tango_z(0, 0, 400, -0.01) == pytest.approx(2.0101, abs=5e-5)
    assert tango_z(0, 0, 380, -0.01) == pytest.approx(1.9592, abs=5e-5)
    assert next(n for n in range(1, 500) if tango_z(0, 0, n, -0.01) > Z) == 381


@given(pairs(), st.floats(-0.4, 0.4))
def test_tango_is_the_score_test_of_the_restricted_likelihood(counts: tuple[int, int, int], theta: float) -> None:
    """Found by maximising the likelihood under theta numerically; its gradient over its information is the score."""
    b, c, n = counts[0] + 1, counts[1] + 1, counts[2] + 5

    def minus_likelihood(q: float) -> float:
        return -(b * log(q) + c * log(q + theta) + (n - b - c) * log(1 - 2 * q - theta))

    least, most = max(0.0, -theta), (1 - theta) / 2
    found = minimize_scalar(minus_likelihood, bounds=(least, most), method="bounded", options={"xatol": 1e-12})
    q = float(found.x)
    assert tango_z(b, c, n, theta) == pytest.approx(
        (c - b - n * theta) / (n * (2 * q + theta - theta**2)) ** 0.5, rel=1e-4, abs=1e-4
    )


@given(pairs().filter(lambda counts: counts[2] > 0))
def test_tango_limits_are_where_the_score_is_critical(counts: tuple[int, int, int]) -> None:
    interval = tango_interval(*counts)
    assert -1 <= interval.lower <= (counts[1] - counts[0]) / counts[2] <= interval.upper <= 1
    if interval.lower > -1:
        assert tango_z(*counts, interval.lower) == pytest.approx(Z, abs=1e-4)
    swapped = tango_interval(counts[1], counts[0], counts[2])
    assert (swapped.lower, swapped.upper) == pytest.approx((-interval.upper, -interval.lower), abs=1e-9)


def test_tango_of_impossible_differences() -> None:
    assert tango_z(0, 10, 10, 1.0) == 0
    assert tango_z(0, 9, 10, 1.0) == -np.inf
    assert tango_z(9, 0, 10, -1.0) == np.inf


@pytest.mark.parametrize(
    ("b", "c", "n", "e_value"), [(0, 0, 600, 37.016), (60, 54, 4000, 23.443), (75, 75, 5000, 344.76)]
)
def test_bets_by_hand(b: int, c: int, n: int, e_value: float) -> None:
    assert betting_e_value(b, c, n, -0.01) == pytest.approx(e_value, rel=2e-5)


def test_bets_in_exact_fractions() -> None:
    stakes = [Fraction(9, 10), *(Fraction(1, 2**k) for k in range(1, 7))]
    m = Fraction(-1, 50)
    money = [(1 - g) ** 3 * (1 + g * (1 - m) / (1 + m)) ** 5 * (1 - g * m / (1 + m)) ** 32 for g in stakes]
    assert betting_e_value(3, 5, 40, -0.02) == pytest.approx(float(sum(money) / 7), rel=1e-12)


def test_pairs_without_discordance_needed_for_a_margin() -> None:
    assert [next(n for n in range(1, 900) if betting_e_value(0, 0, n, -m) > 40) for m in (0.01, 0.02)] == [610, 303]


@pytest.mark.parametrize(
    ("counts", "bounds"),
    [
        ((60, 54, 4000), (-0.010596, 0.007535)),
        ((75, 75, 5000), (-0.008154, 0.008154)),
        ((40, 15, 2000), (-0.026172, -0.000600)),
    ],
)
def test_betting_interval_by_hand(counts: tuple[int, int, int], bounds: tuple[float, float]) -> None:
    interval = betting_interval(*counts)
    assert (interval.lower, interval.upper) == pytest.approx(bounds, abs=1e-6)


def test_nothing_is_known_of_nothing() -> None:
    assert betting_interval(0, 0, 0) == Interval(-1, 1)
    assert betting_e_value(0, 0, 0, -0.01) == pytest.approx(1)


@pytest.mark.parametrize("margin", [-0.3, -0.01, 0.0, 0.2])
@pytest.mark.parametrize("psi", [0.3, 0.9])
def test_a_bet_is_fair_on_the_border(margin: float, psi: float) -> None:
    """If the difference is the margin itself, the money after three pairs is 1 on average."""
    chances = {-1: (psi - margin) / 2, 1: (psi + margin) / 2, 0: 1 - psi}
    mean = 0.0
    for outcome in np.ndindex(3, 3, 3):
        d = [value - 1 for value in outcome]
        chance = float(np.prod([chances[value] for value in d]))
        mean += chance * betting_e_value(d.count(-1), d.count(1), 3, margin)
    assert mean == pytest.approx(1)


@given(pairs(), st.floats(-0.9, 0.9), st.floats(0.001, 0.09))
def test_evidence_falls_as_the_margin_rises(counts: tuple[int, int, int], margin: float, step: float) -> None:
    assert log_betting_e_value(*counts, margin + step) <= log_betting_e_value(*counts, margin) + 1e-9


@given(pairs(), st.sampled_from([0.01, 0.05, 0.2]), st.sampled_from([0.0, 0.01, 0.05, 0.3]))
def test_the_bound_and_the_evidence_say_the_same(counts: tuple[int, int, int], alpha: float, margin: float) -> None:
    evidence = betting_e_value(*counts, -margin)
    if abs(log(evidence * alpha / 2)) > 1e-6:
        assert (betting_interval(*counts, alpha).lower > -margin) is (evidence > 2 / alpha)


@given(pairs())
def test_swapped_arms_negate_the_interval(counts: tuple[int, int, int]) -> None:
    b, c, n = counts
    assert betting_interval(c, b, n) == betting_interval(b, c, n).negated()


@given(pairs())
def test_bounds_follow_the_counts(counts: tuple[int, int, int]) -> None:
    b, c, n = counts
    interval = betting_interval(b, c, n)
    assert -1 <= interval.lower <= (c - b) / max(n, 1) <= interval.upper <= 1
    better = betting_interval(b, c + 1, n + 1)
    assert better.lower >= interval.lower - 1e-12
    surer = betting_interval(b, c, n, alpha=0.01)
    assert surer.lower <= interval.lower + 1e-12
    assert surer.upper >= interval.upper - 1e-12


@given(pairs())
def test_no_labels_can_say_more_than_the_labels_would(counts: tuple[int, int, int]) -> None:
    """Whatever the truth, its own bounds reach no further down than those of the worst case."""
    b, c, n = counts
    free = label_free_interval(b + c, n)
    assert free.lower == -free.upper
    assert free.lower <= betting_interval(b, c, n).lower + 1e-12


@given(pairs(), st.integers(0, 300), st.data())
def test_labels_of_disagreements_are_enough(counts: tuple[int, int, int], both_wrong: int, data: st.DataObject) -> None:
    """Both may be wrong in different ways. Whatever the missing labels say, the bounds hold those of all labels."""
    b, c, n = counts
    disagreements, n = b + c + both_wrong, n + both_wrong
    known_b, known_c = data.draw(st.integers(0, b)), data.draw(st.integers(0, c))
    partly = label_free_interval(disagreements, n, only_control=known_b, only_candidate=known_c)
    whole, none = betting_interval(b, c, n), label_free_interval(disagreements, n)
    assert none.lower - 1e-12 <= partly.lower <= whole.lower + 1e-12
    assert whole.upper - 1e-12 <= partly.upper <= none.upper + 1e-12
    assert label_free_interval(b + c, n, only_control=b, only_candidate=c) == whole


def test_no_disagreement_is_enough_without_labels() -> None:
    assert label_free_interval(0, 609).lower < -0.01 < label_free_interval(0, 610).lower


def test_evidence_stays_a_number_that_json_has() -> None:
    assert betting_e_value(0, 10**6, 10**6, -0.01) == MOST == pytest.approx(exp(700))
    assert from_log(-1e9) == 0
    assert betting_e_value(10**6, 0, 10**6, -0.01) == 0
