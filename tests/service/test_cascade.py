"""The cascade behind a real server: the control answers what the candidate doubts, inside the same request."""

import json
import math
import threading
from typing import Any

import pytest
import torch

from models.errors import CheckpointError
from tests.service.conftest import SECONDS, Harness, Start
from tests.service.test_disconnect import leave_after
from tests.service.toys import LABELS, toy_checkpoint, toy_loader

CONTROL, CANDIDATE = "mood-full", "mood-pruned"
# Confidences of these texts are the softmax of their digit counts: e^n / (e^n + 2).
SURE, UNSURE = "0 0 0 0", "0"
HALFWAY = 0.75


def experiments(threshold: float = HALFWAY, **fields: Any) -> dict[str, Any]:
    arms = [{"deployment": CONTROL}, {"deployment": CANDIDATE}]
    return {"two": {"task": "mood", "mode": "cascade", "threshold": threshold, "arms": arms, **fields}}


def own_database(name: float) -> dict[str, str]:
    return {"url": f"sqlite:///{name}.db"}


def confidence(count: int) -> float:
    return math.exp(count) / (math.exp(count) + 2)


def variants(answer: Any) -> list[str]:
    return [item["variant"] for item in answer.json()["data"]]


def test_doubtful_items_are_the_controls(start: Start) -> None:
    harness = start(experiments=experiments())
    control = harness.loader.model(CONTROL)
    control.shift = 1  # its labels tell whose answer this is
    answer = harness.classify([UNSURE, SURE, "1", "2 2 2 2"])
    body = answer.json()
    assert variants(answer) == [CONTROL, CANDIDATE, CONTROL, CANDIDATE]
    assert [item["label"] for item in body["data"]] == [LABELS[1], LABELS[0], LABELS[2], LABELS[2]]
    assert (body["variant"], body["model"], answer.headers["x-variant"]) == ("mixed", "mixed", "mixed")
    assert answer.headers["x-cascade"] == "mixed"
    assert body["experiment"] == {"name": "two", "revision": 1, "arm": CANDIDATE, "source": "request"}
    assert body["usage"]["total_tokens"] == 10
    parts = [float(answer.headers[f"x-{part}-time"]) for part in ("tokenization", "queue", "inference")]
    assert sum(parts) <= float(answer.headers["x-total-time"])
    # The control ran the candidate's ids, in one batch.
    assert control.batches == [[(0,), (1,)]]
    assert harness.loader.encoder(CONTROL).calls == 0
    assert harness.metric("cascade_items_total", task="mood", outcome="accepted") == 2
    assert harness.metric("cascade_items_total", task="mood", outcome="escalated") == 2
    assert harness.metric("items_total", variant=CANDIDATE, lane="primary", outcome="ok") == 4
    assert harness.metric("items_total", variant=CONTROL, lane="cascade", outcome="ok") == 2
    assert harness.metric("predictions_total", variant=CONTROL) == harness.metric("predictions_total") / 2 == 2
    assert harness.metric("requests_total", variant=CANDIDATE, code="200") == 1
    assert harness.metric("tokens_total", variant=CANDIDATE) == harness.metric("tokens_total") == 10
    assert harness.metric("fallbacks_total") == 0


def test_one_way_for_all_items(start: Start) -> None:
    harness = start(experiments=experiments())
    accepted, escalated = harness.classify([SURE, SURE]), harness.classify([UNSURE, UNSURE])
    assert (accepted.headers["x-cascade"], accepted.headers["x-variant"]) == ("accepted", CANDIDATE)
    assert (escalated.headers["x-cascade"], escalated.headers["x-variant"]) == ("escalated", CONTROL)
    assert escalated.json()["model"] == CONTROL
    assert harness.client.post("/v1/classify", json={"input": UNSURE}).json()["model"] == CONTROL
    assert harness.client.post("/predict", json={"inputs": SURE}).headers["x-cascade"] == "accepted"


def test_accepted_items_fall_with_the_threshold(start: Start) -> None:
    texts = ["0 1 2", "0", "0 0", "0 0 0", "0 0 0 0"]
    sure = [confidence(0), *map(confidence, (1, 2, 3, 4))]
    taken = []
    for threshold in (0.0, sure[1] - 1e-9, sure[1] + 1e-9, 0.9, 1.0):
        answer = start(experiments=experiments(threshold), storage=own_database(threshold)).classify(texts)
        taken.append([CANDIDATE if value >= threshold else CONTROL for value in sure])
        assert variants(answer) == taken[-1]
    assert [column.count(CANDIDATE) for column in taken] == [5, 4, 3, 2, 0]


