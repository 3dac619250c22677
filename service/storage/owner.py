"""Who may use a database: one service per SQLite file, and the key beside it."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from sqlalchemy import Engine

from models.errors import ConfigError
from service.storage.database import connect, explained, sqlite_path

KEY_BYTES = 32


@contextmanager
def owned(url: str) -> Iterator[Engine]:
    """A database, and of an SQLite file no other process's. What fails in here is a ConfigError about `storage.url`."""
    path = sqlite_path(url)
    with ExitStack() as resources:
        if path is not None:
            resources.enter_context(_lock(path))
        engine = connect(url)
        resources.callback(engine.dispose)
        with explained(url):
            yield engine


def _lock(database: Path) -> IO[str]:
    """Become the only service with this file, until the lock is closed or the process ends. Raises ConfigError."""
    path = database.with_name(database.name + ".lock")
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"storage.url: {path} cannot be opened ({error.strerror}): give a writable folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigError(
            f"storage.url: another process uses {database}: stop it, give this one another file, "
            "or let several replicas share a PostgreSQL"
        ) from None
    return file


def key_beside(database: Path) -> bytes:
    """The hash key kept beside the file, made the first time and readable by its owner only. Raises ConfigError."""
    path = database.with_name(database.name + ".key")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _kept_key(path)
    except OSError as error:
        raise ConfigError(f"storage.url: {path} cannot be made ({error.strerror}): give a writable folder") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(KEY_BYTES))
        file.flush()
        os.fsync(descriptor)
    return _kept_key(path)


def _kept_key(path: Path) -> bytes:
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{path}: is not a hash key: restore it, or set SECATEUR_HASH_KEY")
    return key
