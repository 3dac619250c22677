"""What an answered request adds to the metrics."""

from dataclasses import dataclass

from service.answers import Answer
from service.deployments import default_activation
from service.metrics import MAX_LABEL_SERIES, Metrics
from service.prediction import ACTIVATIONS
from service.selection import Selection


@dataclass(frozen=True)
class Times:
    """Durations of a finished request in seconds; the first three never sum to more than the total."""

    tokenization: float
    queue: float
    inference: float
    total: float


def count(metrics: Metrics, selection: Selection, answer: Answer, times: Times) -> None:
    """Count a request that was answered 200, under the deployment that was asked first."""
    deployment, ticket = answer.deployment, answer.ticket
    names = {"task": deployment.task, "variant": deployment.name}
    metrics.observe("request_duration_seconds", times.total, **names)
    metrics.observe("tokenization_duration_seconds", times.tokenization, **names)
    metrics.observe("queue_duration_seconds", times.queue, **names)
    metrics.observe("inference_duration_seconds", times.inference, **names)
    metrics.inc("tokens_total", ticket.tokens, **names, kind="real")
    for item in ticket.items:
        metrics.observe("input_tokens", item.length, task=deployment.task)
        if item.truncated:
            metrics.inc("truncated_inputs_total", task=deployment.task)
    if deployment is not selection.intended:
        served = {"intended": selection.intended.name, "served": deployment.name}
        metrics.inc("fallbacks_total", task=deployment.task, **served, reason=selection.intended.state.value)
    _count_items(metrics, answer)


def _count_items(metrics: Metrics, answer: Answer) -> None:
    checkpoint = answer.deployment.checkpoint
    confidence_of = ACTIVATIONS[default_activation(checkpoint)]
    for served, prediction in zip(answer.served, answer.predictions, strict=True):
        names = {"task": served.deployment.task, "variant": served.deployment.name}
        if len(answer.labels) <= MAX_LABEL_SERIES:
            metrics.inc("predictions_total", **names, label=answer.labels[prediction.label])
        if checkpoint.problem_type != "regression":
            metrics.observe("prediction_confidence", confidence_of(served.row)[prediction.label], **names)
        if served.way is not None:
            metrics.inc("cascade_items_total", task=served.deployment.task, outcome=served.way)
