"""How well each arm recalls each true class: a comparison may be fine on the whole and lose one class."""

from collections.abc import Iterator, Sequence

from service.experiments.document import ClassReport, Report
from service.experiments.records import Records
from service.statistics.classes import holm, two_proportions_p, wilson
from service.statistics.paired import mcnemar_p

# Classes with most labels; multi-label tasks have one for each set of labels.
MOST_CLASSES = 50
SIGNIFICANT = 0.05


def class_reports(records: Records, labels: Sequence[str]) -> list[ClassReport]:
    """One row for each true class seen, in the order of `labels`, others behind."""
    seen: dict[str, int] = {}
    for row in records.counts.rows("confusion"):
        seen[row.truth] = seen.get(row.truth, 0) + row.n
    found = sorted((truth for truth in seen if seen[truth] > 0), key=lambda truth: (-seen[truth], truth))[:MOST_CLASSES]
    order = {label: place for place, label in enumerate(labels)}
    truths = sorted(found, key=lambda truth: (order.get(truth, len(order)), truth))
    corrected = holm([_p_value(records, truth) for truth in truths])
    return [_class_report(records, truth, p_value) for truth, p_value in zip(truths, corrected, strict=True)]


def regressions(report: Report) -> Iterator[str]:
    """The classes that the candidate recalls less well, as sentences."""
    for row in report.classes:
        control, candidate = row.recall[report.control], row.recall[report.candidate]
        if row.p_value is None or control is None or candidate is None:
            continue
        if row.p_value < SIGNIFICANT and candidate < control:
            yield (
                f"{report.candidate} recalls {row.label!r} in {100 * candidate:.1f} % of cases, {report.control} in "
                f"{100 * control:.1f} % (p = {row.p_value:.2g} after Holm)"
            )


def _recalled(records: Records, arm: str, truth: str) -> tuple[int, int]:
    """(right, all) of a class."""
    counts = records.counts
    return counts.n("confusion", arm=arm, truth=truth, predicted=truth), counts.n("confusion", arm=arm, truth=truth)


def _p_value(records: Records, truth: str) -> float:
    if records.experiment.mode == "shadow":
        only_control, only_candidate = (
            records.counts.n("class_pairs", truth=truth, predicted=word) for word in ("only_control", "only_candidate")
        )
        return mcnemar_p(only_control, only_candidate)
    return two_proportions_p(*_recalled(records, records.candidate, truth), *_recalled(records, records.control, truth))


def _class_report(records: Records, truth: str, p_value: float) -> ClassReport:
    found = {arm: _recalled(records, arm, truth) for arm in records.arms}
    intervals = {arm: wilson(right, n) if n else None for arm, (right, n) in found.items()}
    return ClassReport(
        label=truth,
        n={arm: n for arm, (_, n) in found.items()},
        recall={arm: right / n if n else None for arm, (right, n) in found.items()},
        lower={arm: interval.lower if interval else None for arm, interval in intervals.items()},
        upper={arm: interval.upper if interval else None for arm, interval in intervals.items()},
        p_value=p_value,
    )
