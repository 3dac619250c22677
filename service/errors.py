"""The one dialect in which every failure is answered, as data: code -> status, type, reason of rejection."""

import math
from dataclasses import dataclass, field
from typing import Any

from service.jsonio import JSONAnswer


@dataclass(frozen=True)
class Kind:
    """What a code means on the wire; `rejected` is its reason in the metric `rejected_total`, if it has one."""

    status: int
    type: str
    rejected: str | None = None


_INVALID, _NOT_FOUND, _TIMEOUT = "invalid_request_error", "not_found_error", "timeout_error"
_INTERNAL, _UNAVAILABLE, _CONFLICT = "internal_error", "unavailable_error", "conflict_error"

ERRORS: dict[str, Kind] = {
    "invalid_json": Kind(400, _INVALID, "body"),
    "invalid_form": Kind(400, _INVALID, "body"),
    "missing_key": Kind(401, "authentication_error", "auth"),
    "invalid_key": Kind(401, "authentication_error", "auth"),
    "insufficient_scope": Kind(403, "permission_error", "auth"),
    "route_not_found": Kind(404, _NOT_FOUND),
    "task_not_found": Kind(404, _NOT_FOUND),
    "variant_not_found": Kind(404, _NOT_FOUND),
    "deployment_not_found": Kind(404, _NOT_FOUND),
    "experiment_not_found": Kind(404, _NOT_FOUND),
    "method_not_allowed": Kind(405, _INVALID),
    "body_timeout": Kind(408, _TIMEOUT, "body"),
    "feedback_conflict": Kind(409, _CONFLICT),
    "ambiguous_request_id": Kind(409, _CONFLICT),
    "revision_required": Kind(409, _CONFLICT),
    "body_too_large": Kind(413, _INVALID, "body"),
    "unsupported_media_type": Kind(415, _INVALID, "body"),
    "unsupported_encoding": Kind(415, _INVALID, "body"),
    "validation_failed": Kind(422, _INVALID, "validation"),
    "missing_field": Kind(422, _INVALID, "validation"),
    "unknown_field": Kind(422, _INVALID, "validation"),
    "task_required": Kind(422, _INVALID, "validation"),
    "empty_inputs": Kind(422, _INVALID, "validation"),
    "empty_input": Kind(422, _INVALID, "validation"),
    "too_many_inputs": Kind(422, _INVALID, "validation"),
    "text_too_long": Kind(422, _INVALID, "validation"),
    "input_too_long": Kind(422, _INVALID, "validation"),
    "invalid_text": Kind(422, _INVALID, "validation"),
    "invalid_image": Kind(422, _INVALID, "validation"),
    "image_too_large": Kind(422, _INVALID, "validation"),
    "pairs_not_supported": Kind(422, _INVALID, "validation"),
    "token_ids_not_supported": Kind(422, _INVALID, "validation"),
    "unknown_label": Kind(422, _INVALID, "validation"),
    "overloaded": Kind(429, "overloaded_error", "overloaded"),
    "client_closed": Kind(499, _INVALID),
    "internal": Kind(500, _INTERNAL),
    "inference_failed": Kind(500, _INTERNAL),
    "invalid_output": Kind(500, _INTERNAL),
    "out_of_memory": Kind(500, _INTERNAL),
    "not_ready": Kind(503, _UNAVAILABLE, "not_ready"),
    "deployment_unavailable": Kind(503, _UNAVAILABLE, "not_ready"),
    "draining": Kind(503, _UNAVAILABLE, "draining"),
    "engine_failed": Kind(503, _UNAVAILABLE),
    "storage_unavailable": Kind(503, _UNAVAILABLE),
    "deadline_exceeded": Kind(504, _TIMEOUT),
}
# After these the rest of the body is unread or the process is leaving: the connection cannot be used again.
CLOSING = frozenset({"body_timeout", "body_too_large", "draining"})
MAX_RETRY_AFTER_SECONDS = 30


@dataclass(eq=False)
class ApiError(Exception):
    """A failure to be answered. `message` is for people and never holds input, paths or exception text.

    param: the field at fault, such as `inputs[3]`. retry_after_seconds: sent rounded up and clamped to 1..30.
    """

    code: str
    message: str
    param: str | None = None
    retry_after_seconds: float | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return ERRORS[self.code]

    @property
    def status(self) -> int:
        return self.kind.status


class ClientClosedError(ApiError):
    """The client went away: nothing is sent, the outcome is 499 in the log and the metrics."""

    def __init__(self) -> None:
        super().__init__("client_closed", "the client closed the connection")


def error_answer(error: ApiError, request_id: str) -> JSONAnswer:
    """The response for an error."""
    body: dict[str, Any] = {
        "code": error.code,
        "message": error.message,
        "type": error.kind.type,
        "param": error.param,
        "request_id": request_id,
    }
    headers = dict(error.headers)
    if error.status in (429, 503):
        seconds = math.ceil(error.retry_after_seconds or 1)
        headers["retry-after"] = str(min(max(seconds, 1), MAX_RETRY_AFTER_SECONDS))
    if error.code in CLOSING:
        headers["connection"] = "close"
    return JSONAnswer({"error": body}, error.status, headers)
