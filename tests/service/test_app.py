"""Loading in the background, and what the probes say meanwhile."""

from pathlib import Path

import pytest

from models.errors import CheckpointError
from service.deployments import Registry, State
from tests.service.conftest import Harness, Start
from tests.service.toys import ToyLoader, ToyModel, toy_checkpoint, toy_loader, toy_settings


def statuses(harness: Harness) -> tuple[int, int, int]:
    return tuple(harness.client.get(path).status_code for path in ("/livez", "/readyz", "/health"))  # type: ignore[return-value]


def test_probes_answer_while_models_load(start: Start) -> None:
    loader = toy_loader()
    loader.gate.clear()
    harness = start(loader, wait=False)
    try:
        assert statuses(harness) == (200, 503, 503)
        error = harness.client.get("/readyz").json()["error"]
        assert (error["code"], error["type"]) == ("not_ready", "unavailable_error")
        response = harness.classify("1")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
        assert response.headers["retry-after"] == "1"
        assert harness.client.get("/info").json()["tasks"]["mood"]["labels"] is None
        assert harness.client.get("/v1/models").json()["data"] == []
        assert harness.client.get("/deployments/mood-full").json()["state"] == "loading"
        assert harness.metric("ready") == 0
        assert harness.metric("deployment_state", variant="mood-full", state="loading") == 1
    finally:
        loader.gate.set()
    harness.wait_loaded()
    assert statuses(harness) == (200, 200, 200)
    assert harness.metric("ready") == 1


def test_ready(harness: Harness) -> None:
    states = {"mood-full": "ready", "mood-pruned": "ready", "topics-full": "ready"}
    assert harness.client.get("/readyz").json() == {"status": "ready", "deployments": states}


def test_degraded_without_an_optional_deployment(start: Start) -> None:
    loader = toy_loader()
    loader.broken["mood-pruned"] = RuntimeError("secret path")
    harness = start(loader)
    assert harness.client.get("/readyz").json()["status"] == "degraded"
    document = harness.client.get("/deployments/mood-pruned").json()
    assert (document["state"], document["error"], document["bytes"]) == ("failed", "internal", None)
    assert harness.metric("deployment_loads_total", variant="mood-pruned", outcome="failed") == 1
    assert "secret" not in harness.client.get("/deployments").text


def test_readiness_waits_until_every_deployment_was_tried(tmp_path: Path) -> None:
    registry = Registry(toy_settings(tmp_path))
    for deployment in registry.deployments.values():
        assert registry.readiness() == "starting"
        deployment.state = State.READY
    assert registry.readiness() == "ready"
    registry.deployments["mood-pruned"].state = State.FAILED
    assert registry.readiness() == "degraded"
    registry.deployments["mood-full"].state = State.FAILED
    assert registry.readiness() == "failed"


def test_not_ready_without_a_required_deployment(start: Start) -> None:
    loader = toy_loader()
    loader.broken["topics-full"] = CheckpointError("gone")
    harness = start(loader)
    assert statuses(harness) == (200, 503, 503)
    # The other task answers all the same.
    assert harness.classify("1", task="mood").status_code == 200


BROKEN = {
    "golden_mismatch": lambda: toy_checkpoint(is_faithful=False),
    "task_mismatch": lambda: toy_checkpoint(labels=("good", "bad", "ugly")),
    "problem_type_unknown": lambda: toy_checkpoint(problem_type="ranking"),
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_checkpoint_that_must_not_serve(start: Start, code: str) -> None:
    harness = start(ToyLoader({"mood-pruned": BROKEN[code]}))
    document = harness.client.get("/deployments/mood-pruned").json()
    assert (document["state"], document["error"]) == ("failed", code)
    assert harness.classify("1", variant="mood-pruned").status_code == 503


@pytest.mark.parametrize("field", ["tokenizer", "problem_type"])
def test_deployments_of_a_task_must_agree(start: Start, field: str) -> None:
    other = {"tokenizer": "other", "problem_type": "multi_label_classification"}[field]
    loader = ToyLoader({"mood-pruned": lambda: toy_checkpoint(model=ToyModel(), **{field: other})})  # type: ignore[arg-type]
    harness = start(loader)
    assert harness.client.get("/deployments/mood-pruned").json()["error"] == "task_mismatch"


def test_a_text_must_fit_into_a_batch(start: Start) -> None:
    harness = start(deployments={"mood-pruned": {"max_batch_tokens": 7}})
    assert harness.client.get("/deployments/mood-pruned").json()["error"] == "batch_too_small"


def test_info(harness: Harness) -> None:
    info = harness.client.get("/info").json()
    assert info["tasks"]["topics"] == {
        "labels": ["art", "law", "war", "zoo"],
        "problem_type": "multi_label_classification",
        "activation": "sigmoid",
        "reads": "text",
        "max_tokens": 8,
        "full": "topics-full",
        "default": "topics-full",
    }
    assert (info["device"], info["dtype"]) == ("cpu", "float32")
    assert info["limits"]["max_inputs"] == 8


def test_models(harness: Harness) -> None:
    models = harness.client.get("/v1/models").json()
    assert models["object"] == "list"
    first = models["data"][0]
    assert list(first) == ["id", "object", "created", "owned_by", "task", "role"]
    assert [model["id"] for model in models["data"]] == ["mood-full", "mood-pruned", "topics-full"]


def test_deployment_document(harness: Harness) -> None:
    document = harness.client.get("/deployments/mood-pruned").json()
    assert document["experts_kept"] == [2, 2]
    # Two experts of 4 x 2 float32, and an embedding of 4 x 8.
    assert document["bytes"]["experts"] == 2 * 8 * 4
    assert document["bytes"]["embedding"] == 32 * 4
    assert document["memory_saved"] == {"bytes": 64, "ratio": 0.25, "basis": "loaded"}
    assert document in harness.client.get("/deployments").json()["data"]
