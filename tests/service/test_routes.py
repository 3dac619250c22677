"""The HTTP contract, over a real socket."""

import json
import math
import re
from typing import Any

import pytest

from service.documents import ClassifyResponse, ClassifyV1Response, Score
from tests.service.conftest import Harness, Start

PROBES = ("/livez", "/readyz", "/health")
READS = (
    *PROBES,
    "/info",
    "/v1/models",
    "/deployments",
    "/deployments/mood-full",
    "/experiments",
    "/metrics",
    "/openapi.json",
)


def softmax(*logits: float) -> list[float]:
    exps = [math.exp(logit) for logit in logits]
    return [value / sum(exps) for value in exps]


def test_v1_cuts_texts_at_the_wanted_length(harness: Harness) -> None:
    def tokens(wanted: int | None) -> int:
        body = {"input": "1 1 1 1 1", "truncate_prompt_tokens": wanted}
        answer = harness.client.post("/v1/classify", json=body).json()
        return int(answer["usage"]["prompt_tokens"])

    assert [tokens(wanted) for wanted in (None, -1, 3, 500)] == [5, 5, 3, 5]


def test_classify_example(harness: Harness) -> None:
    response = harness.classify(["2 2 1", "0 0"], task="mood", variant="auto", subject="user-2", top_k=None)
    assert response.status_code == 200
    body = response.json()
    ClassifyResponse.model_validate(body)
    assert list(body) == (
        ["id", "object", "created", "model", "task", "variant", "experiment", "activation", "data", "usage"]
    )
    assert re.fullmatch(r"cls_[0-9a-f]{32}", body["id"])
    assert body["object"] == "list"
    assert body["model"] == body["variant"] == "mood-full"
    assert body["experiment"] is None
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    first, second = body["data"]
    low, middle, high = softmax(0, 1, 2)
    assert first["probs"] == pytest.approx([low, middle, high])
    assert first["label"] == "positive"
    assert first["labels"] == ["positive"]
    assert first["score"] == first["probs"][2]
    assert [score["label"] for score in first["scores"]] == ["positive", "neutral", "negative"]
    assert (first["index"], first["num_classes"], first["tokens"], first["truncated"]) == (0, 3, 3, False)
    assert (second["index"], second["label"], second["variant"]) == (1, "negative", "mood-full")


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_list_is_a_batch(harness: Harness, count: int) -> None:
    texts = [str(i % 3) for i in range(count)]
    data = harness.classify(texts).json()["data"]
    assert [item["label"] for item in data] == [("negative", "neutral", "positive")[i % 3] for i in range(count)]


def test_a_string_is_one_text(harness: Harness) -> None:
    assert len(harness.classify("1").json()["data"]) == 1


def test_aliases_of_fields(harness: Harness) -> None:
    body = harness.client.post("/classify", json={"input": "1", "model": "mood-pruned"}).json()
    assert (body["variant"], body["data"][0]["label"]) == ("mood-pruned", "neutral")
    assert harness.client.post("/classify", json={"input": "1", "model": "topics"}).json()["task"] == "topics"


def test_variants(harness: Harness) -> None:
    assert harness.classify("1", variant="full").json()["variant"] == "mood-full"
    assert harness.classify("1", variant="mood-pruned").json()["variant"] == "mood-pruned"
    assert harness.classify("1", model="full").json()["variant"] == "mood-full"


def test_the_three_shapes_agree(harness: Harness) -> None:
    texts = ["0 1 1", "2"]
    native = harness.classify(texts).json()["data"]
    v1 = harness.client.post("/v1/classify", json={"input": texts, "model": "mood", "user": "u"}).json()
    ClassifyV1Response.model_validate(v1)
    assert list(v1) == ["id", "object", "created", "model", "data", "usage"]
    assert [list(item) for item in v1["data"]] == [["index", "label", "probs", "num_classes"]] * 2
    predicted = harness.client.post("/predict?task=mood", json={"inputs": texts}).json()
    for item, other, scores in zip(native, v1["data"], predicted, strict=True):
        assert other["label"] == item["label"] == scores[0]["label"]
        assert other["probs"] == pytest.approx(item["probs"], abs=1e-6)
        assert scores == item["scores"]
        for score in scores:
            Score.model_validate(score)


