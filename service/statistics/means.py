"""Two proportions from different units, as in a split: bounds that hold at every look once samples are not small.

Also used for rates of failed requests. Index 1 is the candidate, 0 the control.
"""

from math import log

import numpy as np
import numpy.typing as npt

from service.statistics.interval import Interval

PLANNED = 10_000


def sequence_half_width(
    deviation: npt.ArrayLike, n: npt.ArrayLike, alpha: float = 0.05, planned: int = PLANNED
) -> npt.NDArray[np.float64]:
    """Half the width of the asymptotic confidence sequence of a mean (arXiv 2103.06476, Waudby-Smith and others).

    deviation: standard deviation of one observation. n >= 1 observations, planned: the n at which the sequence is to be
    narrowest for what it promises; it holds at all others too. Deviation 1 gives 0.0303521 at n = 10,000.
    """
    deviation, n = np.asarray(deviation, np.float64), np.asarray(n, np.float64)
    rho2 = (-2 * log(alpha) + log(1 - 2 * log(alpha))) / planned
    scaled = n * rho2 + 1
    width = deviation * np.sqrt(2 * scaled / (n * n * rho2) * (np.log(scaled) / 2 - log(alpha)))
    return np.asarray(width, dtype=np.float64)


def two_arm_sequence(
    right_1: float,
    n_1: float,
    right_0: float,
    n_0: float,
    margin: float,
    alpha: float = 0.05,
    planned: int = PLANNED,
) -> tuple[float, Interval]:
    """The difference of two proportions, candidate minus control, with bounds valid at every look from 100 per arm on.

    4450 of 5000 against 4500 of 5000 gives -0.01 +- 0.0186189. Without observations in both arms: 0 and [-1, 1].
    """
    if not (n_1 and n_0):
        return 0.0, Interval(-1.0, 1.0)
    lower, upper = two_arm_bounds(right_1, n_1, right_0, n_0, margin, alpha, planned)
    return right_1 / n_1 - right_0 / n_0, Interval(max(-1.0, float(lower)), min(1.0, float(upper)))


def two_arm_bounds(
    right_1: npt.ArrayLike,
    n_1: npt.ArrayLike,
    right_0: npt.ArrayLike,
    n_0: npt.ArrayLike,
    margin: float,
    alpha: float = 0.05,
    planned: int = PLANNED,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(lower, upper) of `two_arm_sequence`, elementwise over arrays that broadcast.

    A proportion near 1 shows no variance until its first failure, which makes an early bound too sure of the arm that
    looks better. So the variance of that arm counts as at least margin (1 - margin): the candidate's for the lower
    bound, the control's for the upper one. Unpaired 1.00 against 0.99 at the margin 0.01, looked at after each of
    20,000 units: false `non_inferior` in 4.9 % of runs without the floor, 0.4 % with it.
    """
    right_1, n_1, right_0, n_0 = (np.asarray(value, np.float64) for value in (right_1, n_1, right_0, n_0))
    n, floor = n_1 + n_0, margin * (1 - margin)
    estimate = right_1 / n_1 - right_0 / n_0
    variance_1, variance_0 = _variance(right_1, n_1), _variance(right_0, n_0)

    def half_width(of_1: npt.NDArray[np.float64], of_0: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return sequence_half_width(np.sqrt(n * (of_1 / n_1 + of_0 / n_0)), n, alpha, planned)

    return (
        estimate - half_width(np.maximum(variance_1, floor), variance_0),
        estimate + half_width(variance_1, np.maximum(variance_0, floor)),
    )


def _variance(right: npt.NDArray[np.float64], n: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of one observation, with one success and one failure added."""
    share = (right + 1) / (n + 2)
    return np.asarray(share * (1 - share), dtype=np.float64)