def test_multi_label_doubt_is_that_of_the_least_decided_class(start: Start) -> None:
    loader = toy_loader()
    loader.makers[CONTROL] = loader.makers[CANDIDATE] = loader.makers["topics-full"]
    # A class that never stands in the text has the sigmoid of 0, which is one half and enough.
    harness = start(loader, experiments=experiments(0.5))
    assert variants(harness.classify("0")) == [CANDIDATE]
    assert variants(start(loader, experiments=experiments(0.6), storage=own_database(0.6)).classify("0")) == [CONTROL]


def test_calibrated_confidence(start: Start) -> None:
    weights = {"kind": "dispersion", "weights": {"variance": 0.0}, "bias": 3.0}
    harness = start(experiments=experiments(0.9, confidence=weights))
    assert variants(harness.classify(UNSURE)) == [CANDIDATE]  # the logistic function of 3 is .953


def test_a_number_has_no_confidence(start: Start) -> None:
    loader = toy_loader()
    for name in (CONTROL, CANDIDATE):
        loader.makers[name] = lambda: toy_checkpoint(labels=("value",), problem_type="regression")
    assert variants(start(loader, experiments=experiments(0.0)).classify("0")) == [CONTROL]


@pytest.mark.parametrize(
    "fault", [RuntimeError("broken"), torch.OutOfMemoryError("full"), math.nan], ids=["raises", "out-of-memory", "nan"]
)
def test_the_candidates_answer_stands_for_a_control_that_fails(start: Start, fault: Exception | float) -> None:
    harness = start(experiments=experiments())
    harness.loader.model(CONTROL).fault = fault
    answer = harness.classify([UNSURE, SURE])
    assert (answer.status_code, variants(answer)) == (200, [CANDIDATE, CANDIDATE])
    assert (answer.headers["x-cascade"], answer.headers["x-variant"]) == ("mixed", CANDIDATE)
    assert harness.classify(UNSURE).headers["x-cascade"] == "fallback"
    assert harness.metric("cascade_items_total", outcome="fallback") == 2
    assert harness.metric("items_total", variant=CONTROL, lane="cascade", outcome="failed") == 2


def test_one_bad_item_leaves_the_control_the_others(start: Start) -> None:
    loader = toy_loader()
    harness = start(loader, experiments=experiments(1.0))
    control = loader.model(CONTROL)
    control.allergy = 2
    answer = harness.classify(["0", "2", "1"])
    assert variants(answer) == [CONTROL, CANDIDATE, CONTROL]
    assert harness.metric("cascade_items_total", outcome="fallback") == 1


def test_a_control_that_is_not_there(start: Start) -> None:
    loader = toy_loader()
    loader.broken[CONTROL] = CheckpointError("gone")
    harness = start(loader, experiments=experiments())
    for _ in range(2):  # nothing was handed to the engine that it could not run
        answer = harness.classify(UNSURE)
        assert (answer.status_code, answer.headers["x-cascade"]) == (200, "fallback")


def test_a_candidate_that_is_not_there_is_no_cascade(start: Start) -> None:
    loader = toy_loader()
    loader.broken[CANDIDATE] = CheckpointError("gone")
    harness = start(loader, experiments=experiments())
    answer = harness.classify(UNSURE)
    assert answer.headers["x-variant"] == CONTROL
    assert "x-cascade" not in answer.headers
    assert harness.metric("fallbacks_total", intended=CANDIDATE, served=CONTROL) == 1
    (row,) = harness.records("exposures", 1)
    assert (row["intended"], row["served"], row["cascade"]) == (CANDIDATE, CONTROL, None)


def test_a_named_variant_is_no_cascade(start: Start) -> None:
    harness = start(experiments=experiments())
    for variant in (CANDIDATE, CONTROL):
        answer = harness.classify(UNSURE, variant=variant)
        assert answer.headers["x-variant"] == variant
        assert "x-cascade" not in answer.headers
    assert harness.metric("cascade_items_total") == 0


