"""The walk over thresholds: hand values, statsmodels, and how often it promises too much."""

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from service.statistics.calibration import (
    GRID,
    Outcomes,
    Point,
    curve,
    effective_rows,
    fewest_rows,
    intraclass,
    loosest_passing,
    lower_bound,
    threshold_for,
)


def outcomes(confidence: object, agrees: object, groups: object = None) -> Outcomes:
    """The candidate is right where it agrees, the control always."""
    agrees_N = np.asarray(agrees, dtype=bool)
    group_N = np.arange(len(agrees_N)) if groups is None else np.asarray(groups)
    return Outcomes(np.asarray(confidence, dtype=float), agrees_N, agrees_N, np.ones_like(agrees_N), group_N)


@pytest.mark.parametrize(("agreed", "rows", "expected"), [(300, 300, 0.99006), (990, 1000, 0.98310), (0, 5, 0.0)])
def test_the_bound_by_hand(agreed: int, rows: int, expected: float) -> None:
    assert lower_bound(agreed, rows) == pytest.approx(expected, abs=5e-6)


def test_the_bound_is_that_of_statsmodels() -> None:
    for agreed, rows in ((1, 1), (7, 9), (58, 60), (4000, 4100)):
        assert lower_bound(agreed, rows) == pytest.approx(proportion_confint(agreed, rows, 0.1, method="beta")[0])


def test_the_fewest_rows_are_those_at_which_a_perfect_record_just_passes() -> None:
    fewest = fewest_rows(0.99)
    assert lower_bound(fewest, fewest) == pytest.approx(0.99)
    assert 298 < fewest < 299


def test_the_grid_falls_from_nearly_one_to_zero() -> None:
    assert list(GRID) == sorted(set(GRID), reverse=True)
    assert (GRID[0], GRID[-1]) == (0.9999939, 0.0)
    assert 0.5 in GRID


def point(threshold: float, effective: float, bound: float) -> Point:
    return Point(threshold, int(effective), 0.5, 1.0, bound, effective, 0.9, 1.0)


def test_the_walk_skips_what_cannot_pass_and_stops_at_the_first_failure() -> None:
    points = [
        point(0.9, 100, 0.97),  # too few rows: not a failure
        point(0.8, 400, 0.992),
        point(0.7, 500, 0.991),
        point(0.6, 600, 0.989),
        point(0.5, 700, 0.995),  # would pass, but comes after a failure
    ]
    kept = loosest_passing(points, 0.99)
    assert kept is not None
    assert kept.threshold == 0.7
    assert loosest_passing(points[3:], 0.99) is None
    assert loosest_passing(points[:1], 0.99) is None


def test_points_by_hand() -> None:
    found = outcomes([0.9, 0.8, 0.8, 0.3], [True, True, False, False])
    none, two, all_ = curve(found, (0.95, 0.8, 0.0), 0.5)
    assert (none.accepted, none.agreement, none.bound, none.accuracy, none.work) == (0, None, 0.0, 1.0, 1.5)
    assert (two.accepted, two.share, two.accuracy, two.work) == (3, 0.75, 0.75, 0.75)
    assert two.agreement == pytest.approx(2 / 3)
    assert two.bound == lower_bound(2, 3)
    assert (all_.accuracy, all_.work) == (0.5, 0.5)


def test_a_share_is_reached_by_the_strictest_threshold() -> None:
    confidence_N = np.array([0.1, 0.7123456789, 0.9, 0.5])
    assert threshold_for(confidence_N, 0.5) == 0.7123456
    assert threshold_for(confidence_N, 0.51) == 0.5
    assert threshold_for(confidence_N, 1) == 0.1
    assert threshold_for(confidence_N, 0) == 1.0


def test_likeness_within_groups_by_hand() -> None:
    group_N = np.array([0, 0, 1, 1])
    assert intraclass(np.array([True, True, False, False]), group_N) == 1
    assert intraclass(np.array([True, False, True, False]), group_N) == 0
    assert intraclass(np.array([True, True, True, True]), group_N) == 0
    # Of the 14 ordered pairs, those of the first group are alike (2); in the second 6 are unlike and 6 alike.
    hit_N, group_N = np.array([True, True, True, False, False, False]), np.array([0, 0, 1, 1, 1, 1])
    assert intraclass(hit_N, group_N) == pytest.approx((2 - 6 + 6) / 14)


def test_rows_of_one_group_are_worth_less() -> None:
    group_N = np.repeat(np.arange(10), 5)
    assert effective_rows(group_N, 0) == 50
    assert effective_rows(group_N, 1) == 10
    assert effective_rows(group_N, 0.25) == 25
    assert effective_rows(np.arange(7), 1) == 7


def promised_too_much(rows_of_group: int, allowed_for: bool) -> float:
    """Share of 300 runs of 3,000 rows whose kept threshold truly agrees less than the wanted .93.

    Agreement rises with confidence, and 3 % of the groups disagree as a whole, whatever the confidence: the truth
    passes through .93 just below a threshold of .5. allowed_for: the calibration is told who belongs together.
    """
    generator = np.random.default_rng(5)
    group_N = np.arange(3_000) // rows_of_group
    missed = 0
    for _ in range(300):
        confidence_N = generator.uniform(0.3, 1, 3_000)
        odd_G = generator.random(group_N[-1] + 1) < 0.03
        agrees_N = (generator.random(3_000) > 0.15 * (1 - confidence_N)) & ~odd_G[group_N]
        found = outcomes(confidence_N, agrees_N, group_N if allowed_for else None)
        kept = loosest_passing(curve(found, GRID[38:], 1.0), 0.93)
        if kept is not None:
            mean = (max(kept.threshold, 0.3) + 1) / 2
            missed += 0.97 * (1 - 0.15 * (1 - mean)) < 0.93
    return missed / 300


def test_a_promise_is_broken_in_at_most_five_percent_of_runs() -> None:
    assert promised_too_much(1, allowed_for=True) <= 0.06


def test_rows_in_groups_need_the_allowance_for_it() -> None:
    """Measured: 22 % without it, 6 % with it, which is an estimate from the rows and no exact bound."""
    assert promised_too_much(10, allowed_for=False) > 0.15
    assert promised_too_much(10, allowed_for=True) <= 0.08
