"""What reports read: tallies as they stand, the newest latencies and disagreements, what was seen and done."""

from collections.abc import Collection
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, delete, select

from service.storage.events import Look, PairEvent, Step, StoredState, Tally
from service.storage.ledger import Revision
from service.storage.schema import CANDIDATE_MEASURED, DISAGREES, MEASURED, experiments, exposures, looks, pairs
from service.storage.schema import steps as steps_table
from service.storage.schema import tallies as tallies_table
from service.storage.statements import belongs, upserting

Floats = npt.NDArray[np.float64]
# A curve needs no more points.
MAX_LOOKS = 2000


@dataclass(frozen=True)
class Latencies:
    """Milliseconds from arrival to answer, newest first. contended: taken while a shadow shared the device."""

    free: Floats
    contended: Floats


def tallies(connection: Connection, revision: Revision) -> list[Tally]:
    """All that count something, in the order of their keys."""
    table = tallies_table
    names = (table.c[name] for name in ("name", "arm", "truth", "predicted", "n", "total", "peak"))
    query = select(*names).where(belongs(table, revision), table.c.n != 0)
    return sorted(
        (Tally(*row) for row in connection.execute(query)), key=lambda t: (t.name, t.arm, t.truth, t.predicted)
    )


def experiments_of(connection: Connection, ids: Collection[str], request_ids: Collection[str]) -> dict[str, str]:
    """The experiment that recorded an answer, by the answer's id and by its request's; unknown ones are absent."""
    found: dict[str, str] = {}
    for column, wanted in ((exposures.c.id, ids), (exposures.c.request_id, request_ids)):
        if wanted:
            query = select(column, exposures.c.experiment).where(column.in_(wanted)).distinct()
            found |= {row[0]: row[1] for row in connection.execute(query)}
    return found


def latencies(connection: Connection, revision: Revision, arm: str, limit: int) -> Latencies:
    """The newest requests that the arm was meant to answer and did, at most `limit` of either kind."""
    of_arm = (belongs(exposures, revision), exposures.c.intended == arm, MEASURED)
    free, contended = (
        _newest(connection, exposures.c.total_ms, exposures.c.at, limit, *of_arm, exposures.c.contended.is_(flag))
        for flag in (False, True)
    )
    return Latencies(free, contended)


def candidate_latencies(connection: Connection, revision: Revision, limit: int) -> Floats:
    """Milliseconds of a shadow's candidate, newest first."""
    return _newest(connection, pairs.c.candidate_ms, pairs.c.at, limit, belongs(pairs, revision), CANDIDATE_MEASURED)


def _newest(
    connection: Connection,
    value: ColumnElement[float],
    at: ColumnElement[float],
    limit: int,
    *where: ColumnElement[bool],
) -> Floats:
    query = select(value).where(*where).order_by(at.desc()).limit(limit)
    return np.fromiter(connection.scalars(query), np.float64)


def disagreements(connection: Connection, revision: Revision, limit: int) -> list[PairEvent]:
    """The newest pairs with two labels, newest first."""
    columns = (pairs.c[name] for name in PairEvent.__dataclass_fields__)
    newest = (pairs.c.at.desc(), pairs.c.id, pairs.c.item)
    query = select(*columns).where(belongs(pairs, revision), DISAGREES).order_by(*newest).limit(limit)
    return [PairEvent(*row) for row in connection.execute(query)]


def find_looks(connection: Connection, revision: Revision, limit: int) -> list[Look]:
    """Looks by rising units, evenly thinned to `limit`; the first and the last are among them."""
    columns = (looks.c[name] for name in Look.__dataclass_fields__)
    query = select(*columns).where(belongs(looks, revision)).order_by(looks.c.units)
    found = [Look(*row) for row in connection.execute(query)]
    if len(found) <= limit:
        return found
    return [found[position] for position in np.linspace(0, len(found) - 1, limit).round().astype(int)]


def keep_look(connection: Connection, revision: Revision, look: Look) -> None:
    """Add a look, over the one at as many units; when there are too many, the one that is least missed goes."""
    connection.execute(upserting(connection, looks), {**revision._asdict(), **asdict(look)})
    query = select(looks.c.units).where(belongs(looks, revision)).order_by(looks.c.units)
    units = np.fromiter(connection.scalars(query), np.int64)
    if len(units) > MAX_LOOKS:
        least = units[1 + np.argmin(units[2:] - units[:-2])]  # its neighbours are the closest to each other
        connection.execute(delete(looks).where(belongs(looks, revision), looks.c.units == int(least)))


def find_steps(connection: Connection, revision: Revision) -> list[Step]:
    """Steps in the order they were taken."""
    table = steps_table
    columns = (table.c[name] for name in Step.__dataclass_fields__)
    query = select(*columns).where(belongs(table, revision)).order_by(table.c.at, table.c.number)
    return [Step(*row) for row in connection.execute(query)]


def states(connection: Connection) -> dict[str, StoredState]:
    """The state of every experiment that has one."""
    columns = (experiments.c[name] for name in StoredState.__dataclass_fields__)
    return {row.name: StoredState(*row) for row in connection.execute(select(*columns))}
