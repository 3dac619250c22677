"""Who answers: explicit names, sticky arms, defaults and fallbacks, over HTTP and alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from models.errors import CheckpointError
from service.assignment import arm, is_enrolled
from service.deployments import Registry
from service.schemas import Query
from service.sections import ExperimentSettings
from service.selection import Selection, select
from service.settings import Settings
from tests.service.conftest import Harness, Start
from tests.service.toys import ToyLoader, toy_loader, toy_settings


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


@pytest.mark.parametrize(("mode", "first"), [("shadow", "mood-full"), ("cascade", "mood-pruned")])
def test_modes_without_weights_begin_with_one_arm(start: Start, mode: str, first: str) -> None:
    arms = [{"deployment": "mood-pruned"}, {"deployment": "mood-full"}]
    fields = {"threshold": 0.0} if mode == "cascade" else {}
    harness = start(experiments=experiments(mode=mode, arms=arms, traffic=20, **fields))
    body = harness.classify("1", subject="user-2").json()
    assert (body["variant"], body["experiment"]["arm"]) == (first, first)
    assert harness.classify("1", subject="user-1").json()["experiment"] is None


def test_roles_may_be_turned_round(start: Start) -> None:
    arms = [{"deployment": "mood-pruned", "role": "control"}, {"deployment": "mood-full", "role": "candidate"}]
    harness = start(experiments=experiments(mode="shadow", arms=arms))
    assert harness.classify("1").json()["variant"] == "mood-pruned"


@dataclass(frozen=True)
class Now:
    """Experiments and winners at one moment."""

    experiments: Mapping[str, ExperimentSettings]
    winners: Mapping[str, str]


def chosen(settings: Settings, now: Now, subject: str, variant: str = "auto") -> Selection:
    return select(Query(["1"], variant=variant, subject=subject), Registry(settings), settings, now, "cls_1")


def test_a_ramp_only_ever_adds_subjects_and_moves_none(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path, experiments=experiments())
    subjects = [f"user-{number}" for number in range(300)]
    before: dict[str, str] = {}
    for traffic in range(101):
        overlaid = {"demo": settings.experiments["demo"].model_copy(update={"traffic": traffic})}
        met = {subject: chosen(settings, Now(overlaid, {}), subject).exposure for subject in subjects}
        arms = {subject: exposure.arm for subject, exposure in met.items() if exposure is not None}
        assert before.items() <= arms.items()
        before = arms
    assert len(before) == 300


def test_a_winner_answers_instead_of_the_default(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path, experiments=experiments(traffic=20))
    stopped = {"demo": settings.experiments["demo"].model_copy(update={"state": "stopped"})}
    won = Now(stopped, {"mood": "mood-pruned", "topics": "topics-full"})
    assert chosen(settings, won, "user-2").intended.name == "mood-pruned"
    assert chosen(settings, won, "user-2").exposure is None
    assert chosen(settings, won, "user-2", "full").intended.name == "mood-full"
    # While an experiment runs, those outside of it meet the winner too, and those inside their arms.
    running = Now(settings.experiments, {"mood": "mood-pruned"})
    assert chosen(settings, running, "user-1").intended.name == "mood-pruned"
    arms = {chosen(settings, Now(settings.experiments, {}), f"user-{n}").intended.name for n in range(100)}
    assert arms == {"mood-full", "mood-pruned"}


def test_a_winner_that_failed_has_the_fallback_behind_it(start: Start) -> None:
    harness = start(loader_without_pruned(), experiments=experiments(state="stopped"))
    harness.runtime.control.winners = {"mood": "mood-pruned"}
    assert harness.classify("1").json()["variant"] == "mood-full"
    assert harness.metric("fallbacks_total", intended="mood-pruned", served="mood-full") == 1
