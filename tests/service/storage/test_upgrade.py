"""The steps from each schema to the newest: they end where the tables are described, and lose nothing on the way."""

from collections.abc import Iterator
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, event, insert, inspect, text

from service.storage.database import connect
from service.storage.schema import metadata, tallies
from service.storage.upgrade import current, newest, upgrade
from tests.service.storage.conftest import Open
from tests.service.storage.records import exposure, number, pair

STEPS = ("1", "2")


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = connect(url)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("start", STEPS)
def test_rows_survive_from_each_schema(engine: Engine, open_store: Open, start: str) -> None:
    upgrade(engine, start)
    key = {"experiment": "e", "revision": 1, "name": "requests", "arm": "small", "truth": "", "predicted": ""}
    with engine.begin() as connection:
        assert current(connection) == start
        connection.execute(insert(tallies), {**key, "n": 7, "total": 0.0, "peak": 0.0})
    store = open_store()
    store.record(exposure("a"))
    store.record(pair("a"))
    store.close()
    assert number(open_store(), "requests", "small") == 8
    with engine.connect() as connection:
        assert current(connection) == newest() == STEPS[-1]


def test_the_steps_end_where_the_tables_are_described(engine: Engine) -> None:
    upgrade(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_conditions_of_indexes_are_the_described_ones(engine: Engine) -> None:
    """Alembic compares columns only; an index whose condition differs from the query's is never used."""
    upgrade(engine)
    found = conditions(engine)
    with engine.begin() as connection:
        metadata.drop_all(connection)
        metadata.create_all(connection)
    assert found == conditions(engine)
    assert {"exposures_measured", "pairs_measured", "pairs_disagree"} <= found.keys()


def conditions(engine: Engine) -> dict[str, str]:
    """The WHERE of every partial index, as the database says it, in SQLite free of quotes and brackets."""
    inspector = inspect(engine)
    key = f"{engine.dialect.name}_where"
    return {
        str(index["name"]): str(index["dialect_options"][key]).replace("exposures.", "").replace("pairs.", "")
        for table in metadata.tables
        for index in inspector.get_indexes(table)
        if key in index.get("dialect_options", {})
    }


def test_a_step_that_fails_leaves_the_old_schema(engine: Engine) -> None:
    upgrade(engine, "1")
    with engine.begin() as connection:
        connection.execute(text("CREATE INDEX pairs_disagree ON pairs (at)"))  # the second step's last index
    with pytest.raises(Exception, match="already exists"):
        upgrade(engine)
    with engine.connect() as connection:
        assert current(connection) == "1"
        assert "exposures_measured" not in {index["name"] for index in inspect(connection).get_indexes("exposures")}


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_reports_read_the_indexes(engine: Engine, open_store: Open) -> None:
    """PostgreSQL plans by what it knows of the rows, of which there are none here."""
    store = open_store()
    seen: list[tuple[str, Any]] = []
    event.listen(store._engine, "before_cursor_execute", lambda c, u, sql, values, x, m: seen.append((sql, values)))
    store.latencies("e", 1, "small")
    store.candidate_latencies("e", 1)
    store.disagreements("e", 1)
    expected = ["exposures_measured", "exposures_measured", "pairs_measured", "pairs_disagree"]
    queries = [(sql, values) for sql, values in seen if sql.startswith("SELECT")]
    with engine.connect() as connection:
        for (sql, values), index in zip(queries, expected, strict=True):
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values).all()
            assert index in str(plan)
            assert "TEMP B-TREE" not in str(plan) or index == "pairs_disagree", "it is read in the order of the index"
