"""What an experiment keeps of each request that met it: one exposure per item, by the arm it was meant for.

Called after the answer has been sent. A request that failed is kept too: it is an error of the arm it was assigned to.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.images import ImageError, from_base64
from service.answers import Answer
from service.counting import Times
from service.metrics import Metrics
from service.prediction import MULTI_LABEL, Prediction
from service.schemas import Input, Picture, Query
from service.selection import Exposure
from service.storage.events import Event, ExposureEvent
from service.storage.store import Store

# The answers that count as errors of an arm; the others are the client's, or nobody's.
ERROR_STATUSES = frozenset({500, 503, 504})


@dataclass(frozen=True)
class Encounter:
    """A request that met an experiment. id: server-made; request_id: the client's or ours. reads: `text` or `image`."""

    id: str
    request_id: str
    exposure: Exposure
    query: Query
    reads: str


class Recorder:
    """Turns requests into events for the store; without a store there is nothing to keep."""

    def __init__(self, store: Store | None, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics

    def record(self, event: Event) -> None:
        """Keep an event if there is room. Any thread; never blocks, never raises."""
        if self._store is not None:
            self._store.record(event)

    def answered(self, encounter: Encounter, answer: Answer, times: Times, contended: bool) -> list[str]:
        """Record a request that was answered, and return the fingerprints of its items.

        contended: a shadow shared the device meanwhile.
        """
        problem_type = answer.deployment.checkpoint.problem_type
        events = self._events(encounter, 200, times.total)
        items = zip(events, answer.ticket.items, answer.served, answer.predictions, strict=True)
        for event, item, served, prediction in items:
            self.record(
                replace(
                    event,
                    served=served.deployment.name,
                    label=recorded_label(answer.labels, prediction, problem_type),
                    score=prediction.values[prediction.label],
                    tokens=item.tokens,
                    queue_ms=times.queue * 1000,
                    infer_ms=times.inference * 1000,
                    device_ms=served.device_seconds * 1000,
                    contended=contended,
                    cascade=served.way,
                )
            )
        return [event.fingerprint for event in events]

    def failed(self, encounter: Encounter, status: int, seconds: float) -> None:
        """Record a request that nothing answered, if its status is an error of the arm."""
        if status in ERROR_STATUSES:
            for event in self._events(encounter, status, seconds):
                self.record(event)

    def _events(self, encounter: Encounter, status: int, seconds: float) -> list[ExposureEvent]:
        """One per item, as if nothing had answered it; the request is counted as assigned."""
        exposure, at = encounter.exposure, time.time()
        names = {"experiment": exposure.name, "arm": exposure.arm, "source": exposure.source}
        self._metrics.inc("experiment_assignments_total", **names)
        prints = self._fingerprints(encounter)
        units = self._units(encounter, prints)
        return [
            ExposureEvent(
                id=encounter.id,
                item=index,
                request_id=encounter.request_id,
                at=at,
                experiment=exposure.name,
                revision=exposure.revision,
                unit=unit,
                intended=exposure.arm,
                served=None,
                source=exposure.source,
                status=status,
                label=None,
                score=None,
                tokens=0,
                queue_ms=None,
                infer_ms=None,
                total_ms=seconds * 1000,
                device_ms=None,
                fingerprint=fingerprint,
            )
            for index, (fingerprint, unit) in enumerate(zip(prints, units, strict=True))
        ]

    def _fingerprints(self, encounter: Encounter) -> list[str]:
        return [self._fingerprint(content_of(given, encounter.reads)) for given in encounter.query.inputs]

    def _fingerprint(self, content: str | bytes) -> str:
        return "" if self._store is None else self._store.fingerprint(content)

    def _units(self, encounter: Encounter, prints: list[str]) -> list[str]:
        """What counts once: a shadow compares inputs, the other modes compare what subjects met."""
        if encounter.exposure.experiment.mode == "shadow":
            return prints
        subject = encounter.query.subject
        return [encounter.id if subject is None else self._fingerprint(subject)] * len(prints)


def recorded_label(labels: Sequence[str], prediction: Prediction, problem_type: str) -> str:
    """An item's label as it is kept; multi-label: the names as a sorted JSON list, so that equal sets are equal."""
    if problem_type != MULTI_LABEL:
        return labels[prediction.label]
    return json.dumps(sorted(labels[i] for i in prediction.labels), ensure_ascii=False)


def content_of(given: Input, reads: str) -> str | bytes:
    """What an input says however it was sent: the text, or the bytes of the image's file."""
    source = given.data if isinstance(given, Picture) else given
    if reads == "text" or isinstance(source, bytes):
        return source
    try:
        return from_base64(source)
    except ImageError:
        return source
