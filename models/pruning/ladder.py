"""Which of many children are tested, in which order, and which of those that pass is taken.

An order that is fixed by other rows than those that confirm can be tested one after the other until the first failure:
fixed-sequence testing, as in Learn then Test (arXiv 2110.01052), of a front, as in Pareto Testing (arXiv 2210.07913).
It finds something if it begins with what is safe. On few rows, that cannot be read off the labels that a child has
right: most children tie there, and of those that differ, the one that gained most was lucky. So the order goes by how
far a child moved from its parent, and none is ranked higher for what it gained.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from models.pruning.confirm import change
from models.pruning.front import front
from models.pruning.race import Run, distance

C = TypeVar("C")


def ladder(candidates: Iterable[C], runs: Callable[[C], Run], parent: Run, tolerance: float) -> tuple[C, ...]:
    """The front of bytes and distance from the parent, from the largest and nearest to the smallest.

    Left out is what, on the rows of these runs, lost more than the tolerance (a fraction) by over a standard error. A
    doubtful one stays: it comes at the end, where it puts none before it at risk.
    """
    known = {candidate: runs(candidate) for candidate in candidates}
    ascending = front(known, lambda c: known[c].bytes, lambda c: -distance(parent, known[c]))
    return tuple(c for c in ascending[::-1] if sum(change(parent.right_N, known[c].right_N)) > -tolerance)


def taken(passed: Sequence[C], reference: C | None, runs: Callable[[C], Run]) -> C | None:
    """Of those that passed, in the order of the ladder, the last that is not behind the reference; else the last.

    runs may be of all rows, those that confirm too: whichever is taken has passed, and that none that passes is wrong
    is what the 95 % are about. The reference itself is not tested.
    """
    good = [c for c in passed if reference is None or not is_behind(runs(c), runs(reference))]
    return good[-1] if good else passed[-1] if passed else None


def is_behind(run: Run, other: Run) -> bool:
    """Fewer rows right, or true labels that are less probable on average, by over a standard error.

    Where few rows change, the second tells more. Not cross-entropy, which falls for a child that is merely less sure
    than a parent that was too sure.
    """
    less_N = other.confidence - run.confidence
    error = float(less_N.std()) / math.sqrt(len(less_N))
    return bool(run.right_N.sum() < other.right_N.sum() or less_N.mean() > error)
