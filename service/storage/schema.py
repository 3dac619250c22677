"""The tables, the same in both databases. `at` is Unix seconds, `_ms` milliseconds. No text, no subject in clear."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    and_,
    literal_column,
)

metadata = MetaData()

exposures = Table(
    "exposures",
    metadata,
    Column("id", String, primary_key=True),
    Column("item", Integer, primary_key=True),
    Column("request_id", String, nullable=False),
    Column("at", Double, nullable=False),
    Column("replica", String, nullable=False),
    Column("experiment", String, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("unit", String, nullable=False),
    Column("intended", String, nullable=False),
    Column("served", String),
    Column("source", String, nullable=False),
    Column("status", Integer, nullable=False),
    Column("label", String),
    Column("score", Double),
    Column("tokens", Integer, nullable=False),
    Column("queue_ms", Double),
    Column("infer_ms", Double),
    Column("total_ms", Double),
    Column("device_ms", Double),
    Column("fingerprint", String, nullable=False),
    Column("contended", Boolean, nullable=False),
    Column("cascade", String),
)
pairs = Table(
    "pairs",
    metadata,
    Column("id", String, primary_key=True),
    Column("item", Integer, primary_key=True),
    Column("at", Double, nullable=False),
    Column("replica", String, nullable=False),
    Column("experiment", String, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("unit", String, nullable=False),
    Column("primary_label", String, nullable=False),
    Column("candidate_label", String),
    Column("outcome", String, nullable=False),
    Column("mean_abs_dp", Double),
    Column("max_abs_dp", Double),
    Column("primary_ms", Double, nullable=False),
    Column("candidate_ms", Double),
)
feedback = Table(
    "feedback",
    metadata,
    Column("id", String, primary_key=True),
    Column("item", Integer, primary_key=True),
    Column("label", String, nullable=False),
    Column("at", Double, nullable=False),
    Column("key_name", String, nullable=False),
)
# Labels that named a request id which nothing recorded has yet; each becomes feedback when its exposure arrives.
waiting = Table(
    "waiting",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("item", Integer, primary_key=True),
    Column("label", String, nullable=False),
    Column("at", Double, nullable=False),
    Column("key_name", String, nullable=False),
)
# What counts once. arm: where the unit was enrolled; labelled_*: the item whose label speaks for it.
units = Table(
    "units",
    metadata,
    Column("experiment", String, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("unit", String, primary_key=True),
    Column("arm", String),
    Column("paired", Boolean, nullable=False),
    Column("labelled_id", String),
    Column("labelled_item", Integer),
)
tallies = Table(
    "tallies",
    metadata,
    Column("experiment", String, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("name", String, primary_key=True),
    Column("arm", String, primary_key=True),
    Column("truth", String, primary_key=True),
    Column("predicted", String, primary_key=True),
    Column("n", BigInteger, nullable=False),
    Column("total", Double, nullable=False),
    Column("peak", Double, nullable=False),
)
designs = Table(
    "designs",
    metadata,
    Column("experiment", String, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("mode", String, nullable=False),
    Column("control", String, nullable=False),
    Column("candidate", String, nullable=False),
)
experiments = Table(
    "experiments",
    metadata,
    Column("name", String, primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("config_hash", String, nullable=False),
    Column("state", String, nullable=False),
    Column("traffic", Double, nullable=False),
    Column("winner", String),
    Column("updated", Double, nullable=False),
)
looks = Table(
    "looks",
    metadata,
    Column("experiment", String, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("units", Integer, primary_key=True),
    Column("at", Double, nullable=False),
    Column("estimate", Double, nullable=False),
    Column("lower", Double, nullable=False),
    Column("upper", Double, nullable=False),
    Column("verdict", String, nullable=False),
)
steps = Table(
    "steps",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("experiment", String, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("at", Double, nullable=False),
    Column("actor", String, nullable=False),
    Column("action", String, nullable=False),
    Column("detail", String, nullable=False),
)
# One row: what the hash key makes of a constant, so that a changed key is seen and units are not counted anew.
keys = Table("keys", metadata, Column("mark", String, primary_key=True))

# Conditions of partial indexes. Literals, not bound values: PostgreSQL plans a prepared query without knowing those.
# A latency is that of a request, so its first item stands for it; an answer of another deployment is not the arm's.
MEASURED = and_(
    exposures.c.item == literal_column("0"),
    exposures.c.status == literal_column("200"),
    exposures.c.source != literal_column("'override'"),
    exposures.c.served == exposures.c.intended,
    exposures.c.total_ms.is_not(None),
)
CANDIDATE_MEASURED = pairs.c.candidate_ms.is_not(None)
DISAGREES = pairs.c.outcome == literal_column("'disagree'")

Index("exposures_request_id", exposures.c.request_id)
Index("exposures_at", exposures.c.at)
Index("pairs_at", pairs.c.at)
Index("feedback_at", feedback.c.at)


def _of_revision(table: Table, *names: str) -> list[Column[Any]]:
    return [table.c[name] for name in ("experiment", "revision", *names)]


# With the values in the index, no row is looked up.
Index(
    "exposures_measured",
    *_of_revision(exposures, "intended", "contended", "at", "total_ms"),
    sqlite_where=MEASURED,
    postgresql_where=MEASURED,
)
Index(
    "pairs_measured",
    *_of_revision(pairs, "at", "candidate_ms"),
    sqlite_where=CANDIDATE_MEASURED,
    postgresql_where=CANDIDATE_MEASURED,
)
Index("pairs_disagree", *_of_revision(pairs, "at"), sqlite_where=DISAGREES, postgresql_where=DISAGREES)
