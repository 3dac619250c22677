"""Clients that leave: their items are dropped, the outcome is 499 and nothing is sent."""

import http.client
import json
from urllib.parse import urlsplit

from tests.service.conftest import SECONDS, Harness, Start
from tests.service.toys import toy_loader


def leave_after(harness: Harness, text: str) -> http.client.HTTPConnection:
    """Send a request on a connection of its own and return the connection without reading."""
    connection = http.client.HTTPConnection(urlsplit(harness.server.url).netloc, timeout=SECONDS)
    connection.request("POST", "/classify", json.dumps({"inputs": text}), {"content-type": "application/json"})
    return connection


def test_while_running_and_while_queued(start: Start) -> None:
    harness = start(toy_loader())
    model = harness.loader.model("mood-full")
    model.gate.clear()
    running = leave_after(harness, "0")
    assert model.entered.acquire(timeout=SECONDS)
    queued = leave_after(harness, "1")
    while harness.metric("inflight_items") < 2:
        pass
    running.close()
    queued.close()
    while harness.metric("requests_total", code="499") < 2:
        pass
    model.gate.set()
    while harness.metric("inflight_items") > 0:
        pass
    assert harness.metric("items_total", outcome="cancelled") == 2
    assert harness.metric("http_requests_total", route="/classify", code="499") == 2
    assert len(model.batches) == 1
    assert harness.classify("1").status_code == 200


def test_timeout_over_http(start: Start) -> None:
    harness = start(toy_loader())
    model = harness.loader.model("mood-full")
    model.gate.clear()
    response = harness.classify("0", headers={"x-timeout-ms": "50"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    model.gate.set()
    assert harness.metric("requests_total", code="504") == 1


def test_dead_worker_over_http(start: Start) -> None:
    harness = start(toy_loader())
    response = harness.classify("broken")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_failed")
    for path in ("/livez", "/readyz", "/health"):
        probe = harness.client.get(path)
        assert (probe.status_code, probe.json()["error"]["code"]) == (503, "engine_failed")
    assert harness.classify("1").json()["error"]["code"] == "engine_failed"
    assert harness.metric("ready") == 0
    assert harness.metric("worker_failures_total") == 1
