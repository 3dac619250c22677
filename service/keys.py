"""API keys: a file of names, scopes and digests. A key itself is shown once, when it is made, and kept nowhere.

A line is `name:scopes:sha256`, scopes joined by commas, the digest in hex. Lines that begin with # are comments.
"""

import base64
import binascii
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from starlette.datastructures import Headers

from models.errors import ConfigError

Scope = Literal["classify", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
KEY_BYTES = 32
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """One line of the file. digest: sha256 of the key, in hexadecimal."""

    name: str
    scopes: frozenset[Scope]
    digest: str

    def line(self) -> str:
        """As the file has it."""
        return f"{self.name}:{','.join(scope for scope in SCOPES if scope in self.scopes)}:{self.digest}"


def new_key(name: str, scopes: Iterable[str]) -> tuple[str, Key]:
    """Make a key of 32 random bytes; returns it and what may be kept. Raises ConfigError for a bad name or scope."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"the key name {name!r} is not 1 to 63 of a-z 0-9 . _ -")
    secret = secrets.token_urlsafe(KEY_BYTES)
    return secret, Key(name, _scopes(scopes), digest_of(secret))


def digest_of(secret: str) -> str:
    """What the file keeps of a key."""
    return sha256(secret.encode()).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file, in order. Raises ConfigError that names the line, and never quotes it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: the keys cannot be read: make the file with `secateur keys new`") from None
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, scopes, digest = [*line.strip().split(":"), "", ""][:3]
        if line.count(":") != 2 or not NAME.fullmatch(name) or not DIGEST.fullmatch(digest):
            raise ConfigError(f"{path}, line {number}: a line is name:scopes:sha256, see `secateur keys new`")
        if name in keys:
            raise ConfigError(f"{path}, line {number}: the name {name!r} is given twice")
        try:
            keys[name] = Key(name, _scopes(scopes.split(",")), digest)
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error.message}") from None
    if not keys:
        raise ConfigError(f"{path}: holds no key, nobody could call: add one with `secateur keys new`")
    return tuple(keys.values())


def write_keys(path: Path, keys: Iterable[Key]) -> None:
    """Write a file of keys in one step, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.writelines(f"{key.line()}\n" for key in keys)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class Keyring:
    """The keys in force. `reload` takes the file as it is now, or keeps what there is if the file is broken."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file is absent, broken or empty."""
        self._path = path
        self.keys = read_keys(path)

    def reload(self) -> None:
        """Read the file again. Raises ConfigError and changes nothing if it is broken."""
        self.keys = read_keys(self._path)

    def find(self, secret: str) -> Key | None:
        """The key, compared with every entry in constant time, so that the time tells nothing about any of them."""
        digest = digest_of(secret)
        matches = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        return matches[0] if matches else None


def presented(headers: Headers) -> str | None:
    """The key a request brings: a bearer token, X-API-Key, or the password of Basic, which is what a browser sends."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return headers.get("x-api-key")


def _scopes(given: Iterable[str]) -> frozenset[Scope]:
    names = list(given)
    known = {scope for scope in SCOPES if scope in names}
    unknown = sorted(set(names) - known)
    if unknown or not known:
        raise ConfigError(f"unknown scope {unknown[0] if unknown else ''!r}, a key has some of {', '.join(SCOPES)}")
    return frozenset(known)
