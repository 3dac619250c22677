"""The engine of one device: admit, tokenise, batch, run, answer. Every admitted request ends exactly once.

Three kinds of thread meet here. The event loop owns slots, tickets and metrics; tokenizer threads put items into the
lane; one worker thread runs batches. Threads report to the loop with `call_soon_threadsafe` and share only the lane.
"""

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from models.checkpoint import Encoder
from models.images import ImageError
from service.admission import Slots
from service.batching import Batch
from service.deployments import Deployment
from service.errors import ApiError, ClientClosedError
from service.forward import Failure, Ran, run
from service.lane import Counts, Lane
from service.measures import measure_batch
from service.metrics import Metrics
from service.schemas import Picture, Query
from service.sections import EngineSettings, Limits
from service.streams import PRIMARY, Stream
from service.ticket import Clock, Item, Outcome, Ticket, Way

log = logging.getLogger("secateur.engine")

# Weight of the newest batch in the running estimate of tokens per second.
RATE_WEIGHT = 0.2
MESSAGES = {
    "inference_failed": "the model failed on this input",
    "out_of_memory": "the device has not enough memory for this input",
    "invalid_output": "the model gave a logit that is not a finite number",
}


@dataclass(frozen=True)
class _Launch:
    batch: Batch
    started: float
    ended: float
    ran: Ran


