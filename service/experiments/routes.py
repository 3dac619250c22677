"""The routes of experiments: the list, the report as JSON or as a page, changes by operators, and true labels."""

import asyncio

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from service.body import read_json
from service.deployments import Task
from service.errors import ApiError
from service.experiments import page
from service.experiments.document import ExperimentPatch, ReportLine, ReportList, as_json
from service.experiments.feedback import feedback_document, kept, parse_feedback, task_of
from service.experiments.refresh import Reports
from service.experiments.report import line
from service.jsonio import JSONAnswer
from service.middleware import exchange_of
from service.runtime import Runtime, runtime_of
from service.schemas import validated
from service.sections import Arm, ExperimentSettings
from service.storage.events import FeedbackRefusedError, StorageUnavailableError

VARY = {"vary": "accept"}
# What a comparison rests on: other than state and traffic it is part of a revision.
OF_A_REVISION = (ExperimentSettings.model_fields.keys() | Arm.model_fields.keys()) - ExperimentPatch.model_fields.keys()


async def get_experiments(request: Request) -> Response:
    """All experiments with their verdicts, as JSON or as a page."""
    lines = await _lines(request)
    if _wants_html(request):
        return _html(page.list_page(lines, _refreshes(request)))
    return JSONAnswer(ReportList(data=lines).model_dump(mode="json"), headers=VARY)


async def get_experiment(request: Request) -> Response:
    """The report of one experiment, as JSON or as a page."""
    wants_html = _wants_html(request)
    name = request.path_params["name"]
    try:
        report = await _reports(request, name).report(name)
    except StorageUnavailableError:
        raise _unavailable() from None
    return _html(page.render(report, _refreshes(request))) if wants_html else JSONAnswer(as_json(report), headers=VARY)


async def patch_experiment(request: Request) -> Response:
    """Pause, resume or stop an experiment, change its traffic, or end it with a winner. Answers the new report."""
    runtime, name = runtime_of(request), request.path_params["name"]
    reports = _reports(request, name)
    document = await read_json(request, runtime.settings.limits)
    for key in document if isinstance(document, dict) else ():
        if key in OF_A_REVISION:
            raise ApiError("revision_required", "this is part of a revision: change the file and raise revision", key)
    await asyncio.to_thread(runtime.control.patch, name, validated(ExperimentPatch, document))
    reports.forget(name)
    try:
        return JSONAnswer(as_json(await reports.report(name)))
    except StorageUnavailableError:
        raise _unavailable() from None


async def post_feedback(request: Request) -> Response:
    """Keep true labels; answers after they are committed."""
    runtime, metrics = runtime_of(request), runtime_of(request).metrics
    items, replace, place = parse_feedback(await read_json(request, runtime.settings.limits))
    if runtime.store is None:
        raise ApiError("experiment_not_found", "no experiment is configured, so labels have no use here")
    params = [place.format(index) for index in range(len(items))]
    key_name = exchange_of(request.scope).fields.get("key", "")
    labels = [kept(item, key_name) for item in items]
    try:
        met = await asyncio.to_thread(runtime.store.experiments_of, labels)
        tasks = [
            task_of(item.label, _tasks(runtime, met.get(label.id or label.request_id or "")), f"{param}.label").name
            for item, label, param in zip(items, labels, params, strict=True)
        ]
        result = await runtime.store.feedback(labels, replace)
    except FeedbackRefusedError as error:
        metrics.inc("feedback_total", task=tasks[error.item], outcome="conflict")
        raise ApiError(error.code, REFUSALS[error.code], params[error.item] or None) from None
    except StorageUnavailableError:
        raise _unavailable() from None
    for task, outcome in zip(tasks, result.outcomes, strict=True):
        metrics.inc("feedback_total", task=task, outcome=outcome)
    return JSONAnswer(feedback_document(result))


def _tasks(runtime: Runtime, experiment: str | None) -> list[Task]:
    """The task that gave an answer; while that is not recorded, every task with an experiment."""
    experiments = runtime.settings.experiments
    asked = [experiments[experiment]] if experiment in experiments else experiments.values()
    names = {settings.task for settings in asked}
    return [task for name, task in runtime.registry.tasks.items() if name in names]


REFUSALS = {
    "feedback_conflict": "the item has another label already: send replace to change it",
    "ambiguous_request_id": "several answers have this request id: name the answer by its id",
}


def prefers_html(accept: str) -> bool:
    """Whether an Accept header ranks text/html above application/json; a tie, as with */*, is JSON."""
    ranked = {"text/html": (0, 0.0), "application/json": (0, 0.0)}
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((_quality(piece[2:]) for piece in parameters if piece.startswith("q=")), 1.0)
        for name, (rank, _) in ranked.items():
            ranges = (name, f"{name.partition('/')[0]}/*", "*/*")
            found = len(ranges) - ranges.index(media) if media in ranges else 0
            if found > rank:
                ranked[name] = found, quality
    return ranked["text/html"][1] > ranked["application/json"][1]


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _wants_html(request: Request) -> bool:
    wanted = request.query_params.get("format")
    if wanted not in (None, "html", "json"):
        raise ApiError("validation_failed", "format is html or json", "format")
    return prefers_html(request.headers.get("accept", "")) if wanted is None else wanted == "html"


def _refreshes(request: Request) -> bool:
    """Whether a page may ask for itself again; `?refresh=off` holds it still."""
    return request.query_params.get("refresh") != "off"


def _html(text: str) -> Response:
    return HTMLResponse(text, headers={"content-security-policy": page.CSP, **VARY})


def _reports(request: Request, name: str) -> Reports:
    runtime = runtime_of(request)
    if runtime.reports is None or name not in runtime.control.experiments:
        raise ApiError("experiment_not_found", "no experiment has this name", "name")
    return runtime.reports


async def _lines(request: Request) -> list[ReportLine]:
    runtime = runtime_of(request)
    try:
        return [line(await _reports(request, name).report(name)) for name in runtime.control.experiments]
    except StorageUnavailableError:
        raise _unavailable() from None


def _unavailable() -> ApiError:
    return ApiError("storage_unavailable", "the database does not answer, nothing was changed")
