"""Proportions of single classes: intervals, a comparison of two samples, and a correction for looking at many.

These hold for one look at a sample whose size was fixed beforehand; a report shows them as warnings, not verdicts.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, fisher_exact

from service.statistics.interval import Interval


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of k successes in n (JASA 22, 1927). 9 of 10 gives [0.596, 0.982], 0 of 0 [0, 1]."""
    if not n:
        return Interval(0.0, 1.0)
    found = binomtest(k, n).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def two_proportions_p(right_1: int, n_1: int, right_0: int, n_0: int) -> float:
    """Two-sided p-value of Fisher's exact test that two proportions are equal: classes may be too rare for a z-test."""
    table = np.array([[right_1, n_1 - right_1], [right_0, n_0 - right_0]])
    return float(fisher_exact(table).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values in the same order, corrected for their number (Holm 1979): rejecting those below alpha is wrong anywhere
    in at most a share alpha of reports. [0.01, 0.04, 0.03] gives [0.03, 0.06, 0.06]."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for done, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - done) * p_values[index]))
        adjusted[index] = least
    return adjusted
