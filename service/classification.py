"""One classify request, from its checked query to its response: select, admit, wait, predict, count."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.types import Receive

from service.answers import Answer
from service.deployments import Deployment, default_activation
from service.engine import Engine
from service.errors import ApiError
from service.jsonio import JSONAnswer
from service.metrics import MAX_LABEL_SERIES, Metrics
from service.middleware import Exchange, exchange_of
from service.prediction import ACTIVATIONS, DEFAULT_THRESHOLD, MULTI_LABEL, predict
from service.runtime import Runtime, runtime_of
from service.schemas import Query, check_kind
from service.selection import Selection, select
from service.ticket import Ticket


@dataclass(frozen=True)
class Times:
    """Durations of a finished request in seconds; the first three never sum to more than the total."""

    tokenization: float
    queue: float
    inference: float
    total: float


async def classify(request: Request, query: Query, document_of: Callable[[Answer], Any]) -> JSONAnswer:
    """Answer a query in the shape that `document_of` gives, and count it under its status. Raises ApiError."""
    runtime, exchange = runtime_of(request), exchange_of(request.scope)
    settings, metrics = runtime.settings, runtime.metrics
    deadline = exchange.arrived + _timeout_seconds(request, settings.limits.timeout_ms)
    unit = f"cls_{uuid4().hex}"
    selection = select(query, runtime.registry, settings.experiments, settings.default_task, unit)
    _note(runtime, exchange, selection, unit)
    deployment, code = selection.intended, 500
    try:
        deployment = selection.serving()
        check_kind(query, deployment.checkpoint.encoder.reads, settings.limits)
        _check_threshold(query, deployment)
        ticket = runtime.engine.submit(deployment, query, deadline, exchange.request_id)
        await _wait(ticket, runtime.engine, request.receive)
        answer = _answer(unit, query, selection, ticket)
        response = JSONAnswer(document_of(answer))
        times = _times(ticket, exchange.arrived)
        _label(response, answer, times)
        response.after = partial(_count, metrics, selection, answer, times)
        exchange.fields |= {
            "variant": deployment.name,
            "tokens": ticket.tokens,
            "queue_ms": round(times.queue * 1000, 3),
            "infer_ms": round(times.inference * 1000, 3),
        }
        code = 200
        return response
    except ApiError as error:
        code = error.status
        raise
    except asyncio.CancelledError:
        code = 499
        raise
    finally:
        metrics.inc("requests_total", task=deployment.task, variant=deployment.name, code=code)


def _timeout_seconds(request: Request, limit_ms: int) -> float:
    sent = request.headers.get("x-timeout-ms")
    if sent is None:
        return limit_ms / 1000
    if not (sent.isascii() and sent.isdigit() and 1 <= len(sent) <= 9 and int(sent) >= 1):
        raise ApiError("validation_failed", "x-timeout-ms is not a whole number of milliseconds", "x-timeout-ms")
    return min(int(sent), limit_ms) / 1000


def _note(runtime: Runtime, exchange: Exchange, selection: Selection, unit: str) -> None:
    exposure = selection.exposure
    exchange.fields |= {"id": unit, "task": selection.task.name, "variant": selection.intended.name}
    if exposure is not None:
        exchange.fields["experiment"] = exposure.name
        names = {"experiment": exposure.name, "arm": exposure.arm, "source": exposure.source}
        runtime.metrics.inc("experiment_assignments_total", **names)


def _check_threshold(query: Query, deployment: Deployment) -> None:
    if query.threshold is not None and deployment.checkpoint.problem_type != MULTI_LABEL:
        raise ApiError("validation_failed", "threshold is for multi-label tasks only", "threshold")


async def _wait(ticket: Ticket, engine: Engine, receive: Receive) -> None:
    watcher = asyncio.create_task(_watch(ticket, engine, receive))
    try:
        await ticket.future
    finally:
        watcher.cancel()
        engine.cancel(ticket)


async def _watch(ticket: Ticket, engine: Engine, receive: Receive) -> None:
    """Starlette does not tell a handler that its client has gone; the raw channel does."""
    while (await receive())["type"] != "http.disconnect":
        pass
    engine.cancel(ticket)


def _answer(unit: str, query: Query, selection: Selection, ticket: Ticket) -> Answer:
    checkpoint = ticket.deployment.checkpoint
    activation = query.activation or default_activation(checkpoint)
    threshold = DEFAULT_THRESHOLD if query.threshold is None else query.threshold
    predictions = [predict(row, checkpoint.problem_type, activation, threshold) for row in ticket.rows]
    return Answer(unit, query, selection.exposure, activation, ticket, predictions)


def _times(ticket: Ticket, arrived: float) -> Times:
    return Times(
        tokenization=ticket.tokenized_at - ticket.admitted_at,
        queue=ticket.started_at - ticket.tokenized_at,
        inference=ticket.finished_at - ticket.started_at,
        total=time.monotonic() - arrived,
    )


def _label(response: JSONAnswer, answer: Answer, times: Times) -> None:
    headers = response.headers
    headers["x-variant"] = answer.deployment.name
    if answer.exposure is not None:
        headers["x-experiment"] = answer.exposure.name
        headers["x-assignment-source"] = answer.exposure.source
    headers["x-tokenization-time"] = f"{times.tokenization * 1000:.3f}"
    headers["x-queue-time"] = f"{times.queue * 1000:.3f}"
    headers["x-inference-time"] = f"{times.inference * 1000:.3f}"
    headers["x-total-time"] = f"{times.total * 1000:.3f}"


def _count(metrics: Metrics, selection: Selection, answer: Answer, times: Times) -> None:
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
    _count_predictions(metrics, answer, names)


def _count_predictions(metrics: Metrics, answer: Answer, names: dict[str, str]) -> None:
    checkpoint = answer.deployment.checkpoint
    confidence_of = ACTIVATIONS[default_activation(checkpoint)]
    for row, prediction in zip(answer.ticket.rows, answer.predictions, strict=True):
        if len(answer.labels) <= MAX_LABEL_SERIES:
            metrics.inc("predictions_total", **names, label=answer.labels[prediction.label])
        if checkpoint.problem_type != "regression":
            metrics.observe("prediction_confidence", confidence_of(row)[prediction.label], **names)
