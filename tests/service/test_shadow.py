"""The shadow lane behind a real server: what the candidate does is recorded, and nobody who asks can tell."""

import json
import math
import os
import threading
import time
from typing import Any

import pytest
import torch

from models.errors import CheckpointError
from service import shadow
from service.assignment import bucket
from tests.service.conftest import SECONDS, Harness, Start
from tests.service.toys import LABELS, toy_loader

CONTROL, CANDIDATE = "mood-full", "mood-pruned"
NAMES = {"experiment": "behind"}


def experiments(**fields: Any) -> dict[str, Any]:
    arms = [{"deployment": CONTROL}, {"deployment": CANDIDATE}]
    return {"behind": {"task": "mood", "mode": "shadow", "arms": arms, **fields}}


def settled(harness: Harness, items: int) -> None:
    """Wait until so many sampled items are pairs or drops."""
    deadline = time.monotonic() + SECONDS
    while harness.metric("experiment_pairs_total") + harness.metric("shadow_dropped_total") < items:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_pairs_by_hand(start: Start) -> None:
    harness = start(experiments=experiments())
    candidate = harness.loader.model(CANDIDATE)
    answer = harness.classify(["1 1", "0"])
    assert answer.json()["variant"] == answer.headers["x-variant"] == CONTROL
    assert (answer.headers["x-experiment"], answer.headers["x-assignment-source"]) == ("behind", "request")
    settled(harness, 2)
    candidate.shift = 1
    harness.classify("1 1")
    settled(harness, 3)
    first, second, third = harness.records("pairs", 3)
    assert [first["outcome"], second["outcome"], third["outcome"]] == ["agree", "agree", "disagree"]
    assert (first["id"], first["item"], second["item"]) == (answer.json()["id"], 0, 1)
    assert (third["primary_label"], third["candidate_label"]) == (LABELS[1], LABELS[2])
    # Logits 0 2 0 against 0 0 2: two probabilities differ by (e^2 - 1) / (e^2 + 2), the first by nothing.
    difference = (math.exp(2) - 1) / (math.exp(2) + 2)
    assert third["max_abs_dp"] == pytest.approx(difference)
    assert third["mean_abs_dp"] == pytest.approx(2 / 3 * difference)
    assert first["max_abs_dp"] == 0
    # The same text is the same unit, and nobody could read it there.
    assert first["unit"] == third["unit"] != second["unit"]
    assert len(first["unit"]) == 32
    exposed = harness.records("exposures", 3)
    assert [row["unit"] for row in exposed] == [row["fingerprint"] for row in exposed]
    assert [row["unit"] for row in exposed] == [first["unit"], second["unit"], third["unit"]]
    assert min(first["primary_ms"], first["candidate_ms"]) > 0
    assert harness.metric("experiment_pairs_total", **NAMES, outcome="agree") == 2
    assert harness.metric("experiment_pairs_total", **NAMES, outcome="disagree") == 1
    assert harness.metric("items_total", variant=CANDIDATE, lane="shadow", outcome="ok") == 3
    assert harness.metric("batch_items_sum", variant=CANDIDATE) == 3
    assert harness.metric("shadow_seconds_total", variant=CANDIDATE) > 0
    # The candidate ran the control's ids: its own tokenizer was never asked.
    assert [ids for batch in candidate.batches for ids in batch] == [(1, 1), (0,), (1, 1)]
    assert harness.loader.encoder(CANDIDATE).calls == 0


def test_multi_label_pairs_are_sets_of_labels(start: Start) -> None:
    loader = toy_loader()
    loader.makers["mood-full"] = loader.makers["mood-pruned"] = loader.makers["topics-full"]
    harness = start(loader, experiments=experiments())
    loader.model(CANDIDATE).shift = 1
    harness.classify("0 2 2", threshold=0.6)
    (pair,) = harness.records("pairs", 1)
    assert (pair["primary_label"], pair["candidate_label"]) == ('["art", "war"]', '["law", "zoo"]')


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (RuntimeError("broken"), None),
        (torch.OutOfMemoryError("full"), None),
        (torch.AcceleratorError("gone"), None),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
    ids=["raises", "out-of-memory", "device", "nan", "inf"],
)
def test_a_candidate_that_fails_changes_no_answer(start: Start, fault: Exception | float, kind: str | None) -> None:
    harness = start(experiments=experiments())
    texts = ["0", "1 1", "2 0 2"]
    before = harness.classify(texts).json()
    settled(harness, 3)
    harness.loader.model(CANDIDATE).fault = fault
    for _ in range(4):
        answer = harness.classify(texts)
        assert answer.status_code == 200
        assert answer.json()["data"] == before["data"]
    settled(harness, 15)
    assert harness.metric("experiment_pairs_total", **NAMES, outcome="candidate_failed") == 12
    assert harness.metric("items_total", variant=CANDIDATE, lane="shadow", outcome="failed") == 12
    assert harness.metric("invalid_outputs_total", variant=CANDIDATE) == (12 if kind else 0)
    failed = [pair for pair in harness.records("pairs", 15) if pair["outcome"] == "candidate_failed"]
    assert len(failed) == 12
    assert {(pair["candidate_label"], pair["mean_abs_dp"], pair["candidate_ms"]) for pair in failed} == {
        (None, None, None)
    }
    # Whatever it was, the lane goes on.
    harness.loader.model(CANDIDATE).fault = None
    harness.classify("0")
    settled(harness, 16)
    assert harness.metric("experiment_pairs_total", **NAMES, outcome="agree") == 4


