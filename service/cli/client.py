"""A client for a running service: standard library only, and errors that say what to do."""

import json
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

import typer

from models.errors import SecateurError

SECONDS = 30
LOOPBACK = ("127.0.0.1", "::1", "localhost")
HINTS = {
    "missing_key": "give a key with --key-file",
    "invalid_key": "the server does not know this key: give another with --key-file",
    "insufficient_scope": "the key may not do this: a change takes one with the scope admin",
    "experiment_not_found": "`secateur report` lists the experiments there are",
    "route_not_found": "the server may have admin.enabled off, which removes this route, or --url is another server's",
}

ServerUrl = Annotated[str, typer.Option("--url", help="Where the service answers.", metavar="URL")]
KeyFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="A file that holds an API key and nothing else.", metavar="FILE"),
]
DEFAULT_URL = "http://127.0.0.1:8000"


class ServerError(SecateurError):
    """The server refused; the message has its code, its reason and what can be done."""


class Client:
    """Requests to one service."""

    def __init__(self, url: str, key_file: Path | None = None) -> None:
        """Raises ServerError if the URL is none, or the file holds no key."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"--url is {url!r}, must begin with http:// or https:// and name a host")
        self.url = url.rstrip("/")
        self._headers = {"accept": "application/json"}
        if key_file is not None:
            key = key_file.read_text(encoding="utf-8").strip()
            if not key.isascii() or len(key.split()) != 1:
                raise ServerError(
                    f"{key_file} must hold one API key, as `secateur keys new` prints it, and nothing else"
                )
            self._headers["authorization"] = f"Bearer {key}"
        self._opener = _opener(parts.hostname)

    def get(self, *path: str) -> bytes:
        """The body of a JSON answer. path: segments, quoted here."""
        return self._ask("GET", path)

    def patch(self, *path: str, body: Mapping[str, Any]) -> bytes:
        """Send a change; the body of its answer."""
        return self._ask("PATCH", path, json.dumps(body).encode())

    def _ask(self, method: str, path: tuple[str, ...], body: bytes | None = None) -> bytes:
        headers = self._headers | ({} if body is None else {"content-type": "application/json"})
        address = "/".join((self.url, *(quote(segment, safe="") for segment in path)))
        try:
            with self._opener.open(Request(address, body, headers, method=method), timeout=SECONDS) as answer:
                content: bytes = answer.read()
                return content
        except HTTPError as error:
            with error:
                raise _refused(error.code, error.read()) from None
        except URLError as error:
            raise ConnectionError(f"nothing answers at {self.url}: {error.reason}; is it running there?") from None
        except (HTTPException, TimeoutError) as error:
            raise ConnectionError(f"{self.url} gave no answer: {type(error).__name__}") from None


def _opener(host: str) -> OpenerDirector:
    # A proxy would look for this machine's loopback on its own.
    return build_opener(ProxyHandler({})) if host in LOOPBACK else build_opener()


def _refused(status: int, body: bytes) -> ServerError:
    try:
        found = json.loads(body)["error"]
        code, message = str(found["code"]), str(found["message"])
    except (ValueError, KeyError, TypeError):
        return ServerError(f"the server answered {status}, and not as this service does: is --url right?")
    hint = f"; {HINTS[code]}" if code in HINTS else ""
    return ServerError(f"{message} ({status} {code}){hint}")
