"""Who answers: explicit names, sticky arms, defaults and fallbacks, over HTTP and alone."""

from typing import Any

import pytest

from models.errors import CheckpointError
from service.assignment import arm, is_enrolled
from tests.service.conftest import Harness, Start
from tests.service.toys import ToyLoader, toy_loader


def weighted(deployment: str, weight: float) -> dict[str, Any]:
    return {"deployment": deployment, "weight": weight}


def experiments(**fields: Any) -> dict[str, Any]:
    arms = [weighted("mood-pruned", 50), weighted("mood-full", 50)]
    return {"demo": {"task": "mood", "mode": "split", "revision": 3, "arms": arms, **fields}}


def test_published_subjects(start: Start) -> None:
    harness = start(experiments=experiments(traffic=20))
    response = harness.classify("1", subject="user-2")
    assert response.json()["experiment"] == {
        "name": "demo",
        "revision": 3,
        "arm": "mood-pruned",
        "source": "subject",
    }
    assert response.json()["variant"] == response.headers["x-variant"] == "mood-pruned"
    assert response.headers["x-experiment"] == "demo"
    assert response.headers["x-assignment-source"] == "subject"
    outsider = harness.classify("1", subject="user-1")
    assert outsider.json()["experiment"] is None
    assert outsider.json()["variant"] == "mood-full"
    assert "x-experiment" not in outsider.headers


def test_subjects_stick_to_the_arm_the_hash_gives(start: Start) -> None:
    harness = start(experiments=experiments(traffic=50, salt="other"))
    halves = [("mood-pruned", 5000), ("mood-full", 5000)]
    for number in range(20):
        subject = f"user-{number}"
        expected = arm("other", halves, subject) if is_enrolled("other", 5000, subject) else "mood-full"
        for _ in range(2):
            assert harness.classify("1", subject=subject).json()["variant"] == expected


def test_without_subject_the_server_made_id_decides(start: Start) -> None:
    harness = start(experiments=experiments())
    for _ in range(8):
        body = harness.classify("1", headers={"x-request-id": "user-2"}).json()
        expected = arm("demo", [("mood-pruned", 5000), ("mood-full", 5000)], body["id"])
        assert (body["experiment"]["source"], body["variant"]) == ("request", expected)


def test_one_arm_for_all_items(start: Start) -> None:
    body = start(experiments=experiments()).classify(["0", "1", "2"], subject="user-2").json()
    assert {item["variant"] for item in body["data"]} == {"mood-pruned"}


@pytest.mark.parametrize("variant", ["full", "mood-full"])
def test_override(start: Start, variant: str) -> None:
    response = start(experiments=experiments()).classify("1", subject="user-2", variant=variant)
    assert response.json()["variant"] == "mood-full"
    assert response.json()["experiment"]["source"] == response.headers["x-assignment-source"] == "override"


@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_an_experiment_at_rest(start: Start, state: str) -> None:
    body = start(experiments=experiments(state=state)).classify("1", subject="user-2").json()
    assert (body["variant"], body["experiment"]) == ("mood-full", None)


def test_other_tasks_are_not_touched(start: Start) -> None:
    body = start(experiments=experiments()).classify("1", task="topics", subject="user-2").json()
    assert (body["variant"], body["experiment"]) == ("topics-full", None)


def test_aliases_are_assigned_alike(start: Start) -> None:
    harness = start(experiments=experiments(arms=[weighted("mood-pruned", 100.0), weighted("mood-full", 0)]))
    assert harness.client.post("/v1/classify", json={"input": "1"}).json()["model"] == "mood-pruned"
    assert harness.client.post("/predict", json={"inputs": "1"}).headers["x-variant"] == "mood-pruned"


def loader_without_pruned() -> ToyLoader:
    loader = toy_loader()
    loader.broken["mood-pruned"] = CheckpointError("secateur.json is not JSON")
    return loader


def test_fallback_for_an_arm_that_failed(start: Start) -> None:
    harness = start(loader_without_pruned(), experiments=experiments())
    body = harness.classify("1", subject="user-2").json()
    assert body["variant"] == "mood-full"
    assert body["experiment"]["arm"] == "mood-pruned"
    labels = {"task": "mood", "intended": "mood-pruned", "served": "mood-full", "reason": "failed"}
    assert harness.metric("fallbacks_total", **labels) == 1


def test_a_named_variant_is_never_substituted(start: Start) -> None:
    response = start(loader_without_pruned()).classify("1", variant="mood-pruned")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "deployment_unavailable")
    assert response.headers["retry-after"] == "1"


def test_no_fallback_left(start: Start) -> None:
    loader = loader_without_pruned()
    loader.broken["mood-full"] = CheckpointError("gone")
    harness: Harness = start(loader)
    response = harness.classify("1")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "deployment_unavailable")
    assert harness.metric("requests_total", variant="mood-full", code="503") == 1
    assert harness.metric("rejected_total", reason="not_ready") == 1
