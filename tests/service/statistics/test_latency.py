"""Quantiles of latency: hand values, NumPy and direct resampling as oracles, and the word."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.statistics.latency import (
    bootstrap_ratio,
    latency_word,
    quantile,
    quantile_interval,
    quantile_sequence,
)

TEN = list(range(1, 11))


def normal_times(n: int, scale: float, seed: int) -> list[float]:
    return sorted((scale * np.random.default_rng(seed).lognormal(0, 0.3, n)).tolist())


@pytest.mark.parametrize(("q", "value"), [(0.5, 5.5), (0.95, 9.55), (0.99, 9.91), (0, 1), (1, 10)])
def test_quantiles_by_hand(q: float, value: float) -> None:
    assert quantile(TEN, q) == pytest.approx(value)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values: list[float], q: float) -> None:
    assert quantile(sorted(values), q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9, abs=1e-9)


def test_no_samples_have_no_quantile() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap_ratio([], [1.0])


def test_interval_by_hand() -> None:
    thousand = list(range(1, 1001))
    assert quantile_interval(thousand, 0.95) == (936, 964)
    assert quantile_interval(thousand[:200], 0.99) == (195, None)
    assert quantile_interval([], 0.5) == (None, None)


@pytest.mark.parametrize(("n", "q"), [(40, 0.5), (200, 0.95)])
def test_interval_covers(n: int, q: float) -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(1000):
        lower, upper = quantile_interval(np.sort(rng.random(n)), q)
        held += (lower is None or lower <= q) and (upper is None or upper >= q)
    assert 0.94 < held / 1000 < 0.98


def test_sequence_by_hand() -> None:
    # n = 1000, q = 0.5, alpha = 0.05: l = (1.4 ln ln 2100 + ln 200) / 1000 = 0.0081464, f = 0.0742106.
    thousand = list(range(1, 1001))
    assert quantile_sequence(thousand, 0.5) == (426, 575)
    assert quantile_sequence([], 0.5) == (None, None)
    assert quantile_sequence([1.0], 0.5) == (None, None)


def test_least_sample_with_an_upper_bound_of_the_95th_percentile() -> None:
    least = next(n for n in range(1, 2000) if quantile_sequence(range(n), 0.95, 0.025)[1] is not None)
    assert least == 623


@given(st.integers(2, 5000), st.sampled_from([0.5, 0.95, 0.99]))
def test_looking_always_costs_width(n: int, q: float) -> None:
    places = np.arange(n, dtype=np.float64)
    once, always = quantile_interval(places, q), quantile_sequence(places, q)
    assert always[0] is None or (once[0] is not None and always[0] <= once[0])
    assert always[1] is None or (once[1] is not None and always[1] >= once[1])


@pytest.mark.parametrize(
    ("control", "candidate", "word"),
    [
        (normal_times(2000, 10, 1), normal_times(2000, 6, 2), "faster"),
        (normal_times(2000, 6, 1), normal_times(2000, 10, 2), "slower"),
        (normal_times(2000, 10, 1), normal_times(2000, 10, 2), "undecided"),
        (normal_times(300, 10, 1), normal_times(2000, 10, 2), "insufficient_data"),
        (normal_times(2000, 10, 1), normal_times(300, 10, 2), "insufficient_data"),
        # The bound that a word needs is there, though the other one is not.
        (normal_times(300, 20, 1), normal_times(2000, 2, 2), "faster"),
        ([], normal_times(2000, 1, 2), "insufficient_data"),
        ([], [], "insufficient_data"),
    ],
)
def test_word(control: list[float], candidate: list[float], word: str) -> None:
    assert latency_word(control, candidate) == word


def test_ranks_are_resampled_as_values_are() -> None:
    """Against a bootstrap that draws all n values each time."""
    control, candidate = normal_times(150, 10, 3), normal_times(80, 7, 4)
    rng = np.random.default_rng(5)
    whole_R = [np.quantile(rng.choice(times, (20_000, len(times))), 0.95, axis=1) for times in (candidate, control)]
    ratios = whole_R[0] / whole_R[1]
    estimate, interval = bootstrap_ratio(control, candidate, resamples=20_000)
    assert estimate == pytest.approx(np.quantile(candidate, 0.95) / np.quantile(control, 0.95))
    assert (interval.lower, interval.upper) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), rel=0.015)


def test_a_ratio_is_repeatable_and_of_one_sample_certain() -> None:
    control, candidate = normal_times(150, 10, 3), normal_times(80, 7, 4)
    assert bootstrap_ratio(control, candidate) == bootstrap_ratio(control, candidate)
    estimate, interval = bootstrap_ratio([2.0], [3.0])
    assert (estimate, interval.lower, interval.upper) == (1.5, 1.5, 1.5)
    estimate, interval = bootstrap_ratio(control, control, q=1.0)
    assert interval.lower <= estimate <= interval.upper
