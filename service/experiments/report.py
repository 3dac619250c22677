"""The report of an experiment, put together from its records: what was counted, what follows, what is missing."""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from models.memory import resident_bytes
from service.deployments import Registry, Task
from service.experiments import ramp, words
from service.experiments.control import has_ended
from service.experiments.document import (
    ArmReport,
    Cascade,
    Decided,
    Disagreement,
    Flip,
    Latency,
    LatencyWord,
    LookReport,
    Memory,
    Pairs,
    Quantiles,
    Ratio,
    Report,
    ReportLine,
    Srm,
    StepReport,
)
from service.experiments.guardrail import failures
from service.experiments.judging import Judged, are_labels_picked, judge
from service.experiments.recalls import class_reports, regressions
from service.experiments.records import Milliseconds, Records
from service.metrics import PREFIX, Metrics
from service.savings import alone_bytes, saved_bytes
from service.statistics.classes import wilson
from service.statistics.latency import bootstrap_ratio, latency_word, quantile, quantile_interval
from service.statistics.srm import srm
from service.statistics.verdict import DECIDED, Reason
from service.storage.events import Step

MOST_FLIPS = 20
WATCHED_QUANTILE = 0.95
CURVE = [percent / 100 for percent in range(1, 100)]
PICKED = (
    "labels_picked: labels went to disagreements more often than to agreements, so the labelled pairs are no fair "
    "sample; the difference is taken over all pairs, those without a label at their worst"
)
SHADOW_DROPS = ("busy", "draining", "unavailable")


def assemble(records: Records, registry: Registry, shadow_drops: dict[str, int], now: float | None = None) -> Report:
    """The report of these records. shadow_drops: sampled items that the candidate never ran, by reason."""
    experiment, counts = records.experiment, records.counts
    task = registry.tasks[experiment.task]
    is_shadow = experiment.mode == "shadow"
    now = time.time() if now is None else now
    sample_ratio, label_ratio = _srm(records, "units"), _srm(records, "labelled")
    judged = judge(records, task, bool(sample_ratio and sample_ratio.alarm), bool(label_ratio and label_ratio.alarm))
    classes = class_reports(records, task.reference.labels if task.reference else ())
    dp = counts.n("dp")
    agreement, agreement_interval = _agreement(records)
    report = Report(
        name=records.name,
        revision=experiment.revision,
        task=experiment.task,
        mode=experiment.mode,
        state=experiment.state,
        traffic=experiment.traffic,
        winner=records.state.winner if has_ended(records.state) else None,
        control=records.control,
        candidate=records.candidate,
        metric=experiment.metric,
        margin=experiment.margin,
        alpha=experiment.alpha,
        updated=moment(now),
        units=judged.units,
        repeats=counts.n("repeats"),
        overrides=counts.n("overrides"),
        dropped={"events": counts.n("dropped"), **(shadow_drops if is_shadow else {})},
        arms=[_arm(records, arm) for arm in records.arms],
        srm=sample_ratio,
        labels_srm=label_ratio,
        pairs=_pairs(records) if is_shadow else None,
        agreement=agreement,
        agreement_interval=agreement_interval,
        mean_abs_dp=counts.total("dp") / dp if dp else None,
        max_abs_dp=counts.peak("dp") if dp else None,
        flips=_flips(records),
        difference=judged.difference,
        classes=classes,
        latency_ms=_latency(records),
        memory=_memory(task, records),
        cascade=_cascade(records),
        verdict=judged.word,
        words="",
        worse=judged.worse,
        first_decided=_first_decided(records.steps) or _decided(judged, now),
        needed=judged.needed,
        ramp=experiment.ramp.steps if experiment.ramp else None,
        timeline=_timeline(records, judged, now),
        steps=[
            StepReport(at=moment(step.at), actor=step.actor, action=step.action, detail=step.detail)
            for step in records.steps
        ],
        disagreements=[
            Disagreement(
                id=pair.id,
                item=pair.item,
                at=moment(pair.at),
                control_label=pair.primary_label,
                candidate_label=pair.candidate_label or "",
            )
            for pair in records.disagreements
        ],
        warnings=[],
    )
    said = words.verdict_words(report, judged.invalid)
    warnings = list(_warnings(report, judged.invalid))
    if is_shadow and are_labels_picked(records):
        warnings.append(PICKED)
    return report.model_copy(update={"words": said, "warnings": warnings})


