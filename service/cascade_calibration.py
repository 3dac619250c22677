"""Run a cascade's two models on held-out rows, and choose the threshold for a wanted agreement or cost.

Legend: N rows.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from models.batches import by_length
from models.checkpoint import Checkpoint
from models.dataset import Row, label_ids
from models.errors import DataError
from models.evaluate import BATCH_TOKENS
from models.flops import flops_per_token
from models.progress import Progress, silent
from service.prediction import DEFAULT_ACTIVATION, DEFAULT_THRESHOLD, MULTI_LABEL, Prediction, predict
from service.sections import Confidence
from service.statistics.calibration import (
    GRID,
    Bools,
    Ints,
    Outcomes,
    Point,
    curve,
    effective_rows,
    fewest_rows,
    intraclass,
    loosest_passing,
    threshold_for,
)
from service.statistics.confidence import DISPERSION, confidence, dispersion
from service.statistics.fitting import fit_dispersion, fitting_rows

Kind = Literal["probability", "dispersion"]


@dataclass(frozen=True)
class Answers:
    """One model's answers to N rows, as the server would give them. flops: floating-point operations per token."""

    checkpoint: Checkpoint
    predictions: tuple[Prediction, ...]
    right_N: Bools
    flops: int


@dataclass(frozen=True)
class Wanted:
    """Agreement among accepted items, at 95 % confidence, or the greatest share of items that the control answers."""

    kind: Kind = "probability"
    agreement: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What was found on `rows` rows in `groups` groups, after `fitted` others fitted the confidence.

    effective: independent rows that all of them are worth. candidate_work: the candidate's arithmetic per token where
    the control's is 1. curve: from strict to loose, each point accepting more rows than the one before. chosen: one of
    them, or None if no threshold keeps the wanted agreement.
    """

    wanted: Wanted
    confidence: Confidence
    rows: int
    groups: int
    fitted: int
    effective: float
    control_accuracy: float
    candidate_accuracy: float
    agreement: float
    candidate_work: float
    curve: tuple[Point, ...]
    chosen: Point | None


def answers(checkpoint: Checkpoint, rows: Sequence[Row], progress: Progress = silent) -> Answers:
    """Classify every row. Raises DataError for an unknown label, a row without tokens, or a regression, whose answers
    have no confidence."""
    activation = DEFAULT_ACTIVATION[checkpoint.problem_type]
    if activation == "none":
        raise DataError(f"{checkpoint.path.name} is a regression: its answers have no confidence, so it cannot cascade")
    truth = label_ids(rows, checkpoint.labels)
    sequences: list[Sized] = [checkpoint.encoder.encode(row.source).ids for row in rows]
    empty = next((number for number, ids in enumerate(sequences, start=1) if not len(ids)), None)
    if empty is not None:
        raise DataError(f"row {empty} has no tokens")
    found: dict[int, Prediction] = {}
    routed = dropped = 0
    for indices in by_length(sequences, BATCH_TOKENS):
        output = checkpoint.model.classify([sequences[i] for i in indices])
        for index, logits in zip(indices, output.logits_BC.tolist(), strict=True):
            found[index] = predict(logits, checkpoint.problem_type, activation, DEFAULT_THRESHOLD)
        routed += output.routed_slots
        dropped += output.dropped_slots
        progress(len(found), len(rows), f"classifying with {checkpoint.path.name}")
    predictions = tuple(found[index] for index in range(len(rows)))
    right_N = np.array([p.labels == [label] for p, label in zip(predictions, truth, strict=True)])
    kept_share = 1 - dropped / routed if routed else 1.0
    length = sum(map(len, sequences)) / len(sequences)
    return Answers(checkpoint, predictions, right_N, flops_per_token(checkpoint.model, kept_share, length))


def check_pair(control: Checkpoint, candidate: Checkpoint) -> None:
    """Raises DataError unless the two can stand in for each other in one task."""
    for what, same in (
        ("labels", control.labels == candidate.labels),
        ("a problem type", control.problem_type == candidate.problem_type),
        ("a tokenizer", control.tokenizer_sha256 == candidate.tokenizer_sha256),
    ):
        if not same:
            raise DataError(
                f"{candidate.path.name} has {what} other than {control.path.name}: they cannot answer for each other"
            )


def outcomes(control: Answers, candidate: Answers, rows: Sequence[Row], settings: Confidence) -> Outcomes:
    """What a cascade of the two can go by, and what comes of it, for the rows that both answered."""
    problem_type = candidate.checkpoint.problem_type
    pairs = zip(control.predictions, candidate.predictions, strict=True)
    return Outcomes(
        confidence_N=np.array([confidence(p.values, problem_type, settings) for p in candidate.predictions]),
        agrees_N=np.array([theirs.labels == ours.labels for theirs, ours in pairs]),
        candidate_right_N=candidate.right_N,
        control_right_N=control.right_N,
        group_N=group_numbers(rows),
    )


def group_numbers(rows: Sequence[Row]) -> Ints:
    """Rows of one group share a number; a row without a group has one of its own."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(row.group or index, len(numbers)) for index, row in enumerate(rows)])


