"""The parts of a running service, and what they say about its health."""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from starlette.requests import Request

import service as package
from service.deployments import Readiness, Registry, State
from service.device_memory import publish_device_memory
from service.engine import Engine
from service.errors import ApiError
from service.experiments.control import Control
from service.experiments.recorder import Recorder
from service.experiments.refresh import Reports
from service.keys import Keyring
from service.metrics import Metrics
from service.settings import Settings
from service.shadow import ShadowLane
from service.storage.store import Store


@dataclass
class Runtime:
    """Everything routes need. store, reports: None while no experiment is configured.

    is_draining: set once, by the first signal to stop.
    """

    settings: Settings
    metrics: Metrics
    registry: Registry
    engine: Engine
    store: Store | None
    control: Control
    recorder: Recorder
    shadow: ShadowLane
    reports: Reports | None = None
    keyring: Keyring | None = None
    is_draining: bool = False

    @property
    def status(self) -> Readiness | Literal["draining"]:
        """What /readyz reports: starting, ready, degraded, failed or draining."""
        if self.is_draining:
            return "draining"
        return "failed" if self.engine.failed else self.registry.readiness()

    def check_ready(self) -> None:
        """Raises ApiError (503) unless the service is ready or degraded."""
        self.check_live()
        if self.is_draining:
            raise ApiError("draining", "the service is shutting down")
        if self.status not in ("ready", "degraded"):
            raise ApiError("not_ready", "a required deployment is not ready")

    def check_live(self) -> None:
        """Raises ApiError (503) if the worker is dead or stalled."""
        self.engine.check()
        if self.engine.failed:
            raise ApiError("engine_failed", "the engine has failed and needs a restart")

    def publish(self) -> None:
        """Set the gauges that describe this moment; called for each scrape."""
        metrics, counts, slots = self.metrics, self.engine.counts, self.engine.slots
        inside = {"queued": counts.queued, "prefetched": counts.prefetched, "running": counts.running}
        # The lane and the slots are read one after the other, so a finished batch may be gone from one of them only.
        inside["tokenizing"] = max(slots.items - sum(inside.values()), 0)
        for state, items in inside.items():
            metrics.set("inflight_items", items, state=state)
        metrics.set("inflight_limit_items", slots.limit_items)
        for deployment in self.registry.deployments.values():
            for state in State:
                names = {"task": deployment.task, "variant": deployment.name, "state": state.value}
                metrics.set("deployment_state", deployment.state is state, **names)
        devices = {d.checkpoint.model.device for d in self.registry.deployments.values() if d.is_ready}
        publish_device_memory(metrics, devices)
        metrics.set("ready", self.status in ("ready", "degraded"))
        metrics.set("auth_open", self.settings.auth.mode == "open")
        metrics.set("worker_heartbeat_timestamp_seconds", time.time() - (time.monotonic() - self.engine.heartbeat))
        metrics.set("build_info", 1, version=package.__version__, torch=torch.__version__)


def runtime_of(request: Request) -> Runtime:
    """The runtime behind a request."""
    runtime: Runtime = request.app.state.runtime
    return runtime
