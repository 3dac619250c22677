"""Which threshold of a cascade keeps a wanted agreement, and what each one costs; from rows that nothing was fitted on.

Legend: N rows.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
CONFIDENCE = 0.95
DIGITS = 7
# Strict to loose. Models are nearly sure of most rows, so steps are even in log-odds down to a half: .999994, .999992,
# ..., .562177, then .5, .45, ..., 0. It must not depend on the rows, or the walk would try more than it pays for.
GRID = (
    *(round(1 / (1 + math.exp(-quarters / 4)), DIGITS) for quarters in range(48, 0, -1)),
    *(round(0.5 - twentieths / 20, 2) for twentieths in range(11)),
)


@dataclass(frozen=True)
class Outcomes:
    """What both models did with N rows. group_N: numbers of the groups of rows that are not independent, from 0."""

    confidence_N: Floats
    agrees_N: Bools
    candidate_right_N: Bools
    control_right_N: Bools
    group_N: Ints

    @property
    def rows(self) -> int:
        return len(self.confidence_N)


@dataclass(frozen=True)
class Point:
    """A cascade at one threshold.

    accepted: rows that the candidate answers; share: of all. agreement: share of those that the control answers alike,
    None without any; bound: its one-sided 95 % lower bound. effective: how many independent rows the accepted ones are
    worth. accuracy: of the cascade, on all rows. work: arithmetic per row, of what the control alone would do.
    """

    threshold: float
    accepted: int
    share: float
    agreement: float | None
    bound: float
    effective: float
    accuracy: float
    work: float


def curve(outcomes: Outcomes, thresholds: Iterable[float], candidate_work: float) -> tuple[Point, ...]:
    """The cascade at each threshold, in the given order. candidate_work: of the candidate, where the control's is 1."""
    dependence = intraclass(~outcomes.agrees_N, outcomes.group_N)
    return tuple(_point(outcomes, threshold, candidate_work, dependence) for threshold in thresholds)


def _point(outcomes: Outcomes, threshold: float, candidate_work: float, dependence: float) -> Point:
    accept_N = outcomes.confidence_N >= threshold
    accepted, agreed = int(accept_N.sum()), int(outcomes.agrees_N[accept_N].sum())
    effective = effective_rows(outcomes.group_N[accept_N], dependence)
    return Point(
        threshold=threshold,
        accepted=accepted,
        share=accepted / outcomes.rows,
        agreement=agreed / accepted if accepted else None,
        bound=lower_bound(agreed / accepted * effective, effective) if accepted else 0.0,
        effective=effective,
        accuracy=float(np.where(accept_N, outcomes.candidate_right_N, outcomes.control_right_N).mean()),
        work=candidate_work + 1 - accepted / outcomes.rows,
    )


def loosest_passing(points: Sequence[Point], agreement: float) -> Point | None:
    """Walk from strict to loose while the bound holds `agreement`, stop at the first failure, keep the last that held.

    The walk begins where a perfect record could pass at all. That follows from the confidences and never from who
    agreed, so the thresholds are tested in an order fixed beforehand, and the chance that the kept one agrees less than
    wanted is at most 5 %, however many were tried (fixed-sequence testing, as in arXiv 2110.01052).
    """
    kept = None
    for point in points:
        if point.effective < fewest_rows(agreement):
            continue
        if point.bound < agreement:
            break
        kept = point
    return kept


def fewest_rows(agreement: float) -> float:
    """Independent rows that must all agree for the bound to hold `agreement`: 298.07 for .99."""
    return math.log(1 - CONFIDENCE) / math.log(agreement)


def threshold_for(confidence_N: Floats, share: float) -> float:
    """The strictest threshold that accepts at least `share` of the rows, rounded down to what a file will hold."""
    wanted = math.ceil(share * len(confidence_N) - 1e-9)
    if wanted <= 0:
        return 1.0
    scale = 10.0**DIGITS
    return math.floor(float(np.sort(confidence_N)[-wanted]) * scale) / scale


def lower_bound(agreed: float, rows: float) -> float:
    """Clopper-Pearson, one-sided 95 %. 300 of 300 give .99006, 990 of 1,000 give .98310; whole numbers or not."""
    return float(beta.ppf(1 - CONFIDENCE, agreed, rows - agreed + 1)) if agreed > 0 else 0.0


def intraclass(hit_N: Bools, group_N: Ints) -> float:
    """How alike two rows of one group are, from 0, not at all, to 1: the correlation over all such pairs, at least 0.

    0 if every row is a hit or none is: then nothing can be seen of it.
    """
    rate = float(hit_N.mean())
    size_G = np.bincount(group_N).astype(np.float64)
    pairs = float((size_G * (size_G - 1)).sum())
    if pairs == 0 or rate in (0.0, 1.0):
        return 0.0
    excess_G = np.bincount(group_N, weights=hit_N) - rate * size_G
    spread = rate * (1 - rate)
    return float(np.clip(((excess_G**2).sum() - len(hit_N) * spread) / pairs / spread, 0, 1))


def effective_rows(group_N: Ints, dependence: float) -> float:
    """Independent rows that would tell as much: rows over the design effect 1 + (m - 1) * dependence (Kish 1965), where
    m is the size of the group that a row finds itself in, on average."""
    if not len(group_N):
        return 0.0
    size_G = np.bincount(group_N).astype(np.float64)
    met = float((size_G**2).sum()) / len(group_N)
    return len(group_N) / (1 + (met - 1) * dependence)
