"""The implementation that computes the experts: chosen by configuration, shown, and warm before it serves."""

import logging
import threading
from pathlib import Path

import pytest

import service.deployments
from models.checkpoint import load_checkpoint
from models.decoder import MoEClassifier
from models.errors import ConfigError
from service.app import create_app
from service.settings import load_settings
from tests.service.conftest import Harness, Start
from tests.service.test_real_model import TEXTS, YAML, write_checkpoints
from tests.service.toys import toy_settings


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("backend")
    write_checkpoints(directory)
    (directory / "secateur.yaml").write_text(YAML, encoding="utf-8")
    return directory


def test_the_operator_may_force_the_reference(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Chosen in the configuration, shown in both documents and in the log, and the answers stay."""
    caplog.set_level(logging.INFO)
    answers = {}
    for backend, shown in (("auto", "cpu"), ("reference", "reference")):
        caplog.clear()
        harness = Harness(load_settings(directory / "secateur.yaml", {"models": {"backend": backend}}), load_checkpoint)
        try:
            harness.wait_loaded()
            assert harness.client.get("/info").json()["backend"] == shown
            documents = harness.client.get("/deployments").json()["data"]
            assert {document["name"]: document["backend"] for document in documents} == dict.fromkeys(
                ("parent", "slice", "zero"), shown
            )
            data = harness.classify(TEXTS, variant="zero", activation="none").json()["data"]
            answers[backend] = [value for item in data for value in item["probs"]]
        finally:
            harness.close()
        ready = [record for record in caplog.records if record.message == "deployment is ready"]
        assert [record.fields["backend"] for record in ready] == [shown] * 3  # type: ignore[attr-defined]
    assert answers["reference"] == pytest.approx(answers["auto"], rel=1e-4, abs=1e-5)


def test_a_backend_that_cannot_run_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toy_settings(tmp_path, models={"device": "cuda:0", "backend": "cpu"})
    with pytest.raises(ConfigError, match=r"models\.backend: backend cpu cannot run on cuda:0: .* choose triton"):
        create_app(settings)


def test_a_deployment_is_warm_before_it_is_ready(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate, seen = threading.Event(), threading.Event(), []

    def warm_up(model: MoEClassifier, max_tokens: int, max_items: int) -> None:
        seen.append((max_tokens, max_items))
        entered.set()
        assert gate.wait(30)

    monkeypatch.setattr(service.deployments, "warm_up", warm_up)
    harness = start(wait=False, deployments={"mood-full": {"max_batch_tokens": 12}})
    try:
        assert entered.wait(30)
        assert harness.client.get("/deployments/mood-full").json()["state"] == "testing"
        assert harness.client.get("/readyz").status_code == 503
    finally:
        gate.set()
    harness.wait_loaded()
    assert harness.client.get("/readyz").status_code == 200
    assert seen == [(12, 4), (16, 4), (16, 4)]


def test_a_deployment_that_cannot_be_warmed_up_does_not_serve(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def warm_up(model: MoEClassifier, max_tokens: int, max_items: int) -> None:
        raise RuntimeError("a kernel does not compile")

    monkeypatch.setattr(service.deployments, "warm_up", warm_up)
    document = start().client.get("/deployments/mood-full").json()
    assert (document["state"], document["error"]) == ("failed", "internal")
