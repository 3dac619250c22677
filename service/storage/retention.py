"""Forget what is old: rows of single items and labels go, what was counted stays."""

from sqlalchemy import ColumnElement, Engine, Table, delete, exists, select, tuple_

from service.storage.database import writing
from service.storage.ledger import Revision
from service.storage.schema import exposures, feedback, pairs, tallies, units, waiting
from service.storage.statements import belongs

# Rows of one transaction, so that the writer's own wait stays short.
ROWS = 2000


def forget(engine: Engine, before: float) -> int:
    """Delete rows older than a Unix time, in small transactions; returns how many.

    What a unit was counted for is kept while its revision has rows: forgotten, it would be counted again.
    """
    rows = sum(_delete(engine, table, table.c.at < before) for table in (exposures, pairs, feedback, waiting))
    return rows + sum(_delete(engine, units, belongs(units, revision)) for revision in _empty_revisions(engine))


def _delete(engine: Engine, table: Table, where: ColumnElement[bool]) -> int:
    key = list(table.primary_key)
    some = delete(table).where(tuple_(*key).in_(select(*key).where(where).limit(ROWS)))
    deleted = 0
    while True:
        with writing(engine) as connection:
            n = connection.execute(some).rowcount
        deleted += n
        if n < ROWS:
            return deleted


def _empty_revisions(engine: Engine) -> list[Revision]:
    """Revisions that have units but neither answers nor pairs."""
    known = select(tallies.c.experiment, tallies.c.revision).distinct()
    with engine.connect() as connection:
        revisions = [Revision(*row) for row in connection.execute(known)]
        found = []
        for revision in revisions:
            has_units, has_answers, has_pairs = (
                connection.scalar(select(exists().where(belongs(table, revision))))
                for table in (units, exposures, pairs)
            )
            if has_units and not (has_answers or has_pairs):
                found.append(revision)
    return found
