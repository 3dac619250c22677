"""What is counted: by hand for each name, and against a recount of the rows for any order of arrival."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.metrics import Metrics
from service.storage.events import ExposureEvent, Feedback, FeedbackRefusedError, PairEvent, Tally
from service.storage.store import Store
from tests.service.storage.records import (
    Key,
    counts,
    exposure,
    flushed,
    label,
    number,
    pair,
    sample,
    send,
)


def test_requests_errors_fallbacks_and_overrides(store: Store, metrics: Metrics) -> None:
    store.record(exposure("a"))
    store.record(exposure("a", 1))
    store.record(exposure("b", served="full", device_ms=3.0))
    for id, status in (("c", 500), ("d", 503), ("e", 504), ("f", 499)):
        store.record(exposure(id, status=status, served=None, label=None, device_ms=None))
    store.record(exposure("g", source="override", intended="full", served="full"))
    assert flushed(store, metrics).tallies("e", 1) == [
        Tally("device_ms", "full", "", "", 1, 3.0),
        Tally("device_ms", "small", "", "", 1, 4.0),
        Tally("errors", "small", "", "", 3),
        Tally("fallbacks", "small", "", "", 1),
        Tally("items", "small", "", "", 7),
        Tally("overrides", "", "", "", 1),
        Tally("requests", "small", "", "", 6),
        Tally("units", "small", "", "", 6),
    ]


def test_a_unit_counts_once_in_the_arm_it_met_first(store: Store, metrics: Metrics) -> None:
    for id, arm, unit in (("a", "small", "u"), ("b", "small", "u"), ("c", "full", "u"), ("d", "full", "v")):
        store.record(exposure(id, unit=unit, intended=arm))
    flushed(store, metrics)
    assert [number(store, "units", arm) for arm in ("small", "full")] == [1, 1]


def test_the_first_label_speaks_for_its_unit(store: Store) -> None:
    for id in ("a", "b"):
        store.record(exposure(id, unit="u"))
    store.record(exposure("failed", unit="v", status=504, served=None, label=None))
    assert send(store, label("b", "no"), label("a", "yes"), label("failed", "yes")) == ("matched",) * 3
    assert [number(store, name, "small") for name in ("labelled", "right")] == [2, 0]
    assert number(store, "repeats") == 1
    assert number(store, "confusion", "small", truth="no", predicted="yes") == 1
    assert number(store, "confusion", "small", truth="yes", predicted="") == 1


def test_a_replaced_label_moves_the_counts(store: Store) -> None:
    for id in ("a", "b"):
        store.record(exposure(id, unit="u"))
    send(store, label("a", "no"), label("b", "no"))
    assert send(store, label("b", "yes"), replace=True) == ("replaced",)
    assert number(store, "right", "small") == 0
    assert send(store, label("a", "yes"), replace=True) == ("replaced",)
    assert number(store, "right", "small") == number(store, "labelled", "small") == 1
    assert [number(store, "confusion", "small", truth, "yes") for truth in ("yes", "no")] == [1, 0]


def test_overrides_are_not_compared(store: Store) -> None:
    store.record(exposure("a", source="override"))
    assert send(store, label("a")) == ("matched",)
    assert counts(store.tallies("e", 1)) == {("overrides", "", "", ""): 1}


@pytest.mark.parametrize(
    ("control", "candidate", "word"),
    [
        ("yes", "yes", "both_right"),
        ("yes", "no", "only_control"),
        ("no", "yes", "only_candidate"),
        ("no", "no", "both_wrong"),
        ("yes", None, "only_control"),
        ("no", None, "both_wrong"),
    ],
)
def test_labelled_pairs_of_a_shadow(store: Store, control: str, candidate: str | None, word: str) -> None:
    store.declare("e", 1, "shadow", "full", "small")
    outcome = "candidate_failed" if candidate is None else "agree" if control == candidate else "disagree"
    store.record(exposure("a", intended="full", served="full", label=control, unit="f"))
    for id in ("a", "b"):
        changes: dict[str, Any] = {"candidate_label": candidate, "outcome": outcome, "unit": "f"}
        store.record(pair(id, primary_label=control, **changes))
    assert send(store, label("a"), label("b")) == ("matched", "matched")
    found = counts(store.tallies("e", 1))
    expected = {
        ("items", "full", "", ""): 1,
        ("requests", "full", "", ""): 1,
        ("units", "full", "", ""): 1,
        ("device_ms", "small", "", ""): 0,
        ("pairs", "", "", outcome): 2,
        ("unit_pairs", "", "", outcome): 1,
        ("labelled_pairs", "", "", word): 1,
        ("class_pairs", "", "yes", word): 1,
        ("confusion", "full", "yes", control): 1,
        ("confusion", "small", "yes", candidate or ""): 1,
        ("repeats", "", "", ""): 1,
        ("flips", "", control, candidate or ""): 2 * (outcome == "disagree"),
        ("dp", "", "", ""): 2,
        ("device_ms", "full", "", ""): 1,
    }  # fmt: skip
    # The answer fell back from nothing: it is the control's own. A failed candidate is no flip.
    assert found == {key: n for key, n in expected.items() if n}


def test_differences_of_probabilities_have_a_sum_and_a_peak(store: Store, metrics: Metrics) -> None:
    store.record(pair("a", mean_abs_dp=0.25, max_abs_dp=0.5))
    flushed(store, metrics)
    store.record(pair("b", mean_abs_dp=0.5, max_abs_dp=0.75))
    flushed(store, metrics)
    store.record(pair("c", mean_abs_dp=0.125, max_abs_dp=0.25))
    store.record(pair("d", mean_abs_dp=None, max_abs_dp=None, candidate_label=None, outcome="candidate_failed"))
    flushed(store, metrics)
    assert [tally for tally in store.tallies("e", 1) if tally.name == "dp"] == [Tally("dp", "", "", "", 3, 0.875, 0.75)]


def test_a_cascade_counts_outcomes_and_the_intended_arm(store: Store) -> None:
    store.declare("e", 1, "cascade", "full", "small")
    store.record(exposure("a", cascade="accepted"))
    store.record(exposure("b", cascade="escalated", served="full", label="no"))
    send(store, label("a"), label("b"))
    found = counts(store.tallies("e", 1))
    assert [found["cascade", "", "", word] for word in ("accepted", "escalated")] == [1, 1]
    assert (found["labelled", "small", "", ""], found["right", "small", "", ""]) == (2, 1)
    assert ("fallbacks", "small", "", "") not in found, "an escalation is what a cascade is for"


def test_revisions_are_counted_apart(store: Store, metrics: Metrics) -> None:
    store.record(exposure("a", unit="u"))
    store.record(exposure("b", unit="u", revision=2))
    flushed(store, metrics)
    assert counts(store.tallies("e", 1)) == counts(store.tallies("e", 2))


def test_a_record_is_counted_once(store: Store, metrics: Metrics) -> None:
    for _ in range(2):
        store.record(exposure("a"))
        store.record(pair("a"))
        flushed(store, metrics)
    assert (number(store, "requests", "small"), number(store, "pairs", predicted="agree")) == (1, 1)
    assert sample(metrics, "events_dropped_total", kind="exposure", reason="storage") == 0, "the row is there"


# Any order of arrival. Requests c and d have the same request id, which labels therefore cannot use once both are in.
REQUESTS = {"a": "ra", "b": "rb", "c": "rc", "d": "rc"}
ids, items, words = st.sampled_from("abcd"), st.integers(0, 1), st.sampled_from(["yes", "no"])
Call = tuple[tuple[Feedback, ...], bool]
Operation = ExposureEvent | PairEvent | Call


@st.composite
def exposures(draw: st.DrawFn) -> ExposureEvent:
    id, status = draw(ids), draw(st.sampled_from([200, 200, 200, 503, 499]))
    answered = status == 200
    return exposure(
        id,
        draw(items),
        request_id=REQUESTS[id],
        unit=draw(st.sampled_from("uvw")),
        intended=draw(st.sampled_from(["full", "small"])),
        served=draw(st.sampled_from(["full", "small"])) if answered else None,
        label=draw(words) if answered else None,
        device_ms=draw(st.sampled_from([0.5, 1.5, None])) if answered else None,
        status=status,
        source=draw(st.sampled_from(["subject", "request", "override"])),
        cascade=draw(st.sampled_from([None, "accepted", "escalated"])) if answered else None,
    )


@st.composite
def pairs(draw: st.DrawFn) -> PairEvent:
    control, candidate = draw(words), draw(st.sampled_from(["yes", "no", None]))
    outcome = "candidate_failed" if candidate is None else "agree" if control == candidate else "disagree"
    dp = None if candidate is None else draw(st.sampled_from([0.0, 0.25, 0.5]))
    return pair(
        draw(ids),
        draw(items),
        unit=draw(st.sampled_from("uvw")),
        primary_label=control,
        candidate_label=candidate,
        outcome=outcome,
        mean_abs_dp=dp,
        max_abs_dp=dp,
    )


named = st.builds(label, ids, words, items)
asked = st.builds(lambda id, word, item: Feedback(None, REQUESTS[id], item, word), ids, words, items)
calls = st.tuples(st.lists(named | asked, min_size=1, max_size=3).map(tuple), st.booleans())
# Whether to wait for everything so far before the operation: batches of any size.
operations = st.lists(st.tuples(exposures() | pairs() | calls, st.booleans()), max_size=20)


class Joined(NamedTuple):
    """A row and its label."""

    row: ExposureEvent | PairEvent
    truth: str


@dataclass
class Recount:
    """The same records, counted from whole lists: rows in their order, and labels as they ended."""

    mode: str

    def __post_init__(self) -> None:
        self.answers: dict[tuple[str, int], ExposureEvent] = {}
        self.pairs: dict[tuple[str, int], PairEvent] = {}
        self.labels: dict[tuple[str, int], str] = {}
        self.asked: dict[tuple[str, int], str] = {}
        self.joined: list[ExposureEvent | PairEvent] = []

    def take(self, operation: Operation) -> str:
        """Keep what is new, and say what a call should have been told."""
        if isinstance(operation, tuple):
            return self._label(*operation)
        key = (operation.id, operation.item)
        rows: dict[tuple[str, int], Any] = self.answers if isinstance(operation, ExposureEvent) else self.pairs
        if key not in rows:
            rows[key] = operation
            if isinstance(operation, ExposureEvent):
                word = self.asked.pop((operation.request_id, operation.item), None)
                if word is not None and key not in self.labels:
                    self.labels[key] = word
                    self._join(key, self.pairs)
            if key in self.labels:
                self.joined.append(operation)
        return ""

    def _join(self, key: tuple[str, int], rows: "dict[tuple[str, int], Any]") -> None:
        if key in rows:
            self.joined.append(rows[key])

    def _label(self, items: tuple[Feedback, ...], replace: bool) -> str:
        labels, asked = dict(self.labels), dict(self.asked)
        outcomes, new = [], []
        known = {answer.request_id: set[str]() for answer in self.answers.values()}
        for answer in self.answers.values():
            known[answer.request_id].add(answer.id)
        if any(len(known.get(item.request_id or "", ())) > 1 for item in items):
            return "ambiguous_request_id"
        for item in items:
            [id] = known.get(item.request_id or "", {item.id})
            kept, key = (asked, (item.request_id, item.item)) if id is None else (labels, (id, item.item))
            before = kept.get(key)  # type: ignore[arg-type]
            if before is None:
                is_there = id is not None and (key in self.answers or key in self.pairs)
                outcomes.append("matched" if is_there else "orphan")
                new.append(key)
            elif before == item.label:
                outcomes.append("unchanged")
            elif not replace:
                return "feedback_conflict"
            else:
                outcomes.append("replaced")
            kept[key] = item.label  # type: ignore[index]
        self.labels, self.asked = labels, asked
        for key in new:
            if key in labels:
                self._join(key, self.answers)
                self._join(key, self.pairs)
        return " ".join(outcomes)

    def counts(self) -> dict[Key, int]:
        found: Counter[Key] = Counter()
        for name, arm, truth, predicted in self._counted():
            found[name, arm, truth, predicted] += 1
        return {key: n for key, n in found.items() if n}

    def _counted(self) -> Iterator[Key]:
        enrolled = [row for row in self.answers.values() if row.source != "override"]
        for row in self.answers.values():
            if row.source == "override":
                yield "overrides", "", "", ""
        for row in enrolled:
            yield "items", row.intended, "", ""
            if row.item == 0:
                yield "requests", row.intended, "", ""
                if row.status == 503:
                    yield "errors", row.intended, "", ""
            if row.cascade:
                yield "cascade", "", "", row.cascade
            elif row.served and row.served != row.intended:
                yield "fallbacks", row.intended, "", ""
            if row.served and row.device_ms is not None and row.item == 0:
                yield "device_ms", row.served, "", ""
        for row in {row.unit: row for row in reversed(enrolled)}.values():
            yield "units", row.intended, "", ""
        for compared in self.pairs.values():
            yield "pairs", "", "", compared.outcome
            if compared.outcome == "disagree":
                yield "flips", "", compared.primary_label, compared.candidate_label or ""
            if compared.mean_abs_dp is not None:
                yield "dp", "", "", ""
        for compared in {row.unit: row for row in reversed(self.pairs.values())}.values():
            yield "unit_pairs", "", "", compared.outcome
        yield from self._labelled()

    def _labelled(self) -> Iterator[Key]:
        is_shadow = self.mode == "shadow"
        rows = [row for row in self.joined if isinstance(row, PairEvent) is is_shadow]
        rows = [row for row in rows if isinstance(row, PairEvent) or row.source != "override"]
        first = {row.unit: row for row in reversed(rows)}.values()
        for _ in range(len(rows) - len(first)):
            yield "repeats", "", "", ""
        for row in first:
            truth = self.labels[row.id, row.item]
            if isinstance(row, PairEvent):
                right = (row.primary_label == truth, row.candidate_label == truth)
                word = ["both_wrong", "only_candidate", "only_control", "both_right"][2 * right[0] + right[1]]
                yield "labelled_pairs", "", "", word
                yield "class_pairs", "", truth, word
                yield "confusion", "full", truth, row.primary_label
                yield "confusion", "small", truth, row.candidate_label or ""
            else:
                yield "labelled", row.intended, "", ""
                if row.label == truth:
                    yield "right", row.intended, "", ""
                yield "confusion", row.intended, truth, row.label or ""


_EXAMPLES = count()


async def run(store: Store, name: str, sequence: list[tuple[Operation, bool]]) -> list[str]:
    """Send a sequence in its order, waiting only where it says so; the names make it new to the store."""
    calls: list[asyncio.Task[str]] = []
    for operation, wait in sequence:
        if isinstance(operation, tuple):
            mine = tuple(
                replace(item, id=item.id and name + item.id, request_id=item.request_id and name + item.request_id)
                for item in operation[0]
            )
            calls.append(asyncio.ensure_future(told(store, mine, operation[1])))
            await asyncio.sleep(0)
        elif isinstance(operation, ExposureEvent):
            store.record(
                replace(operation, id=name + operation.id, request_id=name + operation.request_id, experiment=name)
            )
        else:
            store.record(replace(operation, id=name + operation.id, experiment=name))
        if wait:
            await asyncio.gather(*calls)
    # Whatever was recorded before it is committed with it.
    await store.feedback([label(name + "last")], replace=False)
    return list(await asyncio.gather(*calls))


async def told(store: Store, items: tuple[Feedback, ...], replace: bool) -> str:
    try:
        return " ".join((await store.feedback(items, replace)).outcomes)
    except FeedbackRefusedError as refusal:
        return refusal.code


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=operations, mode=st.sampled_from(["split", "shadow", "cascade"]))
def test_any_order_of_arrival_gives_the_counts_of_the_rows(
    store: Store, sequence: list[tuple[Operation, bool]], mode: Any
) -> None:
    name = f"example{next(_EXAMPLES)}"
    store.declare(name, 1, mode, "full", "small")
    answers = asyncio.run(run(store, name, sequence))
    recount = Recount(mode)
    expected = [recount.take(operation) for operation, _ in sequence]
    assert answers == [answer for answer in expected if answer]
    tallies = [tally for tally in store.tallies(name, 1) if tally.name != "device_ms" or tally.n]
    assert counts(tallies) == recount.counts()
    spent: dict[str, float] = defaultdict(float)
    for row in recount.answers.values():
        if row.source != "override" and row.served and row.device_ms is not None:
            spent[row.served] += row.device_ms
    assert {tally.arm: tally.total for tally in tallies if tally.name == "device_ms"} == {
        arm: total for arm, total in spent.items() if ("device_ms", arm, "", "") in recount.counts()
    }


def test_which_experiment_recorded_an_answer(store: Store, metrics: Metrics) -> None:
    store.record(exposure("a", request_id="asked"))
    store.record(exposure("b", experiment="other"))
    found = flushed(store, metrics).experiments_of([label("a"), label("b"), label("c")])
    assert found == {"a": "e", "b": "other"}
    by_request = Feedback(None, "asked", 0, "yes")
    assert store.experiments_of([by_request]) == {"asked": "e"}
