"""`secateur serve` as a process of its own, for tests that speak HTTP to it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
READY_SECONDS = 90
STOP_SECONDS = 60


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[httpx.Client]:
    """A client of a ready server that runs in `folder`, which gets serve.out and serve.log.

    Afterwards SIGTERM must end the server with 0.
    """
    port = _free_port()
    environment = os.environ | {
        "SECATEUR_SERVER__READY_OFF_SECONDS": "0",  # nothing waits for a load balancer to notice here
        "SECATEUR_STORAGE__URL": f"sqlite:///{folder}/{port}.db",  # the demo's own may be in use
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "service", "serve", *options, "--port", str(port)]
    with (folder / "serve.out").open("wb") as out, (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=log, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            _wait_until_ready(process, client, folder / "serve.log")
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_SECONDS) == 0, (folder / "serve.log").read_text()
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.05)  # another process: there is nothing to wait on but its port
    raise AssertionError(f"not ready after {READY_SECONDS} s:\n{log.read_text()}")
