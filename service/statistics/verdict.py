"""One word for a comparison, safe to read at any moment and as often as one likes."""

from collections.abc import Iterator
from typing import Literal

from service.statistics.comparison import Comparison
from service.statistics.interval import Interval

Word = Literal["invalid", "insufficient_data", "inferior", "superior", "non_inferior", "undecided"]
Reason = Literal["sample_ratio", "label_ratio", "dropped", "revision_mixed"]

# Under this many units, per arm in a split, no bound is read: the sequence for splits is asymptotic.
FEWEST = 100
MOST_DROPPED = 0.001
DECIDED: frozenset[Word] = frozenset({"inferior", "superior", "non_inferior"})


def verdict(
    comparison: Comparison, margin: float, alpha: float = 0.05, *, is_invalid: bool = False
) -> tuple[Word, bool]:
    """(word, worse) of a comparison; `verdict_of` has the rules. margin: the greatest loss of accuracy accepted.

    Each direction is wrong in at most a share alpha / 2 of experiments, all looks of an experiment together.
    is_invalid: there is any of the `invalid_reasons`.
    """
    _, bounds = comparison.difference(margin, alpha)
    return verdict_of(bounds, comparison.fewest, margin, is_invalid=is_invalid)


def verdict_of(bounds: Interval, fewest: float, margin: float, *, is_invalid: bool = False) -> tuple[Word, bool]:
    """(word, worse) of a difference, candidate minus control, with bounds that hold at every look; first match wins.

    `invalid`; `insufficient_data` under 100 units in the smaller arm; `inferior`: surely worse by more than the margin;
    `superior`: surely better; `non_inferior`: surely not worse by more than the margin; else `undecided`. worse: surely
    worse, by however little, so that a `non_inferior` candidate can be worse too; not said with the first two words.
    """
    if is_invalid or fewest < FEWEST:
        return "invalid" if is_invalid else "insufficient_data", False
    worse = bounds.upper < 0
    if bounds.upper < -margin:
        return "inferior", worse
    if bounds.lower > 0:
        return "superior", worse
    return "non_inferior" if bounds.lower > -margin else "undecided", worse


def invalid_reasons(
    *, sample_ratio: bool, label_ratio: bool, dropped: int, recorded: int, revision_mixed: bool = False
) -> Iterator[Reason]:
    """Why nothing may be concluded, if anything.

    sample_ratio, label_ratio: alarms on the units and the labelled units of the arms. dropped, recorded: exposures
    given up and kept; with more than 0.1 % lost, what is left may not be a fair sample.
    """
    if sample_ratio:
        yield "sample_ratio"
    if label_ratio:
        yield "label_ratio"
    if dropped > MOST_DROPPED * (dropped + recorded):
        yield "dropped"
    if revision_mixed:
        yield "revision_mixed"
