"""The tables of a report, for its page and for a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass

from service.experiments.document import ClassReport, Report, ReportLine
from service.experiments.phrases import (
    HEADLINES,
    UNKNOWN,
    arms,
    milliseconds,
    number,
    p_value,
    percent,
    share,
    when,
)

# Below this a class's recalls differ by more than chance, after Holm.
CLASS_ALPHA = 0.05


@dataclass(frozen=True)
class Table:
    """A caption, columns, and rows of text. The first column names its row; columns in `words` are words, others
    numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: tuple[int, ...] = ()
    mark: str | None = None


def arm_table(report: Report) -> Table:
    """What was sent to whom, and what came of it. Weights are there in a split only, fallbacks if there were any, units
    where arms have units of their own."""
    rows = []
    for arm in arms(report):
        rows.append(
            {
                "arm": arm.deployment,
                "role": arm.role,
                "weight": None if arm.weight is None else percent(arm.weight),
                "units": None if report.mode == "shadow" else f"{arm.units:,}",
                "items": f"{arm.requests:,}",
                "errors": f"{arm.errors:,}",
                "fallbacks": f"{arm.fallbacks:,}" if any(other.fallbacks for other in report.arms) else None,
                "labelled": f"{arm.labelled:,}",
                "right, %": share(arm.accuracy, arm.accuracy_lower, arm.accuracy_upper),
                "device s per 1,000": UNKNOWN
                if arm.device_seconds_per_1000 is None
                else f"{arm.device_seconds_per_1000:.2f}",
            }
        )
    columns = tuple(name for name in rows[0] if any(row[name] is not None for row in rows)) if rows else ("arm",)
    return Table(
        "Arms, by the one that was intended; accuracy with its 95 % Wilson interval",
        columns,
        [tuple(row[name] or "" for name in columns) for row in rows],
        words=(1,),
    )


def pairs_table(report: Report) -> Table | None:
    """The two arms against each other on the same labelled items."""
    pairs = report.pairs
    if pairs is None:
        return None
    return Table(
        f"Labelled units that both arms answered; the candidate failed on {pairs.candidate_failed:,} pairs in all",
        ("", "candidate right", "candidate wrong"),
        [
            ("control right", f"{pairs.both_right:,}", f"{pairs.only_control:,}"),
            ("control wrong", f"{pairs.only_candidate:,}", f"{pairs.both_wrong:,}"),
        ],
    )


def cascade_table(report: Report) -> Table | None:
    """Where the items of a cascade were answered."""
    found = report.cascade
    if found is None:
        return None
    total = found.accepted + found.escalated + found.fallback
    outcomes = (
        ("accepted", found.accepted, f"the candidate was sure enough: at least {found.threshold:g}"),
        ("escalated", found.escalated, "the control answered"),
        ("fallback", found.fallback, "the control could not, so the candidate's answer stood"),
    )
    return Table(
        "Where items were answered",
        ("outcome", "items", "share, %", "why"),
        [(name, f"{n:,}", share(n / total if total else None), why) for name, n, why in outcomes],
        words=(3,),
    )


def latency_table(report: Report) -> Table:
    """Quantiles of both arms."""
    found = report.latency_ms.arms
    names = [arm.deployment for arm in arms(report) if arm.deployment in found]
    return Table(
        "Milliseconds from arrival to answer, with 95 % intervals of the order statistics",
        ("arm", "requests", "p50", "p95", "p99"),
        [
            (
                name,
                f"{found[name].n:,}",
                milliseconds(found[name].p50, found[name].p50_interval),
                milliseconds(found[name].p95, found[name].p95_interval),
                milliseconds(found[name].p99, found[name].p99_interval),
            )
            for name in names
        ],
    )


def is_regression(row: ClassReport) -> bool:
    """Whether a class's recalls differ by more than chance."""
    return row.p_value is not None and row.p_value < CLASS_ALPHA


def classes(report: Report) -> list[ClassReport]:
    """Regressions first, then by what is lost; labels that one arm never met come last."""

    def loss(row: ClassReport) -> float:
        control, candidate = row.recall.get(report.control), row.recall.get(report.candidate)
        return control - candidate if control is not None and candidate is not None else -1.0

    return sorted(report.classes, key=lambda row: (not is_regression(row), -loss(row)))


def class_table(report: Report) -> Table:
    """Recalls by true label."""
    rows = []
    for row in classes(report):
        control, candidate = row.recall.get(report.control), row.recall.get(report.candidate)
        counts = dict.fromkeys(f"{row.n.get(name, 0):,}" for name in (report.control, report.candidate))
        rows.append(
            (
                row.label,
                " / ".join(counts),
                *(
                    share(row.recall.get(name), row.lower.get(name), row.upper.get(name))
                    for name in (report.control, report.candidate)
                ),
                UNKNOWN if control is None or candidate is None else number(100 * (candidate - control)),
                p_value(row.p_value),
                "differs" if is_regression(row) else "",
            )
        )
    return Table(
        "Share of each true label that was found, in %, with 95 % Wilson intervals; p after Holm",
        ("true label", "items", report.control, report.candidate, "change, points", "p", ""),
        rows,
        mark="differs",
    )


def flip_table(report: Report) -> Table:
    """Which labels become which."""
    total = sum(flip.n for flip in report.flips)
    return Table(
        "Labels on which the arms disagree",
        (f"{report.control} said", f"{report.candidate} said", "items", "share, %"),
        [(flip.control_label, flip.candidate_label, f"{flip.n:,}", share(flip.n / total)) for flip in report.flips],
        words=(1,),
    )


def disagreement_table(report: Report) -> Table:
    """The newest items on which the arms disagree, by id."""
    return Table(
        "The newest disagreements; what was asked is not kept",
        ("id", "item", f"{report.control} said", f"{report.candidate} said", "at"),
        [(row.id, str(row.item), row.control_label, row.candidate_label, when(row.at)) for row in report.disagreements],
        words=(2, 3),
    )


def step_table(report: Report) -> Table:
    """What was done to the experiment, newest first."""
    return Table(
        "What was done, and by whom",
        ("at", "by", "step", "detail"),
        [(when(step.at), step.actor, step.action, step.detail) for step in reversed(report.steps)],
        words=(1, 2, 3),
    )


def list_table(lines: list[ReportLine]) -> Table:
    """All experiments."""
    return Table(
        "All experiments",
        ("experiment", "verdict", "in words", "task", "mode", "state", "traffic", "units"),
        [
            (
                line.name,
                "Arms are not compared" if line.mode == "cascade" else HEADLINES[line.verdict],
                line.words,
                line.task,
                line.mode,
                line.state,
                percent(line.traffic),
                f"{line.units:,}",
            )
            for line in lines
        ],
        words=(1, 2, 3, 4, 5),
    )


def tables(report: Report) -> Iterator[Table]:
    """Every table that has something in it, in reading order."""
    for table in (
        arm_table(report),
        pairs_table(report),
        cascade_table(report),
        latency_table(report),
        class_table(report),
        flip_table(report),
        disagreement_table(report),
        step_table(report),
    ):
        if table is not None and table.rows:
            yield table
