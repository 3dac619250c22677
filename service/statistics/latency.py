"""Quantiles of latency from raw samples: estimates, intervals of one look and of all looks, and a word.

Samples are sorted, ascending, milliseconds. An interval is a pair of order statistics, whatever the distribution is;
a bound that would lie beyond the sample is None.
"""

from collections.abc import Sequence
from math import ceil, floor, log, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from service.statistics.interval import Interval

Sorted = Sequence[float] | npt.NDArray[np.float64]
Bounds = tuple[float | None, float | None]
Word = Literal["faster", "slower", "undecided", "insufficient_data"]


def quantile(sorted_ms: Sorted, q: float) -> float:
    """The q quantile, 0 <= q <= 1, interpolated as NumPy and R do by default (type 7). 1 to 10 at 0.95 gives 9.55.

    Raises ValueError without samples.
    """
    if not len(sorted_ms):
        raise ValueError("a quantile needs at least one sample")
    place = (len(sorted_ms) - 1) * q
    below = floor(place)
    above = min(below + 1, len(sorted_ms) - 1)
    return float(sorted_ms[below] + (place - below) * (sorted_ms[above] - sorted_ms[below]))


def quantile_interval(sorted_ms: Sorted, q: float, confidence: float = 0.95) -> Bounds:
    """Bounds for one look at a fixed sample: the ranks between which a binomial(n, q) falls with that confidence.

    1000 samples at 0.95 give the 936th and the 964th; 200 at 0.99 have no upper bound.
    """
    n, tail = len(sorted_ms), (1 - confidence) / 2
    return _at(sorted_ms, int(binom.ppf(tail, n, q))), _at(sorted_ms, int(binom.ppf(1 - tail, n, q)) + 1)


def quantile_sequence(sorted_ms: Sorted, q: float, alpha: float = 0.05) -> Bounds:
    """Bounds that hold at all looks together with chance 1 - alpha, while the sample grows.

    Order statistics at q -+ f, `f = 1.5 sqrt(q (1 - q) l) + 0.8 l`, `l = (1.4 ln ln(2.1 n) + ln(10 / alpha)) / n`
    (arXiv 1906.09712, Howard and Ramdas). At alpha 0.025 the 95th percentile has an upper bound from 623 samples on.
    """
    n = len(sorted_ms)
    if not n:
        return None, None
    rate = (1.4 * log(log(2.1 * n)) + log(10 / alpha)) / n
    reach = 1.5 * sqrt(q * (1 - q) * rate) + 0.8 * rate
    return _at(sorted_ms, ceil(n * (q - reach))), _at(sorted_ms, floor(n * (q + reach)) + 1)


def latency_word(control_sorted: Sorted, candidate_sorted: Sorted, q: float = 0.95, alpha: float = 0.05) -> Word:
    """What can be said of the candidate's q quantile, at this and every other look, at the level alpha in all.

    `faster` and `slower` need intervals, each at alpha / 2, that do not overlap; `insufficient_data` is said while an
    arm has no upper bound yet and nothing is decided.
    """
    control_lower, control_upper = quantile_sequence(control_sorted, q, alpha / 2)
    candidate_lower, candidate_upper = quantile_sequence(candidate_sorted, q, alpha / 2)
    if candidate_upper is not None and control_lower is not None and candidate_upper < control_lower:
        return "faster"
    if control_upper is not None and candidate_lower is not None and control_upper < candidate_lower:
        return "slower"
    return "insufficient_data" if control_upper is None or candidate_upper is None else "undecided"


def bootstrap_ratio(
    control_sorted: Sorted, candidate_sorted: Sorted, q: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, Interval]:
    """The candidate's q quantile over the control's, with the 95 % percentile interval of the bootstrap, for one look.

    A resample's order statistics are order statistics of uniform ranks, which have a known distribution (Beta): drawing
    those costs the same for 200,000 samples as for 200. Raises ValueError if an arm has no samples.
    """
    estimate = quantile(candidate_sorted, q) / quantile(control_sorted, q)
    rng = np.random.default_rng(seed)
    control_R = _resampled_quantiles(np.asarray(control_sorted, np.float64), q, resamples, rng)
    candidate_R = _resampled_quantiles(np.asarray(candidate_sorted, np.float64), q, resamples, rng)
    lower, upper = np.quantile(candidate_R / control_R, [0.025, 0.975])
    return estimate, Interval(float(lower), float(upper))


def _at(sorted_ms: Sorted, rank: int) -> float | None:
    """The order statistic of a rank, counted from 1."""
    return float(sorted_ms[rank - 1]) if 1 <= rank <= len(sorted_ms) else None


def _resampled_quantiles(
    sorted_N: npt.NDArray[np.float64], q: float, resamples: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Type-7 quantiles of `resamples` bootstrap samples, by the ranks their two order statistics come from."""
    n = len(sorted_N)
    place = (n - 1) * q
    below = floor(place)
    low_R = rng.beta(below + 1, n - below, resamples)
    # The least of the n - below - 1 uniforms above low; there is none after the last.
    high_R = low_R + (1 - low_R) * rng.beta(1, n - below - 1, resamples) if below + 1 < n else low_R
    low_R, high_R = (sorted_N[np.minimum((share_R * n).astype(np.int64), n - 1)] for share_R in (low_R, high_R))
    return low_R + (place - below) * (high_R - low_R)
