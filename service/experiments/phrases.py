"""A report in short phrases and plain sentences, the same on its page and in a terminal."""

from collections.abc import Sequence

from service.cli.output import size
from service.experiments.document import ArmReport, Report, Srm

HEADLINES = {
    "invalid": "This comparison is not valid",
    "insufficient_data": "Too early to say",
    "inferior": "No: worse than allowed",
    "superior": "Yes: it is better",
    "non_inferior": "Yes: not worse than allowed",
    "undecided": "Not decided yet",
}
STATES = {"running": "running", "paused": "paused", "stopped": "ended"}
METHODS = {
    "paired_betting": "from labelled items that both answered",
    "label_free": "bounded by how often they disagree, without labels",
    "two_arm_sequence": "between two groups of labelled items",
}
LATENCY_WORDS = {
    "faster": "The candidate is faster: the intervals of the two p95, which hold at every look, do not overlap.",
    "slower": "The candidate is slower: the intervals of the two p95, which hold at every look, do not overlap.",
    "undecided": "The two p95 cannot be told apart yet.",
    "contended": "Both arms ran on one device at the same time, so their latencies are shown and not judged.",
    "insufficient_data": "There are too few requests to judge latency.",
}
# The sequential evidence at which the sample ratio raises its alarm.
SRM_ALARM = 1000
UNKNOWN = "\u2013"


def question(report: Report) -> str:
    """What the experiment is asked."""
    if report.mode == "cascade":
        return f"How much can {report.candidate} answer before {report.control} is asked?"
    return f"May {report.candidate} replace {report.control}?"


def headline(report: Report) -> str:
    """The verdict in a few words. A cascade compares nothing: its arms do not answer the same items."""
    if report.cascade is not None and report.difference is None:
        share = report.cascade.accepted_share
        return "Nothing answered yet" if share is None else f"The candidate answers {100 * share:.1f} %"
    if report.worse and report.verdict == "undecided":
        return "Not decided yet, but worse"
    if report.worse and report.verdict == "non_inferior":
        return "Yes: worse, but no more than allowed"
    return HEADLINES[report.verdict]


def stand(report: Report) -> str:
    """What the experiment is doing."""
    answers = f": {report.winner} answers" if report.winner is not None else ""
    return STATES[report.state] + answers


def arms(report: Report) -> list[ArmReport]:
    """The control, then the candidate."""
    return sorted(report.arms, key=lambda arm: arm.role == "candidate")


def number(value: float, decimals: int = 1) -> str:
    """A number with a sign that lines up with plus, and no negative zero."""
    rounded = round(value, decimals)
    return f"{rounded:+.{decimals}f}".replace("-", "\u2212") if rounded else f"{0:.{decimals}f}"


def points(value: float) -> str:
    """A difference of shares in points."""
    return number(100 * value, 2)


def bounds(interval: Sequence[float | None], decimals: int = 1) -> str:
    """An interval; a bound that the data does not give is a dash."""
    return f"[{', '.join(UNKNOWN if bound is None else f'{bound:,.{decimals}f}' for bound in interval)}]"


def share(value: float | None, lower: float | None = None, upper: float | None = None) -> str:
    """A share in percent with its interval."""
    if value is None:
        return UNKNOWN
    if lower is None or upper is None:
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} {bounds((100 * lower, 100 * upper))}"


def milliseconds(value: float | None, interval: Sequence[float | None] = ()) -> str:
    """A latency with its interval: three digits that mean something."""
    if value is None:
        return UNKNOWN
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}" + (f" {bounds(interval, decimals)}" if interval else "")


def percent(value: float) -> str:
    """A percentage as it was written: 25, not 25.00."""
    return f"{value:g} %"


def p_value(value: float | None) -> str:
    """A p-value that is never said to be zero."""
    return UNKNOWN if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def evidence(value: float) -> str:
    """An e-value: how many times a bet against the hypothesis has multiplied its stake."""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def when(moment: str) -> str:
    """An RFC 3339 moment in UTC, as people read it."""
    date, _, time = moment.partition("T")
    return f"{date} {time[:8]} UTC" if time else moment


