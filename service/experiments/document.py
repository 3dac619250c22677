"""The report of an experiment as the wire has it. Its page, its terminal form and its gauges are drawn from this."""

from typing import Any, Literal

from pydantic import Field

from service.documents import Document

Word = Literal["invalid", "insufficient_data", "inferior", "superior", "non_inferior", "undecided"]
LatencyWord = Literal["faster", "slower", "undecided", "contended", "insufficient_data"]


class ArmReport(Document):
    """One arm. requests, errors: by intended arm; units: distinct enrolled. accuracy has a Wilson interval.

    device_seconds_per_1000: what 1,000 requests cost in device time, batches shared out by tokens.
    """

    deployment: str
    role: Literal["control", "candidate"]
    weight: float | None
    requests: int
    errors: int
    fallbacks: int
    units: int
    labelled: int
    right: int
    accuracy: float | None
    accuracy_lower: float | None
    accuracy_upper: float | None
    device_seconds_per_1000: float | None


class Srm(Document):
    """Sample ratio: do the arms' counts fit the weights? The alarm is sequential, chi-square and p are for the eye."""

    counts: dict[str, int]
    chi_square: float
    p_value: float
    e_value: float
    alarm: bool


class Pairs(Document):
    """The labelled units that both arms answered, and the pairs whose candidate failed."""

    both_right: int
    only_control: int
    only_candidate: int
    both_wrong: int
    candidate_failed: int


class Difference(Document):
    """Accuracy of the candidate minus that of the control, with an interval that holds at every look.

    method: `paired_betting` (labelled pairs), `label_free` (disagreements bound it) or `two_arm_sequence`.
    """

    estimate: float
    lower: float
    upper: float
    method: Literal["paired_betting", "label_free", "two_arm_sequence"]
    e_non_inferior: float | None
    mcnemar_p: float | None


class ClassReport(Document):
    """Recalls of one true class. p_value: exact McNemar of the pairs, or of two proportions, after Holm."""

    label: str
    n: dict[str, int]
    recall: dict[str, float | None]
    lower: dict[str, float | None]
    upper: dict[str, float | None]
    p_value: float | None


class Quantiles(Document):
    """Milliseconds from arrival to answer, from raw samples; [value, lower, upper] with 95 % order-statistic intervals.

    curve: the quantiles 0.01, 0.02 ... 0.99, for drawing.
    """

    n: int
    p50: float | None
    p95: float | None
    p99: float | None
    p50_interval: tuple[float | None, float | None]
    p95_interval: tuple[float | None, float | None]
    p99_interval: tuple[float | None, float | None]
    curve: list[float]


class Ratio(Document):
    """p95 of the candidate over p95 of the control, with a bootstrap interval."""

    estimate: float
    lower: float
    upper: float


class Latency(Document):
    """Latency of the arms and its own word."""

    arms: dict[str, Quantiles]
    p95_ratio: Ratio | None
    verdict: LatencyWord


class Memory(Document):
    """Bytes of weights each arm needs served alone, and what this process holds for both. None: not loaded."""

    control_bytes: int | None
    candidate_bytes: int | None
    saved_ratio: float | None
    basis: str | None
    resident_bytes: int


class Cascade(Document):
    """Where the items of a cascade were answered, and how often rightly, of those with labels."""

    threshold: float
    accepted: int
    escalated: int
    fallback: int
    accepted_share: float | None


class Needed(Document):
    """What an undecided comparison still wants: units in all, and a sentence."""

    units: int | None
    more: int | None
    words: str


class Decided(Document):
    """The first verdict that was a decision."""

    verdict: str
    units: int
    at: str


class LookReport(Document):
    """The comparison at one moment."""

    units: int
    at: str
    estimate: float
    lower: float
    upper: float
    verdict: str


class StepReport(Document):
    """Something done to the experiment, or concluded about it."""

    at: str
    actor: str
    action: str
    detail: str


class Disagreement(Document):
    """An item on which the arms disagree. Ids only: what was asked is not kept."""

    id: str
    item: int
    at: str
    control_label: str
    candidate_label: str


class Flip(Document):
    """How often the control said one label and the candidate another."""

    control_label: str
    candidate_label: str
    n: int


class Report(Document):
    """`GET /experiments/{name}`."""

    name: str
    revision: int
    task: str
    mode: Literal["split", "shadow", "cascade"]
    state: Literal["running", "paused", "stopped"]
    traffic: float
    winner: str | None
    control: str
    candidate: str
    metric: Literal["accuracy"]
    margin: float
    alpha: float
    updated: str
    units: int
    repeats: int
    overrides: int
    dropped: dict[str, int]
    arms: list[ArmReport]
    srm: Srm | None
    labels_srm: Srm | None
    pairs: Pairs | None
    agreement: float | None
    agreement_interval: tuple[float, float] | None
    mean_abs_dp: float | None
    max_abs_dp: float | None
    flips: list[Flip]
    difference: Difference | None
    classes: list[ClassReport]
    latency_ms: Latency
    memory: Memory
    cascade: Cascade | None
    verdict: Word
    words: str
    worse: bool
    first_decided: Decided | None
    needed: Needed | None
    ramp: list[float] | None
    timeline: list[LookReport]
    steps: list[StepReport]
    disagreements: list[Disagreement]
    warnings: list[str]


class ReportLine(Document):
    """One experiment in `GET /experiments`."""

    name: str
    revision: int
    task: str
    mode: str
    state: str
    traffic: float
    units: int
    verdict: Word
    words: str


class ReportList(Document):
    """`GET /experiments`."""

    object: Literal["list"] = "list"
    data: list[ReportLine]


class ExperimentPatch(Document):
    """`PATCH /experiments/{name}`: at least one field. winner ends the experiment: that deployment answers the task."""

    state: Literal["running", "paused", "stopped"] | None = None
    traffic: float | None = Field(None, ge=0, le=100)
    winner: str | None = None
    advance: bool | None = None


def as_json(report: Report) -> dict[str, Any]:
    """The body of the JSON answer."""
    return report.model_dump(mode="json")
