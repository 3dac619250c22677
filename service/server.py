"""The process: one uvicorn server, one worker, and our own way to leave."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from models.checkpoint import load_checkpoint
from models.errors import ConfigError
from service import logs
from service.app import create_app
from service.deployments import Loader
from service.runtime import Runtime
from service.settings import Settings, is_loopback

log = logging.getLogger("secateur.server")

KEEP_ALIVE_SECONDS = 65
# After the drain only uploads and idle connections are left.
CLOSE_SECONDS = 2
# After the engine failed: time for the last answers to leave and for a probe to see why.
FAILED_SECONDS = 2
# How long the event loop may hold the interpreter while the worker waits for it. The worker gives it up at every torch
# operation and must win it back some hundred times per batch, so a busy loop starves it: 200 clients that ask again at
# once got 16 answers a second with Python's 5 ms, 141 with .5 ms, 256 with .1 ms, 260 with .02 ms
# (benchmarks.overload, two cores, clients on the same machine).
SWITCH_SECONDS = 1e-4
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(settings: Settings, load: Loader = load_checkpoint) -> None:
    """Serve until SIGTERM or SIGINT, drain, and return. A second signal ends the process at once with status 1.

    Raises ConfigError if the address cannot be bound, and SystemExit with status 1 after the engine has failed: a
    supervisor starts a new process, the only thing that helps a broken device.
    """
    logs.configure(settings.logging.level)
    sys.setswitchinterval(SWITCH_SECONDS)
    app = create_app(settings, load)
    listener = _bind(settings.server.host, settings.server.port)
    host, port = listener.getsockname()[:2]
    if settings.auth.mode == "open" and not is_loopback(settings.server.host):
        log.warning("auth.mode is open: anyone who reaches the port may call")
    log.info("listening", extra={"fields": {"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"}})
    server = DrainingServer(app, settings)
    server.run(sockets=[listener])
    log.info("stopped")
    if server.has_failed:
        sys.exit(1)


class DrainingServer(uvicorn.Server):
    """uvicorn, leaving in our order: readiness off, keep serving, refuse, finish what was accepted, close."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self._app = app
        self._settings = settings.server
        self._leaving: asyncio.Task[None] | None = None
        self.has_failed = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals on the event loop instead of uvicorn's way, which stops without a drain."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._reload_keys)
        yield
        for number in (*SIGNALS, signal.SIGHUP):
            loop.remove_signal_handler(number)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's heartbeat, ten times a second: leave once the engine has failed."""
        runtime: Runtime = self._app.state.runtime
        if runtime.engine.failed and self._leaving is None:
            self._leaving = asyncio.create_task(self._give_up())
        return await super().on_tick(counter)

    async def _give_up(self) -> None:
        log.error("leaving because the engine failed")
        self.has_failed = True
        await asyncio.sleep(FAILED_SECONDS)
        self.should_exit = True

    def _on_signal(self) -> None:
        if self._leaving is not None:
            os._exit(1)
        self._leaving = asyncio.create_task(self._leave())

    def _reload_keys(self) -> None:
        """SIGHUP reads the keys again, and nothing else: text changes of the configuration need a restart."""
        runtime: Runtime = self._app.state.runtime
        if runtime.keyring is None:
            return
        try:
            runtime.keyring.reload()
        except ConfigError as error:
            log.error("the keys stay as they were", extra={"fields": {"reason": error.message}})
        else:
            log.info("keys read again", extra={"fields": {"keys": len(runtime.keyring.keys)}})

    async def _leave(self) -> None:
        runtime: Runtime = self._app.state.runtime
        log.info("draining")
        runtime.is_draining = True
        await asyncio.sleep(self._settings.ready_off_seconds)
        runtime.engine.refuse()
        await runtime.engine.drain(self._settings.drain_seconds)
        self.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"server: cannot listen on {host}:{port} ({error.strerror}), choose another --port") from None