def test_predict_lists(harness: Harness) -> None:
    def post(**body: Any) -> Any:
        return harness.client.post("/predict", json=body).json()

    single = post(inputs="1")
    assert [score["label"] for score in single] == ["neutral", "negative", "positive"]
    assert post(inputs=["1"]) == [single]
    assert post(inputs=[["1"]]) == [single]
    assert post(inputs="1", parameters={"top_k": 1}) == single[:1]
    assert post(inputs="1", raw_scores=True)[0]["score"] == 1.0
    assert post(inputs="1", parameters={"function_to_apply": "none"})[0]["score"] == 1.0


def test_v1_logits(harness: Harness) -> None:
    body = harness.client.post("/v1/classify", json={"input": "1 1", "use_activation": False}).json()
    assert body["data"][0]["probs"] == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("top_k", [1, 2, 3, 99])
def test_top_k(harness: Harness, top_k: int) -> None:
    item = harness.classify("1", top_k=top_k).json()["data"][0]
    assert len(item["scores"]) == min(top_k, 3)
    assert item["probs"] is None


def test_activation_never_changes_the_label(harness: Harness) -> None:
    items = [harness.classify("2 2 0", activation=name).json()["data"][0] for name in ("softmax", "sigmoid", "none")]
    assert {item["label"] for item in items} == {"positive"}
    assert items[2]["probs"] == [1.0, 0.0, 2.0]


def test_multi_label(harness: Harness) -> None:
    item = harness.classify("0 0 2", task="topics", threshold=0.7).json()["data"][0]
    assert (item["label"], item["labels"]) == ("art", ["art", "war"])
    assert harness.classify("0 0 2", task="topics", threshold=0.8).json()["data"][0]["labels"] == ["art"]
    assert harness.classify("0", task="topics").json()["activation"] == "sigmoid"


def test_truncation(harness: Harness) -> None:
    long = " ".join(["1"] * 9)
    item = harness.classify(long).json()["data"][0]
    assert (item["tokens"], item["truncated"]) == (8, True)
    assert harness.classify(" ".join(["1"] * 8), truncate=False).json()["data"][0]["truncated"] is False
    error = harness.classify(["1", long], truncate=False)
    assert error.status_code == 422
    assert error.json()["error"]["code"] == "input_too_long"
    assert error.json()["error"]["param"] == "inputs[1]"
    assert "9 tokens" in error.json()["error"]["message"]
    assert "reads 8" in error.json()["error"]["message"]


def test_ids_are_unique(harness: Harness) -> None:
    ids = {harness.classify("1", headers={"x-request-id": "same"}).json()["id"] for _ in range(5)}
    assert len(ids) == 5


def test_headers(harness: Harness) -> None:
    response = harness.classify("1")
    assert response.headers["x-variant"] == "mood-full"
    assert "x-experiment" not in response.headers
    parts = [float(response.headers[f"x-{part}-time"]) for part in ("tokenization", "queue", "inference")]
    assert min(parts) >= 0
    assert sum(parts) <= float(response.headers["x-total-time"]) + 0.002  # rounding to microseconds
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("sent", "is_kept"), [("req-7f3a", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("", False)]
)
def test_request_id(harness: Harness, sent: str, is_kept: bool) -> None:
    got = harness.client.get("/livez", headers={"x-request-id": sent}).headers["x-request-id"]
    assert (got == sent) is is_kept
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", got)


