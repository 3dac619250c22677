"""What an experiment costs the requests it watches: the same deployment alone, recorded, and with a shadow behind it.

    python -m benchmarks.recording [--requests 10] [--rounds 200] [--task language] [--pause-ms 5]

One server each, and a second plain one for the noise, asked in turn through one keep-alive connection: a short block of
requests with a pause after each, so that a shadow finds the primary idle, then the next server. What else the machine
does meets all of them alike. Growth is a quantile over the plain server's, less one. Prints one JSON document; exits
with 1 if recording raises the median by 3 % or more, a shadow raises it by more than the share of time in which it had
the device, or a record was lost.
"""

import argparse
import http.client
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.overload import await_message, metric
from models.dataset import read_rows
from service.demo import CHECKPOINTS, DEMO, ensure_demo

LIMIT = 0.03
WARM_UP = 50
# A shadow of no request records everything and runs nothing.
SAMPLES: dict[str, float | None] = {"plain": None, "again": None, "recorded": 0, "shadow": 100}
# How long a block waits for its shadow before the next server is asked.
SETTLE_SECONDS = 0.03


@dataclass
class Server:
    """One running server. latencies: in milliseconds; seconds: the time of all blocks."""

    process: subprocess.Popen[str]
    connection: http.client.HTTPConnection
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def post(self, text: str) -> float:
        """Classify a text; returns milliseconds."""
        started = time.perf_counter()
        self.connection.request("POST", "/classify", json.dumps({"inputs": text}), {"content-type": "application/json"})
        response = self.connection.getresponse()
        response.read()
        assert response.status == 200
        return (time.perf_counter() - started) * 1000

    def metrics(self) -> str:
        self.connection.request("GET", "/metrics")
        return self.connection.getresponse().read().decode()


def measure(task: str, requests: int, rounds: int, pause_ms: float) -> dict[str, Any]:
    """Start the servers, ask them in turn, stop them, and report."""
    ensure_demo()
    texts = [row.text for row in read_rows(DEMO / "data" / f"{task}.jsonl.gz", "test")]
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        servers: dict[str, Server] = {}
        try:
            for name, sample in SAMPLES.items():
                servers[name] = _start(Path(directory), name, task, sample)
            for server in servers.values():
                for text in texts[:WARM_UP]:
                    server.post(text)
            time.sleep(1)
            busy_before = metric(servers["shadow"].metrics(), "secateur_shadow_seconds_total")
            for number in range(rounds):
                chosen = chance.choices(texts, k=requests)
                order = list(servers.values())
                for server in order[number % len(order) :] + order[: number % len(order)]:
                    _block(server, chosen, pause_ms / 1000)
            scraped = {name: server.metrics() for name, server in servers.items()}
            for server in servers.values():
                server.process.send_signal(signal.SIGTERM)
                server.process.wait(60)
        finally:
            for server in servers.values():
                server.process.kill()
                server.process.wait()
    busy = metric(scraped["shadow"], "secateur_shadow_seconds_total") - busy_before
    return _report(servers, scraped, busy / servers["shadow"].seconds)


def _block(server: Server, texts: list[str], pause: float) -> None:
    started = time.perf_counter()
    for text in texts:
        server.latencies.append(server.post(text))
        time.sleep(pause)
    server.seconds += time.perf_counter() - started
    time.sleep(SETTLE_SECONDS)


def _report(servers: dict[str, Server], scraped: dict[str, str], busy_share: float) -> dict[str, Any]:
    latency = {
        name: {f"p{q}": round(_quantile(server, q), 3) for q in (50, 95, 99)} for name, server in servers.items()
    }
    growth = {
        name: {f"p{q}": round(_quantile(server, q) / _quantile(servers["plain"], q) - 1, 4) for q in (50, 95)}
        for name, server in servers.items()
        if name != "plain"
    }
    lost = metric(scraped["shadow"], "secateur_events_dropped_total") + metric(
        scraped["recorded"], "secateur_events_dropped_total"
    )
    return {
        "requests": len(servers["plain"].latencies),
        "latency_ms": latency,
        "growth": growth,
        "shadow_busy_share": round(busy_share, 4),
        "pairs": metric(scraped["shadow"], "secateur_experiment_pairs_total"),
        "dropped": metric(scraped["shadow"], "secateur_shadow_dropped_total"),
        "records_lost": lost,
        "limit": LIMIT,
        "passed": growth["recorded"]["p50"] < LIMIT and growth["shadow"]["p50"] <= busy_share and not lost,
    }


def _quantile(server: Server, q: int) -> float:
    return statistics.quantiles(server.latencies, n=100, method="inclusive")[q - 1]


def _start(directory: Path, name: str, task: str, sample: float | None) -> Server:
    folder = directory / name
    folder.mkdir()
    experiment = {
        "task": task,
        "mode": "shadow",
        "sample": sample,
        "arms": [{"deployment": "whole"}, {"deployment": "cut"}],
    }
    config: dict[str, Any] = {
        "version": 1,
        "server": {"port": 0, "ready_off_seconds": 0},
        "models": {"root": str(CHECKPOINTS), "device": "cpu", "dtype": "float32"},
        "deployments": {
            "whole": {"path": f"{task}/full", "role": "full"},
            "cut": {"path": f"{task}/pruned", "role": "pruned"},
        },
        "tasks": {task: {"deployments": ["whole", "cut"], "full": "whole"}},
        "experiments": {} if sample is None else {"watched": experiment},
    }
    file = folder / "secateur.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "service", "serve", "--config", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    connection = http.client.HTTPConnection(urlsplit(await_message(process, "listening")["url"]).netloc)
    for _ in config["deployments"]:
        await_message(process, "deployment is ready")
    assert process.stderr is not None
    threading.Thread(target=process.stderr.read, daemon=True).start()
    return Server(process, connection)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="language")
    parser.add_argument("--requests", type=int, default=10, help="in a block")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--pause-ms", type=float, default=5.0)
    arguments = parser.parse_args()
    report = measure(arguments.task, arguments.requests, arguments.rounds, arguments.pause_ms)
    print(json.dumps(report, indent=2))
    raise SystemExit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
