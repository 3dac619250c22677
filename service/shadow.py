"""The shadow lane: a candidate answers what the control has answered already, and nobody waits for it.

A queue, a thread and on CUDA a stream of its own. It starts a pass only while nobody waits for the primary, and takes
no lock that the primary takes: the event loop hands samples over through a lock-free queue and gets events back as
callbacks. Whatever the candidate does, slow, wrong or broken, is a pair; what it never got to see is a drop.
"""

import asyncio
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from service.answers import Answer
from service.deployments import Deployment, default_activation
from service.engine import Engine
from service.experiments.recorder import recorded_label
from service.forward import Failure, Ran, run
from service.measures import measure_batch
from service.metrics import Metrics
from service.prediction import ACTIVATIONS, DEFAULT_THRESHOLD, predict
from service.sections import EngineSettings
from service.selection import Exposure
from service.storage.events import PairEvent
from service.streams import SHADOW, Stream
from service.ticket import Clock, Item

log = logging.getLogger("secateur.shadow")

# How often a lane with work looks whether the primary is idle.
POLL_SECONDS = 0.001
# The primary has run out of memory: the lane leaves the device to it for so long.
PAUSE_SECONDS = 60.0
# How long a stop waits for the pass that runs; its thread does not keep the process.
STOP_SECONDS = 2.0
# Of the thread, in the scheduler of Linux: 19 gives way to everybody.
NICENESS = 19


@dataclass(eq=False, frozen=True, slots=True)
class Sample:
    """An item that the control has answered. unit: its fingerprint; row: the control's logits; at: on the lane's clock.

    threshold: above which classes of a multi-label task are predicted.
    """

    exposure: Exposure
    id: str
    unit: str
    item: Item
    row: list[float]
    label: str
    threshold: float
    candidate: Deployment
    at: float


@dataclass(eq=False)
class _Pass:
    """Samples that a candidate runs in one forward pass. is_settled: they are counted; only the event loop sets it."""

    samples: list[Sample]
    started: float
    is_settled: bool = False

    @property
    def candidate(self) -> Deployment:
        return self.samples[0].candidate