BAD_REQUESTS: list[tuple[str, Any, int, str, str | None]] = [
    ("/classify", {}, 422, "missing_field", "inputs"),
    ("/classify", [], 422, "validation_failed", None),
    ("/classify", "text", 422, "validation_failed", None),
    ("/classify", {"inputs": 5}, 422, "validation_failed", "inputs"),
    ("/classify", {"inputs": None}, 422, "validation_failed", "inputs"),
    ("/classify", {"inputs": [1]}, 422, "validation_failed", "inputs[0]"),
    ("/classify", {"inputs": ["a", None]}, 422, "validation_failed", "inputs[1]"),
    ("/classify", {"inputs": [["a", "b"]]}, 422, "validation_failed", "inputs[0]"),
    ("/classify", {"inputs": []}, 422, "empty_inputs", "inputs"),
    ("/classify", {"inputs": ""}, 422, "empty_input", "inputs[0]"),
    ("/classify", {"inputs": ["a", " \t\n\u3000"]}, 422, "empty_input", "inputs[1]"),
    ("/classify", {"inputs": ["a", "void"]}, 422, "empty_input", "inputs[1]"),
    ("/classify", {"inputs": ["a"] * 9}, 422, "too_many_inputs", "inputs"),
    ("/classify", {"inputs": ["a", "b" * 401]}, 422, "text_too_long", "inputs[1]"),
    ("/classify", {"inputs": ["a", "\ud800"]}, 422, "invalid_text", "inputs[1]"),
    ("/classify", {"inputs": "a", "subject": "\udfff"}, 422, "invalid_text", "subject"),
    ("/classify", {"inputs": "a", "input": "a"}, 422, "validation_failed", None),
    ("/classify", {"inputs": "a", "variant": "auto", "model": "mood"}, 422, "validation_failed", None),
    ("/classify", {"inputs": "a", "topk": 3}, 422, "unknown_field", "topk"),
    ("/classify", {"inputs": "a", "user": "u"}, 422, "unknown_field", "user"),
    ("/classify", {"inputs": "a", "top_k": 0}, 422, "validation_failed", "top_k"),
    ("/classify", {"inputs": "a", "top_k": 1.0}, 422, "validation_failed", "top_k"),
    ("/classify", {"inputs": "a", "top_k": True}, 422, "validation_failed", "top_k"),
    ("/classify", {"inputs": "a", "top_k": "1"}, 422, "validation_failed", "top_k"),
    ("/classify", {"inputs": "a", "activation": "tanh"}, 422, "validation_failed", "activation"),
    ("/classify", {"inputs": "a", "threshold": 0.5}, 422, "validation_failed", "threshold"),
    ("/classify", {"inputs": "a", "task": "topics", "threshold": 1.5}, 422, "validation_failed", "threshold"),
    ("/classify", {"inputs": "a", "truncate": 1}, 422, "validation_failed", "truncate"),
    ("/classify", {"inputs": "a", "subject": ""}, 422, "validation_failed", "subject"),
    ("/classify", {"inputs": "a", "subject": "s" * 257}, 422, "validation_failed", "subject"),
    ("/classify", {"inputs": "a", "subject": "a\x00b"}, 422, "validation_failed", "subject"),
    ("/classify", {"inputs": "a", "task": 3}, 422, "validation_failed", "task"),
    ("/classify", {"inputs": "a", "task": "nothing"}, 404, "task_not_found", "task"),
    ("/classify", {"inputs": "a", "variant": "nothing"}, 404, "variant_not_found", "variant"),
    ("/classify", {"inputs": "a", "variant": "topics-full"}, 404, "variant_not_found", "variant"),
    ("/classify", {"inputs": "a", "model": "nothing"}, 404, "variant_not_found", "model"),
    ("/classify", {"inputs": "a", "task": "mood", "model": "topics-full"}, 404, "variant_not_found", "model"),
    ("/classify?task=mood", {"inputs": "a"}, 422, "validation_failed", "task"),
    ("/v1/classify", {"input": [1, 2]}, 422, "token_ids_not_supported", "input"),
    ("/v1/classify", {"input": [[1, 2]]}, 422, "token_ids_not_supported", "input"),
    ("/v1/classify", {"input": ["a", ""]}, 422, "empty_input", "input[1]"),
    ("/v1/classify", {"input": ["a", "void"]}, 422, "empty_input", "input[1]"),
    ("/v1/classify", {"messages": []}, 422, "missing_field", "input"),
    ("/v1/classify", {"input": "a", "messages": []}, 422, "unknown_field", "messages"),
    ("/v1/classify", {"input": "a", "top_k": 1}, 422, "unknown_field", "top_k"),
    ("/v1/classify", {"input": "a", "truncate_prompt_tokens": 0}, 422, "validation_failed", "truncate_prompt_tokens"),
    ("/v1/classify", {"input": "a", "truncate_prompt_tokens": -2}, 422, "validation_failed", "truncate_prompt_tokens"),
    ("/v1/classify", {"input": "a", "truncate_prompt_tokens": "9"}, 422, "validation_failed", "truncate_prompt_tokens"),
    ("/v1/classify?task=nothing", {"input": "a"}, 404, "task_not_found", "task"),
    ("/predict", {"inputs": [["a", "b"]]}, 422, "pairs_not_supported", "inputs"),
    ("/predict", {"inputs": [[]]}, 422, "validation_failed", "inputs[0]"),
    ("/predict", {"inputs": "a", "parameters": {"topk": 1}}, 422, "unknown_field", "parameters.topk"),
    (
        "/predict",
        {"inputs": "a", "raw_scores": True, "parameters": {"function_to_apply": "softmax"}},
        422,
        "validation_failed",
        None,
    ),
]


