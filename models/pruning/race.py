"""Which of many children deserve more rows: few rows for all, twice as many for the better half, and so on."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from models.progress import Progress, silent
from models.pruning.confirm import BoolArray

# One-sided 99 %: of a hundred comparisons of equals, one errs. No claim rests on it.
CLEARLY = 2.33
# Sizes within 5 % compete with each other for the next round, of which so many go on at least.
SIZE_CLASS = math.log(1.05)
FEWEST = 2
C = TypeVar("C")


@dataclass(frozen=True)
class Run:
    """What one child did on the first rows: which it had right, the sum of their cross-entropies; and what it costs."""

    right_N: BoolArray
    loss: float
    bytes: int
    flops_per_token: int = 0


@dataclass(frozen=True)
class Result(Generic[C]):
    """survivors were measured on all rows of the race; dropped says of each other after how many, and why."""

    survivors: tuple[C, ...]
    dropped: Mapping[C, tuple[int, str]]


def race(
    candidates: Iterable[C],
    measure: Callable[[C, int], Run],
    parent: Callable[[int], BoolArray],
    rounds: Sequence[int],
    tolerance: float,
    stay: Collection[C] = (),
    progress: Progress = silent,
) -> Result[C]:
    """Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) within each size, with early stops.

    measure: a candidate on the first so many rows; parent: what the parent has right there. rounds: ascending numbers
    of rows. A candidate goes for good when it is clearly below the parent by more than the tolerance (a fraction), or
    clearly below one that is no larger; after each round but the last, so does the worse half of each size.
    stay: goes on to the end, whatever it does, so that others can be compared with it.
    """
    alive = list(candidates)
    dropped: dict[C, tuple[int, str]] = {}
    for number, rows in enumerate(rounds):
        runs = {}
        for done, candidate in enumerate(alive, start=1):
            runs[candidate] = measure(candidate, rows)
            progress(done, len(alive), f"round {number + 1} of {len(rounds)}, {rows} rows: {candidate}")
        out = _hopeless(runs, parent(rows), tolerance)
        out |= _beaten({c: run for c, run in runs.items() if c not in out})
        if number + 1 < len(rounds):
            out |= _lower_half({c: run for c, run in runs.items() if c not in out and c not in stay})
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
        mean, error = _change(parent_N, run.right_N)
        if mean + CLEARLY * error < -tolerance:
            out[candidate] = f"loses {-100 * mean:.1f} points, clearly more than the tolerance"
    return out


def _beaten(runs: Mapping[C, Run]) -> dict[C, str]:
    out = {}
    for candidate, run in runs.items():
        for other, rival in runs.items():
            if rival.bytes <= run.bytes and rival.right_N.sum() > run.right_N.sum():
                mean, error = _change(run.right_N, rival.right_N)
                if mean - CLEARLY * error > 0:
                    out[candidate] = f"clearly worse than {other}, which is no larger"
                    break
    return out


def _lower_half(runs: Mapping[C, Run]) -> dict[C, str]:
    classes: dict[int, list[C]] = {}
    for candidate, run in runs.items():
        classes.setdefault(round(math.log(run.bytes) / SIZE_CLASS), []).append(candidate)
    out: dict[C, str] = {}
    for rivals in classes.values():
        # Rows right first; where they tie, as they do on few rows, the likelihood tells more.
        ranked = sorted(rivals, key=lambda c: (-int(runs[c].right_N.sum()), runs[c].loss, runs[c].bytes))
        out |= dict.fromkeys(ranked[max(FEWEST, math.ceil(len(ranked) / 2)) :], "in the worse half of its size")
    return out


def _change(before_N: BoolArray, after_N: BoolArray) -> tuple[float, float]:
    """Mean change and its standard error, as if one row more had changed: of few rows, none changing says little."""
    change_N = after_N.astype(np.int64) - before_N.astype(np.int64)
    mean = float(change_N.mean())
    variance = (float(np.abs(change_N).sum()) + 1) / (len(change_N) + 1) - mean * mean
    return mean, math.sqrt(max(variance, 0.0) / len(change_N))
