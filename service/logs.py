"""Logging: one JSON object per line on standard error, and a broken pipe that hurts nobody."""

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any


class JsonFormatter(logging.Formatter):
    """A record as one line; attributes given as `extra={"fields": {...}}` or `extra={"request_id": ...}` join it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if hasattr(record, "request_id"):
            line["request_id"] = record.request_id
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line, ensure_ascii=False)


class QuietHandler(logging.StreamHandler[Any]):
    """Writes to standard error; if nobody reads it any more, the line is lost and the service goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        """Ignore the failure: complaining would need the same pipe."""


def configure(level: str) -> None:
    """Send every logger of the process through one JSON handler."""
    handler = QuietHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # Its lines at level info repeat ours.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
