"""Read one JSON body: size counted while it streams, type and encoding checked before a byte is parsed."""

import asyncio
from typing import Any

from starlette.requests import Request

from service.errors import ApiError, ClientClosedError
from service.jsonio import InvalidJsonError, loads
from service.sections import Limits


async def read_json(request: Request, limits: Limits) -> Any:
    """Return the parsed body. Raises ApiError 413, 415, 408, 400, or ClientClosedError."""
    _check_headers(request, limits)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            body = await _read(request, limits.max_body_bytes)
    except TimeoutError:
        message = f"the body was not complete within {limits.body_timeout_s:g} seconds"
        raise ApiError("body_timeout", message) from None
    try:
        return loads(body)
    except InvalidJsonError:
        raise ApiError("invalid_json", "the body is not one strict JSON document in UTF-8") from None


def _check_headers(request: Request, limits: Limits) -> None:
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length[:20]) > limits.max_body_bytes:
        raise _too_large(limits.max_body_bytes)
    media_type, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    charset = parameters.replace(" ", "").replace('"', "")
    if media_type.strip() != "application/json" or charset not in ("", "charset=utf-8"):
        raise ApiError("unsupported_media_type", "send content-type: application/json, in UTF-8")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("unsupported_encoding", "send the body without content-encoding")


async def _read(request: Request, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientClosedError
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError("body_too_large", f"the body is larger than {max_bytes} bytes")
