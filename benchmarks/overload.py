"""Overload a server of its own and hold its metrics against what the clients counted.

    python -m benchmarks.overload CONFIG [--clients 200] [--seconds 20] [--task NAME]

The queue is cut to a quarter of the clients, so they offer four times what may wait, and a refused client asks again at
once. Prints one JSON document; exits with 1 if a request ended otherwise than with 200 or 429, if a slot is still held
afterwards or if a count differs.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

OVERLOAD = 4
TEXTS = (
    "Your account has been credited, reply with the code to claim the prize.",
    "Fracture of the lower end of the left radius",
    "See you tomorrow at nine, and bring the signed papers along please.",
    "ok",
)


@dataclass
class Tally:
    """What the clients saw. latencies: seconds of each request that was answered 200."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    broken: int = 0


async def drive(url: str, clients: int, seconds: float, bodies: list[dict[str, Any]]) -> Tally:
    """Let `clients` connections post the bodies to /classify in turn, each as fast as it is answered."""
    tally = Tally()
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
    requests = [_request(body) for body in bodies]
    until = time.perf_counter() + seconds
    await asyncio.gather(*(_client(host, port, requests, index, until, tally) for index in range(clients)))
    return tally


async def _client(host: str, port: int, requests: list[bytes], turn: int, until: float, tally: Tally) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        while (started := time.perf_counter()) < until:
            writer.write(requests[turn % len(requests)])
            turn += 1
            status = await _status(reader)
            tally.statuses[status] += 1
            if status == 200:
                tally.latencies.append(time.perf_counter() - started)
    except (ConnectionError, asyncio.IncompleteReadError):
        tally.broken += 1
    finally:
        writer.close()


async def _status(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    length = next(line for line in lines if line.lower().startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))
    return int(lines[0].split()[1])


def _request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of a metric that carry these labels, from the text format."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = (line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        return str(response.read().decode())


def await_message(process: subprocess.Popen[str], message: str) -> dict[str, Any]:
    """Read the server's log up to a message."""
    assert process.stderr is not None
    for text in process.stderr:
        line: dict[str, Any] = json.loads(text)
        if line["message"] == message:
            return line
        if line["level"] == "error":
            raise SystemExit(f"the server failed: {text}")
    raise SystemExit("the server ended before it was ready")


def measure(config: Path, clients: int, seconds: float, task: str | None) -> dict[str, Any]:
    """Start a server, overload it, stop it, and report."""
    queue = str(max(clients // OVERLOAD, 1))
    limits = {"SECATEUR_LIMITS__MAX_QUEUE_ITEMS": queue, "SECATEUR_LIMITS__MAX_INPUTS": queue}
    command = [sys.executable, "-m", "service", "serve", "--config", str(config), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **limits})
    try:
        url = await_message(process, "listening")["url"]
        deployments = json.loads(_get(f"{url}/deployments"))["data"]
        for _ in deployments:
            await_message(process, "deployment is ready")
        # The access log would fill the pipe: nobody reads it from here on, and the service ignores that.
        assert process.stderr is not None
        process.stderr.close()
        chosen = {"task": task} if task else {}
        tally = asyncio.run(drive(url, clients, seconds, [{"inputs": text, **chosen} for text in TEXTS]))
        report = _report(tally, _get(f"{url}/metrics"), clients, seconds)
        process.send_signal(signal.SIGTERM)
        report["exit_status"] = process.wait(60)
        report["passed"] = report["passed"] and report["exit_status"] == 0
        return report
    finally:
        process.kill()
        process.wait()


def _report(tally: Tally, text: str, clients: int, seconds: float) -> dict[str, Any]:
    counted = {str(code): count for code, count in sorted(tally.statuses.items())}
    exported = {code: metric(text, "secateur_requests_total", code=code) for code in counted}
    held = metric(text, "secateur_inflight_items")
    percentiles = statistics.quantiles(tally.latencies, n=100) if len(tally.latencies) > 1 else []
    return {
        "clients": clients,
        "seconds": seconds,
        "queue_items": metric(text, "secateur_inflight_limit_items"),
        "statuses": counted,
        "statuses_by_server": exported,
        "broken_connections": tally.broken,
        "slots_held_afterwards": held,
        "answers_per_second": round(tally.statuses[200] / seconds, 1),
        "latency_ms": {f"p{p}": round(percentiles[p - 1] * 1000, 2) for p in (50, 95, 99)} if percentiles else None,
        "items_ok": metric(text, "secateur_items_total", outcome="ok"),
        "passed": set(counted) == {"200", "429"}
        and counted == exported
        and tally.broken == held == 0
        and metric(text, "secateur_items_total") == tally.statuses[200],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--task")
    arguments = parser.parse_args()
    report = measure(arguments.config, arguments.clients, arguments.seconds, arguments.task)
    print(json.dumps(report, indent=2))
    raise SystemExit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
