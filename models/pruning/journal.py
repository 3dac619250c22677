"""plan.json: what a search was asked, everything it measured so far, and in the end what it found."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import PlanError

PLAN_FILE = "plan.json"
FORMAT = 2


class Journal:
    """A JSON document on disk that is whole at every moment; whatever is noted survives the end of the process.

    request: what must be equal for an older file to be continued. Raises PlanError if it is not, or if the file is no
    plan of this version.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        self.file = folder / PLAN_FILE
        self.document: dict[str, Any] = {"format": FORMAT, "request": dict(request), "measured": {}, "latency": {}}
        if self.file.exists():
            self.document = self._continued(request)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._write()

    def note(self, section: str, name: str, value: Any) -> None:
        """Put a value into `measured` or `latency`, on disk before this returns."""
        self.document[section][name] = value
        self._write()

    def finish(self, findings: Mapping[str, Any]) -> None:
        """Add what was found, and sync the file to disk."""
        self.document |= findings
        self._write(sync=True)

    def _continued(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            document = json.loads(self.file.read_text(encoding="utf-8"))
            known = document["format"], document["request"], document["measured"], document["latency"]
        except (ValueError, KeyError, TypeError):
            raise PlanError(f"{self.file} is no plan: choose another --out or remove it") from None
        if known[0] != FORMAT:
            raise PlanError(f"{self.file} is of another version: choose another --out or remove it")
        for name, value in request.items():
            if known[1].get(name) != value:
                raise PlanError(
                    f"{self.file} answers another request, its {name.replace('_', ' ')} differs: "
                    "choose another --out or remove it"
                )
        return dict(document)

    def _write(self, sync: bool = False) -> None:
        temporary = self.file.with_name(f".{PLAN_FILE}.tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(self.document, stream, ensure_ascii=False, allow_nan=False, indent=1)
            stream.write("\n")
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        temporary.replace(self.file)
