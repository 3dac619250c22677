"""The application: parts wired together, started and stopped with the server."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import torch
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request

import service as package
from kernels.moe import select_backend
from models.checkpoint import load_checkpoint
from models.errors import ConfigError
from service.deployments import Deployment, Loader, Registry
from service.engine import Engine
from service.errors import ApiError
from service.experiments.control import Control
from service.experiments.recorder import Recorder
from service.experiments.refresh import Reports
from service.guard import Guard
from service.keys import Keyring
from service.metrics import Metrics
from service.middleware import Edge
from service.routes import add_routes, methods_of
from service.runtime import Runtime
from service.savings import publish_weights
from service.settings import Settings, hash_key
from service.shadow import ShadowLane
from service.storage.store import Store

WATCHDOG_SECONDS = 1.0


def create_app(settings: Settings, load: Loader = load_checkpoint) -> FastAPI:
    """Build the application. Models load in the background once it starts, so probes answer at once.

    Raises ConfigError if models.backend cannot run on the device, the file of keys cannot be used, or the experiments'
    database cannot be opened or contradicts their configuration.
    """
    device = _device(settings.models.device)
    _check_backend(device, settings.models.backend)
    metrics = Metrics(task.slo_ms / 1000 for task in settings.tasks.values() if task.slo_ms is not None)
    registry = Registry(settings)
    keyring = Keyring(Path(settings.auth.keys_file)) if settings.auth.keys_file else None
    store, control = _experiments(settings, metrics)
    reports = Reports(settings, control, store, registry, metrics) if store is not None else None

    def on_loaded(deployment: Deployment) -> None:
        outcome = "ok" if deployment.is_ready else "failed"
        metrics.inc("deployment_loads_total", variant=deployment.name, outcome=outcome)
        if deployment.load_seconds is not None:
            metrics.set("deployment_load_seconds", deployment.load_seconds, variant=deployment.name)
        publish_weights(metrics, registry)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = Engine(settings.limits, settings.engine, metrics)
        recorder = Recorder(store, metrics)
        seconds = settings.limits.timeout_ms / 1000
        shadow = ShadowLane(engine, settings.engine, seconds, metrics, recorder.record)
        parts = (settings, metrics, registry, engine, store, control, recorder, shadow, reports, keyring)
        app.state.runtime = Runtime(*parts)
        engine.start()
        shadow.start()
        arguments = (load, device, settings.models.dtype, settings.models.backend, on_loaded)
        threading.Thread(target=registry.load_all, args=arguments, name="secateur-loader", daemon=True).start()
        watchers = [asyncio.create_task(_watch(engine, shadow))]
        if reports is not None:
            watchers.append(asyncio.create_task(reports.run()))
        yield
        for watcher in watchers:
            watcher.cancel()
        await engine.stop()
        await shadow.stop()
        if reports is not None:
            await reports.stop()
        if store is not None:
            await asyncio.to_thread(store.close)

    app = FastAPI(
        title="Secateur",
        version=package.__version__,
        lifespan=lifespan,
        docs_url="/docs" if settings.server.docs else None,
        redoc_url=None,
        redirect_slashes=False,
    )
    add_routes(app, settings.admin.enabled)
    app.add_exception_handler(HTTPException, _translate)
    if keyring is not None:
        app.add_middleware(Guard, keyring=keyring)
    app.add_middleware(Edge, metrics=metrics)
    return app


async def _watch(engine: Engine, shadow: ShadowLane) -> None:
    while True:
        engine.check()
        shadow.check()
        await asyncio.sleep(WATCHDOG_SECONDS)


async def _translate(request: Request, error: Exception) -> NoReturn:
    """Turn the framework's own refusals into ours; the edge renders them."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        headers = {"allow": ", ".join(methods_of(request))}
        raise ApiError("method_not_allowed", "the route does not have this method", headers=headers)
    raise ApiError("route_not_found", "no such route")


def _experiments(settings: Settings, metrics: Metrics) -> tuple[Store | None, Control]:
    """The database and what it knows of the experiments. Raises ConfigError, and then leaves nothing open."""
    if not settings.experiments:
        return None, Control(settings, None)
    store = Store.open(settings.storage, hash_key(), metrics)
    try:
        return store, Control(settings, store)
    except ConfigError:
        store.close()
        raise


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _check_backend(device: str, name: str) -> None:
    """A backend that was asked for and cannot run stops the start, instead of failing every deployment in turn."""
    if name == "auto":
        return
    try:
        select_backend(torch.device(device), name)
    except ValueError as error:
        raise ConfigError(f"models.backend: {error}") from None