def test_a_candidate_that_hangs_holds_up_nobody(start: Start) -> None:
    harness = start(experiments=experiments(), engine={"shadow_queue_items": 4})
    candidate = harness.loader.model(CANDIDATE)
    candidate.gate.clear()
    try:
        assert harness.classify("0").status_code == 200
        assert candidate.entered.acquire(timeout=SECONDS)
        latencies = [float(harness.classify("0").headers["x-total-time"]) for _ in range(20)]
        assert len(latencies) == 20
        # One runs, four wait, the others found the queue full.
        assert harness.metric("shadow_dropped_total", **NAMES, reason="busy") == 16
    finally:
        candidate.gate.set()
    settled(harness, 21)
    assert harness.metric("experiment_pairs_total", **NAMES, outcome="agree") == 5
    flags = [row["contended"] for row in harness.records("exposures", 21)]
    assert flags == [0] + [1] * 20


def test_a_pass_that_takes_longer_than_a_request_may_has_failed(start: Start) -> None:
    harness = start(experiments=experiments())
    candidate, lane = harness.loader.model(CANDIDATE), harness.runtime.shadow
    candidate.gate.clear()
    try:
        harness.classify("0")
        assert candidate.entered.acquire(timeout=SECONDS)
        lane._seconds = 0.1  # it is the longest a request may take, and that would be long for a test
        settled(harness, 1)
        assert harness.metric("experiment_pairs_total", **NAMES, outcome="candidate_failed") == 1
        lane._seconds = SECONDS
    finally:
        candidate.gate.set()
    # The pass ends after all, and is not counted twice.
    harness.classify("2")
    settled(harness, 2)
    assert harness.metric("experiment_pairs_total", **NAMES) == 2
    assert len(harness.records("pairs", 2)) == 2


def test_a_pass_starts_only_when_the_primary_is_idle(start: Start) -> None:
    harness = start(experiments=experiments())
    control, candidate = harness.loader.model(CONTROL), harness.loader.model(CANDIDATE)
    candidate.gate.clear()
    harness.classify("0")
    assert candidate.entered.acquire(timeout=SECONDS)
    harness.classify("1")  # waits behind the pass that is held
    control.gate.clear()
    assert control.entered.acquire(timeout=SECONDS)
    assert control.entered.acquire(timeout=SECONDS)
    busy = threading.Thread(target=harness.classify, args=("2",))
    busy.start()
    assert control.entered.acquire(timeout=SECONDS)
    candidate.gate.set()
    settled(harness, 1)
    assert not candidate.entered.acquire(timeout=0.1)
    control.gate.set()
    busy.join(SECONDS)
    settled(harness, 3)
    # Both that waited fit into one batch by then, or into two if the thread was quick.
    assert [ids for batch in candidate.batches for ids in batch] == [(0,), (1,), (2,)]


def test_what_waited_too_long_is_dropped(start: Start) -> None:
    harness = start(experiments=experiments())
    control, candidate = harness.loader.model(CONTROL), harness.loader.model(CANDIDATE)
    candidate.gate.clear()
    harness.classify("0")
    assert candidate.entered.acquire(timeout=SECONDS)
    harness.classify("1")
    harness.runtime.shadow._seconds = 0.1
    time.sleep(0.15)
    candidate.gate.set()
    settled(harness, 2)
    assert harness.metric("shadow_dropped_total", **NAMES, reason="busy") == 1
    assert len(candidate.batches) == 1
    assert len(control.batches) == 2