class ShadowLane:
    """Construct and use it on the event loop. seconds: how long a sample may wait, and how long a pass may take."""

    def __init__(
        self,
        engine: Engine,
        settings: EngineSettings,
        seconds: float,
        metrics: Metrics,
        record: Callable[[PairEvent], None],
        clock: Clock = time.monotonic,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._seconds = seconds
        self._metrics = metrics
        self._record = record
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[Sample | None] = SimpleQueue()
        self._held: Sample | None = None
        self._pass: _Pass | None = None
        self._ended = -math.inf
        self._stopping = False
        self._stream = Stream(SHADOW)
        self._thread = threading.Thread(target=self._work, name="secateur-shadow", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def offer(self, samples: Iterable[Sample]) -> None:
        """Let the candidate answer these when there is time, or drop them."""
        self.check()
        for sample in samples:
            reason = self._obstacle(sample)
            if reason is None:
                self._queue.put(sample)
            else:
                self._drop([sample], reason)

    def shares(self, since: float, until: float) -> bool:
        """Whether a pass ran between two moments, the second being about now."""
        running = self._pass
        return (running is not None and running.started <= until) or self._ended >= since

    def check(self) -> None:
        """Give up on a pass that takes too long: its candidate has failed. For the watchdog; `offer` looks too."""
        running = self._pass
        if running is None or running.is_settled:
            return
        seconds = self._clock() - running.started
        if seconds > self._seconds:
            self._settle(running, _all_failed(running.samples), seconds)

    async def stop(self) -> None:
        """Drop what waits and let the thread go. A pass that does not end soon is dropped too."""
        self._stopping = True
        self._queue.put(None)
        await self._loop.run_in_executor(None, self._thread.join, STOP_SECONDS)
        left = [] if self._held is None else [self._held]
        if self._pass is not None and not self._pass.is_settled:
            self._pass.is_settled = True
            left += self._pass.samples
        while not self._queue.empty():
            left += filter(None, [self._queue.get_nowait()])
        self._drop(left, "draining")

    # On the lane's thread.

    def _work(self) -> None:
        _give_way()
        while self._wait():
            samples = self._form()
            if samples:
                self._run(samples)

    def _wait(self) -> bool:
        """Hold a sample, and wait until nobody waits for the primary. Returns False when the lane stops."""
        while not self._stopping:
            self._held = self._held or self._queue.get()
            if self._held is not None and self._may_run():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _may_run(self) -> bool:
        return self._engine.is_idle and self._clock() - self._engine.out_of_memory_at > PAUSE_SECONDS

    def _form(self) -> list[Sample]:
        """Take a batch of one candidate from the front of the queue, without those that have waited too long."""
        chosen: list[Sample] = []
        tokens = 0
        while (head := self._held) is not None:
            if self._clock() - head.at > self._seconds:
                self._post(self._drop, [head], "busy")
            elif chosen and (
                head.candidate is not chosen[0].candidate
                or len(chosen) >= self._settings.max_batch_items
                or tokens + head.item.tokens > self._settings.shadow_batch_tokens
            ):
                break
            else:
                chosen.append(head)
                tokens += head.item.tokens
            self._held = None if self._queue.empty() else self._queue.get_nowait()
        return chosen

    def _run(self, samples: list[Sample]) -> None:
        running = self._pass = _Pass(samples, self._clock())
        try:
            model = running.candidate.checkpoint.model
            with self._stream.on(model.device):
                ran = run(model, [sample.item.ids for sample in samples])
        except Exception:
            ran = _all_failed(samples)
        self._ended = self._clock()
        self._pass = None
        seconds = self._ended - running.started
        self._post(self._settle, running, ran if seconds <= self._seconds else _all_failed(samples), seconds)

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process is leaving, nobody counts any more
            self._loop.call_soon_threadsafe(callback, *arguments)

    # On the event loop.

    def _obstacle(self, sample: Sample) -> str | None:
        if self._stopping:
            return "draining"
        if not sample.candidate.is_ready:
            return "unavailable"
        return "busy" if self._queue.qsize() >= self._settings.shadow_queue_items else None

    def _drop(self, samples: list[Sample], reason: str) -> None:
        for sample in samples:
            self._metrics.inc("shadow_dropped_total", experiment=sample.exposure.name, reason=reason)

    def _settle(self, running: _Pass, ran: Ran, seconds: float) -> None:
        if running.is_settled:
            return
        running.is_settled = True
        names = {"task": running.candidate.task, "variant": running.candidate.name}
        self._metrics.inc("shadow_seconds_total", seconds, **names)
        tokens = sum(sample.item.tokens for sample in running.samples)
        measure_batch(self._metrics, running.candidate, len(running.samples), tokens, ran)
        for sample, result in zip(running.samples, ran.results, strict=True):
            outcome = "failed" if isinstance(result, Failure) else "ok"
            self._metrics.inc("items_total", **names, lane="shadow", outcome=outcome)
            if isinstance(result, Failure):
                log.warning("the candidate failed", extra={"fields": {"id": sample.id, **names, "error": result.code}})
                if result.kind is not None:
                    self._metrics.inc("invalid_outputs_total", **names, kind=result.kind)
            pair = pair_of(sample, result, seconds)
            self._metrics.inc("experiment_pairs_total", experiment=pair.experiment, outcome=pair.outcome)
            self._record(pair)


def samples_of(answer: Answer, fingerprints: list[str], candidate: Deployment, at: float) -> list[Sample]:
    """The items of an answer that its experiment's control gave, for the candidate. at: on the lane's clock."""
    assert answer.exposure is not None
    problem_type = answer.deployment.checkpoint.problem_type
    threshold = DEFAULT_THRESHOLD if answer.query.threshold is None else answer.query.threshold
    parts = zip(answer.ticket.items, answer.served, answer.predictions, fingerprints, strict=True)
    return [
        Sample(
            exposure=answer.exposure,
            id=answer.id,
            unit=fingerprint,
            item=item,
            row=served.row,
            label=recorded_label(answer.labels, prediction, problem_type),
            threshold=threshold,
            candidate=candidate,
            at=at,
        )
        for item, served, prediction, fingerprint in parts
    ]


def pair_of(sample: Sample, result: list[float] | Failure, seconds: float) -> PairEvent:
    """What the two arms made of an item; seconds: of the candidate's pass."""
    label, mean, peak = None, None, None
    if not isinstance(result, Failure):
        checkpoint = sample.candidate.checkpoint
        activation = default_activation(checkpoint)
        prediction = predict(result, checkpoint.problem_type, activation, sample.threshold)
        label = recorded_label(checkpoint.labels, prediction, checkpoint.problem_type)
        rows = zip(ACTIVATIONS[activation](sample.row), prediction.values, strict=True)
        differences = [abs(ours - theirs) for ours, theirs in rows]
        mean, peak = math.fsum(differences) / len(differences), max(differences)
    return PairEvent(
        id=sample.id,
        item=sample.item.index,
        at=time.time(),
        experiment=sample.exposure.name,
        revision=sample.exposure.revision,
        unit=sample.unit,
        primary_label=sample.label,
        candidate_label=label,
        outcome="candidate_failed" if label is None else "agree" if label == sample.label else "disagree",
        mean_abs_dp=mean,
        max_abs_dp=peak,
        primary_ms=sample.item.pass_seconds * 1000,
        candidate_ms=None if label is None else seconds * 1000,
    )


def _all_failed(samples: list[Sample]) -> Ran:
    return Ran([Failure("inference_failed")] * len(samples), "failed")


def _give_way() -> None:
    """Let the scheduler prefer everybody else. Threads that torch starts from this one inherit it."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
