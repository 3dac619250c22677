"""What is in a database, told without changing it."""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, func, inspect, select

from models.errors import ConfigError
from service.storage.database import connect, explained, shown, sqlite_path
from service.storage.schema import exposures, metadata
from service.storage.upgrade import current, newest


@dataclass(frozen=True)
class Contents:
    """schema: the number of the database's, newest: of this version's. oldest: when the first kept answer was given."""

    url: str
    schema: str | None
    newest: str
    bytes: int
    oldest: str | None
    rows: dict[str, int]


def describe(url: str) -> Contents:
    """Look at a database, which may be in use. Raises ConfigError if it is not there."""
    path = sqlite_path(url)
    if path is not None and not path.exists():
        raise ConfigError(f"storage.url: {path} does not exist: the service makes it when it starts with an experiment")
    engine = connect(url)
    try:
        with explained(url), engine.connect() as connection:
            there = set(inspect(connection).get_table_names())
            rows = {
                table.name: connection.scalar(select(func.count()).select_from(table)) or 0
                for table in metadata.sorted_tables
                if table.name in there
            }
            first = connection.scalar(select(func.min(exposures.c.at))) if exposures.name in there else None
            oldest = None if first is None else datetime.fromtimestamp(first, UTC).isoformat(timespec="seconds")
            return Contents(shown(url), current(connection), newest(), _bytes(connection), oldest, rows)
    finally:
        engine.dispose()


def _bytes(connection: Connection) -> int:
    if connection.dialect.name == "postgresql":
        return int(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one())
    pages, page = (connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size"))
    return int(pages) * int(page)