def line(report: Report) -> ReportLine:
    """A report as one line of the list."""
    return ReportLine.model_validate({key: getattr(report, key) for key in ReportLine.model_fields})


def shadow_dropped(metrics: Metrics, name: str) -> dict[str, int]:
    """Sampled items of this process that the candidate never ran, by reason."""
    sample = f"{PREFIX}shadow_dropped_total"
    found = {reason: {"experiment": name, "reason": reason} for reason in SHADOW_DROPS}
    return {reason: int(metrics.registry.get_sample_value(sample, labels) or 0) for reason, labels in found.items()}


def moment(at: float) -> str:
    """Unix seconds as RFC 3339 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _arm(records: Records, arm: str) -> ArmReport:
    counts, experiment = records.counts, records.experiment
    failed, requests = failures(records, arm)
    labelled, right = counts.n("labelled", arm=arm), counts.n("right", arm=arm)
    if experiment.mode == "shadow":
        alone = "only_control" if arm == records.control else "only_candidate"
        labelled = counts.n("labelled_pairs")
        right = sum(counts.n("labelled_pairs", predicted=word) for word in ("both_right", alone))
    interval = wilson(right, labelled) if labelled else None
    run = counts.n("device_ms", arm=arm)
    return ArmReport(
        deployment=arm,
        role="control" if arm == records.control else "candidate",
        weight=next(found.weight for found in experiment.arms if found.deployment == arm),
        requests=requests,
        errors=failed,
        fallbacks=counts.n("fallbacks", arm=arm),
        units=counts.n("units", arm=arm),
        labelled=labelled,
        right=right,
        accuracy=right / labelled if labelled else None,
        accuracy_lower=interval.lower if interval else None,
        accuracy_upper=interval.upper if interval else None,
        # Milliseconds for one request are seconds for a thousand.
        device_seconds_per_1000=counts.total("device_ms", arm=arm) / run if run else None,
    )


def _srm(records: Records, counted: str) -> Srm | None:
    if records.experiment.mode != "split":
        return None
    weights = {arm.deployment: arm.weight or 0.0 for arm in records.experiment.arms}
    found = {arm: records.counts.n(counted, arm=arm) for arm in weights}
    result = srm(list(found.values()), list(weights.values()))
    return Srm(
        counts=found,
        chi_square=result.chi_square,
        p_value=result.p_value,
        e_value=result.e_value,
        alarm=result.alarm,
    )


def _pairs(records: Records) -> Pairs:
    words_of = ("both_right", "only_control", "only_candidate", "both_wrong")
    labelled = {word: records.counts.n("labelled_pairs", predicted=word) for word in words_of}
    return Pairs(**labelled, candidate_failed=records.counts.n("pairs", predicted="candidate_failed"))


def _agreement(records: Records) -> tuple[float | None, tuple[float, float] | None]:
    """Share of distinct inputs to which both arms gave the same label, with Wilson's interval."""
    agree, pairs = records.counts.n("unit_pairs", predicted="agree"), records.counts.n("unit_pairs")
    if not pairs:
        return None, None
    interval = wilson(agree, pairs)
    return agree / pairs, (interval.lower, interval.upper)


def _flips(records: Records) -> list[Flip]:
    rows = sorted(records.counts.rows("flips"), key=lambda row: (-row.n, row.truth, row.predicted))
    return [Flip(control_label=row.truth, candidate_label=row.predicted, n=row.n) for row in rows[:MOST_FLIPS]]


def _latency(records: Records) -> Latency:
    control, candidate = (records.latencies[arm] for arm in records.arms)
    both = min(len(control), len(candidate)) > 0
    word: LatencyWord = latency_word(control, candidate, WATCHED_QUANTILE, records.experiment.alpha)
    if records.experiment.mode == "shadow":
        word = "contended" if both else "insufficient_data"
    ratio = bootstrap_ratio(control, candidate, WATCHED_QUANTILE) if both else None
    return Latency(
        arms={arm: _quantiles(samples) for arm, samples in records.latencies.items()},
        p95_ratio=ratio and Ratio(estimate=ratio[0], lower=ratio[1].lower, upper=ratio[1].upper),
        verdict=word,
    )