@pytest.mark.parametrize(("path", "body", "status", "code", "param"), BAD_REQUESTS)
def test_bad_request(harness: Harness, path: str, body: Any, status: int, code: str, param: str | None) -> None:
    # The client's own encoder refuses lone surrogates, so the document is written in ASCII.
    response = harness.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert list(error) == ["code", "message", "type", "param", "request_id"]
    assert error["request_id"] == response.headers["x-request-id"]


def test_control_characters_reach_the_tokenizer(harness: Harness) -> None:
    assert harness.classify("1 \x00 \x07").status_code == 200


def test_task_is_required_when_nothing_decides(start: Start) -> None:
    error = start(default_task=None).classify("1").json()["error"]
    assert (error["code"], error["param"]) == ("task_required", "task")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "9" * 10, "²"])
def test_bad_timeout(harness: Harness, value: str) -> None:
    response = harness.classify("1", headers={"x-timeout-ms": value.encode()})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "x-timeout-ms"


def test_long_timeout_is_cut_to_the_limit(harness: Harness) -> None:
    assert harness.classify("1", headers={"x-timeout-ms": "999999999"}).status_code == 200


@pytest.mark.parametrize("path", READS)
def test_head_on_every_get(harness: Harness, path: str) -> None:
    assert harness.client.get(path).status_code == 200
    head = harness.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 0


@pytest.mark.parametrize("path", ["/", "/nothing", "/classify/", "/livez/", "/docs", "/deployments/mood-full/x"])
def test_unknown_route(harness: Harness, path: str) -> None:
    response = harness.client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "route_not_found"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", "/classify", "POST"), ("DELETE", "/predict", "POST"), ("POST", "/livez", "GET, HEAD")],
)
def test_wrong_method(harness: Harness, method: str, path: str, allow: str) -> None:
    response = harness.client.request(method, path)
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert response.headers["allow"] == allow


def test_unknown_deployment(harness: Harness) -> None:
    response = harness.client.get("/deployments/nothing")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "deployment_not_found")


def test_documentation_can_be_switched_on(start: Start) -> None:
    assert start(server={"docs": True}).client.get("/docs").status_code == 200


def test_openapi_lists_the_routes(harness: Harness) -> None:
    paths = harness.client.get("/openapi.json").json()["paths"]
    assert {path: sorted(operations) for path, operations in paths.items()} == {
        "/classify": ["post"],
        "/v1/classify": ["post"],
        "/predict": ["post"],
        "/livez": ["get"],
        "/readyz": ["get"],
        "/health": ["get"],
        "/info": ["get"],
        "/v1/models": ["get"],
        "/deployments": ["get"],
        "/deployments/{name}": ["get"],
        "/feedback": ["post"],
        "/experiments": ["get"],
        "/experiments/{name}": ["get"],
        "/metrics": ["get"],
    }
    for path, parameter in (("/v1/classify", "task"), ("/predict", "task"), ("/deployments/{name}", "name")):
        (operation,) = paths[path].values()
        assert [described["name"] for described in operation["parameters"]] == [parameter]
    assert list(paths["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    schema = paths["/classify"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is False
    assert "inputs" in schema["required"]
