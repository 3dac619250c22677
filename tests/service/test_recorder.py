"""What is kept of requests that met an experiment: by the arm they were meant for, failures too, texts never."""

import base64
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from service.experiments.recorder import content_of
from service.schemas import Input, Picture
from service.storage.events import ExposureEvent
from tests.service.conftest import Harness, Start
from tests.service.toys import LABELS, toy_loader

CONTROL, CANDIDATE = "mood-full", "mood-pruned"
SEVEN = Path(__file__).parents[2] / "demo" / "data" / "seven.png"


def experiments(control: float = 50, **fields: Any) -> dict[str, Any]:
    arms = [{"deployment": CONTROL, "weight": control}, {"deployment": CANDIDATE, "weight": 100 - control}]
    return {"half": {"task": "mood", "mode": "split", "revision": 2, "arms": arms, **fields}}


def test_every_field_of_an_answered_request(start: Start) -> None:
    harness = start(experiments=experiments(0))
    answer = harness.classify(["0 0", "1 2 2"], subject="user-1", headers={"x-request-id": "mine-1"})
    rows = harness.records("exposures", 2)
    columns = {field.name for field in dataclasses.fields(ExposureEvent)}
    assert columns == rows[0].keys() - {"replica"}
    for index, row in enumerate(rows):
        item = answer.json()["data"][index]
        assert (row["id"], row["item"], row["request_id"]) == (answer.json()["id"], index, "mine-1")
        assert (row["experiment"], row["revision"], row["source"]) == ("half", 2, "subject")
        assert (row["intended"], row["served"], row["status"]) == (CANDIDATE, CANDIDATE, 200)
        assert (row["label"], row["score"], row["tokens"]) == (item["label"], item["score"], item["tokens"])
        assert row["queue_ms"] == pytest.approx(float(answer.headers["x-queue-time"]), abs=1e-3)
        assert row["infer_ms"] == pytest.approx(float(answer.headers["x-inference-time"]), abs=1e-3)
        assert row["total_ms"] == pytest.approx(float(answer.headers["x-total-time"]), abs=1e-3)
        assert (row["contended"], row["cascade"]) == (0, None)
    # The pass is shared out by tokens, 2 to 3.
    assert rows[0]["device_ms"] / 2 == pytest.approx(rows[1]["device_ms"] / 3)
    assert rows[0]["device_ms"] + rows[1]["device_ms"] == pytest.approx(rows[0]["infer_ms"], rel=1e-6)
    assert rows[0]["unit"] == rows[1]["unit"]
    assert rows[0]["fingerprint"] != rows[1]["fingerprint"]


def test_who_is_one_unit(start: Start) -> None:
    harness = start(experiments=experiments())
    first, again = harness.classify("0", subject="user-1"), harness.classify("1", subject="user-1")
    other, nobody = harness.classify("0", subject="user-2"), harness.classify("0")
    rows = {row["id"]: row for row in harness.records("exposures", 4)}
    of = [rows[answer.json()["id"]] for answer in (first, again, other, nobody)]
    assert of[0]["unit"] == of[1]["unit"] != of[2]["unit"]
    assert of[3]["unit"] == of[3]["id"]
    assert of[0]["fingerprint"] == of[2]["fingerprint"] == of[3]["fingerprint"] != of[1]["fingerprint"]
    assert "user-" not in json.dumps(of)


