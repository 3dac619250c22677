"""Bodies too big, too slow, of the wrong type or not JSON; over a raw socket where a client would be too kind."""

import http.client
import json
import socket
from collections.abc import Iterator

import pytest

from tests.service.conftest import SECONDS, Harness, Start

JSON = {"content-type": "application/json"}


def exchange(harness: Harness, *chunks: bytes) -> tuple[int, dict[str, str], dict[str, object]]:
    """Send raw bytes on a new connection and read one answer."""
    host, port = harness.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        for chunk in chunks:
            connection.sendall(chunk)
        response = http.client.HTTPResponse(connection)
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, json.loads(response.read())


def request(*headers: str) -> bytes:
    return "\r\n".join(
        ["POST /classify HTTP/1.1", "host: x", "content-type: application/json", *headers, "", ""]
    ).encode()


def code(body: dict[str, object]) -> object:
    error = body["error"]
    assert isinstance(error, dict)
    return error["code"]


def test_announced_size(harness: Harness) -> None:
    status, headers, body = exchange(harness, request("content-length: 4097"), b"{")
    assert (status, code(body)) == (413, "body_too_large")
    assert headers["connection"] == "close"


@pytest.mark.parametrize("length", ["4097", "9" * 18])
def test_announced_size_is_refused_before_a_byte_is_sent(harness: Harness, length: str) -> None:
    assert exchange(harness, request(f"content-length: {length}", "expect: 100-continue"))[0] == 413


def test_counted_size(harness: Harness) -> None:
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    status, headers, body = exchange(harness, request("transfer-encoding: chunked"), chunk, b"1\r\n \r\n")
    assert (status, code(body)) == (413, "body_too_large")
    assert headers["connection"] == "close"


def test_an_ordinary_client_sees_the_refusal(harness: Harness) -> None:
    def stream() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 65536

    announced = harness.client.post("/classify", content=b" " * 4_000_000, headers=JSON)
    counted = harness.client.post("/classify", content=stream(), headers=JSON)
    assert (announced.status_code, counted.status_code) == (413, 413)


def test_greatest_body(harness: Harness) -> None:
    body = b'{"inputs":"1"}'
    assert harness.client.post("/classify", content=body.ljust(4096), headers=JSON).status_code == 200
    assert harness.client.post("/classify", content=body.ljust(4097), headers=JSON).status_code == 413


def test_slow_body(start: Start) -> None:
    harness = start(limits={"body_timeout_s": 0.05})
    status, headers, body = exchange(harness, request("content-length: 20"), b'{"inputs"')
    assert (status, code(body)) == (408, "body_timeout")
    assert headers["connection"] == "close"


def test_client_that_leaves_while_sending(start: Start) -> None:
    harness = start()
    host, port = harness.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(request("content-length: 20") + b"{")
    # The next answers come from the same loop, so the closed connection is soon seen; each asks for one turn of it.
    while harness.metric("http_requests_total", code="499") == 0:
        assert harness.client.get("/livez").status_code == 200
    assert harness.metric("requests_total") == 0


@pytest.mark.parametrize(
    "value", ["text/plain", "application/json; charset=latin-1", "multipart/form-data", "", "json"]
)
def test_media_type(harness: Harness, value: str) -> None:
    response = harness.client.post("/classify", content=b'{"inputs":"1"}', headers={"content-type": value})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("value", ["application/json", 'Application/JSON; charset="UTF-8"'])
def test_accepted_media_type(harness: Harness, value: str) -> None:
    response = harness.client.post("/classify", content=b'{"inputs":"1"}', headers={"content-type": value})
    assert response.status_code == 200


@pytest.mark.parametrize(("value", "status"), [("gzip", 415), ("br", 415), ("identity", 200)])
def test_encoding(harness: Harness, value: str, status: int) -> None:
    response = harness.client.post("/classify", content=b'{"inputs":"1"}', headers={**JSON, "content-encoding": value})
    assert response.status_code == status


@pytest.mark.parametrize("path", ["/classify", "/v1/classify", "/predict"])
@pytest.mark.parametrize("body", [b"", b"{", b'{"inputs": NaN}', b'{"inputs":"\xff"}', b"[" * 4000, b'{"a":1,"a":1}'])
def test_invalid_json(harness: Harness, path: str, body: bytes) -> None:
    response = harness.client.post(path, content=body, headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_order_of_the_checks(harness: Harness) -> None:
    def post(path: str, content: bytes, media_type: str) -> int:
        return harness.client.post(path, content=content, headers={"content-type": media_type}).status_code

    big = b"x" * 5000
    assert post("/nothing", big, "text/plain") == 404
    assert post("/livez", big, "text/plain") == 405
    assert post("/classify", big, "text/plain") == 413
    assert post("/classify", b"x", "text/plain") == 415
    assert post("/classify", b"x", "application/json") == 400
    assert post("/classify", b'{"inputs":"","task":"nothing"}', "application/json") == 422
    assert post("/classify", b'{"inputs":"1","task":"nothing"}', "application/json") == 404
