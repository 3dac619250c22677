"""The hand-over between the event loop, the tokenizer threads and the one worker thread of a device.

One batch runs and at most one more is formed ahead. A condition variable wakes the worker; nothing polls.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from service.batching import Batch, Budget, Queues, bury, count_tokens, fill, form
from service.deployments import Deployment
from service.ticket import Clock, Item, Ticket

HEARTBEAT_SECONDS = 1.0
# An out-of-memory error lowers the token limit until this long has passed without another.
CAUTION_SECONDS = 60.0


@dataclass(frozen=True)
class Counts:
    """Items in each place of the lane, and the tokens of all of them."""

    queued: int
    prefetched: int
    running: int
    tokens: int


class Lane:
    """Queues, the batch formed ahead and the batch that runs, behind one lock.

    on_drop receives dead items, on any thread, while the lock is held: it must only hand them on.
    """

    def __init__(self, max_batch_items: int, clock: Clock, on_drop: Callable[[list[Item]], None]) -> None:
        self._max_batch_items = max_batch_items
        self._clock = clock
        self._on_drop = on_drop
        self._changed = threading.Condition()
        self._queues: Queues = {}
        self._prefetched: Batch | None = None
        self._running: Batch | None = None
        self._arrivals = 0
        self._closed = False
        self._cap: tuple[int, float] | None = None
        self.heartbeat = clock()

    def put(self, deployment: Deployment, items: list[Item]) -> None:
        """Append a request's items to the deployment's queue, or drop them if the lane is closed."""
        with self._changed:
            if self._closed:
                self._on_drop(items)
                return
            for item in items:
                item.order = self._arrivals
                self._arrivals += 1
            self._queues.setdefault(deployment, deque()).extend(items)
            if self._running is not None and self._prefetched is None:
                self._prefetched = self._form()
            self._changed.notify()

    def next(self) -> Batch | None:
        """Wait for work and launch it: the batch formed ahead, freed of the dead and filled up. None: closed."""
        with self._changed:
            self._running = None
            while not self._closed:
                self.heartbeat = self._clock()
                batch, self._prefetched = self._prefetched or self._form(), None
                if batch is not None and self._launch(batch):
                    return batch
                if batch is None:
                    self._changed.wait(HEARTBEAT_SECONDS)
            return None

    def discard(self, ticket: Ticket) -> list[Item]:
        """Take the queued items of a ticket out; those in a formed batch stay until it is launched or done."""
        with self._changed:
            queue = self._queues.get(ticket.deployment, deque())
            taken = [item for item in queue if item.ticket is ticket]
            if taken:
                self._queues[ticket.deployment] = deque(item for item in queue if item.ticket is not ticket)
            return taken

    def close(self) -> list[Item]:
        """End the lane and return every item in it, also those of a batch that runs."""
        with self._changed:
            self._closed = True
            batches = [batch for batch in (self._prefetched, self._running) if batch is not None]
            left = [item for queue in self._queues.values() for item in queue]
            left += [item for batch in batches for item in batch.items]
            self._queues.clear()
            self._prefetched = self._running = None
            self._changed.notify_all()
            return left

    def lower(self, tokens: int) -> None:
        """Limit batches to `tokens` until a minute has passed without another out-of-memory error."""
        with self._changed:
            self._cap = (max(tokens, 1), self._clock() + CAUTION_SECONDS)

    def counts(self) -> Counts:
        """Where the items are now."""
        with self._changed:
            queued = [item for queue in self._queues.values() for item in queue]
            ahead = self._prefetched.items if self._prefetched else []
            running = self._running.items if self._running else []
            tokens = count_tokens(queued) + count_tokens(ahead) + count_tokens(running)
            return Counts(len(queued), len(ahead), len(running), tokens)

    def is_stalled(self, stall_seconds: float) -> bool:
        """Whether work is in the lane while the worker has not been seen for `stall_seconds`."""
        counts = self.counts()
        waiting = counts.queued + counts.prefetched + counts.running
        return waiting > 0 and self._clock() - self.heartbeat > stall_seconds

    def _launch(self, batch: Batch) -> bool:
        now = self._clock()
        dead = bury(batch, now)
        queue = self._queues.get(batch.deployment)
        if queue:
            dead += fill(batch, queue, self._budget(batch.deployment), now)
        if dead:
            self._on_drop(dead)
        if not batch.items:
            return False
        self._running = batch
        self._prefetched = self._form()
        return True

    def _form(self) -> Batch | None:
        batch, dead = form(self._queues, self._budget, self._clock())
        if dead:
            self._on_drop(dead)
        return batch

    def _budget(self, deployment: Deployment) -> Budget:
        tokens = deployment.max_batch_tokens
        if self._cap is not None and self._clock() < self._cap[1]:
            tokens = min(tokens, self._cap[0])
        return Budget(tokens, self._max_batch_items)
