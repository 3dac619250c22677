"""The process: its log, its signals, its exit status."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.errors import ConfigError
from service.keys import new_key, write_keys
from service.server import run
from tests.service.conftest import SECONDS
from tests.service.toys import TOY_CONFIG, toy_loader, toy_settings

ROOT = Path(__file__).parents[2]


class Process:
    """A server in a process of its own, with its log read line by line."""

    def __init__(self, config: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.service.toy_server", str(config)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.url = self.until("listening")["url"]
        for _ in range(3):
            self.until("deployment is ready")

    def until(self, message: str) -> dict[str, Any]:
        """Read the log up to a message."""
        assert self.process.stderr is not None
        for text in self.process.stderr:
            line: dict[str, Any] = json.loads(text)
            if line["message"] == message:
                return line
        raise AssertionError(f"the process ended without {message!r}")

    def finish(self) -> int:
        self.process.communicate(timeout=SECONDS)
        return self.process.returncode


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def launch(server: str = "{port: 0, ready_off_seconds: 0}") -> Process:
        config = tmp_path / "secateur.yaml"
        config.write_text(TOY_CONFIG.replace("{port: 0, ready_off_seconds: 0}", server), encoding="utf-8")
        running.append(Process(config))
        return running[-1]

    yield launch
    for process in running:
        process.process.kill()
        process.finish()


def classify(url: str, text: str) -> httpx.Response:
    return httpx.post(f"{url}/classify", json={"inputs": text}, timeout=SECONDS, trust_env=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_loses_nothing_that_was_accepted(launch: Callable[..., Process], number: signal.Signals) -> None:
    server = launch()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(classify, server.url, "slow 0") for _ in range(4)]
        while httpx.get(f"{server.url}/metrics", trust_env=False).text.count('inflight_items{state="running"} 0.0'):
            pass
        accepted = 4 - _tokens_free(server.url)
        server.process.send_signal(number)
        server.until("draining")
        statuses = sorted(answer.result().status_code for answer in answers)
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= accepted >= 1
    server.until("stopped")
    assert server.finish() == 0


def _tokens_free(url: str) -> int:
    """Of four requests, how many have not been admitted yet."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    inside = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("secateur_inflight_items{")]
    return 4 - int(sum(inside))


def test_readiness_goes_first_and_requests_are_still_served(launch: Callable[..., Process]) -> None:
    server = launch("{port: 0, ready_off_seconds: 30}")
    assert httpx.get(f"{server.url}/readyz", trust_env=False).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    server.until("draining")
    ready = httpx.get(f"{server.url}/readyz", trust_env=False)
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
    assert ready.headers["connection"] == "close"
    assert httpx.get(f"{server.url}/livez", trust_env=False).status_code == 200
    assert classify(server.url, "0").status_code == 200
    # A second signal does not wait for the thirty seconds.
    server.process.send_signal(signal.SIGTERM)
    assert server.finish() == 1


def test_new_work_is_refused_while_the_old_is_finished(launch: Callable[..., Process]) -> None:
    server = launch()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(classify, server.url, "slow 0")
        while httpx.get(f"{server.url}/metrics", trust_env=False).text.count('inflight_items{state="running"} 0.0'):
            pass
        with httpx.Client(base_url=server.url, trust_env=False, timeout=SECONDS) as client:
            assert client.get("/livez").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            server.until("draining")
            refused = client.post("/classify", json={"inputs": "0"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        assert answer.result().status_code == 200
    assert server.finish() == 0


def test_a_reader_of_the_log_that_leaves(launch: Callable[..., Process]) -> None:
    server = launch()
    assert server.process.stderr is not None
    server.process.stderr.close()
    for _ in range(3):
        assert classify(server.url, "0").status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(SECONDS) == 0
    server.process.stderr = None


def test_hangup_reads_the_keys_again_and_a_broken_file_changes_nothing(
    launch: Callable[..., Process], tmp_path: Path
) -> None:
    (old, old_key), (new, new_key_) = new_key("old", ["classify"]), new_key("new", ["classify"])
    file = tmp_path / "keys.txt"
    write_keys(file, [old_key])
    server = launch("{port: 0, ready_off_seconds: 0}\nauth: {mode: keys, keys_file: keys.txt}")

    def statuses() -> list[int]:
        with httpx.Client(base_url=server.url, timeout=SECONDS, trust_env=False) as client:
            return [
                client.post("/classify", json={"inputs": "0"}, headers={"x-api-key": key}).status_code
                for key in (old, new)
            ]

    assert statuses() == [200, 401]
    write_keys(file, [new_key_])
    server.process.send_signal(signal.SIGHUP)
    server.until("keys read again")
    assert statuses() == [401, 200]
    file.write_text("broken", encoding="utf-8")
    server.process.send_signal(signal.SIGHUP)
    server.until("the keys stay as they were")
    assert statuses() == [401, 200]


def test_hangup_without_keys_ends_nothing(launch: Callable[..., Process]) -> None:
    server = launch()
    server.process.send_signal(signal.SIGHUP)
    assert classify(server.url, "0").status_code == 200


def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            run(toy_settings(tmp_path, server={"port": port}), toy_loader())


def test_a_broken_device_ends_the_process_for_its_supervisor(launch: Callable[..., Process]) -> None:
    server = launch()
    answer = classify(server.url, "broken")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_failed")
    assert httpx.get(f"{server.url}/livez", trust_env=False).status_code == 503
    server.until("leaving because the engine failed")
    assert server.finish() == 1
