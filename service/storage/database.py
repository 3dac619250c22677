"""One way to reach SQLite and PostgreSQL: connections, who may write, and what counts as an outage.

In both, one transaction writes at a time: SQLite has a lock of its own, PostgreSQL is given an advisory one. Whoever
holds it sees all that was committed before, so two replicas neither miss a join nor lock each other out in a circle.
The rows of the tallies, which every transaction updates, would make them queue in any case.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError, TimeoutError

from models.errors import ConfigError
from service.storage.events import StorageUnavailableError

# A statement or a lock that takes longer is given up, so that a stuck peer costs seconds.
PATIENCE_SECONDS = 5
WRITERS_LOCK = 0x5ECA7E


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite URL, None for PostgreSQL."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def shown(url: str) -> str:
    """A URL for messages: without its password, and without its query, which can hold one."""
    return make_url(url).set(query={}).render_as_string(hide_password=True)


def connect(url: str) -> Engine:
    """An engine for a URL of the configuration; nothing is reached yet."""
    parsed = make_url(url)
    return _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgresql(parsed)


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that is the only one to write, committed at the end."""
    with engine.execution_options(writes=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITERS_LOCK})
        yield connection


def is_outage(error: Exception) -> bool:
    """Whether the database is to blame, and not the values it was given."""
    return isinstance(error, OperationalError | InterfaceError | InternalError | TimeoutError)


@contextmanager
def outages() -> Iterator[None]:
    """Let errors of the database appear as StorageUnavailableError."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StorageUnavailableError from error


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Let errors of the database appear as ConfigError about `storage.url`, with what the database said."""
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise ConfigError(f"storage.url: {shown(url)} cannot be used: {reason}") from None


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": PATIENCE_SECONDS}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver would begin late, after the reads that a write relies on
        # FULL: with NORMAL a power cut can take back what was acknowledged.
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")

    return engine


def _postgresql(url: URL) -> Engine:
    milliseconds = 1000 * PATIENCE_SECONDS
    server = {
        "statement_timeout": milliseconds,
        "idle_in_transaction_session_timeout": milliseconds,
        "synchronous_commit": "on",
    }
    arguments = {
        "connect_timeout": PATIENCE_SECONDS,
        "tcp_user_timeout": milliseconds,
        "application_name": "secateur",
        "client_encoding": "utf8",  # a database of encoding SQL_ASCII would hand out bytes
        "options": " ".join((*url.normalized_query.get("options", ()), *(f"-c {k}={v}" for k, v in server.items()))),
    }
    return create_engine(
        url.set(drivername="postgresql+psycopg"), connect_args=arguments, pool_pre_ping=True, hide_parameters=True
    )
