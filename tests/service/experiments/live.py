"""A running service with one experiment on the toy task `mood`, and what the tests do with it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import torch

from models.classifier import Output
from service.experiments import refresh
from tests.service.conftest import SECONDS, Harness
from tests.service.toys import ToyLoader, ToyModel, toy_checkpoint

# A text that holds this word is answered differently by the candidate.
SWAY = 77
# A second deployment for the multi-label task.
TOPICS = {
    "deployments": {"topics-pruned": {"path": "topics-full", "role": "pruned"}},
    "tasks": {"topics": {"deployments": ["topics-full", "topics-pruned"]}},
}


class SwayedModel(ToyModel):
    """Counts digits like its parent, and moves every class by one where the word 77 stands."""

    def classify(self, sequences: Sequence[Sequence[int]]) -> Output:
        output = super().classify(sequences)
        rows = [row.roll(1) if SWAY in ids else row for row, ids in zip(output.logits_BC, sequences, strict=True)]
        return Output(torch.stack(rows), output.routed_slots, output.dropped_slots)


def swayed_loader() -> ToyLoader:
    """The pruned deployment can be told to disagree."""
    return ToyLoader({"mood-pruned": lambda: toy_checkpoint(model=SwayedModel(kept=2))})


def split(**fields: Any) -> dict[str, Any]:
    """Half of the subjects each; the pruned deployment is the candidate."""
    arms = [{"deployment": "mood-full", "weight": 50}, {"deployment": "mood-pruned", "weight": 50}]
    return {"exp": {"task": "mood", "mode": "split", "arms": arms, **fields}}


def shadow(**fields: Any) -> dict[str, Any]:
    """Everything is answered by the full deployment, and run again by the pruned one."""
    arms = [{"deployment": "mood-full"}, {"deployment": "mood-pruned"}]
    return {"exp": {"task": "mood", "mode": "shadow", "arms": arms, **fields}}


@contextmanager
def no_cache() -> Iterator[None]:
    """Reports are built for each request, so that a test sees what it did."""
    fresh, refresh.FRESH_SECONDS = refresh.FRESH_SECONDS, 0.0
    try:
        yield
    finally:
        refresh.FRESH_SECONDS = fresh


def report_of(harness: Harness, name: str = "exp") -> dict[str, Any]:
    """The report as a client gets it."""
    response = harness.client.get(f"/experiments/{name}")
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def report_when(harness: Harness, holds: Callable[[dict[str, Any]], bool], name: str = "exp") -> dict[str, Any]:
    """The first report of which something holds: records are written a moment after their answers."""
    deadline = time.monotonic() + SECONDS
    while not holds(report := report_of(harness, name)):
        assert time.monotonic() < deadline, report
        time.sleep(0.05)
    return report


def send_labels(harness: Harness, items: Sequence[dict[str, Any]], **fields: Any) -> httpx.Response:
    """Send true labels as one request."""
    return harness.client.post("/feedback", json={"items": list(items), **fields})


def arm_of(report: dict[str, Any], deployment: str) -> dict[str, Any]:
    """One arm of a report."""
    found: dict[str, Any] = next(arm for arm in report["arms"] if arm["deployment"] == deployment)
    return found
