"""What the service adds to one request: the HTTP round trip against the bare forward pass of the same checkpoint.

    python -m benchmarks.http_overhead CHECKPOINT [--text TEXT] [--requests 400] [--rounds 5]

One keep-alive connection, one text, forward pass and round trip measured alternately, medians. Prints one JSON
document; exits with 1 if the median of the added times over the rounds is above the limit of 2 ms.
"""

import argparse
import http.client
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.overload import await_message
from models.checkpoint import load_checkpoint

LIMIT_MS = 2.0
WARM_UP = 50
TEXT = "Fracture of the lower end of the left radius, initial encounter for a closed fracture, seen again today."
PARTS = ("tokenization", "queue", "inference", "total")


def measure(checkpoint: Path, text: str, requests: int, rounds: int) -> dict[str, Any]:
    """Alternate bare passes and round trips, and report the medians of each round in milliseconds."""
    loaded = load_checkpoint(checkpoint)
    ids = loaded.encoder.encode(text).ids
    with tempfile.TemporaryDirectory() as directory:
        process = _serve(checkpoint, Path(directory))
        try:
            connection = http.client.HTTPConnection(urlsplit(await_message(process, "listening")["url"]).netloc)
            await_message(process, "deployment is ready")
            assert process.stderr is not None
            threading.Thread(target=process.stderr.read, daemon=True).start()
            parts: list[list[float]] = []

            def post() -> None:
                connection.request(
                    "POST", "/classify", json.dumps({"inputs": text}), {"content-type": "application/json"}
                )
                response = connection.getresponse()
                response.read()
                parts.append([float(response.headers[f"x-{part}-time"]) for part in PARTS])

            _median_ms(lambda: loaded.model.classify([ids]), WARM_UP)
            _median_ms(post, WARM_UP)
            bare, served = [], []
            for _ in range(rounds):
                bare.append(_median_ms(lambda: loaded.model.classify([ids]), requests))
                served.append(_median_ms(post, requests))
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
            process.wait()
    added = [round(whole - alone, 3) for whole, alone in zip(served, bare, strict=True)]
    medians = [statistics.median(column) for column in zip(*parts, strict=True)]
    return {
        "tokens": len(ids),
        "bare_ms": bare,
        "http_ms": served,
        "added_ms": added,
        "server_ms": dict(zip(PARTS, medians, strict=True)),
        "limit_ms": LIMIT_MS,
        "passed": statistics.median(added) <= LIMIT_MS,
    }


def _serve(checkpoint: Path, directory: Path) -> subprocess.Popen[str]:
    config = {
        "version": 1,
        "server": {"port": 0, "ready_off_seconds": 0},
        "models": {"root": str(checkpoint.resolve().parent)},
        "deployments": {"measured": {"path": checkpoint.resolve().name, "role": "full"}},
        "tasks": {"measured": {"deployments": ["measured"], "full": "measured"}},
    }
    file = directory / "secateur.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "service", "serve", "--config", str(file)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _median_ms(call: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds) * 1000, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    report = measure(arguments.checkpoint, arguments.text, arguments.requests, arguments.rounds)
    print(json.dumps(report, indent=2))
    raise SystemExit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
