"""The queue and its thread: full, failing, refusing and closing, without ever holding up whoever records."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_FSIZE, getrlimit, setrlimit

import pytest

from service.metrics import Metrics
from service.storage.database import connect, writing
from service.storage.events import Step, StorageUnavailableError
from service.storage.store import Store
from tests.service.storage.conftest import DATABASE, Open, administer
from tests.service.storage.records import (
    exposure,
    flushed,
    label,
    number,
    pair,
    sample,
    send,
    wait_until,
)

Outage = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def outage(url: str, request: pytest.FixtureRequest, tmp_path: Path) -> Outage:
    """A database that fails for a while: SQLite on a full disk, PostgreSQL letting nobody in."""
    return _full_disk(tmp_path) if url.startswith("sqlite") else _closed(request.getfixturevalue("postgres"))


def _full_disk(folder: Path) -> Outage:
    @contextmanager
    def outage() -> Iterator[None]:
        before = getrlimit(RLIMIT_FSIZE)
        setrlimit(RLIMIT_FSIZE, ((folder / "secateur.db-wal").stat().st_size, RLIM_INFINITY))
        try:
            yield
        finally:
            setrlimit(RLIMIT_FSIZE, before)

    return outage


def _closed(folder: Path) -> Outage:
    @contextmanager
    def outage() -> Iterator[None]:
        administer(
            folder,
            f"ALTER DATABASE {DATABASE} ALLOW_CONNECTIONS false",
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{DATABASE}'",
        )
        try:
            yield
        finally:
            administer(folder, f"ALTER DATABASE {DATABASE} ALLOW_CONNECTIONS true")

    return outage


@contextmanager
def blocked(url: str) -> Iterator[None]:
    """Nobody else may write."""
    engine = connect(url)
    with writing(engine):
        yield
    engine.dispose()


def test_a_full_queue_drops_and_counts(open_store: Open, metrics: Metrics, url: str) -> None:
    store = open_store(queue_events=20)
    with blocked(url):
        start = time.perf_counter()
        for id in range(1000):
            store.record(exposure(f"{id}"))
        store.record(pair("a"))
        # A thousand calls that each waited a millisecond would show.
        assert time.perf_counter() - start < 1
        assert sample(metrics, "event_queue_depth") == 20
    flushed(store, metrics)
    wait_until(lambda: number(store, "dropped", predicted="queue_full") == 981)
    assert number(store, "requests", "small") == 20
    assert sample(metrics, "events_written_total", kind="exposure") == 20
    assert sample(metrics, "events_dropped_total", kind="exposure", reason="queue_full") == 980
    assert sample(metrics, "events_dropped_total", kind="pair", reason="queue_full") == 1


def test_an_outage_is_survived(open_store: Open, metrics: Metrics, outage: Outage) -> None:
    store = open_store(queue_events=100)
    store.record(exposure("before"))
    flushed(store, metrics)
    assert sample(metrics, "storage_writable") == 1
    with outage():
        for id in range(150):
            store.record(exposure(f"{id}"))
        wait_until(lambda: sample(metrics, "storage_writable") == 0)
        for _ in range(2):
            with pytest.raises(StorageUnavailableError):
                send(store, label("a"))
        assert sample(metrics, "event_queue_depth") == 100
    assert send(store, label("a")) == ("orphan",), "it recovers without a restart, and nothing refused was kept"
    flushed(store, metrics)
    assert sample(metrics, "storage_writable") == 1
    assert number(store, "requests", "small") == 101
    wait_until(lambda: number(store, "dropped", predicted="queue_full") == 50)


def test_an_outage_ends_by_itself(store: Store, metrics: Metrics, outage: Outage) -> None:
    store.record(exposure("before"))
    flushed(store, metrics)
    with outage():
        store.record(exposure("a"))
        wait_until(lambda: sample(metrics, "storage_writable") == 0)
    flushed(store, metrics)
    assert number(store, "requests", "small") == 2


def test_reads_and_small_writes_tell_of_an_outage(store: Store, metrics: Metrics, outage: Outage, url: str) -> None:
    with outage():
        if url.startswith("postgresql"):  # a full disk can be read
            with pytest.raises(StorageUnavailableError):
                store.tallies("e", 1)
        with pytest.raises(StorageUnavailableError):
            store.declare("e", 1, "split", "full", "small")


@pytest.mark.parametrize(
    "wrong", [exposure("bad", label="\ud800"), exposure("bad", status=2**70), exposure("bad", served=object())]
)
def test_a_refused_record_is_lost_alone(store: Store, metrics: Metrics, wrong: object) -> None:
    for id in range(5):
        store.record(exposure(f"{id}"))
    store.record(wrong)  # type: ignore[arg-type]
    store.record(pair("a"))
    flushed(store, metrics)
    assert (number(store, "requests", "small"), number(store, "pairs", predicted="agree")) == (5, 1)
    assert sample(metrics, "events_dropped_total", kind="exposure", reason="storage") == 1
    assert sample(metrics, "events_written_total", kind="exposure") == 5
    assert sample(metrics, "storage_writable") == 1
    wait_until(lambda: number(store, "dropped", predicted="storage") == 1)


def test_a_refused_label_does_not_harm_its_neighbours(store: Store) -> None:
    async def both() -> list[object]:
        calls = (store.feedback([label(id)], replace=False) for id in ("a", "\ud800", "b"))
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(both())
    assert isinstance(answers[1], StorageUnavailableError)
    assert [getattr(answer, "outcomes", None) for answer in answers] == [("orphan",), None, ("orphan",)]


def test_a_caller_that_gave_up_is_not_written_for(store: Store, metrics: Metrics, url: str) -> None:
    async def hasty() -> None:
        async with asyncio.timeout(0.1):
            await store.feedback([label("hasty")], replace=False)

    with blocked(url):
        store.record(exposure("a"))
        wait_until(lambda: not store._writer._queue)  # it is in the hands of the writer, which waits for the database
        with pytest.raises(TimeoutError):
            asyncio.run(hasty())
    assert send(store, label("hasty")) == ("orphan",)
    assert sample(metrics, "events_written_total", kind="exposure") == 1


def test_closing_writes_what_is_queued(open_store: Open, metrics: Metrics) -> None:
    store = open_store()
    for id in range(1200):
        store.record(exposure(f"{id}"))
    store.close(30)
    assert sample(metrics, "events_written_total", kind="exposure") == 1200
    assert number(open_store(Metrics()), "requests", "small") == 1200


def test_what_comes_too_late_is_counted(open_store: Open, metrics: Metrics, outage: Outage) -> None:
    store = open_store()
    store.record(exposure("a"))
    flushed(store, metrics)
    with outage():
        store.record(exposure("b"))
        wait_until(lambda: sample(metrics, "storage_writable") == 0)
        store.close(30)
    store.record(exposure("c"))
    with pytest.raises(StorageUnavailableError):
        send(store, label("a"))
    assert sample(metrics, "events_dropped_total", kind="exposure", reason="shutdown") == 2
    assert sample(metrics, "event_queue_depth") == 0


def test_many_threads_record_at_once(store: Store, metrics: Metrics) -> None:
    def work(name: int) -> None:
        for id in range(250):
            store.record(exposure(f"{name}-{id}"))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flushed(store, metrics)
    assert number(store, "requests", "small") == 1000


def test_small_writes_beside_the_writer_are_no_outage(
    store: Store, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        for _ in range(30):
            store.add_step("e", 1, Step(1.0, "operator", "pause", ""))

    thread = threading.Thread(target=work)
    thread.start()
    for id in range(300):
        store.record(exposure(f"{id}"))
        if id % 10 == 0:
            send(store, label(f"{id}"))
    thread.join()
    flushed(store, metrics)
    assert (len(store.steps("e", 1)), number(store, "requests", "small")) == (30, 300)
    assert caplog.records == []