def test_a_late_control_leaves_time_for_the_answer(start: Start) -> None:
    harness = start(experiments=experiments())
    control = harness.loader.model(CONTROL)
    control.gate.clear()
    try:
        answer = harness.classify([UNSURE, SURE], headers={"x-timeout-ms": "300"})
    finally:
        control.gate.set()
    assert (answer.status_code, variants(answer)) == (200, [CANDIDATE, CANDIDATE])
    total = float(answer.headers["x-total-time"])
    assert 250 < total < 1000
    while harness.metric("inflight_items") > 0:
        pass
    assert harness.metric("items_total", variant=CONTROL, lane="cascade", outcome="timeout") == 1


def test_a_late_candidate_is_an_error(start: Start) -> None:
    harness = start(experiments=experiments())
    candidate = harness.loader.model(CANDIDATE)
    candidate.gate.clear()
    try:
        answer = harness.classify(UNSURE, headers={"x-timeout-ms": "60"})
    finally:
        candidate.gate.set()
    # The candidate itself was late, so there is nothing to fall back on.
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    (row,) = harness.records("exposures", 1)
    assert (row["status"], row["intended"], row["served"], row["label"]) == (504, CANDIDATE, None, None)


def test_no_room_for_the_control(start: Start) -> None:
    harness = start(experiments=experiments())
    candidate, slots = harness.loader.model(CANDIDATE), harness.runtime.engine.slots
    candidate.gate.clear()
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(harness.classify(UNSURE)))
    asking.start()
    assert candidate.entered.acquire(timeout=SECONDS)
    slots.limit_items = 0
    candidate.gate.set()
    asking.join(SECONDS)
    assert (answers[0].status_code, answers[0].headers["x-cascade"]) == (200, "fallback")
    assert harness.metric("rejected_total", reason="overloaded") == 0


def test_a_drain_that_begins_between_the_steps(start: Start) -> None:
    harness = start(experiments=experiments())
    candidate = harness.loader.model(CANDIDATE)
    candidate.gate.clear()
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(harness.classify(UNSURE)))
    asking.start()
    assert candidate.entered.acquire(timeout=SECONDS)
    harness.runtime.engine.refuse()
    candidate.gate.set()
    asking.join(SECONDS)
    assert (answers[0].status_code, answers[0].headers["x-cascade"]) == (200, "fallback")


def test_a_client_that_leaves_during_the_second_step(start: Start) -> None:
    harness = start(experiments=experiments())
    control = harness.loader.model(CONTROL)
    control.gate.clear()
    connection = leave_after(harness, UNSURE)
    assert control.entered.acquire(timeout=SECONDS)
    connection.close()
    while harness.metric("requests_total", code="499") < 1:
        pass
    control.gate.set()
    while harness.metric("inflight_items") > 0:
        pass
    assert harness.metric("items_total", variant=CONTROL, lane="cascade", outcome="cancelled") == 1
    assert harness.metric("items_total", variant=CANDIDATE, lane="primary", outcome="ok") == 1
    assert harness.metric("cascade_items_total") == 0
    # Nobody got an answer, and no arm is to blame.
    assert harness.classify(SURE).status_code == 200
    assert len(harness.records("exposures", 1)) == 1


def test_exposures_of_a_cascade(start: Start) -> None:
    harness = start(experiments=experiments())
    gate = harness.loader.model(CANDIDATE).gate
    gate.clear()
    threading.Timer(0.3, gate.set).start()
    body = harness.classify([UNSURE, SURE], subject="user-1").json()
    escalated, accepted = harness.records("exposures", 2)
    assert (escalated["id"], escalated["item"], accepted["item"]) == (body["id"], 0, 1)
    assert (escalated["served"], escalated["cascade"], escalated["tokens"]) == (CONTROL, "escalated", 1)
    assert (accepted["served"], accepted["cascade"], accepted["tokens"]) == (CANDIDATE, "accepted", 4)
    assert escalated["intended"] == accepted["intended"] == CANDIDATE
    assert escalated["unit"] == accepted["unit"] != "user-1"
    # Both were in one pass of the candidate, a fifth of it the first one's; the control's is all its own, and short.
    assert escalated["device_ms"] > accepted["device_ms"] / 4 > 10
    assert escalated["label"] == accepted["label"] == LABELS[0]
    assert "user-1" not in json.dumps([escalated, accepted])


def test_those_outside_the_experiment(start: Start) -> None:
    harness: Harness = start(experiments=experiments(traffic=0))
    answer = harness.classify(UNSURE)
    assert (answer.headers["x-variant"], answer.json()["experiment"]) == (CONTROL, None)
    assert "x-cascade" not in answer.headers
