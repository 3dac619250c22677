"""The routes of experiments: what they answer, in which form, and who may change anything."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from service.experiments import page, refresh
from service.experiments.document import Report, ReportList
from service.experiments.routes import prefers_html
from service.storage.events import StorageUnavailableError
from tests.service.conftest import Harness, Start
from tests.service.experiments.live import no_cache, report_of, split
from tests.service.toys import toy_loader, toy_settings

ADMIN = {"enabled": True}
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """The split `exp`, and an admin."""
    with no_cache():
        settings = toy_settings(tmp_path_factory.mktemp("toy"), experiments=split(), admin=ADMIN)
        harness = Harness(settings, toy_loader())
        harness.wait_loaded()
        yield harness
        harness.close()


def patch(harness: Harness, name: str = "exp", **fields: Any) -> httpx.Response:
    return harness.client.patch(f"/experiments/{name}", json=fields)


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_a_report_has_the_published_shape(harness: Harness) -> None:
    response = harness.client.get("/experiments/exp")
    assert response.headers["content-type"] == "application/json"
    report = Report.model_validate_json(response.content)
    assert (report.name, report.control, report.candidate) == ("exp", "mood-full", "mood-pruned")
    assert report.verdict == "insufficient_data"


def test_the_list_says_what_the_report_says(harness: Harness) -> None:
    (line,) = ReportList.model_validate_json(harness.client.get("/experiments").content).data
    report = report_of(harness)
    assert line.model_dump() == {key: report[key] for key in line.model_dump()}


@pytest.mark.parametrize("path", ["/experiments", "/experiments/exp"])
def test_a_browser_gets_a_page(harness: Harness, path: str) -> None:
    for response in (
        harness.client.get(path, headers={"accept": BROWSER}),
        harness.client.get(path, params={"format": "html"}),
    ):
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert response.headers["content-security-policy"] == page.CSP
        assert response.headers["vary"] == "accept"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "exp" in response.text
        assert response.text.startswith("<!doctype html>")
    asked = harness.client.get(path, params={"format": "json"}, headers={"accept": BROWSER})
    assert asked.headers["content-type"] == "application/json"
    assert asked.headers["vary"] == "accept"


@pytest.mark.parametrize("query", ["", "?format=html"])
@pytest.mark.parametrize("path", ["/experiments", "/experiments/exp"])
def test_head(harness: Harness, path: str, query: str) -> None:
    response = harness.client.head(path + query)
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("accept", "is_html"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("text/html", True),
        (BROWSER, True),
        ("text/*", True),
        ("text/html;q=0.5, application/json", False),
        ("text/html;q=0.5, application/json;q=0.4", True),
        ("application/json, text/html", False),
        ("TEXT/HTML", True),
        ("text/html;q=0", False),
        ("text/html;q=0, */*;q=0.1", False),
        ("text/html;level=1;q=0.7, */*;q=0.1", True),
        ("text/html;q=never", False),
        (";;,,", False),
    ],
)
def test_who_prefers_a_page(accept: str, is_html: bool) -> None:
    assert prefers_html(accept) is is_html


def test_a_format_nobody_knows(harness: Harness) -> None:
    for path in ("/experiments", "/experiments/exp"):
        assert code_of(harness.client.get(path, params={"format": "xml"})) == (422, "validation_failed")


def test_an_experiment_nobody_knows(harness: Harness) -> None:
    for response in (
        harness.client.get("/experiments/nothing"),
        harness.client.get("/experiments/nothing?format=html"),
        patch(harness, "nothing", state="paused"),
    ):
        assert code_of(response) == (404, "experiment_not_found")
        assert response.json()["error"]["param"] == "name"


def test_a_service_without_experiments(start: Start) -> None:
    harness = start()
    assert harness.client.get("/experiments").json() == {"object": "list", "data": []}
    assert harness.client.get("/experiments", headers={"accept": BROWSER}).text.startswith("<!doctype html>")
    assert code_of(harness.client.get("/experiments/exp")) == (404, "experiment_not_found")


def test_operators_change_what_is_served(harness: Harness) -> None:
    def met(subject: str) -> Any:
        return harness.classify("0", subject=subject).json()["experiment"]

    assert met("user-3")
    paused = patch(harness, state="paused")
    assert (paused.status_code, paused.json()["state"]) == (200, "paused")
    assert met("user-3") is None
    assert harness.metric("experiment_traffic_percent", experiment="exp") == 0
    assert patch(harness, state="running", traffic=40).json()["traffic"] == 40
    assert harness.metric("experiment_traffic_percent", experiment="exp") == 40
    enrolled = [subject for subject in (f"user-{n}" for n in range(60)) if met(subject)]
    assert 12 <= len(enrolled) <= 36
    patch(harness, traffic=100)
    assert [step["action"] for step in report_of(harness)["steps"]] == ["configured", "paused", "running", "traffic"]
    assert report_of(harness)["steps"][1]["actor"] == "operator"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 422, "validation_failed", None),
        ({"state": "done"}, 422, "validation_failed", "state"),
        ({"traffic": 101}, 422, "validation_failed", "traffic"),
        ({"traffic": "5"}, 422, "validation_failed", "traffic"),
        ({"colour": 1}, 422, "unknown_field", "colour"),
        ({"margin": 0.5}, 409, "revision_required", "margin"),
        ({"arms": []}, 409, "revision_required", "arms"),
        ({"weight": 3}, 409, "revision_required", "weight"),
        ({"traffic": 5, "salt": "x"}, 409, "revision_required", "salt"),
        ([], 422, "validation_failed", None),
    ],
)
def test_refused_changes(harness: Harness, body: Any, status: int, code: str, param: str | None) -> None:
    before = report_of(harness)["steps"]
    response = harness.client.patch("/experiments/exp", json=body)
    assert code_of(response) == (status, code)
    assert response.json()["error"]["param"] == param
    assert report_of(harness)["steps"] == before


def test_a_winner_answers_the_task(start: Start) -> None:
    with no_cache():
        harness = start(experiments=split(), admin=ADMIN)
        ended = patch(harness, winner="mood-pruned").json()
        assert (ended["state"], ended["winner"]) == ("stopped", "mood-pruned")
        answer = harness.classify("0", subject="user-3").json()
        assert (answer["variant"], answer["experiment"]) == ("mood-pruned", None)
        assert code_of(patch(harness, state="running")) == (409, "revision_required")


def test_a_change_is_seen_at_once_though_reports_are_kept(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "FRESH_SECONDS", 60.0)
    harness = start(experiments=split(), admin=ADMIN)
    for state in ("paused", "running", "paused"):
        assert patch(harness, state=state).json()["state"] == state
        assert report_of(harness)["state"] == state


def test_without_an_admin_nothing_can_be_changed(start: Start) -> None:
    harness = start(experiments=split())
    for name in ("exp", "nothing"):
        response = patch(harness, name, state="paused")
        assert code_of(response) == (404, "route_not_found")
    assert report_of(harness)["state"] == "running"


def test_the_route_table_is_what_openapi_says(start: Start) -> None:
    for is_admin in (False, True):
        harness = start(admin={"enabled": is_admin})
        methods = {"get", "patch"} if is_admin else {"get"}
        paths = harness.client.get("/openapi.json").json()["paths"]
        assert set(paths["/experiments/{name}"]) == methods
        refused = harness.client.delete("/experiments/exp")
        assert code_of(refused) == (405, "method_not_allowed")
        allowed = {"GET", "HEAD", "PATCH"} if is_admin else {"GET", "HEAD"}
        assert set(refused.headers["allow"].split(", ")) == allowed


def test_openapi_describes_the_page_the_body_and_the_parameters(harness: Harness) -> None:
    paths = harness.client.get("/openapi.json").json()["paths"]
    for path, names in (("/experiments", ["format"]), ("/experiments/{name}", ["name", "format"])):
        operation = paths[path]["get"]
        assert [parameter["name"] for parameter in operation["parameters"]] == names
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/html"}
    body = paths["/experiments/{name}"]["patch"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"state", "traffic", "winner", "advance"}
    feedback = paths["/feedback"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(feedback["properties"]) == {"items", "replace"}


READS: list[Callable[[Harness], httpx.Response]] = [
    lambda harness: harness.client.get("/experiments"),
    lambda harness: harness.client.get("/experiments/exp"),
    lambda harness: patch(harness, state="running"),
]


@pytest.mark.parametrize("call", READS)
def test_a_failing_database(
    harness: Harness, call: Callable[[Harness], httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise StorageUnavailableError

    monkeypatch.setattr(harness.runtime.store, "tallies", fails)
    monkeypatch.setattr(harness.runtime.store, "put_state", fails)
    response = call(harness)
    assert code_of(response) == (503, "storage_unavailable")
    assert harness.classify("0").status_code == 200
    monkeypatch.undo()
    assert harness.client.get("/experiments/exp").status_code == 200
