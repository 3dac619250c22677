"""Pieces of SQL that both databases understand, or that are worded for the one that is meant."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, bindparam, select
from sqlalchemy.dialects import postgresql, sqlite

from service.storage.ledger import Revision

T = TypeVar("T")
# Bound values of one statement; both databases allow over 30,000.
CHUNK = 1000


def belongs(table: Table, revision: Revision) -> ColumnElement[bool]:
    """The rows of one revision of an experiment."""
    return and_(table.c.experiment == revision.experiment, table.c.revision == revision.revision)


def inserting(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that can say ON CONFLICT: both dialects have one, in the same words, but not in common."""
    return sqlite.insert(table) if connection.dialect.name == "sqlite" else postgresql.insert(table)


def upserting(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that replaces what else the row holds if its primary key exists."""
    insert = inserting(connection, table)
    values = {column.name: insert.excluded[column.name] for column in table.columns if not column.primary_key}
    return insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=values)


def rows_with(
    connection: Connection, table: Table, column: ColumnElement[str], values: Iterable[str], *where: ColumnElement[bool]
) -> Iterator[Row[Any]]:
    """The rows whose column is one of the values, however many these are."""
    query = select(table).where(*where, column.in_(bindparam("values", expanding=True)))
    for chunk in chunks(sorted(values)):
        yield from connection.execute(query, {"values": chunk})


def chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Runs of at most CHUNK values."""
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
