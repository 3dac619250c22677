"""What the service records, and what a report reads back: plain data, no text, no subject in clear."""

from dataclasses import dataclass, field
from typing import Literal

Source = Literal["subject", "request", "override"]
PairOutcome = Literal["agree", "disagree", "candidate_failed"]
CascadeOutcome = Literal["accepted", "escalated", "fallback"]


@dataclass(frozen=True, slots=True)
class ExposureEvent:
    """One item of a request that met an experiment. Times are milliseconds, `at` is Unix seconds.

    id, item: what feedback names. unit: what counts once, the keyed hash of the subject, else the id (split, cascade);
    shadow: the input's fingerprint. intended: the assigned arm, or the deployment named by an override. served: what
    answered, None if nothing did. label: what was answered, None unless status is 200; multi-label tasks: the labels as
    a sorted JSON list. device_ms: the item's share of its batches' time. contended: a shadow shared the device.
    """

    id: str
    item: int
    request_id: str
    at: float
    experiment: str
    revision: int
    unit: str
    intended: str
    served: str | None
    source: Source
    status: int
    label: str | None
    score: float | None
    tokens: int
    queue_ms: float | None
    infer_ms: float | None
    total_ms: float | None
    device_ms: float | None
    fingerprint: str
    contended: bool = False
    cascade: CascadeOutcome | None = None


@dataclass(frozen=True, slots=True)
class PairEvent:
    """One item that both arms of a shadow answered; candidate_label is None if the candidate failed.

    unit: the input's fingerprint. dp: absolute differences of the two probability rows.
    """

    id: str
    item: int
    at: float
    experiment: str
    revision: int
    unit: str
    primary_label: str
    candidate_label: str | None
    outcome: PairOutcome
    mean_abs_dp: float | None
    max_abs_dp: float | None
    primary_ms: float
    candidate_ms: float | None


Event = ExposureEvent | PairEvent


@dataclass(frozen=True, slots=True)
class Feedback:
    """The true label of one item, as `ExposureEvent.label` would write it. Exactly one of id and request_id is set."""

    id: str | None
    request_id: str | None
    item: int
    label: str
    key_name: str = ""


@dataclass(frozen=True, slots=True)
class FeedbackResult:
    """What became of each label, in order: matched, orphan, replaced or unchanged."""

    outcomes: tuple[Literal["matched", "orphan", "replaced", "unchanged"], ...]


class FeedbackRefusedError(Exception):
    """Nothing was kept. code: feedback_conflict or ambiguous_request_id; item: the label at fault, from 0."""

    def __init__(self, code: Literal["feedback_conflict", "ambiguous_request_id"], item: int) -> None:
        super().__init__(code)
        self.code = code
        self.item = item


class StorageUnavailableError(Exception):
    """The database could not commit; nothing was kept."""


@dataclass(frozen=True, slots=True)
class Tally:
    """A count of something in an experiment's revision, kept by the transaction that wrote the rows it counts.

    name says what, `arm` a deployment, `truth` and `predicted` labels or outcomes; those that do not apply are "".
    total, peak: sum and greatest of the values counted, where there are any. The names:

    requests(arm), errors(arm)      by intended arm, overrides left out; errors are 500, 503 and 504
    items(arm)                      of those requests, by intended arm
    units(arm)                      distinct enrolled units by intended arm
    overrides                       items of requests that named a deployment
    fallbacks(arm)                  items of the intended arm that another deployment answered
    labelled(arm), right(arm)       split, cascade: first labelled item of each unit, by intended arm
    confusion(arm, truth, predicted)  the same items by label; predicted "" if nothing was answered
    repeats                         labelled items left out because their unit has one already
    pairs(predicted=outcome)        shadow: all pairs
    unit_pairs(predicted=outcome)   shadow: the first pair of each unit
    labelled_pairs(predicted)       both_right, only_control, only_candidate, both_wrong: the first labelled per unit
    class_pairs(truth, predicted)   labelled_pairs by true label
    confusion(arm, truth, predicted)  shadow: of both arms, over labelled_pairs
    flips(truth=primary, predicted=candidate)  all pairs that disagree
    dp                              total and peak of mean_abs_dp / max_abs_dp over pairs
    cascade(predicted=outcome)      items of a cascade
    device_ms(arm)                  n requests answered by the arm, total of device_ms, overrides left out
    dropped(predicted=reason)       records given up, once the database could be told
    """

    name: str
    arm: str
    truth: str
    predicted: str
    n: int
    total: float = 0.0
    peak: float = 0.0


@dataclass(frozen=True, slots=True)
class Look:
    """The comparison at one moment, for the curve over time. Differences are candidate minus control."""

    units: int
    at: float
    estimate: float
    lower: float
    upper: float
    verdict: str


@dataclass(frozen=True, slots=True)
class Step:
    """Something done to an experiment or concluded about it. actor: `operator`, `ramp`, `guardrail` or `report`."""

    at: float
    actor: str
    action: str
    detail: str


@dataclass(frozen=True, slots=True)
class StoredState:
    """What operators and the ramp made of an experiment. winner: the deployment that took the task over."""

    name: str
    revision: int
    config_hash: str
    state: Literal["running", "paused", "stopped"]
    traffic: float
    winner: str | None = None
    updated: float = field(default=0.0)
