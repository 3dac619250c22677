"""The edge of the application, pure ASGI: request id, fixed headers, errors, counting and the access log.

Everything a route raises ends here, so there is one place that renders errors and none that leaks them.
"""

import asyncio
import logging
import re
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ApiError, ClientClosedError, error_answer
from service.metrics import Metrics

access_log = logging.getLogger("secateur.access")
error_log = logging.getLogger("secateur.errors")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SCOPE_KEY = "secateur"
LINGER_SECONDS = 1.0
LINGER_BYTES = 16 * 2**20


@dataclass
class Exchange:
    """What is known about one HTTP exchange. arrived: monotonic seconds. fields: for the access log, never text."""

    request_id: str
    arrived: float
    status: int = 499
    is_started: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that the edge opened for this request."""
    exchange: Exchange = scope[SCOPE_KEY]
    return exchange


class Edge:
    """The outermost layer of our own. HEAD runs as GET and loses its body here."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = Exchange(_request_id(headers), time.monotonic())
        is_head = scope["method"] == "HEAD"
        inner: Scope = {**scope, SCOPE_KEY: exchange, "method": "GET" if is_head else scope["method"]}
        fixed = [
            (b"x-request-id", exchange.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"cache-control", b"no-store"),
        ]

        async def send_out(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status, exchange.is_started = message["status"], True
                message = {**message, "headers": [*message.get("headers", []), *fixed]}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            try:
                await self._app(inner, receive, send_out)
            except ClientClosedError:
                pass
            except Exception as error:
                if exchange.is_started:
                    _log_crash(error, exchange)
                    raise _TruncatedError from None
                refusal = self._api_error(error, exchange)
                answer = error_answer(refusal, exchange.request_id)
                if refusal.code == "body_too_large":
                    await _answer_and_linger(answer, receive, send_out)
                else:
                    await answer(inner, receive, send_out)
        finally:
            self._record(inner, scope["method"], headers, exchange)

    def _api_error(self, error: Exception, exchange: Exchange) -> ApiError:
        if not isinstance(error, ApiError):
            _log_crash(error, exchange)
            return ApiError("internal", "the service failed, its log has the details")
        if error.kind.rejected is not None:
            self._metrics.inc("rejected_total", reason=error.kind.rejected)
        exchange.fields["error"] = error.code
        return error

    def _record(self, inner: Scope, method: str, headers: Headers, exchange: Exchange) -> None:
        route = _template(inner)
        method = method if method in METHODS else "other"
        self._metrics.inc("http_requests_total", route=route, method=method, code=exchange.status)
        fields = {
            "request_id": exchange.request_id,
            "method": method,
            "route": route,
            "code": exchange.status,
            "total_ms": round((time.monotonic() - exchange.arrived) * 1000, 3),
            **exchange.fields,
        }
        traceparent = headers.get("traceparent", "")
        if TRACEPARENT.fullmatch(traceparent):
            fields["traceparent"] = traceparent
        access_log.info("request", extra={"fields": fields})


class _TruncatedError(Exception):
    """A response that broke after its start: the server must cut the connection. Carries no details to its log."""


async def _answer_and_linger(answer: Response, receive: Receive, send: Send) -> None:
    """Send the whole answer, then read some of what the client still sends.

    A socket closed with unread bytes resets the connection, and the client would lose the answer.
    """
    await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            size, is_open = 0, True
            while is_open and size < LINGER_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                is_open = message.get("more_body", False)
    await send({"type": "http.response.body", "body": b""})


def _template(inner: Scope) -> str:
    """The route's template: bounded, whatever the client asks for."""
    if "route" in inner:
        return str(inner["route"].path)
    # The framework's own pages have an endpoint and a path without parameters.
    return str(inner["path"]) if "endpoint" in inner else "unmatched"


def _request_id(headers: Headers) -> str:
    sent = headers.get("x-request-id", "")
    return sent if REQUEST_ID.fullmatch(sent) else f"req-{uuid4().hex}"


def _log_crash(error: Exception, exchange: Exchange) -> None:
    # Frames and type only: the text of an unexpected exception may quote a request.
    frames = "".join(traceback.format_tb(error.__traceback__))
    fields = {"request_id": exchange.request_id, "error": type(error).__name__, "traceback": frames}
    error_log.error("unexpected error", extra={"fields": fields})
