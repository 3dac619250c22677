"""Simulated experiments, looked at after every unit: wrong words stay as rare as promised, and right ones come in time.

Fewer runs than `python -m benchmarks.verdicts`, the same functions, fixed seeds. Limits are the promise plus two and a
half Monte Carlo errors.
"""

from math import log, sqrt

import numpy as np
import pytest

from benchmarks.verdicts import (
    ALPHA,
    FEWEST,
    MARGIN,
    clustered_misses,
    first_looks,
    first_refuted,
    latency_misses,
    paired_counts,
    paired_naive,
    paired_stops,
    paired_words,
    split_stops,
    split_words,
    srm_alarms,
)
from service.statistics.paired import log_betting_e_value
from service.statistics.power import anytime_size, split_anytime_size


def at_most(promise: float, runs: int) -> float:
    return promise + 2.5 * sqrt(promise * (1 - promise) / runs)


def test_skipped_looks_would_have_shown_nothing_new() -> None:
    """The simulation looks before and after each change of the counts; here every single look is taken instead."""
    for b_RN, c_RN, n_RN in paired_counts(400, 1500, -0.004, 0.012, seed=5):
        reached_RN = log_betting_e_value(b_RN, c_RN, n_RN, -MARGIN) >= log(2 / ALPHA)
        reached_RN[:, : FEWEST - 1] = False
        every_look_R = first_looks(reached_RN)
        ever_R = first_refuted(b_RN, c_RN, n_RN, -MARGIN, ALPHA, every=1500) <= 1500
        assert (ever_R == (every_look_R <= 1500)).all()
        late_R = (first_refuted(b_RN, c_RN, n_RN, -MARGIN, ALPHA, every=10) - every_look_R)[ever_R]
        assert 0 <= late_R.min() <= late_R.max() <= 9


def test_a_comparison_of_equals_is_rarely_called_anything_else() -> None:
    found = paired_words(0.0, 0.03, ["superior", "worse"], runs=1000, units=20_000)
    assert sum(found.values()) <= ALPHA
    assert min(found.values()) > 0  # the simulation can find something
    assert paired_naive(0.03, runs=200, units=20_000) > 0.3  # a test made for one look, taken at every look


@pytest.mark.parametrize("discordance", [0.0101, 0.012, 0.02, 0.03, 0.10])
def test_a_candidate_worse_by_the_margin_rarely_passes(discordance: float) -> None:
    found = paired_words(-MARGIN, discordance, ["non_inferior"], runs=300, units=20_000)
    assert found["non_inferior"] <= at_most(ALPHA / 2, 300)


def test_a_split_of_equals_is_rarely_called_anything_else() -> None:
    found = split_words(0.9, 0.9, runs=1000, units=20_000, floor=MARGIN)
    assert found["superior"] + found["worse"] <= ALPHA
    assert found["naive"] > 0.3


def test_a_perfect_control_needs_the_floor() -> None:
    with_floor = split_words(0.99, 1.0, runs=600, units=6000, floor=MARGIN)["non_inferior"]
    without = split_words(0.99, 1.0, runs=600, units=6000, floor=0.0)["non_inferior"]
    assert with_floor <= at_most(ALPHA / 2, 600)
    assert without > with_floor


@pytest.mark.parametrize("discordance", [0.01, 0.05])
def test_pairs_stop_as_planned(discordance: float) -> None:
    planned = anytime_size(-MARGIN, discordance)
    assert planned is not None
    stop_R = paired_stops(0.0, discordance, MARGIN, runs=400, units=planned)
    assert 0.74 < (stop_R <= planned).mean() < 0.88


def test_splits_stop_as_planned() -> None:
    planned = split_anytime_size(-0.03, 0.9, 0.9, 0.03)
    assert planned is not None
    stop_R = split_stops(0.9, 0.03, runs=400, units=2 * planned)
    assert 0.74 < (stop_R <= planned).mean() < 0.88


def test_an_alarm_on_shares_is_rarely_false_and_sees_a_small_mismatch() -> None:
    raised, _, naive = srm_alarms(0.5, runs=500, units=20_000)
    assert raised <= at_most(0.001, 500)
    assert naive > 0.005  # the positive control
    raised, median, _ = srm_alarms(0.52, runs=100, units=20_000)
    assert raised > 0.85
    assert 7000 < median < 13_000


@pytest.mark.parametrize("q", [0.5, 0.95])
def test_bounds_of_quantiles_hold_at_all_looks(q: float) -> None:
    assert latency_misses(q, 0.05, runs=60, units=5000) <= at_most(0.05, 60)


def test_a_subject_counts_once() -> None:
    every, first = clustered_misses(2000, 10, runs=150)
    assert first <= 0.05
    assert every > 0.15


def test_simulated_counts_have_the_rates_asked_for() -> None:
    (b_RN, c_RN, _), *_ = paired_counts(50, 5000, -0.01, 0.03, seed=1)
    assert float(b_RN[:, -1].mean()) / 5000 == pytest.approx(0.02, abs=0.001)
    assert float(c_RN[:, -1].mean()) / 5000 == pytest.approx(0.01, abs=0.001)
    assert np.all(np.diff(b_RN) + np.diff(c_RN) <= 1)
