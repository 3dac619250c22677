"""Two checkpoints on the same rows, one row at a time and in turns, without a server: labels and time, fairly.

Whoever runs second meets warm caches, so the order turns with every row. What the machine does besides meets both
alike. All rows are there beforehand, so the statistics are those of a fixed sample.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.checkpoint import Checkpoint
from models.dataset import Row, label_ids
from models.errors import DataError
from models.progress import Progress, silent
from service.statistics.classes import wilson
from service.statistics.interval import Interval
from service.statistics.latency import Sorted, bootstrap_ratio, quantile, quantile_interval
from service.statistics.paired import mcnemar_p, tango_interval, tango_z

# Passes of each model before anything is timed.
WARM_UP = 20
QUANTILES = (0.5, 0.95)
# One-sided 2.5 %, as the lower end of a two-sided 95 % interval.
Z = 1.959964


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one forward pass per row at a quantile, and the ratio candidate over control, each at 95 %."""

    quantile: float
    control_ms: float
    control_interval: tuple[float | None, float | None]
    candidate_ms: float
    candidate_interval: tuple[float | None, float | None]
    ratio: float
    ratio_interval: tuple[float, float]


@dataclass(frozen=True)
class Compared:
    """Fractions unless named otherwise. difference: accuracy of the candidate minus that of the control.

    p_value: exact McNemar. interval: Tango's score interval. is_non_inferior: a loss of `margin` is refuted at 2.5 %.
    """

    rows: int
    control_accuracy: float
    candidate_accuracy: float
    only_control: int
    only_candidate: int
    agreement: float
    agreement_interval: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    p_value: float
    margin: float
    is_non_inferior: bool
    timings: tuple[Timing, ...]


def compare(
    control: Checkpoint, candidate: Checkpoint, rows: Sequence[Row], margin: float, progress: Progress = silent
) -> Compared:
    """Classify every row by both. Raises DataError: no rows, an unknown label, a text without tokens, other labels."""
    if control.labels != candidate.labels:
        raise DataError("the checkpoints have different labels: they cannot be compared")
    if not rows:
        raise DataError("there is no row to compare on: choose another --split")
    truth = label_ids(rows, control.labels)
    models = (control, candidate)
    encoded = [[model.encoder.encode(row.source).ids for row in rows] for model in models]
    for number, ids in enumerate(encoded[0], 1):
        if not len(ids):
            raise DataError(f"row {number} has no tokens in the vocabulary of {control.path.name}")
    for turn in range(min(WARM_UP, len(rows))):
        for model, inputs in zip(models, encoded, strict=True):
            _answer(model, inputs[turn])
    label_NM, ms_NM = np.empty((len(rows), 2), np.int64), np.empty((len(rows), 2))
    for number in range(len(rows)):
        progress(number, len(rows), "rows by both, in turns")
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            began = time.perf_counter()
            label_NM[number, which] = _answer(models[which], encoded[which][number])
            ms_NM[number, which] = 1000 * (time.perf_counter() - began)
    progress(len(rows), len(rows), "compared")
    return summary(label_NM, np.array(truth), np.sort(ms_NM, axis=0), margin)


def summary(label_NM: np.ndarray, truth_N: np.ndarray, ms_NM: np.ndarray, margin: float) -> Compared:
    """From labels and sorted milliseconds, the control's in column 0, to what is said about them."""
    right_NM = label_NM == truth_N[:, None]
    n = len(truth_N)
    only_control = int((right_NM[:, 0] & ~right_NM[:, 1]).sum())
    only_candidate = int((right_NM[:, 1] & ~right_NM[:, 0]).sum())
    agreed = int((label_NM[:, 0] == label_NM[:, 1]).sum())
    return Compared(
        rows=n,
        control_accuracy=float(right_NM[:, 0].mean()),
        candidate_accuracy=float(right_NM[:, 1].mean()),
        only_control=only_control,
        only_candidate=only_candidate,
        agreement=agreed / n,
        agreement_interval=_pair(wilson(agreed, n)),
        difference=(only_candidate - only_control) / n,
        interval=_pair(tango_interval(only_control, only_candidate, n)),
        p_value=mcnemar_p(only_control, only_candidate),
        margin=margin,
        is_non_inferior=tango_z(only_control, only_candidate, n, -margin) > Z,
        timings=tuple(_timing(ms_NM[:, 0], ms_NM[:, 1], q) for q in QUANTILES),
    )


def _timing(control_ms: Sorted, candidate_ms: Sorted, q: float) -> Timing:
    ratio, interval = bootstrap_ratio(control_ms, candidate_ms, q)
    return Timing(
        quantile=q,
        control_ms=quantile(control_ms, q),
        control_interval=quantile_interval(control_ms, q),
        candidate_ms=quantile(candidate_ms, q),
        candidate_interval=quantile_interval(candidate_ms, q),
        ratio=ratio,
        ratio_interval=_pair(interval),
    )


def _answer(model: Checkpoint, ids: object) -> int:
    # item() waits for the device, so the time is that of the whole pass.
    return int(model.model.classify([ids]).logits_BC.argmax(1).item())


def _pair(interval: Interval) -> tuple[float, float]:
    return interval.lower, interval.upper