def test_a_stop_drops_what_waits(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "STOP_SECONDS", 0.05)
    harness = start(experiments=experiments())
    candidate = harness.loader.model(CANDIDATE)
    candidate.gate.clear()
    for text in "0012":
        harness.classify(text)
    assert candidate.entered.acquire(timeout=SECONDS)
    harness.server.should_exit = True
    harness.thread.join(SECONDS)
    assert not harness.thread.is_alive()
    registry = harness.runtime.metrics.registry
    labels = {**NAMES, "reason": "draining"}
    assert registry.get_sample_value("secateur_shadow_dropped_total", labels) == 4
    # It comes back to a loop that is closed, and leaves quietly.
    candidate.gate.set()
    harness.runtime.shadow._thread.join(SECONDS)
    assert not harness.runtime.shadow._thread.is_alive()
    assert registry.get_sample_value("secateur_shadow_dropped_total", labels) == 4


def test_the_lane_leaves_the_device_to_a_primary_short_of_memory(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "PAUSE_SECONDS", 0.3)
    harness = start(experiments=experiments())
    began = time.monotonic()
    assert harness.classify(["huge", "0"]).status_code == 200  # fits only in halves
    settled(harness, 2)
    assert time.monotonic() - began > 0.3
    assert [len(batch) for batch in harness.loader.model(CONTROL).batches] == [2, 1, 1]


def test_the_sample_is_drawn_by_the_answers_id(start: Start) -> None:
    harness = start(experiments=experiments(sample=40, salt="other"))
    ids = [harness.classify(["0", "1"], subject="user-1").json()["id"] for _ in range(30)]
    sampled = {unit for unit in ids if bucket("other:shadow", unit) < 4000}
    assert 0 < len(sampled) < 30
    settled(harness, 2 * len(sampled))
    assert {pair["id"] for pair in harness.records("pairs", 2 * len(sampled))} == sampled
    assert harness.metric("experiment_assignments_total", **NAMES, arm=CONTROL, source="subject") == 30


def test_who_is_not_sampled(start: Start) -> None:
    loader = toy_loader()
    loader.broken[CONTROL] = CheckpointError("gone")
    tasks = {"mood": {"deployments": [CONTROL, CANDIDATE], "full": CONTROL, "fallback": CANDIDATE}}
    harness = start(loader, experiments=experiments(), tasks=tasks)
    assert harness.classify("0").json()["variant"] == CANDIDATE  # the fallback is no control
    assert harness.classify("0", variant=CANDIDATE).json()["experiment"]["source"] == "override"
    assert harness.classify("0", task="topics").status_code == 200
    assert harness.metric("experiment_pairs_total") == harness.metric("shadow_dropped_total") == 0
    (fallback, override) = harness.records("exposures", 2)
    assert (fallback["intended"], fallback["served"], fallback["source"]) == (CONTROL, CANDIDATE, "request")
    assert (override["intended"], override["served"], override["source"]) == (CANDIDATE, CANDIDATE, "override")


def test_a_candidate_that_is_not_there(start: Start) -> None:
    loader = toy_loader()
    loader.broken[CANDIDATE] = CheckpointError("gone")
    harness = start(loader, experiments=experiments())
    assert harness.classify(["0", "1"]).json()["variant"] == CONTROL
    assert harness.metric("shadow_dropped_total", **NAMES, reason="unavailable") == 2


def test_batches_keep_to_the_shadows_own_budget(start: Start) -> None:
    engine = {"shadow_batch_tokens": 5, "max_batch_items": 3, "max_batch_tokens": 16}
    harness = start(experiments=experiments(), engine=engine)
    candidate = harness.loader.model(CANDIDATE)
    candidate.gate.clear()
    harness.classify("0")
    assert candidate.entered.acquire(timeout=SECONDS)
    harness.classify(["0 0 0", "1 1", "2", "0 0 0 0 0 0", "1", "1", "1", "1"])
    candidate.gate.set()
    settled(harness, 9)
    assert [len(batch) for batch in candidate.batches] == [1, 2, 1, 1, 3, 1]


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="priorities of threads are Linux's")
def test_the_thread_gives_way(start: Start) -> None:
    harness = start(experiments=experiments())
    tid = harness.runtime.shadow._thread.native_id
    assert tid is not None
    harness.classify("0")
    settled(harness, 1)
    assert os.getpriority(os.PRIO_PROCESS, tid) == shadow.NICENESS
    assert os.getpriority(os.PRIO_PROCESS, os.getpid()) < shadow.NICENESS


def test_texts_are_nowhere(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    harness = start(experiments=experiments())
    harness.loader.model(CANDIDATE).fault = RuntimeError("canary 0 77")
    harness.classify("canary 0", subject="canary")
    settled(harness, 1)
    rows = harness.records("exposures", 1) + harness.records("pairs", 1)
    assert "canary" not in json.dumps(rows) + caplog.text + harness.client.get("/metrics").text
