"""What is exported equals what a client counted."""

import math
import threading
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import LATENCY_SECONDS, PREFIX, TABLE, Metrics
from tests.service.conftest import Harness, Start
from tests.service.test_selection import experiments
from tests.service.toys import toy_loader

FULL = {"task": "mood", "variant": "mood-full"}


def test_table_is_what_is_exported(harness: Harness) -> None:
    exported = {family.name for family in text_string_to_metric_families(harness.client.get("/metrics").text)}
    assert exported == {PREFIX + row.name.removesuffix("_total") for row in TABLE}
    assert len({row.name for row in TABLE}) == len(TABLE)
    for row in TABLE:
        assert row.help.endswith(".")
        assert (row.kind == "counter") == row.name.endswith("_total")
        assert (row.kind == "histogram") == bool(row.buckets)


def test_content_type(harness: Harness) -> None:
    assert harness.client.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_slo_is_an_exact_bound_for_all_variants(harness: Harness) -> None:
    harness.classify("1")
    harness.classify("1", variant="mood-pruned")
    samples = [
        sample
        for family in text_string_to_metric_families(harness.client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "secateur_request_duration_seconds_bucket"
    ]
    for variant in ("mood-full", "mood-pruned"):
        bounds = [float(sample.labels["le"]) for sample in samples if sample.labels["variant"] == variant]
        assert bounds == [*sorted([*LATENCY_SECONDS, 0.04]), math.inf]


def test_requests_equal_the_clients_count(start: Start) -> None:
    harness = start()
    for _ in range(3):
        assert harness.classify(["0 0", "1 1 1"]).status_code == 200
    assert harness.client.post("/v1/classify", json={"input": "2"}).status_code == 200
    assert harness.client.post("/predict", json={"inputs": " ".join("2" * 12)}).status_code == 200
    assert harness.classify("0", variant="mood-pruned").status_code == 200
    assert harness.classify("0", task="topics").status_code == 200
    assert harness.classify("nan").status_code == 500
    assert harness.classify("poison").status_code == 500
    assert harness.classify("1 " * 9, truncate=False).status_code == 422
    assert harness.classify("").status_code == 422
    assert harness.classify("1", task="secret-task").status_code == 404
    assert harness.client.get("/secret-path").status_code == 404

    assert harness.metric("requests_total", **FULL, code="200") == 5
    assert harness.metric("requests_total", **FULL, code="500") == 2
    assert harness.metric("requests_total", **FULL, code="422") == 1
    assert harness.metric("requests_total", variant="mood-pruned", code="200") == 1
    assert harness.metric("requests_total", task="topics", code="200") == 1
    # Requests whose task or variant was never known are HTTP exchanges only.
    assert harness.metric("requests_total") == 10
    assert harness.metric("http_requests_total", route="/classify", method="POST", code="200") == 5
    assert harness.metric("http_requests_total", route="/classify", code="404") == 1
    assert harness.metric("http_requests_total", route="/classify", code="422") == 2
    assert harness.metric("http_requests_total", route="/v1/classify", code="200") == 1
    assert harness.metric("http_requests_total", route="unmatched", code="404") == 1
    assert harness.metric("rejected_total", reason="validation") == 2
    harness.client.request("PROPFIND", "/livez")
    assert harness.metric("http_requests_total", route="/livez", method="other", code="405") == 1
    harness.client.head("/openapi.json")
    assert harness.metric("http_requests_total", route="/openapi.json", method="HEAD", code="200") == 1

    for name in ("request", "tokenization", "queue", "inference"):
        assert harness.metric(f"{name}_duration_seconds_count") == 7
    parts = [harness.metric(f"{name}_duration_seconds_sum") for name in ("tokenization", "queue", "inference")]
    assert sum(parts) <= harness.metric("request_duration_seconds_sum")

    assert harness.metric("items_total", **FULL, outcome="ok") == 8
    assert harness.metric("items_total", outcome="failed") == 2
    assert harness.metric("items_total", outcome="client_error") == 1
    # 3 x (2 + 3), 1, 12 cut to 8.
    assert harness.metric("tokens_total", **FULL, kind="real") == 24
    assert harness.metric("input_tokens_sum", task="mood") == 15 + 1 + 12 + 1
    assert harness.metric("truncated_inputs_total", task="mood") == 1
    assert harness.metric("predictions_total", **FULL, label="negative") == 3
    assert harness.metric("predictions_total", **FULL, label="neutral") == 3
    assert harness.metric("predictions_total", **FULL, label="positive") == 2
    assert harness.metric("prediction_confidence_count", **FULL) == 8
    assert harness.metric("invalid_outputs_total", kind="nan") == 1
    assert "secret" not in harness.client.get("/metrics").text


def test_batches_and_routed_slots(start: Start) -> None:
    harness = start()
    harness.classify(["0 0", "1"])
    harness.classify(["poison"])
    assert harness.metric("batch_items_sum", variant="mood-full") == 3
    assert harness.metric("batch_items_count", variant="mood-full") == 2
    assert harness.metric("batches_total", variant="mood-full") == 2
    assert harness.metric("batches_total", outcome="failed") == 1
    assert harness.metric("batch_tokens_sum", variant="mood-full") == 4
    # The toy routes four slots per token and drops one of them.
    assert harness.metric("routed_slots_total", **FULL, outcome="kept") == 9
    assert harness.metric("routed_slots_total", **FULL, outcome="pruned") == 3


def test_time_headers_equal_the_histograms(start: Start) -> None:
    harness = start()
    headers = harness.classify("1").headers
    for part in ("tokenization", "queue", "inference"):
        seconds = float(headers[f"x-{part}-time"]) / 1000
        assert harness.metric(f"{part}_duration_seconds_sum") == pytest.approx(seconds, abs=1e-6)
    total = float(headers["x-total-time"]) / 1000
    assert harness.metric("request_duration_seconds_sum") == pytest.approx(total, abs=1e-6)


def test_assignments(start: Start) -> None:
    harness = start(experiments=experiments())
    harness.classify("1", subject="user-2")
    harness.classify("1", subject="user-2")
    harness.classify("1")
    harness.classify("1", variant="full")
    harness.classify("1", task="topics")
    labels = {"experiment": "demo"}
    assert harness.metric("experiment_assignments_total", **labels, arm="mood-pruned", source="subject") == 2
    assert harness.metric("experiment_assignments_total", **labels, source="request") == 1
    assert harness.metric("experiment_assignments_total", **labels, arm="mood-full", source="override") == 1
    assert harness.metric("experiment_assignments_total") == 4


def test_gauges_of_the_moment(start: Start) -> None:
    harness = start()
    assert harness.metric("inflight_items") == 0
    assert harness.metric("inflight_limit_items") == 16
    assert harness.metric("ready") == 1
    assert harness.metric("auth_open") == 1
    assert harness.metric("worker_failures_total") == 0
    assert harness.metric("deployment_state", variant="mood-full") == 1
    assert harness.metric("deployment_state", variant="mood-full", state="ready") == 1
    assert harness.metric("deployment_loads_total", outcome="ok") == 3
    assert harness.metric("build_info") == 1


def test_items_inside_are_seen(start: Start) -> None:
    loader = toy_loader()
    harness = start(loader)
    model = loader.model("mood-full")
    model.gate.clear()
    try:
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(harness.classify(["0", "1"]).status_code))
        thread.start()
        assert model.entered.acquire(timeout=30)
        assert harness.metric("inflight_items", state="running") == 2
        assert harness.metric("inflight_items") == 2
    finally:
        model.gate.set()
    thread.join(30)
    assert answers == [200]
    assert harness.metric("inflight_items") == 0


@pytest.mark.parametrize("method", ["inc", "observe", "set"])
def test_instruments_are_used_as_declared(method: str) -> None:
    wrong = {"inc": "ready", "observe": "ready", "set": "worker_failures_total"}
    call: Callable[[str, float], None] = getattr(Metrics(), method)
    with pytest.raises(AssertionError):
        call(wrong[method], 1)
