"""Whether a child is not worse than its parent by more than a tolerance: bounds on the same rows, and many candidates.

Of n rows, the child alone has b right and the parent alone c; the difference of accuracies is (b - c) / n. A bound is
one-sided at 95 %, and has to hold twice:

    rows    an exact test: the trinomial of (b, c), ordered by Tango's score statistic (Statistics in Medicine 1998,
            17:891), its probability maximised over the unknown share of rows on which the two differ, within that
            share's 99.9 % bound (Berger and Boos, JASA 1994). It also holds where hardly a row differs; a bootstrap,
            which draws only what was seen, would be certain there.
    groups  rows of a group go together: the difference as a ratio of sums over groups, with Student's t.

The first takes rows as independent, the second is an approximation for many groups; the lower of the two counts.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, binom, t

ERROR = 0.05
# Of the error, what is spent on bounding the share of rows that differ.
SHARE_ERROR = 0.001
SHARES = 33
BISECTIONS = 20
BoolArray = npt.NDArray[np.bool_]
T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """Accuracy of the child minus accuracy of the parent, as fractions. lower: the one-sided 95 % bound."""

    value: float
    lower: float
    gained: int
    lost: int
    rows: int
    groups: int


def difference(parent_N: BoolArray, child_N: BoolArray, group_N: npt.ArrayLike) -> Difference:
    """What is right on the same rows, whose groups are numbers."""
    gained, lost = int((child_N & ~parent_N).sum()), int((parent_N & ~child_N).sum())
    change_N = child_N.astype(np.float64) - parent_N.astype(np.float64)
    lower = min(rows_bound(len(change_N), gained, lost), groups_bound(change_N, group_N))
    return Difference(float(change_N.mean()), lower, gained, lost, len(change_N), np.unique(np.asarray(group_N)).size)


def is_not_worse(parent_N: BoolArray, child_N: BoolArray, group_N: npt.ArrayLike, tolerance: float) -> bool:
    """True if both bounds are above -tolerance, a fraction. What `difference` shows is the same up to rounding."""
    gained, lost = int((child_N & ~parent_N).sum()), int((parent_N & ~child_N).sum())
    change_N = child_N.astype(np.float64) - parent_N.astype(np.float64)
    return (
        groups_bound(change_N, group_N) > -tolerance and rows_p_value(len(change_N), gained, lost, -tolerance) <= ERROR
    )


def descend(ladder: Iterable[T], passes: Callable[[T], bool]) -> tuple[tuple[T, ...], T | None]:
    """Test an order that was fixed beforehand until the first failure: those that passed, and the one that failed.

    With each test at 5 %, the chance that any wrong candidate passes is 5 % in all: for that, the first wrong one of
    the order has to pass. (Going on until the first success, the other way round, gives each wrong one a chance.)
    """
    passed: list[T] = []
    for candidate in ladder:
        if not passes(candidate):
            return tuple(passed), candidate
        passed.append(candidate)
    return tuple(passed), None


def groups_bound(change_N: npt.NDArray[np.float64], group_N: npt.ArrayLike) -> float:
    """Lower bound of a mean whose rows come in groups; -1 for a single group."""
    _, index_N = np.unique(np.asarray(group_N), return_inverse=True)
    size_G = np.bincount(index_N)
    mean = float(change_N.mean())
    if size_G.size < 2:
        return -1.0
    residual_G = np.bincount(index_N, weights=change_N) - mean * size_G
    error = math.sqrt(size_G.size / (size_G.size - 1) * float(np.square(residual_G).sum())) / len(change_N)
    return mean - float(t.ppf(1 - ERROR, size_G.size - 1)) * error


@lru_cache(maxsize=4096)
def rows_bound(rows: int, gained: int, lost: int) -> float:
    """The least difference that the exact test does not reject, to a millionth."""
    low, high = -1.0, (gained - lost) / rows
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rows_p_value(rows, gained, lost, middle) <= ERROR else (low, middle)
    return low


@lru_cache(maxsize=65536)
def rows_p_value(rows: int, gained: int, lost: int, limit: float) -> float:
    """The chance, if the difference is `limit`, of a result that speaks at least so much for a greater one."""
    differing = gained + lost
    most = 1.0 if differing == rows else float(beta.ppf(1 - SHARE_ERROR, differing + 1, rows - differing))
    if most <= abs(limit):  # so few rows differ that the difference cannot be as large
        return SHARE_ERROR if limit < 0 else 1.0
    count_M = np.arange(int(binom.ppf(1 - 1e-9, rows, most)) + 1)
    gained_MB = np.arange(count_M.size)[None, :]
    lost_MB = count_M[:, None] - gained_MB
    observed = float(_score(rows, np.array(gained), np.array(lost), limit))
    extreme_MB = (lost_MB >= 0) & (_score(rows, gained_MB, np.maximum(lost_MB, 0), limit) >= observed - 1e-9)
    # Of so many rows that differ, those with enough gains are extreme.
    enough_M = count_M + 1 - extreme_MB.sum(1)
    share_S = np.geomspace(max(abs(limit), most * 1e-3), most, SHARES)[:, None]
    gain_S = np.clip((share_S + limit) / (2 * share_S), 0.0, 1.0)
    p_SM = np.asarray(binom.pmf(count_M, rows, share_S) * binom.sf(enough_M - 1, count_M, gain_S))
    return min(1.0, float(p_SM.sum(1).max()) + SHARE_ERROR)


def _score(
    rows: int, gained: npt.NDArray[np.int64], lost: npt.NDArray[np.int64], limit: float
) -> npt.NDArray[np.float64]:
    """Tango's statistic: distance from the limit in standard errors, at the likeliest shares with that difference."""
    b = -(gained + lost) + (2 * rows - gained + lost) * limit
    c = -lost * limit * (1 - limit)
    share_lost = (np.sqrt(np.maximum(b * b - 8 * rows * c, 0.0)) - b) / (4 * rows)
    variance = np.maximum(rows * (2 * share_lost + limit * (1 - limit)), 1e-12)
    score: npt.NDArray[np.float64] = (gained - lost - rows * limit) / np.sqrt(variance)
    return score


def rows_to_confirm(tolerance: float) -> int:
    """Rows below which nothing can be confirmed, not even that no row at all has changed."""
    return math.ceil(math.log(ERROR - SHARE_ERROR) / math.log1p(-tolerance))


def change(before_N: BoolArray, after_N: BoolArray) -> tuple[float, float]:
    """Mean change and roughly its standard error, for choosing and not for a claim.

    As if one row more had changed: of few rows, none changing says little.
    """
    change_N = after_N.astype(np.int64) - before_N.astype(np.int64)
    mean = float(change_N.mean())
    variance = (float(np.abs(change_N).sum()) + 1) / (len(change_N) + 1) - mean * mean
    return mean, math.sqrt(max(variance, 0.0) / len(change_N))


def numbered(groups: Sequence[str]) -> npt.NDArray[np.int64]:
    """Groups as numbers; a row without a group stands for itself."""
    names = [group or f"\0{number}" for number, group in enumerate(groups)]
    numbers: npt.NDArray[np.int64] = np.unique(names, return_inverse=True)[1]
    return numbers
