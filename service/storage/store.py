"""The service's memory: records go in without waiting, feedback after its commit, and reports come out."""

import asyncio
import hmac
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

from sqlalchemy import Connection, Engine, insert, select

from models.errors import ConfigError
from service.metrics import Metrics
from service.sections import Storage
from service.storage import reads, retention
from service.storage.batch import Dropped, Entry, Labels, Written, write
from service.storage.database import outages, sqlite_path, writing
from service.storage.events import (
    Event,
    Feedback,
    FeedbackResult,
    Look,
    PairEvent,
    Step,
    StoredState,
    Tally,
)
from service.storage.ledger import Mode, Revision
from service.storage.owner import key_beside, owned
from service.storage.reads import Floats, Latencies
from service.storage.schema import designs, experiments, keys, steps
from service.storage.statements import upserting
from service.storage.upgrade import upgrade
from service.storage.writer import Writer

FINGERPRINT_DIGITS = 32
MARK = b"secateur"
LATENCIES = 200_000


class Store:
    """The database and the one thread that writes to it. Made by `open`, ended by `close`.

    Of `record`, `fingerprint` and `feedback` any thread or task may make use; the other methods block and belong in
    worker threads. They raise StorageUnavailableError when the database fails.
    """

    def __init__(
        self, engine: Engine, key: bytes, metrics: Metrics, queue_events: int, replica: str, owned: ExitStack
    ) -> None:
        self._engine = engine
        self._key = key
        self._replica = replica
        self._owned = owned
        self._writer = Writer(self._commit, queue_events, metrics)

    @classmethod
    def open(cls, settings: Storage, hash_key: bytes | None, metrics: Metrics, replica: str | None = None) -> "Store":
        """Reach the database and bring its schema up to date.

        hash_key: under which subjects and inputs are recorded; None makes one beside the SQLite file. replica: who
        recorded, default: host and process. Raises ConfigError: unreachable, used by another process, of a newer
        version, written under another key, or a PostgreSQL without a key.
        """
        path = sqlite_path(settings.url)
        if path is None and hash_key is None:
            raise ConfigError("SECATEUR_HASH_KEY: replicas that share a PostgreSQL need a common key of 32 bytes")
        with ExitStack() as resources:
            engine = resources.enter_context(owned(settings.url))
            key = key_beside(path) if path is not None and hash_key is None else hash_key
            assert key is not None
            upgrade(engine)
            _check_key(engine, key)
            name = replica or f"{socket.gethostname()}-{os.getpid()}"
            return cls(engine, key, metrics, settings.queue_events, name, resources.pop_all())

    def fingerprint(self, data: str | bytes) -> str:
        """What is recorded instead of a subject or an input: 32 hex digits of HMAC-SHA256 under the key."""
        # Any string has a fingerprint, lone surrogates too.
        encoded = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
        return _digest(self._key, encoded)

    def declare(self, experiment: str, revision: int, mode: Mode, control: str, candidate: str) -> None:
        """Say how a revision compares its arms. Whoever starts an experiment calls this before anything is recorded.

        Labels of a `shadow` are counted by pairs and those of other modes by answers; an experiment that was not
        declared is counted as a split. control, candidate: deployments, the arms under which pairs are tallied.
        """
        row = {"experiment": experiment, "revision": revision, "mode": mode, "control": control, "candidate": candidate}
        with self._writing() as connection:
            connection.execute(upserting(connection, designs), row)

    def record(self, event: Event) -> None:
        """Queue a record. Never waits and never raises; what cannot be kept is counted in `events_dropped_total`."""
        self._writer.put(event)

    async def feedback(self, items: Sequence[Feedback], replace: bool) -> FeedbackResult:
        """Keep true labels, all or none; returns after the commit.

        A label that is there already is `unchanged`, another one needs `replace`. Raises FeedbackRefusedError,
        StorageUnavailableError.
        """
        return await asyncio.wrap_future(self._writer.submit(Labels(tuple(items), replace, time.time())))

    def tallies(self, experiment: str, revision: int) -> list[Tally]:
        """The counts of a revision; one that is absent is zero."""
        with self._reading() as connection:
            return reads.tallies(connection, Revision(experiment, revision))

    def experiments_of(self, items: Sequence[Feedback]) -> dict[str, str]:
        """The experiment behind each label, by the id or request id that it names; absent while nothing is recorded."""
        ids = {item.id for item in items if item.id is not None}
        request_ids = {item.request_id for item in items if item.request_id is not None}
        with self._reading() as connection:
            return reads.experiments_of(connection, ids, request_ids)

    def latencies(self, experiment: str, revision: int, arm: str, limit: int = LATENCIES) -> Latencies:
        """Milliseconds per request of status 200 that the arm was meant to answer and did; overrides left out."""
        with self._reading() as connection:
            return reads.latencies(connection, Revision(experiment, revision), arm, limit)

    def candidate_latencies(self, experiment: str, revision: int, limit: int = LATENCIES) -> Floats:
        """Milliseconds per item that a shadow's candidate took, newest first."""
        with self._reading() as connection:
            return reads.candidate_latencies(connection, Revision(experiment, revision), limit)

    def disagreements(self, experiment: str, revision: int, limit: int = 20) -> list[PairEvent]:
        """The newest pairs whose labels differ, newest first."""
        with self._reading() as connection:
            return reads.disagreements(connection, Revision(experiment, revision), limit)

    def looks(self, experiment: str, revision: int, limit: int = 500) -> list[Look]:
        """Looks by rising units, evenly thinned to `limit`."""
        with self._reading() as connection:
            return reads.find_looks(connection, Revision(experiment, revision), limit)

    def add_look(self, experiment: str, revision: int, look: Look) -> None:
        """Keep a look, over the one at as many units. At most 2,000 stay, spread over the run."""
        with self._writing() as connection:
            reads.keep_look(connection, Revision(experiment, revision), look)

    def steps(self, experiment: str, revision: int) -> list[Step]:
        """Steps in the order they were taken."""
        with self._reading() as connection:
            return reads.find_steps(connection, Revision(experiment, revision))

    def add_step(self, experiment: str, revision: int, step: Step) -> None:
        """Keep a step."""
        row = {**Revision(experiment, revision)._asdict(), **asdict(step)}
        with self._writing() as connection:
            connection.execute(insert(steps), row)

    def states(self) -> dict[str, StoredState]:
        """What was made of each experiment, by name."""
        with self._reading() as connection:
            return reads.states(connection)

    def put_state(self, state: StoredState) -> None:
        """Keep the state of an experiment, over the one before."""
        with self._writing() as connection:
            connection.execute(upserting(connection, experiments), asdict(state))

    def forget(self, before: float) -> int:
        """Delete the rows of items and labels older than a Unix time; returns how many. Counts and curves stay."""
        with outages():
            return retention.forget(self._engine, before)

    def close(self, seconds: float = 5) -> None:
        """Write what is queued, for at most so many seconds, and let go of the database."""
        self._writer.close(seconds)
        self._owned.close()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with outages(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with outages(), writing(self._engine) as connection:
            yield connection

    def _commit(self, entries: Sequence[Entry], dropped: Mapping[Dropped, int]) -> Written:
        with writing(self._engine) as connection:
            return write(connection, entries, dropped, self._replica)


def _digest(key: bytes, data: bytes) -> str:
    return hmac.digest(key, data, "sha256").hex()[:FINGERPRINT_DIGITS]


def _check_key(engine: Engine, key: bytes) -> None:
    """Refuse a key that is not the one of before: the same subjects would be counted again as new units."""
    mark = _digest(key, MARK)
    with writing(engine) as connection:
        found = connection.scalars(select(keys.c.mark)).one_or_none()
        if found is None:
            connection.execute(insert(keys), {"mark": mark})
        elif found != mark:
            raise ConfigError(
                "SECATEUR_HASH_KEY: this database was written under another key, and units would count twice: "
                "give that key, or begin a new database"
            )
