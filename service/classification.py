"""One classify request, from its checked query to its response: select, admit, wait, predict, count, record."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.types import Receive

from service.answers import Answer, Served
from service.cascade import cascade
from service.counting import Times, count
from service.deployments import Deployment, default_activation
from service.engine import Engine
from service.errors import ApiError
from service.experiments.recorder import Encounter
from service.jsonio import JSONAnswer
from service.middleware import Exchange, exchange_of
from service.prediction import DEFAULT_THRESHOLD, MULTI_LABEL, predict
from service.runtime import Runtime, runtime_of
from service.schemas import Query, check_kind
from service.selection import Selection, select
from service.shadow import samples_of
from service.ticket import Ticket


async def classify(request: Request, query: Query, document_of: Callable[[Answer], Any]) -> JSONAnswer:
    """Answer a query in the shape that `document_of` gives, and count it under its status. Raises ApiError."""
    runtime, exchange = runtime_of(request), exchange_of(request.scope)
    settings, metrics, engine = runtime.settings, runtime.metrics, runtime.engine
    deadline = exchange.arrived + _timeout_seconds(request, settings.limits.timeout_ms)
    unit = f"cls_{uuid4().hex}"
    selection = select(query, runtime.registry, settings, runtime.control, unit)
    _note(exchange, selection, unit)
    deployment, code = selection.intended, 500
    try:
        deployment = selection.serving()
        check_kind(query, deployment.checkpoint.encoder.reads, settings.limits)
        _check_threshold(query, deployment)
        ticket = engine.submit(deployment, query, deadline, exchange.request_id)
        await _wait(engine, request.receive, ticket)
        served, finished_at = await _through_cascade(engine, selection, ticket, request.receive)
        is_contended = selection.exposure is not None and runtime.shadow.shares(ticket.admitted_at, finished_at)
        answer = _answer(unit, query, selection, ticket, served)
        response = JSONAnswer(document_of(answer))
        times = _times(ticket, finished_at, exchange.arrived)
        _label(response, answer, times)
        response.after = partial(_finish, runtime, exchange, selection, answer, times, is_contended)
        exchange.fields |= {
            "variant": answer.variant,
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
        if code != 200 and selection.exposure is not None:
            # On the loop's next turn: the answer goes out first.
            encounter = _encounter(exchange, selection, query, unit, deployment)
            seconds = time.monotonic() - exchange.arrived
            asyncio.get_running_loop().call_soon(runtime.recorder.failed, encounter, code, seconds)


def _timeout_seconds(request: Request, limit_ms: int) -> float:
    sent = request.headers.get("x-timeout-ms")
    if sent is None:
        return limit_ms / 1000
    if not (sent.isascii() and sent.isdigit() and 1 <= len(sent) <= 9 and int(sent) >= 1):
        raise ApiError("validation_failed", "x-timeout-ms is not a whole number of milliseconds", "x-timeout-ms")
    return min(int(sent), limit_ms) / 1000


def _note(exchange: Exchange, selection: Selection, unit: str) -> None:
    exchange.fields |= {"id": unit, "task": selection.task.name, "variant": selection.intended.name}
    if selection.exposure is not None:
        exchange.fields["experiment"] = selection.exposure.name


def _check_threshold(query: Query, deployment: Deployment) -> None:
    if query.threshold is not None and deployment.checkpoint.problem_type != MULTI_LABEL:
        raise ApiError("validation_failed", "threshold is for multi-label tasks only", "threshold")


async def _wait(engine: Engine, receive: Receive, ticket: Ticket) -> None:
    watcher = asyncio.create_task(_watch(engine, receive, ticket))
    try:
        await ticket.future
    finally:
        watcher.cancel()
        engine.cancel(ticket)


async def _watch(engine: Engine, receive: Receive, ticket: Ticket) -> None:
    """Starlette does not tell a handler that its client has gone; the raw channel does."""
    while (await receive())["type"] != "http.disconnect":
        pass
    engine.cancel(ticket)


async def _through_cascade(
    engine: Engine, selection: Selection, ticket: Ticket, receive: Receive
) -> tuple[list[Served], float]:
    """What answered each item, and when the last pass ended. Only a cascade's candidate is asked about its doubts."""
    exposure = selection.exposure
    if exposure is not None and exposure.is_in("cascade") and ticket.deployment is selection.intended:
        control = selection.task.deployments[exposure.control]
        return await cascade(engine, ticket, control, exposure.experiment, partial(_wait, engine, receive))
    items = zip(ticket.items, ticket.rows, strict=True)
    return [Served(ticket.deployment, row, item.device_seconds) for item, row in items], ticket.finished_at


def _answer(unit: str, query: Query, selection: Selection, ticket: Ticket, served: list[Served]) -> Answer:
    checkpoint = ticket.deployment.checkpoint
    activation = query.activation or default_activation(checkpoint)
    threshold = DEFAULT_THRESHOLD if query.threshold is None else query.threshold
    predictions = [predict(each.row, checkpoint.problem_type, activation, threshold) for each in served]
    return Answer(unit, query, selection.exposure, activation, ticket, served, predictions)


def _times(ticket: Ticket, finished_at: float, arrived: float) -> Times:
    return Times(
        tokenization=ticket.tokenized_at - ticket.admitted_at,
        queue=ticket.started_at - ticket.tokenized_at,
        inference=finished_at - ticket.started_at,
        total=time.monotonic() - arrived,
    )


def _label(response: JSONAnswer, answer: Answer, times: Times) -> None:
    headers = response.headers
    headers["x-variant"] = answer.variant
    if answer.exposure is not None:
        headers["x-experiment"] = answer.exposure.name
        headers["x-assignment-source"] = answer.exposure.source
    if answer.cascade is not None:
        headers["x-cascade"] = answer.cascade
    headers["x-tokenization-time"] = f"{times.tokenization * 1000:.3f}"
    headers["x-queue-time"] = f"{times.queue * 1000:.3f}"
    headers["x-inference-time"] = f"{times.inference * 1000:.3f}"
    headers["x-total-time"] = f"{times.total * 1000:.3f}"


def _encounter(exchange: Exchange, selection: Selection, query: Query, unit: str, deployment: Deployment) -> Encounter:
    assert selection.exposure is not None
    reads = deployment.loaded.encoder.reads if deployment.loaded is not None else "text"
    return Encounter(unit, exchange.request_id, selection.exposure, query, reads)


def _finish(
    runtime: Runtime, exchange: Exchange, selection: Selection, answer: Answer, times: Times, is_contended: bool
) -> None:
    """Count, record and hand on to the shadow, after the answer has been sent."""
    count(runtime.metrics, selection, answer, times)
    exposure = answer.exposure
    if exposure is None:
        return
    encounter = _encounter(exchange, selection, answer.query, answer.id, answer.deployment)
    fingerprints = runtime.recorder.answered(encounter, answer, times, is_contended)
    if exposure.is_sampled(answer.id) and answer.deployment.name == exposure.control:
        candidate = selection.task.deployments[exposure.candidate]
        runtime.shadow.offer(samples_of(answer, fingerprints, candidate, time.monotonic()))
