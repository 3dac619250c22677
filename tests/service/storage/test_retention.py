"""Forgetting: rows go by age, what was counted stays."""

import pytest

from service.metrics import Metrics
from service.storage.events import Look, Step
from service.storage.store import Store
from tests.service.storage.records import counts, exposure, flushed, label, label_request, number, pair, send


def test_old_rows_go_and_counts_stay(store: Store, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.storage.retention.ROWS", 3)  # so that there are several rounds
    store.declare("e", 1, "shadow", "full", "small")
    store.add_look("e", 1, Look(10, 1.0, 0.0, -1.0, 1.0, "undecided"))
    store.add_step("e", 1, Step(1.0, "operator", "pause", ""))
    for id in range(10):
        store.record(exposure(f"{id}", at=float(id)))
        store.record(pair(f"{id}", at=float(id)))
    flushed(store, metrics)
    before = counts(store.tallies("e", 1))
    assert store.forget(8.0) == 16
    assert store.forget(8.0) == 0
    assert counts(store.tallies("e", 1)) == before
    assert len(store.latencies("e", 1, "small").free) == len(store.candidate_latencies("e", 1)) == 2
    assert (len(store.looks("e", 1)), len(store.steps("e", 1))) == (1, 1)


def test_a_unit_is_remembered_while_its_revision_has_rows(store: Store, metrics: Metrics) -> None:
    store.record(exposure("old", at=1.0, unit="u"))
    store.record(exposure("new", at=9.0, unit="v"))
    flushed(store, metrics)
    assert store.forget(5.0) == 1
    store.record(exposure("again", at=9.0, unit="u"))
    flushed(store, metrics)
    assert number(store, "units", "small") == 2, "the unit was counted before its row was forgotten"
    assert store.forget(10.0) == 4, "two rows, and the two units that nothing can meet again"


def test_labels_go_too(store: Store) -> None:
    send(store, label("a"), label_request("b"))
    assert store.forget(1.0) == 0
    assert store.forget(4e9) == 2
    assert send(store, label("a", "no"), label_request("b", "no")) == ("orphan", "orphan")
