"""A real server on a loopback socket, in a thread of the test process, over toy models."""

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.deployments import Loader
from service.runtime import Runtime
from service.settings import Settings
from tests.service.toys import ToyLoader, toy_loader, toy_settings

SECONDS = 30


@pytest.fixture(autouse=True, scope="session")
def _own_environment() -> Iterator[None]:
    """What the developer's shell configures is not what the tests mean."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("SECATEUR_")]:
            patch.delenv(variable)
        yield


class ThreadedServer(uvicorn.Server):
    """uvicorn as the product configures it, started in a thread; `is_up` is set when it listens."""

    def __init__(self, settings: Settings, load: Loader) -> None:
        self.app = create_app(settings, load)
        super().__init__(
            uvicorn.Config(self.app, http="httptools", ws="none", lifespan="on", log_config=None, access_log=False)
        )
        self.is_up = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = self.app.state.runtime
        return runtime


class Harness:
    """A running server, a client, and the models behind it."""

    def __init__(self, settings: Settings, load: Loader) -> None:
        self._load = load
        self.settings = settings
        self.server = ThreadedServer(settings, load)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.server.listener]})
        self.thread.start()
        assert self.server.is_up.wait(SECONDS)
        self.client = httpx.Client(base_url=self.server.url, timeout=SECONDS, trust_env=False)

    @property
    def loader(self) -> ToyLoader:
        """The toys behind the server."""
        assert isinstance(self._load, ToyLoader)
        return self._load

    @property
    def runtime(self) -> Runtime:
        return self.server.runtime

    def wait_loaded(self) -> None:
        for thread in threading.enumerate():
            if thread.name == "secateur-loader":
                thread.join(SECONDS)

    def classify(self, inputs: Any, **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", None)
        return self.client.post("/classify", json={"inputs": inputs, **fields}, headers=headers)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of this name that carry these labels."""
        text = self.client.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"secateur_{name}" and labels.items() <= sample.labels.items()
        )

    def records(self, table: str, count: int) -> list[dict[str, Any]]:
        """The rows of a table of the experiments' database by time, as soon as there are `count`."""
        deadline = time.monotonic() + SECONDS
        query = f"SELECT * FROM {table} ORDER BY at, id, item"
        with closing(sqlite3.connect(self.settings.storage.url.removeprefix("sqlite:///"))) as database:
            database.row_factory = sqlite3.Row
            while len(rows := database.execute(query).fetchall()) < count:
                assert time.monotonic() < deadline, f"{len(rows)} of {count} rows"
                time.sleep(0.01)
        return [dict(row) for row in rows]

    def close(self) -> None:
        """Stop, and check the identity: what was admitted has ended, and no slot is held."""
        self.client.close()
        self.server.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        engine = self.runtime.engine
        assert engine.slots.items == 0
        assert engine.slots.chars == 0
        samples = [s for m in self.runtime.metrics.registry.collect() for s in m.samples]
        items = [s for s in samples if s.name == "secateur_items_total"]
        assert engine.admitted == sum(s.value for s in items if s.labels["lane"] != "shadow")


class Start(Protocol):
    def __call__(self, loader: ToyLoader | None = None, *, wait: bool = True, **sections: Any) -> Harness: ...


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers over toy models; all are stopped and checked at the end."""
    running: list[Harness] = []

    def start(loader: ToyLoader | None = None, *, wait: bool = True, **sections: Any) -> Harness:
        harness = Harness(toy_settings(tmp_path, **sections), loader or toy_loader())
        running.append(harness)
        if wait:
            harness.wait_loaded()
        return harness

    yield start
    for harness in running:
        harness.close()


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """One server with the toy configuration, loaded, shared by the tests of a module."""
    harness = Harness(toy_settings(tmp_path_factory.mktemp("toy")), toy_loader())
    harness.wait_loaded()
    yield harness
    harness.close()
