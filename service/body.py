"""Read one body, JSON or a form: size counted while it streams, type and encoding checked before a byte is parsed."""

import asyncio
from email.message import Message
from typing import Any

from starlette.requests import Request

from service.errors import ApiError, ClientClosedError
from service.jsonio import InvalidJsonError, loads
from service.multipart import BOUNDARY, FormError, Part, split_form
from service.sections import Limits


async def read_json(request: Request, limits: Limits) -> Any:
    """Return the parsed body. Raises ApiError 413, 415, 408, 400, or ClientClosedError."""
    _check_size(request, limits)
    media_type, charset = _content_type(request)
    if media_type != "application/json" or charset.lower() not in ("", "utf-8"):
        raise ApiError("unsupported_media_type", "send content-type: application/json, in UTF-8")
    body = await _body(request, limits)
    try:
        return loads(body)
    except InvalidJsonError:
        raise ApiError("invalid_json", "the body is not one strict JSON document in UTF-8") from None


def is_form(request: Request) -> bool:
    """Whether the body says that it is multipart/form-data."""
    return _content_type(request)[0] == "multipart/form-data"


async def read_form(request: Request, limits: Limits, max_parts: int) -> list[Part]:
    """Return the parts of a form. Raises ApiError 413, 415, 408, 400, or ClientClosedError."""
    _check_size(request, limits)
    boundary = _parameter(request, "boundary")
    if not BOUNDARY.fullmatch(boundary):
        raise ApiError("unsupported_media_type", "send content-type: multipart/form-data with its boundary")
    body = await _body(request, limits)
    try:
        return split_form(body, boundary, max_parts)
    except FormError:
        message = f"the body is not one whole multipart/form-data document of at most {max_parts} parts"
        raise ApiError("invalid_form", message) from None


def _content_type(request: Request) -> tuple[str, str]:
    """The media type in lower case and the charset, empty if none is named."""
    media_type = request.headers.get("content-type", "").partition(";")[0]
    return media_type.strip().lower(), _parameter(request, "charset")


def _parameter(request: Request, name: str) -> str:
    message = Message()
    message["content-type"] = request.headers.get("content-type", "")
    value = message.get_param(name)
    return value if isinstance(value, str) else ""


async def _body(request: Request, limits: Limits) -> bytes:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("unsupported_encoding", "send the body without content-encoding")
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            return await _read(request, limits.max_body_bytes)
    except TimeoutError:
        message = f"the body was not complete within {limits.body_timeout_s:g} seconds"
        raise ApiError("body_timeout", message) from None


def _check_size(request: Request, limits: Limits) -> None:
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length[:20]) > limits.max_body_bytes:
        raise _too_large(limits.max_body_bytes)


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
