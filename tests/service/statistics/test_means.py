"""Bounds for two arms of different units: hand values and what must hold of any counts."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from service.statistics.interval import Interval
from service.statistics.means import sequence_half_width, two_arm_bounds, two_arm_sequence


@st.composite
def arms(draw: st.DrawFn) -> tuple[int, int, int, int]:
    n_1, n_0 = draw(st.integers(1, 20_000)), draw(st.integers(1, 20_000))
    return draw(st.integers(0, n_1)), n_1, draw(st.integers(0, n_0)), n_0


@pytest.mark.parametrize(("n", "width"), [(10_000, 0.0303521), (20_000, 0.0216479)])
def test_half_width_by_hand(n: int, width: float) -> None:
    assert float(sequence_half_width(1, n)) == pytest.approx(width, abs=5e-8)


def test_a_sequence_is_narrowest_where_it_was_planned() -> None:
    """Against a fixed sample's 1.96 / sqrt(n): the price of looking all along is least near the planned n."""
    prices = {n: float(sequence_half_width(1, n)) * sqrt(n) / 1.959964 for n in (100, 1000, 10_000, 100_000, 1_000_000)}
    assert min(prices, key=prices.__getitem__) == 10_000
    assert prices[10_000] == pytest.approx(1.5486, abs=1e-4)


def test_two_arms_by_hand() -> None:
    estimate, interval = two_arm_sequence(4450, 5000, 4500, 5000, 0.01)
    assert estimate == pytest.approx(-0.01)
    assert (interval.lower, interval.upper) == pytest.approx((-0.0286189, 0.0086189), abs=5e-7)


@given(arms())
def test_swapped_arms_negate(counts: tuple[int, int, int, int]) -> None:
    estimate, interval = two_arm_sequence(*counts, 0.01)
    swapped, mirrored = two_arm_sequence(*counts[2:], *counts[:2], 0.01)
    assert swapped == pytest.approx(-estimate)
    assert (mirrored.lower, mirrored.upper) == pytest.approx((-interval.upper, -interval.lower), abs=1e-12)
    assert -1 <= interval.lower <= estimate <= interval.upper <= 1


@given(arms(), st.sampled_from([0.005, 0.01, 0.1]))
def test_the_floor_only_ever_widens(counts: tuple[int, int, int, int], margin: float) -> None:
    bare_lower, bare_upper = two_arm_bounds(*counts, 0.0)
    lower, upper = two_arm_bounds(*counts, margin)
    assert lower <= bare_lower
    assert upper >= bare_upper
    share_1, share_0 = (counts[0] + 1) / (counts[1] + 2), (counts[2] + 1) / (counts[3] + 2)
    for share in (share_1, share_0):  # a variance at the floor to the last bit is on either side of it
        assume(abs(share * (1 - share) - margin * (1 - margin)) > 1e-12)
    assert bool(lower == bare_lower) is (share_1 * (1 - share_1) >= margin * (1 - margin))
    assert bool(upper == bare_upper) is (share_0 * (1 - share_0) >= margin * (1 - margin))


def test_an_arm_without_units_says_nothing() -> None:
    assert two_arm_sequence(0, 0, 5, 10, 0.01) == (0.0, Interval(-1, 1))
    assert two_arm_sequence(5, 10, 0, 0, 0.01) == (0.0, Interval(-1, 1))


def test_arrays_and_numbers_agree() -> None:
    right_1_M, n_1_M = np.array([90.0, 4450.0]), np.array([100.0, 5000.0])
    lower_M, upper_M = two_arm_bounds(right_1_M, n_1_M, 4500, 5000, 0.01)
    for index in range(2):
        _, interval = two_arm_sequence(right_1_M[index], n_1_M[index], 4500, 5000, 0.01)
        assert (interval.lower, interval.upper) == pytest.approx((lower_M[index], upper_M[index]))
