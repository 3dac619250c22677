"""Keeps the reports fresh: builds them, publishes their gauges, records looks, and acts on what they say."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from service.deployments import Registry
from service.experiments import ramp
from service.experiments.control import Control
from service.experiments.document import Report, Word
from service.experiments.guardrail import breach
from service.experiments.records import Records, read
from service.experiments.report import assemble, shadow_dropped
from service.metrics import Metrics
from service.settings import Settings
from service.statistics.verdict import DECIDED
from service.storage.events import Look, Step, StorageUnavailableError
from service.storage.store import Store

log = logging.getLogger("secateur.experiments")

# What other replicas did is taken over this often.
POLL_SECONDS = 5.0
REFRESH_SECONDS = 30.0
FORGET_SECONDS = 3600.0
# A report younger than this is given again: many who watch cost no more than one.
FRESH_SECONDS = 2.0
DAY_SECONDS = 86_400
WORDS: tuple[Word, ...] = ("invalid", "insufficient_data", "inferior", "superior", "non_inferior", "undecided")

# One for a slow report, one so that others need not wait for it.
THREADS = 2

Given = ParamSpec("Given")
Result = TypeVar("Result")
_Built = tuple[Report, Records]


class Reports:
    """The reports of all experiments of this process. Its methods belong to the event loop and never block it."""

    def __init__(
        self, settings: Settings, control: Control, store: Store, registry: Registry, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._control = control
        self._store = store
        self._registry = registry
        self._metrics = metrics
        self._building: dict[str, tuple[float, asyncio.Task[_Built]]] = {}
        self._seen: set[tuple[str, str]] = set()
        self._threads = ThreadPoolExecutor(THREADS, "secateur-reports")

    async def report(self, name: str) -> Report:
        """The report of an experiment, at most two seconds old. Raises StorageUnavailableError."""
        return (await self._built(name))[0]

    def forget(self, name: str) -> None:
        """Build the next report anew: something was done to the experiment."""
        self._building.pop(name, None)

    async def run(self) -> None:
        """Poll, refresh and clean up until cancelled; a failure is logged and tried again in its turn."""
        due = {self.poll: 0.0, self.refresh: 0.0, self.clean: FORGET_SECONDS}
        every = {self.poll: POLL_SECONDS, self.refresh: REFRESH_SECONDS, self.clean: FORGET_SECONDS}
        started = time.monotonic()
        while True:
            for duty in due:
                if time.monotonic() - started >= due[duty]:
                    await _attempted(duty.__name__, duty)
                    due[duty] = time.monotonic() - started + every[duty]
            await asyncio.sleep(max(started + min(due.values()) - time.monotonic(), 0))

    async def stop(self) -> None:
        """Let what has begun come to its end, for the database is about to be closed."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def poll(self) -> None:
        """Take over what other replicas did."""
        await self._in_thread(self._control.poll)

    async def clean(self) -> None:
        """Delete the rows that retention no longer covers."""
        before = time.time() - self._settings.storage.retention_days * DAY_SECONDS
        await self._in_thread(self._store.forget, before)

    async def refresh(self) -> None:
        """One round: running experiments, and others once in each state, so that their gauges say where they ended."""
        for name, experiment in self._control.experiments.items():
            if experiment.state == "running" or (name, experiment.state) not in self._seen:
                # A failure of one must not leave the others without their guardrail.
                await _attempted(f"refresh {name}", partial(self._look_after, name))

    async def _look_after(self, name: str) -> None:
        report, records = await self._built(name)
        self._seen.add((name, report.state))
        if report.state == "running" and await self._in_thread(self._act, report, records):
            self.forget(name)

    async def _in_thread(self, call: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **kwargs))

    async def _built(self, name: str) -> _Built:
        """One build at a time for each experiment, shared by all who ask."""
        started, task = self._building.get(name, (0.0, None))
        if task is None or time.monotonic() - started > FRESH_SECONDS:
            task = asyncio.create_task(self._in_thread(self._build, name))
            self._building[name] = time.monotonic(), task
        try:
            # Whoever gives up waiting must not take the report from the others.
            return await asyncio.shield(task)
        except StorageUnavailableError:
            self.forget(name)
            raise

    def _build(self, name: str) -> _Built:
        records = read(name, self._settings, self._control, self._store)
        report = assemble(records, self._registry, shadow_dropped(self._metrics, name))
        publish(self._metrics, report)
        return report, records

    def _act(self, report: Report, records: Records) -> bool:
        """Record what is new, then do what follows. Returns whether anything changed."""
        noted = self._note(report, records)
        reason = breach(records)
        if reason is not None:
            self._control.pause(report.name, "guardrail", reason)
            return True
        settings = records.experiment.ramp
        move = ramp.decide(report, settings) if settings else "hold"
        if move == "roll_back":
            self._control.pause(report.name, "ramp", "the candidate is inferior")
        elif move == "advance":
            assert settings is not None
            step = ramp.next_step(settings, report.traffic)
            assert step is not None
            self._control.set_traffic(report.name, step)
        return noted or move != "hold"

    def _note(self, report: Report, records: Records) -> bool:
        """Keep the look of this moment, the way of comparing if it is new, and the first decision."""
        difference, key = report.difference, (report.name, report.revision)
        if difference is None:
            return False
        now, new = time.time(), []
        methods = [step.detail for step in records.steps if step.action == "method"]
        if methods[-1:] != [difference.method]:
            new.append(Step(now, "report", "method", difference.method))
        if report.verdict in DECIDED and not any(step.action == "decided" for step in records.steps):
            detail = ramp.units_detail(report.verdict, report.units)
            new.append(Step(now, "report", "decided", detail))
        for step in new:
            self._store.add_step(*key, step)
        looks = {look.units for look in records.looks}
        if new or report.units not in looks:
            bounds = (difference.estimate, difference.lower, difference.upper)
            self._store.add_look(*key, Look(report.units, now, *bounds, report.verdict))
        return bool(new)


async def _attempted(name: str, duty: Callable[[], Awaitable[None]]) -> None:
    try:
        await duty()
    except StorageUnavailableError:
        log.warning("the database failed, experiments wait", extra={"fields": {"duty": name}})
    except Exception:
        log.exception("experiments were not looked after", extra={"fields": {"duty": name}})


def publish(metrics: Metrics, report: Report) -> None:
    """Set every gauge of an experiment; what the report does not know has no gauge."""
    name = report.name
    if report.difference is not None:
        metrics.set("experiment_difference", report.difference.estimate, experiment=name)
        metrics.set("experiment_lower", report.difference.lower, experiment=name)
        metrics.set("experiment_upper", report.difference.upper, experiment=name)
    if report.agreement is not None:
        metrics.set("experiment_agreement", report.agreement, experiment=name)
    if report.srm is not None:
        metrics.set("experiment_srm_alarm", report.srm.alarm, experiment=name)
    metrics.set("experiment_units", report.units, experiment=name)
    traffic = report.traffic if report.state == "running" else 0.0
    metrics.set("experiment_traffic_percent", traffic, experiment=name)
    for word in WORDS:
        metrics.set("experiment_verdict", word == report.verdict, experiment=name, verdict=word)
