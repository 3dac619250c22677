"""What a finished request answers, in each of the three response shapes."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from service.deployments import Deployment
from service.prediction import Activation, Prediction
from service.schemas import Query
from service.selection import Exposure
from service.storage.events import CascadeOutcome
from service.ticket import Ticket

MIXED: Literal["mixed"] = "mixed"


@dataclass(frozen=True, slots=True)
class Served:
    """What answered one input. row: its logits. way: through a cascade, None outside of one.

    device_seconds: its share of all passes that it was in.
    """

    deployment: Deployment
    row: list[float]
    device_seconds: float
    way: CascadeOutcome | None = None


@dataclass(frozen=True)
class Answer:
    """One request's result. ticket: its first, in a cascade the candidate's. served, predictions: one per input."""

    id: str
    query: Query
    exposure: Exposure | None
    activation: Activation
    ticket: Ticket
    served: list[Served]
    predictions: list[Prediction]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def deployment(self) -> Deployment:
        return self.ticket.deployment

    @property
    def variant(self) -> str:
        """The deployment that answered every input, or `mixed`."""
        names = {served.deployment.name for served in self.served}
        return names.pop() if len(names) == 1 else MIXED

    @property
    def cascade(self) -> CascadeOutcome | Literal["mixed"] | None:
        """The way that every input went through a cascade, or `mixed`; None outside of one."""
        ways = {served.way for served in self.served}
        return ways.pop() if len(ways) == 1 else MIXED

    @property
    def labels(self) -> tuple[str, ...]:
        return self.deployment.checkpoint.labels

    @property
    def usage(self) -> dict[str, int]:
        tokens = self.ticket.tokens
        return {"prompt_tokens": tokens, "total_tokens": tokens}

    def scores(self, prediction: Prediction) -> list[dict[str, Any]]:
        """Classes and activated values, greatest logit first, at most `top_k`."""
        ids = prediction.order[: self.query.top_k]
        return [{"label": self.labels[i], "score": prediction.values[i]} for i in ids]


def classify_document(answer: Answer) -> dict[str, Any]:
    """The native shape."""
    exposure = answer.exposure
    return {
        "id": answer.id,
        "object": "list",
        "created": answer.created,
        "model": answer.variant,
        "task": answer.deployment.task,
        "variant": answer.variant,
        "experiment": None
        if exposure is None
        else {
            "name": exposure.name,
            "revision": exposure.revision,
            "arm": exposure.arm,
            "source": exposure.source,
        },
        "activation": answer.activation,
        "data": [
            {
                "index": item.index,
                "label": answer.labels[prediction.label],
                "score": prediction.values[prediction.label],
                "labels": [answer.labels[i] for i in prediction.labels],
                "scores": answer.scores(prediction),
                "probs": prediction.values if answer.query.top_k is None else None,
                "num_classes": len(answer.labels),
                "variant": served.deployment.name,
                "tokens": item.tokens,
                "truncated": item.truncated,
            }
            for item, served, prediction in zip(answer.ticket.items, answer.served, answer.predictions, strict=True)
        ],
        "usage": answer.usage,
    }


def v1_document(answer: Answer) -> dict[str, Any]:
    """The shape of vLLM and SGLang."""
    return {
        "id": answer.id,
        "object": "list",
        "created": answer.created,
        "model": answer.variant,
        "data": [
            {
                "index": index,
                "label": answer.labels[prediction.label],
                "probs": prediction.values,
                "num_classes": len(answer.labels),
            }
            for index, prediction in enumerate(answer.predictions)
        ],
        "usage": answer.usage,
    }


def predict_document(answer: Answer) -> list[Any]:
    """The shape of TEI: a list of scores for a single text, a list of such lists for a batch."""
    lists = [answer.scores(prediction) for prediction in answer.predictions]
    return lists if answer.query.is_batch else lists[0]
