"""One transaction of records: load what they touch, apply them to a ledger, write what changed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, bindparam, case, delete, select

from service.storage.events import ExposureEvent, Feedback, FeedbackRefusedError, FeedbackResult, PairEvent
from service.storage.ledger import (
    Answer,
    Changes,
    Delta,
    Design,
    ItemKey,
    Label,
    Ledger,
    Pair,
    RequestKey,
    Revision,
    TallyKey,
    Unit,
)
from service.storage.schema import designs, exposures, feedback, pairs, tallies, units, waiting
from service.storage.statements import belongs, inserting, rows_with, upserting


@dataclass(frozen=True)
class Labels:
    """One call of feedback: all of it is kept, or none. at: when it arrived."""

    items: Sequence[Feedback]
    replace: bool
    at: float


Entry = ExposureEvent | PairEvent | Labels
Answered = FeedbackResult | FeedbackRefusedError | None


class Dropped(NamedTuple):
    """Whose records were given up, and why."""

    revision: Revision
    reason: str


@dataclass(frozen=True)
class Written:
    """answers: one per entry, None for events. new_labels: how many labels are there that were not before."""

    answers: list[Answered]
    new_labels: int


def write(connection: Connection, entries: Sequence[Entry], dropped: Mapping[Dropped, int], replica: str) -> Written:
    """Record entries in their order. The transaction must be the only one to write."""
    ledger = _load(connection, entries)
    answers = [_apply(ledger, entry) for entry in entries]
    for (revision, reason), n in dropped.items():
        ledger.drop(revision, reason, n)
    _save(connection, ledger, replica)
    return Written(answers, ledger.changes.new_labels)


def _apply(ledger: Ledger, entry: Entry) -> Answered:
    if isinstance(entry, Labels):
        try:
            return ledger.feedback(entry.items, entry.replace, entry.at)
        except FeedbackRefusedError as refusal:
            return refusal
    if isinstance(entry, ExposureEvent):
        ledger.expose(entry)
    else:
        ledger.pair(entry)
    return None


def _load(connection: Connection, entries: Sequence[Entry]) -> Ledger:
    """Everything that the entries could meet."""
    ledger = Ledger()
    events = [entry for entry in entries if not isinstance(entry, Labels)]
    labels = [label for entry in entries if isinstance(entry, Labels) for label in entry.items]
    asked = {label.request_id for label in labels if label.request_id is not None}
    _load_answers(connection, ledger, exposures.c.request_id, asked)
    ids = {event.id for event in events} | {label.id for label in labels if label.id is not None}
    ids.update(*(ledger.requests[request_id] for request_id in asked & ledger.requests.keys()))
    _load_answers(connection, ledger, exposures.c.id, ids)
    for row in rows_with(connection, pairs, pairs.c.id, ids):
        revision = Revision(row.experiment, row.revision)
        ledger.pairs[ItemKey(row.id, row.item)] = Pair(revision, row.unit, row.primary_label, row.candidate_label)
    for row in rows_with(connection, feedback, feedback.c.id, ids):
        ledger.labels[ItemKey(row.id, row.item)] = Label(row.label, row.at, row.key_name)
    arriving = {event.request_id for event in events if isinstance(event, ExposureEvent)}
    for row in rows_with(connection, waiting, waiting.c.request_id, asked | arriving):
        ledger.waiting[RequestKey(row.request_id, row.item)] = Label(row.label, row.at, row.key_name)
    _load_units(connection, ledger, events)
    return ledger


def _load_answers(connection: Connection, ledger: Ledger, column: ColumnElement[str], values: set[str]) -> None:
    for row in rows_with(connection, exposures, column, values):
        arm = None if row.source == "override" else row.intended
        answer = Answer(Revision(row.experiment, row.revision), row.unit, arm, row.label)
        ledger.answers[ItemKey(row.id, row.item)] = answer
        ledger.requests.setdefault(row.request_id, set()).add(row.id)


def _load_units(connection: Connection, ledger: Ledger, events: Iterable[ExposureEvent | PairEvent]) -> None:
    needed: dict[Revision, set[str]] = {}
    met = [(Revision(event.experiment, event.revision), event.unit) for event in events]
    met += [(answer.revision, answer.unit) for answer in ledger.answers.values()]
    met += [(pair.revision, pair.unit) for pair in ledger.pairs.values()]
    for revision, unit in met:
        needed.setdefault(revision, set()).add(unit)
    for revision, names in needed.items():
        of_revision = belongs(designs, revision)
        for row in connection.execute(select(designs).where(of_revision)):
            ledger.designs[revision] = Design(row.mode, row.control, row.candidate)
        for row in rows_with(connection, units, units.c.unit, names, belongs(units, revision)):
            labelled = None if row.labelled_id is None else ItemKey(row.labelled_id, row.labelled_item)
            ledger.units[revision, row.unit] = Unit(row.arm, row.paired, labelled)


def _save(connection: Connection, ledger: Ledger, replica: str) -> None:
    changes = ledger.changes
    _save_events(connection, changes, replica)
    labels = [_label_row(key, ledger.labels[key]) for key in changes.labels]
    _run(connection, upserting(connection, feedback), labels)
    kept = [key for key in changes.waiting if key in ledger.waiting]
    _run(connection, upserting(connection, waiting), [_label_row(key, ledger.waiting[key]) for key in kept])
    joined = delete(waiting).where(waiting.c.request_id == bindparam("request"), waiting.c.item == bindparam("number"))
    gone = [{"request": key.request_id, "number": key.item} for key in changes.waiting if key not in ledger.waiting]
    _run(connection, joined, gone)
    _run(connection, upserting(connection, units), [_unit_row(*key, ledger.units[key]) for key in changes.units])
    sums = [_tally_row(key, delta) for key, delta in changes.deltas.items()]
    _run(connection, _adding(connection), sums)


def _save_events(connection: Connection, changes: Changes, replica: str) -> None:
    for table, events in ((exposures, changes.exposures), (pairs, changes.pairs)):
        _run(connection, table.insert(), [{**asdict(event), "replica": replica} for event in events])


def _label_row(key: ItemKey | RequestKey, label: Label) -> dict[str, Any]:
    return {**key._asdict(), **label._asdict()}


def _unit_row(revision: Revision, name: str, unit: Unit) -> dict[str, Any]:
    labelled_id, labelled_item = unit.labelled or (None, None)
    return {
        **revision._asdict(),
        "unit": name,
        "arm": unit.arm,
        "paired": unit.paired,
        "labelled_id": labelled_id,
        "labelled_item": labelled_item,
    }


def _tally_row(key: TallyKey, delta: Delta) -> dict[str, Any]:
    return {**key._asdict(), **key.revision._asdict(), **asdict(delta)}


def _adding(connection: Connection) -> Any:
    """Add to tallies, making those that are not there."""
    insert = inserting(connection, tallies)
    new, old = insert.excluded, tallies.c
    sums = {"n": old.n + new.n, "total": old.total + new.total}
    peak = case((new.peak > old.peak, new.peak), else_=old.peak)
    return insert.on_conflict_do_update(index_elements=list(tallies.primary_key), set_={**sums, "peak": peak})


def _run(connection: Connection, statement: Any, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(statement, rows)
