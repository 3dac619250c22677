"""What is kept and read back, the same on both databases."""

from dataclasses import replace
from hashlib import sha256
from hmac import new as hmac

import numpy as np
import pytest

from service.metrics import Metrics
from service.storage.events import Look, Step, StoredState
from service.storage.store import Store
from tests.service.storage.conftest import KEY, Open
from tests.service.storage.records import exposure, flushed, pair


def look(units: int, verdict: str = "undecided") -> Look:
    return Look(units, 1000.0 + units, 0.01, -0.02, 0.04, verdict)


@pytest.mark.parametrize("data", ["user-1", "日本語", "", b"\x00\xff"])
def test_fingerprints_are_keyed_hashes(store: Store, data: str | bytes) -> None:
    raw = data if isinstance(data, bytes) else data.encode()
    assert store.fingerprint(data) == hmac(KEY, raw, sha256).hexdigest()[:32]


def test_any_text_has_a_fingerprint(store: Store) -> None:
    assert len(store.fingerprint("half of a pair: \ud800")) == 32


def test_latencies_are_of_answers_by_the_arm_itself(store: Store, metrics: Metrics) -> None:
    kept = {"a": (30.0, False), "b": (10.0, True), "c": (20.0, False)}
    for at, (id, (milliseconds, contended)) in enumerate(kept.items()):
        store.record(exposure(id, at=float(at), total_ms=milliseconds, contended=contended))
    store.record(exposure("a", 1, total_ms=30.0))
    store.record(exposure("override", source="override"))
    store.record(exposure("fallback", served="full"))
    store.record(exposure("late", status=504, served=None, total_ms=99.0))
    store.record(exposure("cancelled", status=499, total_ms=None))
    store.record(exposure("other", intended="full", served="full"))
    store.record(exposure("older", revision=2))
    found = flushed(store, metrics).latencies("e", 1, "small")
    assert (found.free.tolist(), found.contended.tolist()) == ([20.0, 30.0], [10.0])
    assert store.latencies("e", 1, "small", limit=1).free.tolist() == [20.0]
    assert store.latencies("e", 1, "nobody").free.dtype == np.float64


def test_latencies_of_a_shadow_come_from_pairs(store: Store, metrics: Metrics) -> None:
    for at, milliseconds in enumerate([4.0, None, 6.0]):
        store.record(pair(f"{at}", at=float(at), candidate_ms=milliseconds))
    assert flushed(store, metrics).candidate_latencies("e", 1, 5).tolist() == [6.0, 4.0]
    assert store.candidate_latencies("e", 1, 1).tolist() == [6.0]


def test_disagreements_come_newest_first(store: Store, metrics: Metrics) -> None:
    differing = [pair(id, at=at, candidate_label="no", outcome="disagree") for id, at in (("a", 1.0), ("b", 2.0))]
    for event in (*differing, pair("c"), pair("d", candidate_label=None, outcome="candidate_failed")):
        store.record(event)
    assert flushed(store, metrics).disagreements("e", 1) == differing[::-1]
    assert store.disagreements("e", 1, limit=1) == differing[1:]


def test_looks_are_kept_by_units(store: Store) -> None:
    for found in (look(200), look(100), look(200, "superior")):
        store.add_look("e", 1, found)
    store.add_look("e", 2, look(7))
    assert store.looks("e", 1) == [look(100), look(200, "superior")]
    assert store.looks("nothing", 1) == []


def test_looks_are_thinned_evenly_between_the_first_and_the_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.storage.reads.MAX_LOOKS", 20)
    for units in range(0, 500, 5):
        store.add_look("e", 1, look(units))
    kept = [found.units for found in store.looks("e", 1)]
    assert len(kept) <= 20
    assert (kept[0], kept[-1]) == (0, 495)
    assert max(np.diff(kept)) <= 80
    shown = [found.units for found in store.looks("e", 1, limit=5)]
    assert len(shown) == 5
    assert (shown[0], shown[-1]) == (0, 495)


def test_steps_keep_their_order(store: Store) -> None:
    steps = [Step(2.0, "operator", "traffic", "5"), Step(2.0, "ramp", "advance", "25"), Step(3.0, "report", "x", "")]
    for step in steps:
        store.add_step("e", 1, step)
    store.add_step("e", 2, steps[0])
    assert store.steps("e", 1) == steps


def test_states_are_kept_by_name(store: Store) -> None:
    state = StoredState("e", 1, "abc", "running", 12.5, updated=1.0)
    store.put_state(replace(state, state="paused"))
    store.put_state(state)
    store.put_state(replace(state, name="f", winner="small"))
    assert store.states() == {"e": state, "f": replace(state, name="f", winner="small")}


def test_everything_is_there_after_a_restart(open_store: Open, metrics: Metrics) -> None:
    first = open_store()
    first.declare("e", 1, "shadow", "full", "small")
    first.record(pair("a"))
    first.add_step("e", 1, Step(1.0, "operator", "pause", ""))
    first.close()
    second = open_store()
    assert [tally.n for tally in second.tallies("e", 1) if tally.name == "pairs"] == [1]
    assert len(second.steps("e", 1)) == 1
