"""A verdict in one or two plain sentences. Bounds are rounded away from the claim, so no sentence says too much."""

import math
from collections.abc import Callable, Sequence

from service.experiments.document import Difference, Report, Word
from service.statistics.comparison import Comparison
from service.statistics.verdict import FEWEST, Reason

# What a comparison counts.
COUNTED = {
    "paired_betting": "labelled items that both answered",
    "label_free": "items that both answered",
    "two_arm_sequence": "labelled units in the smaller arm",
}


def verdict_words(report: Report, invalid: Sequence[Reason]) -> str:
    """What the report concludes, for somebody who knows no statistics. invalid: why it is not to be trusted, if so."""
    if report.cascade is not None:
        return _cascade(report)
    if invalid:
        clauses = " and ".join(REASONS[reason](report) for reason in invalid)
        return _capitalised(f"{clauses}: the comparison cannot be trusted.")
    if report.difference is None or report.verdict == "insufficient_data":
        return _too_few(report)
    return SENTENCES[report.verdict](report, report.difference)


# Why the numbers are not to be trusted, as clauses.
REASONS: dict[Reason, Callable[[Report], str]] = {
    "sample_ratio": lambda _: "the units do not reach the arms in the shares that the weights promise",
    "label_ratio": lambda _: "true labels do not come for both arms alike",
    "dropped": lambda report: f"{report.dropped['events']:,} records were lost",
}


def needed_words(comparison: Comparison, word: Word, more: int | None) -> str:
    """What is missing for a decision. more: units that would do if the rates stay, None if no number would."""
    if word == "insufficient_data":
        counted = COUNTED[comparison.method]
        return f"Too early to say: there are {round(comparison.fewest):,} {counted}, and {FEWEST} are needed at least."
    if more is None:
        return "At the rates seen so far, no number of units would decide it."
    return f"If the rates stay, about {roughly(more):,} more units will decide it."


def _superior(report: Report, difference: Difference) -> str:
    return (
        f"{report.candidate} is more accurate than {report.control}, by at least {_least(difference.lower)} points "
        f"({_points(difference.estimate)} estimated)."
    )


def _non_inferior(report: Report, difference: Difference) -> str:
    most = f"at most {_most(-difference.lower)} points; {_allowed(report)}"
    if difference.method == "label_free":
        return (
            f"{report.candidate} and {report.control} give the same label so often that their accuracies differ by "
            f"{most}. No true labels were needed."
        )
    return f"{report.candidate} is less accurate than {report.control} by {most}.{_worse(report, difference)}"


def _inferior(report: Report, difference: Difference) -> str:
    return (
        f"{report.candidate} is less accurate than {report.control} by at least {_least(-difference.upper)} points; "
        f"{_allowed(report)}."
    )


def _undecided(report: Report, difference: Difference) -> str:
    said = (
        f"It is not known yet whether {report.candidate} is less accurate than {report.control} by more than the "
        f"{_margin(report)} allowed: the difference lies between {_points(difference.lower)} and "
        f"{_points(difference.upper)}."
    )
    return said + _worse(report, difference)


SENTENCES = {
    "superior": _superior,
    "non_inferior": _non_inferior,
    "inferior": _inferior,
    "undecided": _undecided,
}


def _worse(report: Report, difference: Difference) -> str:
    return f" It is worse, though, by at least {_least(-difference.upper)} points." if report.worse else ""


def _too_few(report: Report) -> str:
    if report.needed is not None:
        return report.needed.words
    return f"There is nothing to compare {report.candidate} with {report.control} by yet."


def _cascade(report: Report) -> str:
    assert report.cascade is not None
    share = report.cascade.accepted_share
    if share is None:
        return f"No item has met the cascade of {report.candidate} and {report.control} yet."
    return (
        f"{report.candidate} was sure enough to answer {100 * share:.1f} % of the items, {report.control} was asked "
        "for the rest. Nothing is compared, as nobody judges both answers, and no memory is saved: both are loaded."
    )


def _margin(report: Report) -> str:
    points = f"{100 * report.margin:g}"
    return f"{points} point" if points == "1" else f"{points} points"


def _allowed(report: Report) -> str:
    margin = _margin(report)
    return f"{margin} {'are' if margin.endswith('s') else 'is'} allowed"


def _points(difference: float) -> str:
    rounded = round(100 * difference, 2) or 0.0
    return f"{rounded:+.2f}".replace("-", "\u2212")


def _least(difference: float) -> str:
    """A lower bound in points, rounded down."""
    return f"{math.floor(1e4 * difference + 1e-9) / 100:.2f}"


def _most(difference: float) -> str:
    """An upper bound in points, rounded up."""
    return f"{max(math.ceil(1e4 * difference - 1e-9), 0) / 100:.2f}"


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def roughly(units: int) -> int:
    """A forecast with the two digits that it deserves, rounded up: 4,535,810 is 4,600,000."""
    step: int = 10 ** max(len(str(units)) - 2, 0)
    return -(-units // step) * step
