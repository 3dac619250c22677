"""What keeping records costs: writing a million answers and pairs, acknowledging labels, reading a report's inputs.

    python -m benchmarks.records [--records 1000000] [--url postgresql://...] [--json FILE]

Without --url a new SQLite file in a temporary folder is used, and deleted in the end. The tallies are checked against
what was sent before any time is printed.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from service.metrics import Metrics
from service.sections import Storage
from service.storage.events import Event, ExposureEvent, Feedback, PairEvent, PairOutcome
from service.storage.store import Store

QUEUE = 20_000
LABELS = 200
KEY = b"a key for measuring, not a secret"


def events(records: int, seed: int) -> Iterator[Event]:
    """A shadow's records: an answer and its pair in turn, one pair in thirty disagreeing."""
    rng = random.Random(seed)
    start = time.time()
    for number in range(records // 2):
        id, unit, at = f"cls_{number:032x}", f"{rng.getrandbits(128):032x}", start + number / 1000
        milliseconds = rng.lognormvariate(2, 0.3)
        agrees = number % 30 != 0
        candidate = "positive" if agrees else "negative"
        outcome: PairOutcome = "agree" if agrees else "disagree"
        times = 1.0, milliseconds - 1, milliseconds, 2.0
        answer = 200, "positive", 0.9, 40
        asked = "shadowed", 1, unit, "full", "full"
        yield ExposureEvent(id, 0, id, at, *asked, "subject", *answer, *times, unit, contended=number % 2 == 0)
        labels = "positive", candidate, outcome
        yield PairEvent(id, 0, at, "shadowed", 1, unit, *labels, 0.01, 0.02, milliseconds, milliseconds / 2)


def fill(store: Store, metrics: Metrics, records: int) -> float:
    """Seconds until all records were committed, at the pace of the writer."""
    start = time.perf_counter()
    for number, event in enumerate(events(records, seed=0)):
        if number % 1000 == 0:
            _wait(metrics, QUEUE - 1000)
        store.record(event)
    _wait(metrics, 0)
    return time.perf_counter() - start


def _wait(metrics: Metrics, depth: int) -> None:
    while (metrics.registry.get_sample_value("secateur_event_queue_depth") or 0) > depth:
        time.sleep(0.005)


async def acknowledge(store: Store) -> list[float]:
    """Milliseconds from sending a label to knowing that it was committed, one after another, sorted."""
    found = []
    for number in range(LABELS):
        start = time.perf_counter()
        result = await store.feedback([Feedback(f"cls_{number:032x}", None, 0, "positive")], replace=False)
        found.append(1000 * (time.perf_counter() - start))
        assert result.outcomes == ("matched",)
    return sorted(found)


def measure(url: str, records: int) -> dict[str, float]:
    """All figures for one database, which must be empty."""
    metrics = Metrics()
    store = Store.open(Storage(url=url, queue_events=QUEUE), KEY, metrics)
    try:
        store.declare("shadowed", 1, "shadow", "full", "pruned")
        seconds = fill(store, metrics, records)
        labels = asyncio.run(acknowledge(store))
        counted = {(tally.name, tally.arm, tally.predicted): tally.n for tally in store.tallies("shadowed", 1)}
        assert counted["requests", "full", ""] == counted["units", "full", ""] == records // 2
        assert counted["pairs", "", "agree"] + counted["pairs", "", "disagree"] == records // 2
        reads: dict[str, Callable[[], object]] = {
            "tallies": lambda: store.tallies("shadowed", 1),
            "latencies of the control": lambda: store.latencies("shadowed", 1, "full"),
            "latencies of the candidate": lambda: store.candidate_latencies("shadowed", 1),
            "disagreements": lambda: store.disagreements("shadowed", 1),
            "looks and steps": lambda: (store.looks("shadowed", 1), store.steps("shadowed", 1)),
        }
        milliseconds = {f"{name}, ms": 1000 * _timed(read) for name, read in reads.items()}
        return {
            "records": records,
            "written per second": records / seconds,
            "label acknowledged, median ms": labels[LABELS // 2],
            "label acknowledged, p95 ms": labels[int(0.95 * LABELS)],
            **milliseconds,
            "inputs of a report, ms": sum(milliseconds.values()),
        }
    finally:
        store.close()


def _timed(read: Callable[[], object]) -> float:
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, and write the figures if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--url")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.url or f"sqlite:///{folder}/records.db", arguments.records)
        if not arguments.url:
            size = sum(file.stat().st_size for file in Path(folder).glob("records.db*"))
            figures["bytes per record"] = size / arguments.records
    for name, figure in figures.items():
        print(f"{name:32} {figure:,.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
