"""A store on each database. PostgreSQL runs as another user in a temporary folder, on a socket of the file system."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from service.metrics import Metrics
from service.sections import Storage
from service.storage.store import Store

KEY = b"0123456789abcdef0123456789abcdef"
SECONDS = 30
DATABASE = "tests"
Open = Callable[..., Store]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Path]:
    """The folder of a running server's socket."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = str(installed[-1]) if installed else shutil.which("initdb")
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    # Not pytest's own folder, which other users may not enter; and short, for a socket's path has 107 bytes at most.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        user: dict[str, Any] = {}
        if os.geteuid() == 0:  # as root it refuses to run
            user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            shutil.chown(folder, "nobody", "nogroup")
        data = folder / "data"
        make = [found, "-D", str(data), "-A", "trust", "-U", "secateur", "--no-sync", "-E", "UTF8"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **user)
        serve = [str(Path(found).with_name("postgres")), "-D", str(data), "-k", name, "-c", "listen_addresses="]
        # Nothing here cuts the power: what a killed client was told is in the server's memory.
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen([*serve, "-c", "fsync=off"], stdout=log, stderr=log, cwd=folder, **user)
        try:
            _wait_for(folder)
            administer(folder, f"CREATE DATABASE {DATABASE}")
            yield folder
        finally:
            server.send_signal(signal.SIGQUIT)  # nothing is kept, so there is nothing to write
            server.wait(SECONDS)


def administer(folder: Path, *statements: str) -> None:
    """Run statements outside a transaction, on a database that no test uses."""
    with psycopg.connect(f"host={folder} user=secateur dbname=postgres", autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def _wait_for(folder: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return administer(folder, "SELECT 1")
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/secateur.db"
    folder = request.getfixturevalue("postgres")
    schema = f"test_{next(_NUMBERS)}"  # a database of its own would cost a second
    with psycopg.connect(f"host={folder} user=secateur dbname={DATABASE}", autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}".encode())
    return f"postgresql://secateur@/{DATABASE}?host={folder}&options=-csearch_path%3D{schema}"


_NUMBERS = count()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def open_store(url: str, metrics: Metrics) -> Iterator[Open]:
    """Opens stores on the database; they are closed in the end."""
    opened: list[Store] = []

    def open_(metrics: Metrics = metrics, **settings: Any) -> Store:
        opened.append(Store.open(Storage(url=url, **settings), KEY, metrics))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Open) -> Store:
    return open_store()
