"""What counts as one strict JSON document."""

import pytest

from service.jsonio import InvalidJsonError, JSONAnswer, loads


def test_document() -> None:
    assert loads('{"inputs": ["é", "\\u0000"]}'.encode()) == {"inputs": ["é", "\x00"]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{} {}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"b": [{"a": 1, "a": 1}]}',
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
    ],
    ids=lambda body: repr(body[:16]),
)
def test_refused(body: bytes) -> None:
    with pytest.raises(InvalidJsonError):
        loads(body)


def test_answers_are_compact_utf8() -> None:
    assert JSONAnswer({"label": "é", "scores": [1, 0.5]}).body == '{"label":"é","scores":[1,0.5]}'.encode()


def test_nan_cannot_leave() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        JSONAnswer({"score": float("nan")})