def calibrate(control: Answers, candidate: Answers, rows: Sequence[Row], wanted: Wanted) -> Calibration:
    """Fit the confidence on a part of the rows if it needs that, and walk the thresholds on the others.

    Raises DataError if no row is left for the walk.
    """
    found, settings, fitted = outcomes(control, candidate, rows, Confidence()), Confidence(), 0
    if wanted.kind == "dispersion":
        fitting_N = fitting_rows(found.group_N)
        fitted = int(fitting_N.sum())
        if fitted == len(rows):
            raise DataError("all rows are of one group: none is left to calibrate on once the confidence is fitted")
        settings = _fitted(candidate, found.agrees_N, fitting_N)
        found = _part(outcomes(control, candidate, rows, settings), ~fitting_N)
    work = candidate.flops / control.flops
    chosen: Point | None
    if wanted.cost is not None:
        at = threshold_for(found.confidence_N, 1 - wanted.cost)
        points = curve(found, sorted({*GRID, at}, reverse=True), work)
        chosen = next(point for point in points if point.threshold == at)
    else:
        points = curve(found, GRID, work)
        chosen = loosest_passing(points, wanted.agreement or 0.0)
    return Calibration(
        wanted=wanted,
        confidence=settings,
        rows=found.rows,
        groups=len(np.unique(found.group_N)),
        fitted=fitted,
        effective=effective_rows(found.group_N, intraclass(~found.agrees_N, found.group_N)),
        control_accuracy=float(found.control_right_N.mean()),
        candidate_accuracy=float(found.candidate_right_N.mean()),
        agreement=float(found.agrees_N.mean()),
        candidate_work=work,
        curve=_distinct(points, chosen),
        chosen=chosen,
    )


def _fitted(candidate: Answers, agrees_N: Bools, fitting_N: Bools) -> Confidence:
    multi = candidate.checkpoint.problem_type == MULTI_LABEL
    features = [
        dispersion([(value, 1 - value) for value in p.values] if multi else [p.values])
        for p, fits in zip(candidate.predictions, fitting_N, strict=True)
        if fits
    ]
    return fit_dispersion(np.array([[row[name] for name in DISPERSION] for row in features]), agrees_N[fitting_N])


def _part(found: Outcomes, chosen_N: Bools) -> Outcomes:
    """Some of the rows; their groups keep their numbers."""
    return replace(found, **{name: values[chosen_N] for name, values in vars(found).items()})


def _distinct(points: Sequence[Point], chosen: Point | None) -> tuple[Point, ...]:
    """Of thresholds that accept the same rows the strictest, or the chosen one; none that accepts nothing."""
    kept: dict[int, Point] = {}
    for point in points:
        if point.accepted and (point.accepted not in kept or point is chosen):
            kept[point.accepted] = point
    return tuple(kept.values())


def section(found: Calibration) -> dict[str, Any]:
    """The keys of an experiment of mode `cascade` that calibration decides."""
    if found.chosen is None:
        return {}
    settings = found.confidence.model_dump(exclude_defaults=True)
    return {"threshold": found.chosen.threshold, **({"confidence": settings} if settings else {})}


def in_words(found: Calibration) -> list[str]:
    """What came out, why nothing did, and what a cascade saves: sentences for a person."""
    lines = [_worth(found)] if found.effective < 0.95 * found.rows else []
    chosen, wanted = found.chosen, found.wanted
    if chosen is None:
        return [*lines, _why_not(found)]
    difference = 100 * (chosen.accuracy - found.control_accuracy)
    promise = f", of which {_percent(chosen.agreement)} get the control's answer" if chosen.accepted else ""
    if wanted.agreement is not None:
        promise += f" (at 95 % confidence no less than {_percent(chosen.bound)})"
    lines.append(
        f"At threshold {chosen.threshold} the candidate answers {_percent(chosen.share)} of the rows{promise}; the "
        f"cascade's accuracy is {_percent(chosen.accuracy)}, {difference:+.2f} points against the control alone."
    )
    saved = 100 * (1 - chosen.work)
    verb = "saves" if saved > 0 else "costs another"
    lines.append(
        f"It {verb} {abs(saved):.1f} % of the control's arithmetic: the candidate needs "
        f"{_percent(found.candidate_work)} of it, so a cascade pays if more than that is accepted. "
        "Memory is not saved: both models stay resident."
    )
    return lines


def _worth(found: Calibration) -> str:
    return (
        f"The {found.rows:,} rows are {found.groups:,} groups whose rows fare alike: for a bound they are worth "
        f"{found.effective:,.0f} independent ones."
    )


def _why_not(found: Calibration) -> str:
    agreement = found.wanted.agreement or 0.0
    fewest = fewest_rows(agreement)
    if max(point.effective for point in found.curve) < fewest:
        return (
            f"No threshold keeps an agreement of {agreement:g}: at 95 % confidence even a perfect record would need "
            f"{fewest:,.0f} independent rows. Give more rows, or ask for less."
        )
    first = next(point for point in found.curve if point.effective >= fewest)
    return (
        f"No threshold keeps an agreement of {agreement:g}: the strictest one that enough rows pass, "
        f"{first.threshold}, shows only {_percent(first.bound)} at 95 % confidence. Give more rows, or ask for less."
    )


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0.0):.2f} %"
