"""The table of errors and how one is rendered."""

import json

import pytest

from service.errors import ERRORS, ApiError, error_answer


def test_statuses_are_the_contract() -> None:
    by_status: dict[int, set[str]] = {}
    for code, kind in ERRORS.items():
        by_status.setdefault(kind.status, set()).add(code)
    assert by_status == {
        400: {"invalid_json", "invalid_form"},
        401: {"missing_key", "invalid_key"},
        403: {"insufficient_scope"},
        404: {
            *("route_not_found", "task_not_found", "variant_not_found", "deployment_not_found"),
            "experiment_not_found",
        },
        405: {"method_not_allowed"},
        408: {"body_timeout"},
        409: {"feedback_conflict", "ambiguous_request_id", "revision_required"},
        413: {"body_too_large"},
        415: {"unsupported_media_type", "unsupported_encoding"},
        422: {
            *("validation_failed", "missing_field", "unknown_field", "task_required", "empty_inputs", "empty_input"),
            *("too_many_inputs", "text_too_long", "input_too_long", "invalid_text", "pairs_not_supported"),
            *("token_ids_not_supported", "invalid_image", "image_too_large", "unknown_label"),
        },
        429: {"overloaded"},
        499: {"client_closed"},
        500: {"internal", "inference_failed", "invalid_output", "out_of_memory"},
        503: {"not_ready", "draining", "deployment_unavailable", "engine_failed", "storage_unavailable"},
        504: {"deadline_exceeded"},
    }


def test_dialect() -> None:
    answer = error_answer(ApiError("empty_input", "inputs[1] is empty", "inputs[1]"), "req-7f3a")
    assert answer.status_code == 422
    assert json.loads(bytes(answer.body)) == {
        "error": {
            "code": "empty_input",
            "message": "inputs[1] is empty",
            "type": "invalid_request_error",
            "param": "inputs[1]",
            "request_id": "req-7f3a",
        }
    }
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize(("seconds", "sent"), [(None, "1"), (0.01, "1"), (1.2, "2"), (29.5, "30"), (1e9, "30")])
def test_retry_after(seconds: float | None, sent: str) -> None:
    error = ApiError("overloaded", "too much work is waiting", retry_after_seconds=seconds)
    assert error_answer(error, "r").headers["retry-after"] == sent


def test_draining_closes_the_connection() -> None:
    headers = error_answer(ApiError("draining", "leaving"), "r").headers
    assert headers["connection"] == "close"
    assert headers["retry-after"] == "1"
