"""The one thread that writes: records are queued from anywhere and leave in transactions of up to 500 or 200 ms.

A record that the database refuses is given up alone. While the database itself fails, the records in hand are kept and
tried again, new ones queue until there is no room, and who waits for a commit is told at once.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from service.metrics import Metrics
from service.storage.batch import Dropped, Entry, Labels, Written
from service.storage.database import is_outage
from service.storage.events import Event, ExposureEvent, FeedbackResult, StorageUnavailableError
from service.storage.ledger import Revision

BATCH_EVENTS = 500
BATCH_SECONDS = 0.2
# Between two attempts while the database fails; feedback does not wait for it but tries at once.
RETRY_SECONDS = 1.0

Commit = Callable[[Sequence[Entry], Mapping[Dropped, int]], Written]
log = logging.getLogger("secateur.storage")


@dataclass(eq=False)
class Job:
    """An entry on its way. done: for feedback, who waits for the commit."""

    entry: Entry
    done: "Future[FeedbackResult] | None" = None

    @property
    def size(self) -> int:
        return len(self.entry.items) if isinstance(self.entry, Labels) else 1


class Writer:
    """The queue and its thread. commit runs one transaction, on that thread."""

    def __init__(self, commit: Commit, queue_events: int, metrics: Metrics) -> None:
        self._commit = commit
        self._limit = queue_events
        self._metrics = metrics
        self._queue: deque[Job] = deque()
        self._events = 0  # in the queue and in hand
        self._waiting = 0  # feedback in the queue
        self._dropped: Counter[Dropped] = Counter()
        self._changed = threading.Condition()
        self._is_down = False
        self._is_closing = False
        metrics.set("storage_writable", 1)
        metrics.set("event_queue_depth", 0)
        self._thread = threading.Thread(target=self._run, name="secateur-storage", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Queue a record, or give it up if there is no room."""
        with self._changed:
            if self._is_closing or self._events >= self._limit:
                self._drop(event, "shutdown" if self._is_closing else "queue_full")
                return
            self._queue.append(Job(event))
            self._count(1)
            if len(self._queue) in (1, BATCH_EVENTS):
                self._changed.notify()

    def submit(self, labels: Labels) -> "Future[FeedbackResult]":
        """Queue feedback; the future ends after its commit. Raises StorageUnavailableError once closed."""
        job = Job(labels, Future())
        with self._changed:
            if self._is_closing:
                raise StorageUnavailableError
            self._queue.append(job)
            self._waiting += 1
            self._changed.notify()
        assert job.done is not None
        return job.done

    def close(self, seconds: float) -> None:
        """Write what is queued, for at most this long; the rest is given up."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
        self._give_up(left, "shutdown")

    def _run(self) -> None:
        while not self._is_over():
            self._write(self._next())

    def _is_over(self) -> bool:
        with self._changed:
            return self._is_closing and (self._is_down or not (self._queue or self._dropped))

    def _next(self) -> list[Job]:
        """Wait for a batch: it is full, or old enough, or somebody waits for a commit."""
        with self._changed:
            if self._is_down:
                self._changed.wait_for(lambda: self._is_urgent, RETRY_SECONDS)
            else:
                self._changed.wait_for(lambda: self._queue or self._dropped or self._is_closing)
                self._changed.wait_for(lambda: self._is_urgent or len(self._queue) >= BATCH_EVENTS, BATCH_SECONDS)
            batch: list[Job] = []
            size = 0
            while self._queue and size < BATCH_EVENTS:
                batch.append(self._queue.popleft())
                self._waiting -= batch[-1].done is not None
                size += batch[-1].size
            return batch

    @property
    def _is_urgent(self) -> bool:
        return self._waiting > 0 or self._is_closing

    def _write(self, batch: list[Job]) -> None:
        """Commit a batch; if a record is refused, in halves, so that only that record is lost."""
        # A caller that has gone is not written for: nobody would learn of it.
        parts = [[job for job in batch if job.done is None or job.done.set_running_or_notify_cancel()]]
        while parts:
            part = parts.pop()
            with self._changed:
                dropped = dict(self._dropped)
            try:
                written = self._commit([job.entry for job in part], dropped)
            except Exception as error:
                if is_outage(error):
                    self._outage(error, [job for rest in (part, *reversed(parts)) for job in rest])
                    return
                half = len(part) // 2
                if half:
                    parts += [part[half:], part[:half]]
                else:
                    self._refuse(error, part, dropped)
                continue
            self._committed(part, written, dropped)

    def _committed(self, part: list[Job], written: Written, dropped: Mapping[Dropped, int]) -> None:
        with self._changed:
            self._dropped -= Counter(dropped)
            self._count(-sum(job.done is None for job in part))
        self._set_down(False)
        for name in ("exposure", "pair"):
            self._metrics.inc("events_written_total", sum(_kind(job.entry) == name for job in part), kind=name)
        self._metrics.inc("events_written_total", written.new_labels, kind="feedback")
        for job, answer in zip(part, written.answers, strict=True):
            if job.done is not None:
                if isinstance(answer, FeedbackResult):
                    job.done.set_result(answer)
                else:
                    job.done.set_exception(answer)

    def _refuse(self, error: Exception, part: list[Job], dropped: Mapping[Dropped, int]) -> None:
        """Give up one record. An empty part was refused for what it told of earlier drops."""
        log.error("a record was refused: %s", type(error).__name__)
        self._give_up(part, "storage")
        if not part:
            with self._changed:
                self._dropped -= Counter(dropped)

    def _outage(self, error: Exception, jobs: list[Job]) -> None:
        """Keep the events for the next attempt, and tell those who wait."""
        if not self._is_down:
            log.error("the database cannot be written: %s", type(error).__name__)
        self._set_down(True)
        with self._changed:
            self._queue.extendleft(job for job in reversed(jobs) if job.done is None)
        self._give_up([job for job in jobs if job.done is not None], "storage")

    def _set_down(self, is_down: bool) -> None:
        if self._is_down and not is_down:
            log.warning("the database can be written again")
        self._is_down = is_down
        self._metrics.set("storage_writable", not is_down)

    def _give_up(self, jobs: Iterable[Job], reason: str) -> None:
        for job in jobs:
            if job.done is not None:
                _fail(job.done)
            elif not isinstance(job.entry, Labels):
                with self._changed:
                    self._count(-1)
                    self._drop(job.entry, reason)

    def _drop(self, event: Event, reason: str) -> None:
        self._dropped[Dropped(Revision(event.experiment, event.revision), reason)] += 1
        self._metrics.inc("events_dropped_total", kind=_kind(event), reason=reason)

    def _count(self, change: int) -> None:
        self._events += change
        self._metrics.set("event_queue_depth", self._events)


def _kind(entry: Entry) -> str:
    if isinstance(entry, Labels):
        return "feedback"
    return "exposure" if isinstance(entry, ExposureEvent) else "pair"


def _fail(done: "Future[FeedbackResult]") -> None:
    # Jobs that never reached the thread are not running yet, and may have been cancelled.
    if done.running() or done.set_running_or_notify_cancel():
        done.set_exception(StorageUnavailableError())
