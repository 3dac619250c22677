"""A canary in every place a client may write: it must not come out in a log, a metric or an error."""

import json
import logging
from typing import Any

import pytest

from service.logs import JsonFormatter
from tests.service.conftest import Start

CANARY = "canary7f3a"

REQUESTS: list[tuple[str, str, Any]] = [
    ("POST", "/classify", {"inputs": f"1 {CANARY}", "subject": CANARY}),
    ("POST", "/classify", {"inputs": [f"{CANARY} nan"], "subject": CANARY}),
    ("POST", "/classify", {"inputs": [f"{CANARY} poison"]}),
    ("POST", "/classify", {"inputs": [f"{CANARY} crash"]}),
    ("POST", "/classify", {"inputs": [CANARY, ""]}),
    ("POST", "/classify", {"inputs": [CANARY * 100]}),
    ("POST", "/classify", {"inputs": [{CANARY: CANARY}]}),
    ("POST", "/classify", {"inputs": "1", "task": CANARY}),
    ("POST", "/classify", {"inputs": "1", "variant": CANARY}),
    ("POST", "/classify", {"inputs": "1", "model": CANARY}),
    ("POST", "/classify", {"inputs": "1", "activation": CANARY}),
    ("POST", "/classify", {"inputs": "1", "top_k": CANARY}),
    ("POST", "/classify", {"inputs": "1", "subject": CANARY * 30}),
    ("POST", "/v1/classify", {"input": f"{CANARY} inf", "user": CANARY}),
    ("POST", "/predict", {"inputs": [[CANARY, CANARY]]}),
    ("POST", "/predict", {"inputs": CANARY, "parameters": CANARY}),
    ("GET", f"/{CANARY}", None),
    ("GET", f"/deployments/{CANARY}", None),
    ("GET", f"/livez?{CANARY}={CANARY}", None),
    ("DELETE", f"/classify?task={CANARY}", None),
]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.handler.setFormatter(JsonFormatter())
    caplog.set_level(logging.DEBUG)
    for noisy in ("httpx", "httpcore", "asyncio"):  # the client's own log is not the service's
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return caplog


def test_nothing_a_client_writes_comes_out(start: Start, lines: pytest.LogCaptureFixture) -> None:
    harness = start()
    headers = {"x-api-key": CANARY, "authorization": f"Bearer {CANARY}", "user-agent": CANARY, "traceparent": CANARY}
    for method, path, body in REQUESTS:
        response = harness.client.request(method, path, json=body, headers=headers)
        assert CANARY not in response.text, (path, body)
        assert CANARY not in str(response.headers)
    for content in (CANARY.encode(), f'{{"inputs": "{CANARY}"'.encode(), f'{{"{CANARY}": NaN}}'.encode()):
        harness.client.post("/classify", content=content, headers={"content-type": "application/json"})
    harness.client.post("/classify", content=CANARY.encode(), headers={"content-type": CANARY})
    assert CANARY not in harness.client.get("/metrics").text
    harness.client.get("/livez")  # the loop writes a request's line before it serves the next request
    assert CANARY not in lines.text
    assert len([record for record in lines.records if record.name == "secateur.access"]) >= len(REQUESTS) + 5


def test_an_unexpected_error_is_logged_without_its_text(
    start: Start, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start()

    def fail(*_: object) -> None:
        raise KeyError(CANARY)

    monkeypatch.setattr(harness.runtime, "check_live", fail)
    response = harness.client.get("/livez", headers={"x-request-id": "req-1"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    crash = next(json.loads(line) for line in lines.text.splitlines() if '"secateur.errors"' in line)
    assert crash["request_id"] == "req-1"
    assert crash["error"] == "KeyError"
    assert "in fail" in crash["traceback"]
    assert CANARY not in lines.text


def test_access_line(start: Start, lines: pytest.LogCaptureFixture) -> None:
    harness = start()
    parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    response = harness.classify("1 1", headers={"x-request-id": "req-1", "traceparent": parent})
    harness.client.get("/livez")  # the loop writes a request's line before it serves the next request
    line = next(json.loads(text) for text in lines.text.splitlines() if '"req-1"' in text)
    assert {key: line[key] for key in ("request_id", "id", "task", "variant", "tokens", "code", "route")} == {
        "request_id": "req-1",
        "id": response.json()["id"],
        "task": "mood",
        "variant": "mood-full",
        "tokens": 2,
        "code": 200,
        "route": "/classify",
    }
    assert line["traceparent"] == parent
    assert line["queue_ms"] == pytest.approx(float(response.headers["x-queue-time"]), abs=0.002)


def test_a_failed_pass_leaves_its_traceback(start: Start, lines: pytest.LogCaptureFixture) -> None:
    harness = start()
    harness.classify("poison", headers={"x-request-id": "req-2"})
    line = next(json.loads(text) for text in lines.text.splitlines() if "inference_failed" in text)
    assert line["request_id"] == "req-2"
    assert "RuntimeError: poison" in line["traceback"]
