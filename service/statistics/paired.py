"""Two classifiers on the same items: exact and score tests of a fixed sample, and bets that hold at every look.

b: items that only the control got right. c: items that only the candidate got right. n: all pairs. The difference is
the candidate's accuracy minus the control's, (c - b) / n. Counts may be fractions, for projections.
"""

from math import inf, isinf, log, sqrt

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import binom, norm

from service.statistics.evidence import from_log
from service.statistics.interval import Interval

# Shares of the money put at stake. A mixture of few bets loses at most log 7 against the best of them; halving down
# to 1/64 covers differences from the whole down to about a percent, 0.9 decides quickly where nothing is discordant.
STAKES = np.array([0.9, *(2.0**-k for k in range(1, 7))])
# Bounds are found to a width of 2 / 64^8, which is 2^-47: far below what is printed, far above rounding.
PARTS, ROUNDS = 64, 8


def mcnemar_p(b: int, c: int) -> float:
    """Two-sided p-value of the exact McNemar test: are b and c equally likely? For a sample size fixed beforehand.

    `min(1, 2 P[X <= min(b, c)])`, X binomial(b + c, 1/2); 1 without discordant pairs. (6, 1) gives 0.125.
    """
    return min(1.0, 2 * float(binom.cdf(min(b, c), b + c, 0.5))) if b + c else 1.0


def tango_z(b: int, c: int, n: int, theta: float) -> float:
    """Score statistic of Tango (Statistics in Medicine 17, 1998) for a difference of theta in [-1, 1].

    Standard normal if theta is true, positive if the candidate does better, infinite where theta is impossible.
    For a sample size fixed beforehand: not inferior by a margin m at 2.5 % if `tango_z(b, c, n, -m) > 1.959964`.
    """
    surplus = c - b - n * theta
    half = (2 * n - c + b) * theta - b - c
    # The probability of "only the control" that fits best under theta.
    only_control = (sqrt(max(half * half + 8 * n * b * theta * (1 - theta), 0.0)) - half) / (4 * n)
    variance = n * (2 * only_control + theta * (1 - theta))
    if abs(surplus) <= 1e-12 * n:
        return 0.0
    return surplus / sqrt(variance) if variance > 1e-12 else inf * surplus


def tango_interval(b: int, c: int, n: int, confidence: float = 0.95) -> Interval:
    """The differences that Tango's score test does not reject. For a sample size fixed beforehand; n >= 1."""
    z, estimate = float(norm.ppf((1 + confidence) / 2)), (c - b) / n

    def bound(end: float, target: float) -> float:
        def excess(theta: float) -> float:
            value = tango_z(b, c, n, theta)
            return (1e9 if value > 0 else -1e9) if isinf(value) else value - target

        return end if excess(end) * excess(estimate) >= 0 else float(brentq(excess, end, estimate, xtol=1e-12))

    return Interval(bound(-1.0, z), bound(1.0, -z))


def log_betting_e_value(
    b: npt.ArrayLike, c: npt.ArrayLike, n: npt.ArrayLike, margin: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Natural logarithm of `betting_e_value`, elementwise over arrays that broadcast. margin in (-1, 1)."""
    b, c, n, margin = (np.asarray(value, dtype=np.float64)[..., None] for value in (b, c, n, margin))
    stake = STAKES / (1 + margin)
    money = b * np.log1p(-STAKES) + c * np.log1p(stake * (1 - margin)) + (n - b - c) * np.log1p(-stake * margin)
    most = money.max(axis=-1)
    return np.asarray(most + np.log(np.exp(money - most[..., None]).mean(axis=-1)), dtype=np.float64)


def betting_e_value(b: float, c: float, n: float, margin: float) -> float:
    """Evidence, valid at every look, against "the candidate is better by at most `margin`"; margin in (-1, 1).

    A gambler stakes the share g of the money on each pair: it is multiplied by 1 - g where only the control was right,
    by `1 + g (1 - m) / (1 + m)` where only the candidate was, and by `1 - g m / (1 + m)` elsewhere. The value is the
    mean over seven g of what 1 became. Betting e-process of arXiv 2010.09686, exact for any sample size.
    With the margin -0.01: (0, 0, 600) gives 37.016, (75, 75, 5000) 344.76.
    """
    return from_log(float(log_betting_e_value(b, c, n, margin)))


def betting_interval(b: float, c: float, n: float, alpha: float = 0.05) -> Interval:
    """The differences that no bet has refuted: covers the true one at all looks together with chance 1 - alpha.

    The lower bound is the m at which `betting_e_value(b, c, n, m)` is 2 / alpha, so it is above -margin exactly if the
    e-value at -margin is above 2 / alpha; the upper bound is that of exchanged arms. [-1, 1] for no pairs at all.
    """
    return Interval(_lower(b, c, n, alpha), -_lower(c, b, n, alpha))


def label_free_interval(
    disagreements: float, n: float, alpha: float = 0.05, *, only_control: float = 0, only_candidate: float = 0
) -> Interval:
    """Bounds of the difference with few true labels or none, valid at every look, whichever items were labelled.

    Where both answer the same, no label can tell them apart. So the lower bound counts each disagreement as won by the
    control unless a label says otherwise, and the upper one the reverse. Without labels the bounds are -x and x and can
    never tell which one is the better; with a label for every disagreement they are those of labels for all n items.
    only_control, only_candidate: disagreements whose label says that this one alone was right.
    """
    lower = _lower(disagreements - only_candidate, only_candidate, n, alpha)
    return Interval(lower, -_lower(disagreements - only_control, only_control, n, alpha))


def _lower(b: float, c: float, n: float, alpha: float) -> float:
    """The greatest margin refuted. Evidence falls as the margin rises, so each round keeps one of 64 equal parts."""
    needed = log(2 / alpha)
    refuted, standing = -1.0, 1.0
    for _ in range(ROUNDS):
        margin_M = np.linspace(refuted, standing, PARTS + 1)
        found = int((log_betting_e_value(b, c, n, margin_M[1:-1]) >= needed).sum())
        refuted, standing = float(margin_M[found]), float(margin_M[found + 1])
    return refuted