@pytest.mark.parametrize(
    ("text", "fields", "status"),
    [
        ("poison", {}, 500),
        ("nan", {}, 500),
        ("crash", {}, 500),
        ("0", {"headers": {"x-timeout-ms": "30"}}, 504),
        ("broken", {}, 503),
    ],
)
def test_failures_are_errors_of_the_intended_arm(start: Start, text: str, fields: dict[str, Any], status: int) -> None:
    harness = start(experiments=experiments(0))
    model = harness.loader.model(CANDIDATE)
    if status == 504:
        model.gate.clear()
    try:
        assert harness.classify([text, "1"], subject="user-1", **fields).status_code == status
    finally:
        model.gate.set()
    rows = harness.records("exposures", 2)
    assert [row["item"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["status"], row["intended"], row["served"]) == (status, CANDIDATE, None)
        assert (row["label"], row["score"], row["queue_ms"], row["device_ms"]) == (None, None, None, None)
        assert row["total_ms"] > 0


def test_what_is_nobodys_error_is_not_kept(start: Start) -> None:
    harness = start(experiments=experiments(0))
    assert harness.classify("1 " * 9, truncate=False).status_code == 422
    assert harness.classify("void").status_code == 422
    assert harness.classify("0", threshold=0.5).status_code == 422
    assert harness.classify("0", headers={"x-timeout-ms": "never"}).status_code == 422
    harness.runtime.engine.slots.limit_items = 0
    assert harness.classify("0").status_code == 429
    harness.runtime.engine.slots.limit_items = 16
    assert harness.classify("0").status_code == 200
    assert [row["status"] for row in harness.records("exposures", 1)] == [200]
    assert harness.metric("experiment_assignments_total") == 1


def test_outside_of_experiments_nothing_is_kept(start: Start) -> None:
    harness = start(experiments=experiments(0, traffic=0))
    harness.classify("0")
    harness.classify("0", task="topics")
    harness.classify("0", variant=CONTROL)  # an override is kept, and is not analysed
    (row,) = harness.records("exposures", 1)
    assert (row["source"], row["intended"]) == ("override", CONTROL)


def test_multi_label_answers_are_sorted_lists(start: Start) -> None:
    arms = [{"deployment": CONTROL, "weight": 0}, {"deployment": CANDIDATE, "weight": 100}]
    loader = toy_loader()
    loader.makers[CONTROL] = loader.makers[CANDIDATE] = loader.makers["topics-full"]
    harness = start(loader, experiments=experiments(arms=arms))
    harness.classify("2 0 0", threshold=0.6)
    harness.classify("0", threshold=0.9)
    assert [row["label"] for row in harness.records("exposures", 2)] == ['["art", "war"]', "[]"]


def test_intention_to_treat(start: Start) -> None:
    """A candidate that is down for three units of ten shows by intended arm, and would not show by what answered."""
    harness = start(experiments=experiments())
    model = harness.loader.model(CANDIDATE)
    for number in range(100):
        model.fault = RuntimeError("down") if number % 10 < 3 else None
        harness.classify("0", subject=f"user-{number}")
    model.fault = None
    rows = harness.records("exposures", 100)
    sent = Counter(row["intended"] for row in rows)
    failed = Counter(row["intended"] for row in rows if row["status"] == 500)
    assert failed[CONTROL] == 0
    assert 0.15 < failed[CANDIDATE] / sent[CANDIDATE] < 0.45
    served = [row for row in rows if row["served"] == CANDIDATE]
    assert len(served) == sent[CANDIDATE] - failed[CANDIDATE]
    assert {row["status"] for row in served} == {200}
    assert harness.metric("experiment_assignments_total", arm=CANDIDATE) == sent[CANDIDATE]


def test_a_full_queue_or_a_closed_store_never_shows_in_an_answer(start: Start) -> None:
    harness: Harness = start(experiments=experiments())
    store = harness.runtime.store
    assert store is not None
    store.close()
    assert harness.classify("0").status_code == 200
    assert harness.classify("poison").status_code == 500
    assert harness.metric("events_dropped_total", kind="exposure") == 2


def test_an_image_is_the_same_however_it_is_sent() -> None:
    content = SEVEN.read_bytes()
    text = base64.b64encode(content).decode()
    forms: list[Input] = [Picture(content), Picture(text), text, f"data:image/png;base64,{text}"]
    assert {content_of(given, "image") for given in forms} == {content}
    assert content_of("not an image!", "image") == "not an image!"
    assert content_of(LABELS[0], "text") == LABELS[0]
