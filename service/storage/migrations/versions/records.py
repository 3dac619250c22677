"""1: answers, pairs, labels, what counts once, and the tallies of it all."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "designs",
        sa.Column("experiment", sa.String, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("mode", sa.String, nullable=False),
        sa.Column("control", sa.String, nullable=False),
        sa.Column("candidate", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("experiment", "revision"),
    )
    op.create_table(
        "experiments",
        sa.Column("name", sa.String, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("config_hash", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("traffic", sa.Double, nullable=False),
        sa.Column("winner", sa.String),
        sa.Column("updated", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "exposures",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("item", sa.Integer, nullable=False),
        sa.Column("request_id", sa.String, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("replica", sa.String, nullable=False),
        sa.Column("experiment", sa.String, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("unit", sa.String, nullable=False),
        sa.Column("intended", sa.String, nullable=False),
        sa.Column("served", sa.String),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("label", sa.String),
        sa.Column("score", sa.Double),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("queue_ms", sa.Double),
        sa.Column("infer_ms", sa.Double),
        sa.Column("total_ms", sa.Double),
        sa.Column("device_ms", sa.Double),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("contended", sa.Boolean, nullable=False),
        sa.Column("cascade", sa.String),
        sa.PrimaryKeyConstraint("id", "item"),
    )
    op.create_index("exposures_at", "exposures", ["at"])
    op.create_index("exposures_request_id", "exposures", ["request_id"])
    op.create_table(
        "feedback",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("item", sa.Integer, nullable=False),
        sa.Column("label", sa.String, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("key_name", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("id", "item"),
    )
    op.create_index("feedback_at", "feedback", ["at"])
    op.create_table("keys", sa.Column("mark", sa.String, nullable=False), sa.PrimaryKeyConstraint("mark"))
    op.create_table(
        "looks",
        sa.Column("experiment", sa.String, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("units", sa.Integer, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("estimate", sa.Double, nullable=False),
        sa.Column("lower", sa.Double, nullable=False),
        sa.Column("upper", sa.Double, nullable=False),
        sa.Column("verdict", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("experiment", "revision", "units"),
    )
    op.create_table(
        "pairs",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("item", sa.Integer, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("replica", sa.String, nullable=False),
        sa.Column("experiment", sa.String, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("unit", sa.String, nullable=False),
        sa.Column("primary_label", sa.String, nullable=False),
        sa.Column("candidate_label", sa.String),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("mean_abs_dp", sa.Double),
        sa.Column("max_abs_dp", sa.Double),
        sa.Column("primary_ms", sa.Double, nullable=False),
        sa.Column("candidate_ms", sa.Double),
        sa.PrimaryKeyConstraint("id", "item"),
    )
    op.create_index("pairs_at", "pairs", ["at"])
    op.create_table(
        "steps",
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("experiment", sa.String, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_table(
        "tallies",
        sa.Column("experiment", sa.String, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("arm", sa.String, nullable=False),
        sa.Column("truth", sa.String, nullable=False),
        sa.Column("predicted", sa.String, nullable=False),
        sa.Column("n", sa.BigInteger, nullable=False),
        sa.Column("total", sa.Double, nullable=False),
        sa.Column("peak", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("experiment", "revision", "name", "arm", "truth", "predicted"),
    )
    op.create_table(
        "units",
        sa.Column("experiment", sa.String, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("unit", sa.String, nullable=False),
        sa.Column("arm", sa.String),
        sa.Column("paired", sa.Boolean, nullable=False),
        sa.Column("labelled_id", sa.String),
        sa.Column("labelled_item", sa.Integer),
        sa.PrimaryKeyConstraint("experiment", "revision", "unit"),
    )
    op.create_table(
        "waiting",
        sa.Column("request_id", sa.String, nullable=False),
        sa.Column("item", sa.Integer, nullable=False),
        sa.Column("label", sa.String, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("key_name", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("request_id", "item"),
    )
