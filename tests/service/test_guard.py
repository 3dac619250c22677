"""Every route of the real table, without a key, with a wrong one, and with a key of each scope."""

import base64
import logging
from collections.abc import Iterator

import pytest

from service.guard import PROBES, scope_of
from service.keys import SCOPES, new_key, write_keys
from service.routes import ROUTES
from tests.service.conftest import Harness
from tests.service.toys import toy_loader, toy_settings

UNKNOWN = [("GET", "/no-such-page"), ("POST", "/admin"), ("PATCH", "/experiments/e"), ("DELETE", "/deployments/d")]


@pytest.fixture(scope="module")
def secrets() -> dict[str, str]:
    return {}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, secrets: dict[str, str]) -> Iterator[Harness]:
    directory = tmp_path_factory.mktemp("guarded")
    made = {scope: new_key(f"only-{scope}", [scope]) for scope in SCOPES}
    secrets.update({scope: secret for scope, (secret, _) in made.items()})
    write_keys(directory / "keys.txt", [key for _, key in made.values()])
    harness = Harness(toy_settings(directory, auth={"mode": "keys", "keys_file": "keys.txt"}), toy_loader())
    harness.wait_loaded()
    yield harness
    harness.close()


def requests() -> list[tuple[str, str]]:
    return [(row.method, row.path.replace("{name}", "mood-full")) for row in ROUTES] + UNKNOWN


@pytest.mark.parametrize(("method", "path"), requests(), ids=" ".join)
def test_denied_by_default(guarded: Harness, secrets: dict[str, str], method: str, path: str) -> None:
    needed = scope_of(method, path)
    bare = guarded.client.request(method, path)
    if path in PROBES:
        assert bare.status_code == 200
        return
    assert (bare.status_code, bare.json()["error"]["code"]) == (401, "missing_key")
    assert bare.headers["www-authenticate"] == 'Bearer, Basic realm="secateur"'
    wrong = guarded.client.request(method, path, headers={"x-api-key": "wrong"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_key")
    for scope, secret in secrets.items():
        answer = guarded.client.request(method, path, headers={"authorization": f"Bearer {secret}"})
        assert (answer.status_code == 403) is (scope != needed), (scope, answer.text)


def test_probes_alone_are_open() -> None:
    assert {path for _, path in requests() if path in PROBES} == PROBES
    assert scope_of("POST", "/livez") == "classify"
    assert scope_of("HEAD", "/readyz") is None


def test_a_key_by_each_way_in_and_its_name_in_the_log(
    guarded: Harness, secrets: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "secateur.access")
    secret = secrets["classify"]
    body = {"inputs": "0 0 2"}
    basic = base64.b64encode(f"anyone:{secret}".encode()).decode()
    for headers in (
        {"authorization": f"Bearer {secret}"},
        {"x-api-key": secret},
        {"authorization": f"Basic {basic}"},
    ):
        answer = guarded.client.post("/classify", json=body, headers=headers)
        assert answer.json()["data"][0]["label"] == "negative"
    guarded.client.get("/livez")  # the loop writes a request's line before it serves the next request
    lines = [record.fields for record in caplog.records if record.name == "secateur.access"]  # type: ignore[attr-defined]
    assert [line["key"] for line in lines if line["route"] == "/classify"] == ["only-classify"] * 3
    assert secret not in caplog.text


def test_gauge_and_counter(guarded: Harness, secrets: dict[str, str]) -> None:
    before = guarded.runtime.metrics.registry.get_sample_value("secateur_rejected_total", {"reason": "auth"}) or 0
    guarded.client.get("/info")
    guarded.client.get("/info", headers={"x-api-key": secrets["metrics"]})
    text = guarded.client.get("/metrics", headers={"x-api-key": secrets["metrics"]}).text
    assert f'secateur_rejected_total{{reason="auth"}} {before + 2:.1f}' in text
    assert "secateur_auth_open 0.0" in text