def _quantiles(samples: Milliseconds) -> Quantiles:
    p50, p95, p99 = ((quantile(samples, q) if len(samples) else None) for q in (0.5, 0.95, 0.99))
    intervals = [quantile_interval(samples, q) for q in (0.5, 0.95, 0.99)] if len(samples) else [(None, None)] * 3
    return Quantiles(
        n=len(samples),
        p50=p50,
        p95=p95,
        p99=p99,
        p50_interval=intervals[0],
        p95_interval=intervals[1],
        p99_interval=intervals[2],
        curve=[quantile(samples, q) for q in CURVE] if len(samples) else [],
    )


def _memory(task: Task, records: Records) -> Memory:
    control, candidate = (task.deployments[arm] for arm in records.arms)
    loaded = [deployment for deployment in (control, candidate) if deployment.is_ready]
    sizes: dict[str, int] = {deployment.name: alone_bytes(deployment.checkpoint) for deployment in loaded}
    basis = "loaded" if len(sizes) == 2 else None
    if basis is None and candidate.is_ready and control is task.full:
        saved = saved_bytes(task, candidate)
        if saved is not None:
            sizes[control.name], basis = saved[1:]
    full, pruned = sizes.get(control.name), sizes.get(candidate.name)
    return Memory(
        control_bytes=full,
        candidate_bytes=pruned,
        saved_ratio=1 - pruned / full if full and pruned is not None else None,
        basis=basis,
        resident_bytes=resident_bytes(deployment.checkpoint.model for deployment in loaded),
    )


def _cascade(records: Records) -> Cascade | None:
    threshold = records.experiment.threshold
    if threshold is None:
        return None
    accepted, escalated, fallback = (
        records.counts.n("cascade", predicted=outcome) for outcome in ("accepted", "escalated", "fallback")
    )
    items = accepted + escalated + fallback
    return Cascade(
        threshold=threshold,
        accepted=accepted,
        escalated=escalated,
        fallback=fallback,
        accepted_share=accepted / items if items else None,
    )


def _decided(judged: Judged, now: float) -> Decided | None:
    """For the moment between a decision and its record."""
    return Decided(verdict=judged.word, units=judged.units, at=moment(now)) if judged.word in DECIDED else None


def _first_decided(steps: Sequence[Step]) -> Decided | None:
    for step in steps:
        units = ramp.units_of(step.detail) if step.action == "decided" else None
        if units is not None:
            return Decided(verdict=step.detail.partition(" ")[0], units=units, at=moment(step.at))
    return None


def _timeline(records: Records, judged: Judged, now: float) -> list[LookReport]:
    """Looks since the comparison was last made another way, and the one of this moment."""
    since = max((step.at for step in records.steps if step.action == "method"), default=0.0)
    looks = [
        LookReport(
            units=look.units,
            at=moment(look.at),
            estimate=look.estimate,
            lower=look.lower,
            upper=look.upper,
            verdict=look.verdict,
        )
        for look in records.looks
        if look.at >= since
    ]
    found = judged.difference
    if found is not None and (not looks or looks[-1].units < judged.units):
        numbers = {"estimate": found.estimate, "lower": found.lower, "upper": found.upper}
        looks.append(LookReport(units=judged.units, at=moment(now), **numbers, verdict=judged.word))
    return looks


def _warnings(report: Report, invalid: Sequence[Reason]) -> Iterator[str]:
    """A code, a colon and a sentence each."""
    for reason in invalid:
        yield f"{reason}: {words.REASONS[reason](report)}"
    for found in regressions(report):
        yield f"class_regression: {found}"
    failed = report.pairs.candidate_failed if report.pairs else 0
    if failed:
        yield f"candidate_failed: {report.candidate} gave no answer to {failed:,} items and counts as wrong there"
