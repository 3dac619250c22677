"""Records to send, and what came of them."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from service.metrics import Metrics
from service.storage.events import ExposureEvent, Feedback, FeedbackResult, PairEvent, Tally
from service.storage.store import Store

SECONDS = 20
Key = tuple[str, str, str, str]


def exposure(id: str, item: int = 0, **changes: Any) -> ExposureEvent:
    """An item that the arm `small` answered with `yes`, in 8 ms."""
    fields: dict[str, Any] = {
        "request_id": f"request-{id}",
        "at": 1000.0,
        "experiment": "e",
        "revision": 1,
        "unit": f"unit-{id}",
        "intended": "small",
        "served": "small",
        "source": "subject",
        "status": 200,
        "label": "yes",
        "score": 0.75,
        "tokens": 12,
        "queue_ms": 1.0,
        "infer_ms": 5.0,
        "total_ms": 8.0,
        "device_ms": 2.0,
        "fingerprint": f"fingerprint-{id}-{item}",
    }
    return ExposureEvent(id=id, item=item, **(fields | changes))


def pair(id: str, item: int = 0, **changes: Any) -> PairEvent:
    """An item on which both arms say `yes`."""
    fields: dict[str, Any] = {
        "at": 1000.0,
        "experiment": "e",
        "revision": 1,
        "unit": f"fingerprint-{id}-{item}",
        "primary_label": "yes",
        "candidate_label": "yes",
        "outcome": "agree",
        "mean_abs_dp": 0.25,
        "max_abs_dp": 0.5,
        "primary_ms": 8.0,
        "candidate_ms": 4.0,
    }
    return PairEvent(id=id, item=item, **(fields | changes))


def label(id: str, label: str = "yes", item: int = 0) -> Feedback:
    return Feedback(id, None, item, label)


def label_request(request_id: str, label: str = "yes", item: int = 0) -> Feedback:
    return Feedback(None, request_id, item, label)


def send(store: Store, *labels: Feedback, replace: bool = False) -> tuple[str, ...]:
    """Feedback in one call."""

    async def call() -> FeedbackResult:
        return await store.feedback(labels, replace)

    return asyncio.run(call()).outcomes


def counts(tallies: Sequence[Tally]) -> dict[Key, int]:
    """n by name, arm, truth and predicted."""
    return {(tally.name, tally.arm, tally.truth, tally.predicted): tally.n for tally in tallies}


def number(store: Store, name: str, arm: str = "", truth: str = "", predicted: str = "") -> int:
    """One tally of the experiment `e`."""
    return counts(store.tallies("e", 1)).get((name, arm, truth, predicted), 0)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """A metric, 0 if nothing was counted."""
    return metrics.registry.get_sample_value(f"secateur_{name}", labels) or 0.0


def flushed(store: Store, metrics: Metrics) -> Store:
    """The store, once it has written all it was given."""
    wait_until(lambda: sample(metrics, "event_queue_depth") == 0)
    return store


def wait_until(holds: Callable[[], object]) -> None:
    """Wait, a while at most, and fail if it never holds."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