class Engine:
    """Admission, tokenizer threads and worker of one device. Construct and use it on the event loop."""

    def __init__(
        self, limits: Limits, settings: EngineSettings, metrics: Metrics, clock: Clock = time.monotonic
    ) -> None:
        self.slots = Slots(limits.max_queue_items, limits.max_queue_chars)
        self._settings = settings
        self._max_pixels = limits.max_pixels
        self._metrics = metrics
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._lane = Lane(settings.max_batch_items, clock, lambda items: self._post(self._leave, items))
        self._tokenizers = ThreadPoolExecutor(settings.tokenizer_threads, "secateur-tokenizer")
        self._stream = Stream(PRIMARY)
        self._worker = threading.Thread(target=self._work, name="secateur-worker", daemon=True)
        self._open: set[Ticket] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._rate: float | None = None
        self._refusing = False
        self._closed = False
        self.failed = False
        self.admitted = 0
        self.out_of_memory_at = -math.inf

    def start(self) -> None:
        """Start the worker thread."""
        self._worker.start()

    def submit(self, deployment: Deployment, query: Query, deadline: float, request_id: str) -> Ticket:
        """Admit a request and begin its work; await the ticket's future. deadline: on the engine's clock.

        Raises ApiError, with nothing computed: engine_failed, draining, overloaded.
        """
        ticket = self._admit(deployment, query, [len(given) for given in query.inputs], deadline, request_id, "primary")
        self._tokenizers.submit(self._tokenize, ticket)
        return ticket

    def submit_again(self, ticket: Ticket, indices: Sequence[int], deployment: Deployment, deadline: float) -> Ticket:
        """Admit items of an answered ticket for another deployment of its task, which reads the same ids.

        The new ticket's items and rows are in the order of `indices`. Raises ApiError like `submit`.
        """
        chosen = [ticket.items[index] for index in indices]
        chars = [item.chars for item in chosen]
        again = self._admit(deployment, ticket.query, chars, deadline, ticket.request_id, "cascade")
        for item, source in zip(again.items, chosen, strict=True):
            item.ids, item.length = source.ids, source.length
        again.tokenized_at = again.admitted_at
        self._lane.put(deployment, again.items)
        return again

    def cancel(self, ticket: Ticket) -> None:
        """The client is gone: drop what has not run. No effect on a ticket that has ended."""
        self._end(ticket, "cancelled", ClientClosedError())

    def refuse(self) -> None:
        """Refuse new requests from now on; admitted ones continue."""
        self._refusing = True

    async def drain(self, seconds: float) -> None:
        """Wait until every admitted request has ended, at most `seconds`; the rest is answered 503 `draining`."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            self._end_all("drained", _draining)

    async def stop(self) -> None:
        """End everything and join the threads. The engine cannot be started again."""
        self.refuse()
        self._close("drained", _draining)
        await self._loop.run_in_executor(None, self._tokenizers.shutdown)
        if not self.failed:  # a stalled worker may never come back, and a daemon thread does not keep the process
            await self._loop.run_in_executor(None, self._worker.join, self._settings.stall_seconds)

    def check(self) -> None:
        """Fail the engine if its worker is dead or stalled; called by the watchdog and by `/livez`."""
        if not self.failed and (not self._worker.is_alive() or self._lane.is_stalled(self._settings.stall_seconds)):
            self._fail("the worker thread is dead or stalled")

    @property
    def counts(self) -> Counts:
        return self._lane.counts()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything. Any thread may ask: it takes no lock."""
        return not self.slots.items

    @property
    def heartbeat(self) -> float:
        """When the worker was last seen, on the engine's clock."""
        return self._lane.heartbeat

    # On a tokenizer thread.

    def _tokenize(self, ticket: Ticket) -> None:
        if ticket.outcome is not None:
            self._post(self._leave, ticket.items)
            return
        encoder = ticket.deployment.checkpoint.encoder
        try:
            for item in ticket.items:
                _encode(item, encoder, self._max_pixels)
                _check_length(item, encoder.max_tokens)
        except ApiError as error:
            self._post(self._reject, ticket, "client_error", error)
        except Exception as error:
            log.error("tokenizer failed: %s", type(error).__name__, extra={"request_id": ticket.request_id})
            self._post(self._reject, ticket, "failed", ApiError("internal", "the input could not be read"))
        else:
            ticket.tokenized_at = self._clock()
            self._lane.put(ticket.deployment, ticket.items)

    # On the worker thread.

    def _work(self) -> None:
        try:
            while batch := self._lane.next():
                model = batch.deployment.checkpoint.model
                started = self._clock()
                with self._stream.on(model.device):
                    ran = run(model, [item.ids for item in batch.items])
                if ran.outcome == "split":
                    self._lane.lower(batch.tokens // 2)
                if ran.lacked_memory:
                    self.out_of_memory_at = self._clock()
                self._post(self._deliver, _Launch(batch, started, self._clock(), ran))
        except BaseException:
            log.exception("the worker thread died")
            self._post(self._fail, "the worker thread died")

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process is leaving, nobody waits for the report
            self._loop.call_soon_threadsafe(callback, *arguments)

    # On the event loop.

    def _admit(
        self, deployment: Deployment, query: Query, chars: list[int], deadline: float, request_id: str, way: Way
    ) -> Ticket:
        if self.failed:
            raise _engine_failed()
        if self._refusing:
            raise _draining()
        if not self.slots.reserve(len(chars), sum(chars)):
            raise ApiError("overloaded", "too much work is waiting", retry_after_seconds=self._wait_seconds())
        now = self._clock()
        ticket = Ticket(deployment, query, request_id, deadline, now, self._loop.create_future(), way)
        ticket.items = [Item(ticket, index, size) for index, size in enumerate(chars)]
        ticket.rows = [[] for _ in chars]
        ticket.missing = ticket.inside = len(chars)
        self.admitted += len(chars)
        self._open.add(ticket)
        self._idle.clear()
        ticket.timer = self._loop.call_later(max(deadline - now, 0), self._expire, ticket)
        return ticket

    def _deliver(self, launch: _Launch) -> None:
        batch, ran = launch.batch, launch.ran
        if self._closed:
            self._leave_late(batch.items)
            return
        seconds = launch.ended - launch.started
        seconds_per_token = seconds / batch.tokens
        for item, result in zip(batch.items, ran.results, strict=True):
            item.pass_seconds, item.device_seconds = seconds, seconds_per_token * item.tokens
            ticket = item.ticket
            ticket.started_at = ticket.started_at or launch.started
            ticket.finished_at = launch.ended
            if isinstance(result, Failure):
                self._item_failed(item, result)
            else:
                ticket.rows[item.index] = result
                ticket.missing -= 1
                if not ticket.missing:
                    self._end(ticket, "ok", None)
        self._leave(batch.items)
        # Behind the callbacks of the futures: the answers go out first.
        self._loop.call_soon(self._measure, launch)

    def _measure(self, launch: _Launch) -> None:
        batch = launch.batch
        rate = batch.tokens / max(launch.ended - launch.started, 1e-6)
        self._rate = rate if self._rate is None else self._rate + RATE_WEIGHT * (rate - self._rate)
        measure_batch(self._metrics, batch.deployment, len(batch.items), batch.tokens, launch.ran)

    def _item_failed(self, item: Item, failure: Failure) -> None:
        item.failed = True
        ticket = item.ticket
        variant, task = ticket.deployment.name, ticket.deployment.task
        if failure.kind is not None:
            self._metrics.inc("invalid_outputs_total", task=task, variant=variant, kind=failure.kind)
        if ticket.outcome is None:
            log.error("%s", failure.code, exc_info=failure.cause, extra={"request_id": ticket.request_id})
        self._end(ticket, "failed", ApiError(failure.code, MESSAGES[failure.code]))

    def _reject(self, ticket: Ticket, outcome: Outcome, error: ApiError) -> None:
        self._end(ticket, outcome, error)
        self._leave(ticket.items)

    def _expire(self, ticket: Ticket) -> None:
        self._end(ticket, "timeout", ApiError("deadline_exceeded", "the deadline passed before the answer was ready"))

    def _end(self, ticket: Ticket, outcome: Outcome, error: ApiError | None) -> None:
        if ticket.outcome is not None:
            return
        ticket.outcome = outcome
        if ticket.timer is not None:
            ticket.timer.cancel()
        self._open.discard(ticket)
        if not self._open:
            self._idle.set()
        if not ticket.future.done():
            if error is None:
                ticket.future.set_result(None)
            else:
                ticket.future.set_exception(error)
        if not ticket.inside:
            self._count(ticket)
        elif outcome != "ok":
            self._leave(self._lane.discard(ticket))

    def _end_all(self, outcome: Outcome, error: Callable[[], ApiError]) -> None:
        for ticket in list(self._open):
            self._end(ticket, outcome, error())

    def _leave(self, items: list[Item]) -> None:
        for item in items:
            self.slots.release(1, item.chars)
            item.has_left = True
            item.ticket.inside -= 1
            if not item.ticket.inside and item.ticket.outcome is not None:
                self._count(item.ticket)

    def _leave_late(self, items: list[Item]) -> None:
        """The running batch is known to the lane and to its delivery: whichever comes second finds its items gone."""
        self._leave([item for item in items if not item.has_left])

    def _count(self, ticket: Ticket) -> None:
        blame_items = ticket.outcome == "failed" and any(item.failed for item in ticket.items)
        outcomes = Counter("cancelled" if blame_items and not item.failed else ticket.outcome for item in ticket.items)
        labels = {"task": ticket.deployment.task, "variant": ticket.deployment.name, "lane": ticket.way}
        for outcome, items in outcomes.items():
            self._metrics.inc("items_total", items, **labels, outcome=outcome)

    def _fail(self, reason: str) -> None:
        if self._closed:
            return
        self.failed = True
        log.error("engine failed: %s", reason)
        self._metrics.inc("worker_failures_total")
        self._close("failed", _engine_failed)

    def _close(self, outcome: Outcome, error: Callable[[], ApiError]) -> None:
        self._closed = True
        self._end_all(outcome, error)
        self._leave_late(self._lane.close())

    def _wait_seconds(self) -> float:
        return self._lane.counts().tokens / self._rate if self._rate else 1.0


def _engine_failed() -> ApiError:
    return ApiError("engine_failed", "the engine has failed and needs a restart")


def _draining() -> ApiError:
    return ApiError("draining", "the service is shutting down")


def _encode(item: Item, encoder: Encoder, max_pixels: int) -> None:
    query = item.ticket.query
    given, param = query.inputs[item.index], f"{query.field}[{item.index}]"
    source = given.data if isinstance(given, Picture) else given
    try:
        encoded = encoder.encode(source, query.max_tokens if encoder.reads == "text" else max_pixels)
    except ImageError as error:
        raise ApiError(
            "image_too_large" if error.is_too_large else "invalid_image", f"{param} {error.problem}", param
        ) from None
    item.ids, item.length = encoded.ids, encoded.length


def _check_length(item: Item, max_tokens: int) -> None:
    query = item.ticket.query
    param = f"{query.field}[{item.index}]"
    if not item.tokens:
        raise ApiError("empty_input", f"{param} has no tokens", param)
    if item.truncated and not query.truncate:
        message = f"{param} has {item.length} tokens, the model reads {max_tokens}"
        raise ApiError("input_too_long", message, param)
