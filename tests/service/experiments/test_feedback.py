"""True labels over HTTP: shapes, refusals, joins and what is counted."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from service.experiments.feedback import kept, parse_feedback
from service.experiments.recorder import recorded_label
from service.prediction import MULTI_LABEL, predict
from service.storage.events import StorageUnavailableError
from tests.service.conftest import Harness, Start
from tests.service.experiments.live import TOPICS, no_cache, report_when, send_labels, split
from tests.service.toys import toy_loader, toy_settings

BOTH = split() | {
    "topical": {
        "task": "topics",
        "mode": "split",
        "arms": [{"deployment": "topics-full", "weight": 50}, {"deployment": "topics-pruned", "weight": 50}],
    }
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """Both toy tasks have an experiment."""
    with no_cache():
        harness = Harness(toy_settings(tmp_path_factory.mktemp("toy"), experiments=BOTH, **TOPICS), toy_loader())
        harness.wait_loaded()
        yield harness
        harness.close()


def answered(harness: Harness, text: str = "0", **fields: Any) -> str:
    """The id of an answer that has been recorded."""
    before = recorded(harness)
    answer = harness.classify(text, **fields)
    assert answer.status_code == 200
    report_when(harness, lambda _: recorded(harness) > before)
    return str(answer.json()["id"])


def recorded(harness: Harness) -> float:
    return harness.metric("events_written_total", kind="exposure")


def test_one_item_bare(harness: Harness) -> None:
    body = {"id": answered(harness), "index": 0, "label": "negative"}
    assert harness.client.post("/feedback", json=body).json() == {"accepted": 1, "matched": 1, "unchanged": 0}


def test_the_documented_example(harness: Harness) -> None:
    id = answered(harness)
    items = [{"id": id, "index": 0, "label": "negative"}]
    assert send_labels(harness, items).json() == {"accepted": 1, "matched": 1, "unchanged": 0}
    assert send_labels(harness, items).json() == {"accepted": 1, "matched": 0, "unchanged": 1}
    conflicts = harness.metric("feedback_total", task="mood", outcome="conflict")
    refused = send_labels(harness, [{"id": "cls_other", "label": "neutral"}, {"id": id, "label": "neutral"}])
    assert refused.status_code == 409
    assert harness.metric("feedback_total", task="mood", outcome="conflict") == conflicts + 1
    assert refused.json()["error"]["code"] == "feedback_conflict"
    assert refused.json()["error"]["param"] == "items[1]"
    assert harness.client.post("/feedback", json={"id": id, "label": "neutral"}).json()["error"]["param"] is None
    replaced = send_labels(harness, [{"id": id, "label": "neutral"}], replace=True)
    assert replaced.json() == {"accepted": 1, "matched": 1, "unchanged": 0}
    # What was refused with the conflict was not kept.
    assert send_labels(harness, [{"id": "cls_other", "label": "positive"}]).status_code == 200


def test_by_request_id(harness: Harness) -> None:
    headers = {"x-request-id": "mine-1"}
    answered(harness, headers=headers)
    item = {"request_id": "mine-1", "label": "negative"}
    assert send_labels(harness, [item]).json()["matched"] == 1
    answered(harness, headers=headers)
    error = send_labels(harness, [item]).json()["error"]
    assert (error["code"], error["param"]) == ("ambiguous_request_id", "items[0]")


def test_a_label_may_come_before_its_answer(harness: Harness) -> None:
    before = {key: harness.metric("feedback_total", task="mood", outcome=key) for key in ("orphan", "matched")}
    item = {"request_id": "later-1", "label": "negative"}
    assert send_labels(harness, [item]).json() == {"accepted": 1, "matched": 0, "unchanged": 0}
    assert harness.metric("feedback_total", task="mood", outcome="orphan") == before["orphan"] + 1
    labelled = sum(arm["labelled"] for arm in harness.client.get("/experiments/exp").json()["arms"])
    answered(harness, headers={"x-request-id": "later-1"}, subject="a subject of its own")
    report_when(harness, lambda report: sum(arm["labelled"] for arm in report["arms"]) == labelled + 1)


def test_multi_label_tasks_take_lists(harness: Harness) -> None:
    right = answered(harness, "0 2", task="topics", subject="s1")
    wrong = answered(harness, "0 2", task="topics", subject="s2")
    items = [{"id": right, "label": ["zoo", "war", "art", "law", "war"]}, {"id": wrong, "label": ["war"]}]
    assert send_labels(harness, items).json()["matched"] == 2
    arms = harness.client.get("/experiments/topical").json()["arms"]
    # An unseen digit has the logit 0, which is a probability of one half: every label is predicted.
    assert (sum(arm["labelled"] for arm in arms), sum(arm["right"] for arm in arms)) == (2, 1)
    assert harness.metric("feedback_total", task="topics", outcome="matched") == 2


def test_a_list_is_stored_as_the_recorder_stores_it() -> None:
    (item,), _, _ = parse_feedback({"id": "cls_1", "label": ["zoo", "\u00e9", "zoo"]})
    prediction = predict([3.0, -1.0, 2.0], MULTI_LABEL, "sigmoid", 0.5)
    assert kept(item, "").label == recorded_label(("zoo", "law", "\u00e9"), prediction, MULTI_LABEL)
    assert kept(item, "").label == '["zoo", "\u00e9"]'


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("furious", "unknown_label"),
        ("war", "unknown_label"),  # a name of the multi-label task, which takes lists
        (["negative"], "unknown_label"),
        (["war", "peace"], "unknown_label"),
        ("", "unknown_label"),
        (3, "validation_failed"),
        ([3], "validation_failed"),
        (None, "validation_failed"),
        ("\ud800", "invalid_text"),
    ],
)
def test_labels_that_no_task_has(harness: Harness, label: Any, code: str) -> None:
    body = b'{"items": [{"id": "a", "label": "negative"}, {"id": "b", "label": %s}]}'
    content = body % json.dumps(label).encode()
    response = harness.client.post("/feedback", content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, code)
    assert error["param"].startswith("items[1].label")


@pytest.mark.parametrize(("task", "label"), [("mood", ["art"]), ("topics", "negative")])
def test_a_label_of_another_task_is_refused_once_the_answer_is_known(harness: Harness, task: str, label: Any) -> None:
    id = answered(harness, "0 2", task=task)
    refused = send_labels(harness, [{"id": id, "label": label}])
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "unknown_label")
    # Nobody knows yet which task this one is of.
    assert send_labels(harness, [{"id": f"cls_of_{task}", "label": label}]).status_code == 200


BAD = {
    "no label": ({"id": "a"}, "missing_field", "label"),
    "no id": ({"label": "negative"}, "missing_field", None),
    "two ids": ({"id": "a", "request_id": "b", "label": "negative"}, "missing_field", None),
    "negative index": ({"id": "a", "index": -1, "label": "negative"}, "validation_failed", "index"),
    "text index": ({"id": "a", "index": "0", "label": "negative"}, "validation_failed", "index"),
    "unknown": ({"id": "a", "label": "negative", "note": "x"}, "unknown_field", "note"),
    "empty id": ({"id": "", "label": "negative"}, "validation_failed", "id"),
    "text for an id": ({"id": "my text", "label": "negative"}, "validation_failed", "id"),
    "long id": ({"id": "a" * 129, "label": "negative"}, "validation_failed", "id"),
    "no items": ({"items": []}, "validation_failed", "items"),
    "not a list": ({"items": "a"}, "validation_failed", "items"),
    "in a list": ({"items": [{"id": "a"}]}, "missing_field", "items[0].label"),
    "both shapes": ({"items": [], "id": "a"}, "validation_failed", "items"),
    "replace": ({"id": "a", "label": "negative", "replace": 1}, "validation_failed", "replace"),
    "an array": ([1], "validation_failed", None),
}


@pytest.mark.parametrize(("body", "code", "param"), BAD.values(), ids=BAD)
def test_bad_requests(harness: Harness, body: Any, code: str, param: str | None) -> None:
    response = harness.client.post("/feedback", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (422, code, param)


def test_a_failing_database_keeps_nothing_and_says_so(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: Any) -> None:
        raise StorageUnavailableError

    monkeypatch.setattr(harness.runtime.store, "feedback", fails)
    response = send_labels(harness, [{"id": "a", "label": "negative"}])
    assert (response.status_code, response.json()["error"]["code"]) == (503, "storage_unavailable")
    assert response.headers["retry-after"] == "1"


def test_without_experiments_labels_have_no_use(start: Start) -> None:
    response = send_labels(start(), [{"id": "a", "label": "negative"}])
    assert (response.status_code, response.json()["error"]["code"]) == (404, "experiment_not_found")


def test_labels_are_not_known_before_a_deployment_is_ready(start: Start) -> None:
    loader = toy_loader()
    loader.gate.clear()
    harness = start(loader, wait=False, experiments=split())
    try:
        response = send_labels(harness, [{"id": "a", "label": "negative"}])
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    finally:
        loader.gate.set()
    harness.wait_loaded()
    assert send_labels(harness, [{"id": "a", "label": "negative"}]).status_code == 200
