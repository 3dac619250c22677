"""What one record changes: joins of answers, pairs and labels, what counts once, and the tallies. No database here.

A ledger holds the part of the database that a batch can touch. Records are applied one after another; what changed
is then written in the transaction that holds the writers' lock, so that rows and tallies never part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from service.storage.events import (
    ExposureEvent,
    Feedback,
    FeedbackRefusedError,
    FeedbackResult,
    PairEvent,
)

Mode = Literal["split", "shadow", "cascade"]
Outcome = Literal["matched", "orphan", "replaced", "unchanged"]
FAILURES = frozenset({500, 503, 504})


class Revision(NamedTuple):
    """Which run of which experiment."""

    experiment: str
    revision: int


class Design(NamedTuple):
    """How a revision compares its arms."""

    mode: Mode
    control: str
    candidate: str


UNDECLARED = Design("split", "control", "candidate")


class ItemKey(NamedTuple):
    """One answered item."""

    id: str
    item: int


class RequestKey(NamedTuple):
    """An item of a request that no answer is known of yet."""

    request_id: str
    item: int


class Answer(NamedTuple):
    """The part of an exposure that a label needs. arm: None if the request named its deployment."""

    revision: Revision
    unit: str
    arm: str | None
    label: str | None


class Pair(NamedTuple):
    """The part of a pair that a label needs."""

    revision: Revision
    unit: str
    control_label: str
    candidate_label: str | None


class Label(NamedTuple):
    """A true label as it is kept."""

    label: str
    at: float
    key_name: str


@dataclass(slots=True)
class Unit:
    """What a unit has been counted for. arm: enrolled there; labelled: the item whose label speaks for it."""

    arm: str | None = None
    paired: bool = False
    labelled: ItemKey | None = None


class TallyKey(NamedTuple):
    """A tally's name and what it is about; what does not apply is empty."""

    revision: Revision
    name: str
    arm: str = ""
    truth: str = ""
    predicted: str = ""


@dataclass(slots=True)
class Delta:
    """What a batch adds to a tally."""

    n: int = 0
    total: float = 0.0
    peak: float = 0.0


@dataclass
class Changes:
    """What a batch has to write."""

    exposures: list[ExposureEvent] = field(default_factory=list)
    pairs: list[PairEvent] = field(default_factory=list)
    labels: set[ItemKey] = field(default_factory=set)
    new_labels: int = 0
    waiting: set[RequestKey] = field(default_factory=set)
    units: set[tuple[Revision, str]] = field(default_factory=set)
    deltas: dict[TallyKey, Delta] = field(default_factory=dict)


