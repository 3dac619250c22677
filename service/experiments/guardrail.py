"""What pauses an experiment by itself: bounds that hold at every look, on failures and on latency."""

from service.experiments.records import Records
from service.statistics.latency import quantile_sequence
from service.statistics.means import two_arm_sequence

# Below this many requests in an arm the sequence of error rates promises nothing.
LEAST_REQUESTS = 100
WATCHED_QUANTILE = 0.95


def breach(records: Records) -> str | None:
    """Why the experiment must not go on, as a clause; None if nothing is known against it. A cascade has one arm."""
    if records.experiment.mode == "cascade":
        return None
    return _errors(records) or _latency(records)


def failures(records: Records, arm: str) -> tuple[int, int]:
    """(failed, all) requests meant for an arm; the candidate of a shadow is never asked for, its runs count instead."""
    if records.experiment.mode == "shadow" and arm == records.candidate:
        return records.counts.n("pairs", predicted="candidate_failed"), records.counts.n("pairs")
    return records.counts.n("errors", arm=arm), records.counts.n("requests", arm=arm)


def _errors(records: Records) -> str | None:
    experiment = records.experiment
    allowed = experiment.guardrail.error_rate
    failed_0, requests_0 = failures(records, records.control)
    failed_1, requests_1 = failures(records, records.candidate)
    if min(requests_0, requests_1) < LEAST_REQUESTS:
        return None
    sequence = two_arm_sequence(failed_1, requests_1, failed_0, requests_0, allowed, experiment.alpha)
    estimate, interval = sequence
    if interval.lower <= allowed:
        return None
    return (
        f"{records.candidate} fails {100 * estimate:.1f} points more often than {records.control}, at least "
        f"{100 * interval.lower:.1f}, and {100 * allowed:g} are allowed"
    )


def _latency(records: Records) -> str | None:
    """Each bound at half of alpha. Latency beside a shadow says nothing about the candidate alone."""
    experiment = records.experiment
    allowed = experiment.guardrail.latency_ratio
    if allowed is None or experiment.mode == "shadow":
        return None
    _, most = quantile_sequence(records.latencies[records.control], WATCHED_QUANTILE, experiment.alpha / 2)
    least, _ = quantile_sequence(records.latencies[records.candidate], WATCHED_QUANTILE, experiment.alpha / 2)
    if most is None or least is None or least <= allowed * most:
        return None
    return (
        f"the p95 latency of {records.candidate} is at least {least / most:.2f} times that of {records.control}, and "
        f"{allowed:g} times are allowed"
    )
