"""Which of many children deserve more rows: few rows for all, twice as many for the better half, and so on."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from models.progress import Progress, silent
from models.pruning.confirm import BoolArray, change

# One-sided 99 %: of a hundred comparisons of equals, one errs. No claim rests on it.
CLEARLY = 2.33
# Sizes within 5 % compete with each other for the next round, of which so many go on at least.
SIZE_CLASS = math.log(1.05)
FEWEST = 2
C = TypeVar("C")


@dataclass(frozen=True)
class Run:
    """What one child did on the first rows: which it had right, their cross-entropies in nats; and what it costs."""

    right_N: BoolArray
    loss_N: npt.NDArray[np.float32]
    bytes: int
    flops_per_token: int = 0

    @property
    def confidence(self) -> npt.NDArray[np.float64]:
        """Of each row, the probability of its true label."""
        found_N: npt.NDArray[np.float64] = np.exp(-self.loss_N.astype(np.float64))
        return found_N


def distance(parent: Run, child: Run) -> float:
    """How far the probability of a row's true label moves, on average: from 0 to 1.

    It bounds the change of accuracy there would be if labels were drawn from the probabilities, and tells more than
    whole rows do: of most children, few rows change sides.
    """
    return float(np.abs(child.confidence - parent.confidence).mean())


@dataclass(frozen=True)
class Result(Generic[C]):
    """survivors were measured on all rows of the race; dropped says of each other after how many, and why."""

    survivors: tuple[C, ...]
    dropped: Mapping[C, tuple[int, str]]


def race(
    candidates: Iterable[C],
    measure: Callable[[C, int], Run],
    parent: Callable[[int], Run],
    rounds: Sequence[int],
    tolerance: float,
    stay: Collection[C] = (),
    progress: Progress = silent,
) -> Result[C]:
    """Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) within each size, with early stops.

    measure: a candidate on the first so many rows; parent: the parent there. rounds: ascending numbers
    of rows. A candidate goes for good when it is clearly below the parent by more than the tolerance (a fraction), or
    clearly below one that is no larger; after each round but the last, so does the half of each size that is
    further from the parent.
    stay: goes on to the end, whatever it does, so that others can be compared with it.
    """
    alive = list(candidates)
    dropped: dict[C, tuple[int, str]] = {}
    for number, rows in enumerate(rounds):
        runs = {}
        for done, candidate in enumerate(alive, start=1):
            runs[candidate] = measure(candidate, rows)
            progress(done, len(alive), f"round {number + 1} of {len(rounds)}, {rows} rows: {candidate}")
        out = _hopeless(runs, parent(rows).right_N, tolerance)
        out |= _beaten({c: run for c, run in runs.items() if c not in out})
        if number + 1 < len(rounds):
            out |= _further_half({c: run for c, run in runs.items() if c not in out and c not in stay}, parent(rows))
        dropped |= {c: (rows, why) for c, why in out.items() if c not in stay}
        alive = [c for c in alive if c not in dropped]
    return Result(tuple(alive), dropped)


def doubling(first: int, last: int) -> tuple[int, ...]:
    """Rows per round: last, and halves of it down to `first`, ascending."""
    rounds = [last]
    while rounds[0] // 2 >= first:
        rounds.insert(0, rounds[0] // 2)
    return tuple(rounds)


def _hopeless(runs: Mapping[C, Run], parent_N: BoolArray, tolerance: float) -> dict[C, str]:
    out = {}
    for candidate, run in runs.items():
        mean, error = change(parent_N, run.right_N)
        if mean + CLEARLY * error < -tolerance:
            out[candidate] = f"loses {-100 * mean:.1f} points, clearly more than the tolerance"
    return out


def _beaten(runs: Mapping[C, Run]) -> dict[C, str]:
    out = {}
    for candidate, run in runs.items():
        for other, rival in runs.items():
            if rival.bytes <= run.bytes and rival.right_N.sum() > run.right_N.sum():
                mean, error = change(run.right_N, rival.right_N)
                if mean - CLEARLY * error > 0:
                    out[candidate] = f"clearly worse than {other}, which is no larger"
                    break
    return out


def _further_half(runs: Mapping[C, Run], parent: Run) -> dict[C, str]:
    classes: dict[int, list[C]] = {}
    for candidate, run in runs.items():
        classes.setdefault(round(math.log(run.bytes) / SIZE_CLASS), []).append(candidate)
    out: dict[C, str] = {}
    for rivals in classes.values():
        ranked = sorted(rivals, key=lambda c: (distance(parent, runs[c]), runs[c].bytes))
        out |= dict.fromkeys(
            ranked[max(FEWEST, math.ceil(len(ranked) / 2)) :],
            "in that half of its size which is further from the parent",
        )
    return out
