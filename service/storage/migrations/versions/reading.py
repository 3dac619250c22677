"""2: indexes for what reports read; without them each table of latencies costs a pass over all answers."""

from alembic import op
from sqlalchemy import text

revision = "2"
down_revision = "1"

MEASURED = text("item = 0 AND status = 200 AND source != 'override' AND served = intended AND total_ms IS NOT NULL")
CANDIDATE_MEASURED = text("candidate_ms IS NOT NULL")
DISAGREES = text("outcome = 'disagree'")


def upgrade() -> None:
    """Make the indexes."""
    answers = ["experiment", "revision", "intended", "contended", "at", "total_ms"]
    _index("exposures_measured", "exposures", answers, MEASURED)
    _index("pairs_measured", "pairs", ["experiment", "revision", "at", "candidate_ms"], CANDIDATE_MEASURED)
    _index("pairs_disagree", "pairs", ["experiment", "revision", "at"], DISAGREES)


def _index(name: str, table: str, columns: list[str], where: object) -> None:
    op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)
