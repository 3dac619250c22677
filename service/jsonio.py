"""JSON in and out: strict about what comes in, dumped exactly once on the way out."""

import json
from collections.abc import Callable
from typing import Any, NoReturn

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class InvalidJsonError(ValueError):
    """Bytes that are not one strict JSON document."""


class JSONAnswer(Response):
    """A response whose content is dumped once; NaN and infinities cannot leave.

    after: called when the answer has been handed to the server, so that counting it keeps nobody waiting.
    """

    media_type = "application/json"
    after: Callable[[], None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, then call `after`, also if the client left meanwhile."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self.after is not None:
                self.after()

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def loads(body: bytes) -> Any:
    """Parse a document. Raises InvalidJsonError for bad UTF-8, NaN literals, repeated keys and deep nesting too."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise InvalidJsonError from None


def _refuse_constant(_: str) -> NoReturn:
    raise InvalidJsonError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise InvalidJsonError
    return result