@dataclass
class Ledger:
    """What is known of the items, requests and units of a batch; whatever is not in here is not in the database."""

    designs: dict[Revision, Design] = field(default_factory=dict)
    answers: dict[ItemKey, Answer] = field(default_factory=dict)
    pairs: dict[ItemKey, Pair] = field(default_factory=dict)
    labels: dict[ItemKey, Label] = field(default_factory=dict)
    requests: dict[str, set[str]] = field(default_factory=dict)
    waiting: dict[RequestKey, Label] = field(default_factory=dict)
    units: dict[tuple[Revision, str], Unit] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)

    def expose(self, event: ExposureEvent) -> None:
        """Take in an answered or failed item, and the label that was there before it. A known item is left alone."""
        key = ItemKey(event.id, event.item)
        if key in self.answers:
            return
        revision = Revision(event.experiment, event.revision)
        arm = None if event.source == "override" else event.intended
        answer = Answer(revision, event.unit, arm, event.label)
        self.answers[key] = answer
        self.requests.setdefault(event.request_id, set()).add(event.id)
        self.changes.exposures.append(event)
        self._count_exposure(event, answer)
        if key in self.labels:
            self._count_label(key, self.labels[key].label, answer, None)
        asked = RequestKey(event.request_id, event.item)
        found = self.waiting.pop(asked, None)
        if found is not None:
            self.changes.waiting.add(asked)
            if key not in self.labels:
                self._keep(key, found)
                self._count_label(key, found.label, answer, self.pairs.get(key))

    def pair(self, event: PairEvent) -> None:
        """Take in an item that both arms answered, and the label that was there before it."""
        key = ItemKey(event.id, event.item)
        if key in self.pairs:
            return
        revision = Revision(event.experiment, event.revision)
        pair = Pair(revision, event.unit, event.primary_label, event.candidate_label)
        self.pairs[key] = pair
        self.changes.pairs.append(event)
        self._add(TallyKey(revision, "pairs", predicted=event.outcome))
        if event.outcome == "disagree":
            flip = TallyKey(revision, "flips", truth=event.primary_label, predicted=event.candidate_label or "")
            self._add(flip)
        if event.mean_abs_dp is not None:
            self._add(TallyKey(revision, "dp"), total=event.mean_abs_dp, peak=event.max_abs_dp or 0.0)
        unit = self._unit(revision, event.unit)
        if not unit.paired:
            unit.paired = True
            self._touch(revision, event.unit)
            self._add(TallyKey(revision, "unit_pairs", predicted=event.outcome))
        if key in self.labels:
            self._count_label(key, self.labels[key].label, None, pair)

    def feedback(self, items: Sequence[Feedback], replace: bool, at: float) -> FeedbackResult:
        """Take in true labels, all or none. Raises FeedbackRefusedError."""
        targets = [self._target(number, label) for number, label in enumerate(items)]
        said: dict[tuple[bool, ItemKey | RequestKey], str] = {}
        for number, (label, target) in enumerate(zip(items, targets, strict=True)):
            kept = self._kept(target)
            named = isinstance(target, ItemKey), target  # tuples of two kinds are equal if their values are
            before = said.get(named, kept.label if kept else label.label)
            if before != label.label and not replace:
                raise FeedbackRefusedError("feedback_conflict", number)
            said[named] = label.label
        outcomes = (
            self._take(target, Label(label.label, at, label.key_name))
            for label, target in zip(items, targets, strict=True)
        )
        return FeedbackResult(tuple(outcomes))

    def drop(self, revision: Revision, reason: str, n: int) -> None:
        """Note records that were given up."""
        self._add(TallyKey(revision, "dropped", predicted=reason), n)

    def _target(self, number: int, label: Feedback) -> ItemKey | RequestKey:
        """The item that a label is for. Raises FeedbackRefusedError if several requests have its request id."""
        if label.id is not None:
            return ItemKey(label.id, label.item)
        request_id = label.request_id or ""
        ids = self.requests.get(request_id, set())
        if len(ids) > 1:
            raise FeedbackRefusedError("ambiguous_request_id", number)
        return ItemKey(next(iter(ids)), label.item) if ids else RequestKey(request_id, label.item)

    def _kept(self, target: ItemKey | RequestKey) -> Label | None:
        return self.labels.get(target) if isinstance(target, ItemKey) else self.waiting.get(target)

    def _take(self, target: ItemKey | RequestKey, label: Label) -> Outcome:
        before = self._kept(target)
        if before is not None and before.label == label.label:
            return "unchanged"
        if not isinstance(target, ItemKey):
            self.waiting[target] = label
            self.changes.waiting.add(target)
            return "orphan" if before is None else "replaced"
        self._keep(target, label)
        answer, pair = self.answers.get(target), self.pairs.get(target)
        if before is not None:
            self._move_label(target, before.label, label.label)
            return "replaced"
        self._count_label(target, label.label, answer, pair)
        return "orphan" if answer is None and pair is None else "matched"

    def _keep(self, key: ItemKey, label: Label) -> None:
        self.changes.new_labels += key not in self.labels
        self.labels[key] = label
        self.changes.labels.add(key)

    def _count_exposure(self, event: ExposureEvent, answer: Answer) -> None:
        revision, arm = answer.revision, answer.arm
        if arm is None:
            self._add(TallyKey(revision, "overrides"))
            return
        self._add(TallyKey(revision, "items", arm))
        if event.item == 0:
            self._add(TallyKey(revision, "requests", arm))
            if event.status in FAILURES:
                self._add(TallyKey(revision, "errors", arm))
        if event.cascade is not None:
            self._add(TallyKey(revision, "cascade", predicted=event.cascade))
        elif event.served not in (None, arm):
            self._add(TallyKey(revision, "fallbacks", arm))
        if event.served is not None and event.device_ms is not None:
            self._add(TallyKey(revision, "device_ms", event.served), int(event.item == 0), event.device_ms)
        unit = self._unit(revision, event.unit)
        if unit.arm is None:
            unit.arm = arm
            self._touch(revision, event.unit)
            self._add(TallyKey(revision, "units", arm))

    def _count_label(self, key: ItemKey, truth: str, answer: Answer | None, pair: Pair | None) -> None:
        """Let a label speak for its unit unless another item does. A split counts answers, a shadow pairs."""
        for found in (answer, pair):
            if found is None or not self._compares(found):
                continue
            unit = self._unit(found.revision, found.unit)
            if unit.labelled is None:
                unit.labelled = key
                self._touch(found.revision, found.unit)
                self._tally_label(found, truth, 1)
            else:
                self._add(TallyKey(found.revision, "repeats"))

    def _move_label(self, key: ItemKey, before: str, after: str) -> None:
        for found in (self.answers.get(key), self.pairs.get(key)):
            if found is None or not self._compares(found):
                continue
            if self._unit(found.revision, found.unit).labelled == key:
                self._tally_label(found, before, -1)
                self._tally_label(found, after, 1)

    def _compares(self, found: Answer | Pair) -> bool:
        is_shadow = self._design(found.revision).mode == "shadow"
        return is_shadow if isinstance(found, Pair) else found.arm is not None and not is_shadow

    def _tally_label(self, found: Answer | Pair, truth: str, n: int) -> None:
        revision = found.revision
        if isinstance(found, Answer):
            arm = found.arm or ""
            self._add(TallyKey(revision, "labelled", arm), n)
            if found.label == truth:
                self._add(TallyKey(revision, "right", arm), n)
            self._add(TallyKey(revision, "confusion", arm, truth, found.label or ""), n)
            return
        design = self._design(revision)
        word = _PAIR_WORDS[found.control_label == truth, found.candidate_label == truth]
        self._add(TallyKey(revision, "labelled_pairs", predicted=word), n)
        self._add(TallyKey(revision, "class_pairs", truth=truth, predicted=word), n)
        self._add(TallyKey(revision, "confusion", design.control, truth, found.control_label), n)
        self._add(TallyKey(revision, "confusion", design.candidate, truth, found.candidate_label or ""), n)

    def _design(self, revision: Revision) -> Design:
        return self.designs.get(revision, UNDECLARED)

    def _unit(self, revision: Revision, unit: str) -> Unit:
        return self.units.setdefault((revision, unit), Unit())

    def _touch(self, revision: Revision, unit: str) -> None:
        self.changes.units.add((revision, unit))

    def _add(self, key: TallyKey, n: int = 1, total: float = 0.0, peak: float = 0.0) -> None:
        delta = self.changes.deltas.setdefault(key, Delta())
        delta.n += n
        delta.total += total
        delta.peak = max(delta.peak, peak)


# (control right, candidate right) -> the pair's name.
_PAIR_WORDS = {
    (True, True): "both_right",
    (True, False): "only_control",
    (False, True): "only_candidate",
    (False, False): "both_wrong",
}