def difference_words(report: Report) -> str:
    """What the difference is, and what it rests on."""
    found = report.difference
    if found is None:
        if report.mode == "cascade":
            return "No item is answered by both arms, so there is no difference to measure: a shadow measures it."
        return "There is no difference yet: that takes true labels, sent to POST /feedback."
    said = (
        f"Candidate minus control is {points(found.estimate)} points and lies between {points(found.lower)} and "
        f"{points(found.upper)}, {METHODS[found.method]}; down to {points(-report.margin)} is allowed. The interval "
        f"holds at every look, at {percent(100 * (1 - report.alpha))} confidence."
    )
    if found.e_non_inferior is not None:
        said += (
            f" Evidence against a greater loss: {evidence(found.e_non_inferior)}, of "
            f"{evidence(2 / report.alpha)} needed."
        )
    return said


def srm_words(srm: Srm, counted: str = "units") -> str:
    """Whether the counts fit the weights."""
    numbers = (
        f"chi-square {srm.chi_square:.2f}, p {p_value(srm.p_value)}; sequential evidence "
        f"{evidence(srm.e_value)}, an alarm from {SRM_ALARM:,}"
    )
    if srm.alarm:
        return f"The {counted} do not fit the weights ({numbers}): some are lost or sent astray, so do not compare yet."
    return f"The {counted} fit the weights: {numbers}."


def agreement_words(report: Report) -> str | None:
    """How often both arms give one answer."""
    if report.agreement is None:
        return None
    said = f"Both give the same label to {100 * report.agreement:.1f} %"
    if report.agreement_interval is not None:
        said += f" {bounds([100 * bound for bound in report.agreement_interval])}"
    said += " of the items"
    if report.mean_abs_dp is not None and report.max_abs_dp is not None:
        said += (
            f"; their probabilities differ by {report.mean_abs_dp:.4f} on average and {report.max_abs_dp:.3f} at most"
        )
    return f"{said}."


def latency_words(report: Report) -> str:
    """The word for latency as a sentence, with the ratio."""
    said, ratio = LATENCY_WORDS[report.latency_ms.verdict], report.latency_ms.p95_ratio
    if ratio is not None:
        said += (
            f" The p95 ratio is {ratio.estimate:.2f} {bounds((ratio.lower, ratio.upper), 2)}, candidate over control."
        )
    return said


def memory_words(report: Report) -> str:
    """What the candidate saves, and what the comparison costs meanwhile."""
    memory = report.memory
    said = f"This process holds {size(memory.resident_bytes)} of weights for both."
    if memory.control_bytes is None or memory.candidate_bytes is None or memory.saved_ratio is None:
        return f"What each needs alone is not known while one is not loaded. {said}"
    less = f"{100 * abs(memory.saved_ratio):.1f} % {'less' if memory.saved_ratio >= 0 else 'more'}"
    basis = "; the control's size is from the manifest" if memory.basis == "manifest" else ""
    return (
        f"Served alone, {report.candidate} needs {size(memory.candidate_bytes)} instead of "
        f"{size(memory.control_bytes)}, {less}{basis}. {said}"
    )


def left_out_words(report: Report) -> str:
    """What was recorded and does not count, and what was not recorded."""
    dropped = {reason: n for reason, n in report.dropped.items() if n}
    lost = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()) or "none"
    return (
        f"Left out: {report.repeats:,} repeats of a unit, {report.overrides:,} items that named a deployment. "
        f"Dropped: {lost}."
    )


def ramp_words(report: Report) -> str | None:
    """The steps of the ramp, the present one in brackets."""
    if not report.ramp:
        return None
    steps = [f"[{step:g}]" if step == report.traffic else f"{step:g}" for step in report.ramp]
    return " \u2192 ".join(steps) + " %"
