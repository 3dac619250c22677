"""The route table: thin handlers over the parts that do the work.

Handlers read their own bodies and build their own responses; FastAPI contributes the schema, not a second validation.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Match, Route

from service import reports
from service.answers import classify_document, predict_document, v1_document
from service.body import is_form, read_form, read_json
from service.classification import classify
from service.documents import ClassifyResponse, ClassifyV1Response, ErrorResponse, Score
from service.errors import ApiError
from service.experiments.document import ExperimentPatch, Report, ReportList
from service.experiments.feedback import FeedbackRequest, FeedbackResponse
from service.experiments.routes import get_experiment, get_experiments, patch_experiment, post_feedback
from service.jsonio import JSONAnswer
from service.runtime import runtime_of
from service.schemas import (
    FORM_IMAGE,
    ClassifyRequest,
    ClassifyV1Request,
    PredictRequest,
    Query,
    Shape,
    check_inputs,
    parse,
    parse_form,
)

STARTED = int(time.time())
TEXT = {"schema": {"type": "string"}}
NAME = {"parameters": [{"name": "name", "in": "path", "required": True, **TEXT}]}
TASK = {"parameters": [{"name": "task", "in": "query", "required": False, **TEXT}]}
FORMAT = {"name": "format", "in": "query", "required": False, "schema": {"type": "string", "enum": ["html", "json"]}}
PAGE = {"responses": {"200": {"content": {"text/html": TEXT}}}}


def _body(shape: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry of a body that the handler reads itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": shape.model_json_schema()}}}}


def _classify_body() -> dict[str, Any]:
    """As `_body`, for JSON or a form with one or more images, in which the other fields are text."""
    described = _body(ClassifyRequest)
    fields = {name: TEXT["schema"] for name in ClassifyRequest.model_fields if name != "inputs"}
    image = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
    form = {"type": "object", "properties": {FORM_IMAGE: image, **fields}, "required": [FORM_IMAGE]}
    described["requestBody"]["content"]["multipart/form-data"] = {"schema": form}
    return described


async def _query(request: Request, shape: type[Shape]) -> Query:
    limits = runtime_of(request).settings.limits
    if shape is ClassifyRequest and is_form(request):
        query = parse_form(await read_form(request, limits, limits.max_inputs + len(ClassifyRequest.model_fields)))
    else:
        query = parse(shape, await read_json(request, limits), request.query_params.get("task"))
    check_inputs(query, limits)
    return query


async def post_classify(request: Request) -> Response:
    """Classify texts or images with a task's deployment."""
    return await classify(request, await _query(request, ClassifyRequest), classify_document)


async def post_v1_classify(request: Request) -> Response:
    """Classify texts in the shape of vLLM and SGLang; `?task=` names a task."""
    return await classify(request, await _query(request, ClassifyV1Request), v1_document)


async def post_predict(request: Request) -> Response:
    """Classify texts in the shape of TEI and Hugging Face inference; `?task=` names a task."""
    return await classify(request, await _query(request, PredictRequest), predict_document)


async def get_livez(request: Request) -> Response:
    """Answers 200 while the event loop and the worker thread beat."""
    runtime_of(request).check_live()
    return JSONAnswer({"status": "live"})


async def get_readyz(request: Request) -> Response:
    """Answers 200 while requests can be served."""
    runtime = runtime_of(request)
    runtime.check_ready()
    states = {name: deployment.state.value for name, deployment in runtime.registry.deployments.items()}
    return JSONAnswer({"status": runtime.status, "deployments": states})


async def get_info(request: Request) -> Response:
    """Version, device, tasks with their labels, and limits."""
    return JSONAnswer(reports.info(runtime_of(request)))


async def get_models(request: Request) -> Response:
    """The deployments that can answer now, as an OpenAI list."""
    return JSONAnswer(reports.openai_models(runtime_of(request).registry, STARTED))


async def get_deployments(request: Request) -> Response:
    """State, bytes, experts and provenance of every deployment."""
    registry = runtime_of(request).registry
    documents = [reports.deployment_document(registry, deployment) for deployment in registry.deployments.values()]
    return JSONAnswer({"object": "list", "data": documents})


async def get_deployment(request: Request) -> Response:
    """State, bytes, experts and provenance of one deployment."""
    registry, name = runtime_of(request).registry, request.path_params["name"]
    if name not in registry.deployments:
        raise ApiError("deployment_not_found", "no deployment has this name", "name")
    return JSONAnswer(reports.deployment_document(registry, registry.deployments[name]))


async def get_metrics(request: Request) -> Response:
    """Prometheus text format 0.0.4."""
    runtime = runtime_of(request)
    runtime.publish()
    return Response(runtime.metrics.expose(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


@dataclass(frozen=True)
class Row:
    """One route. answer: the model of its 200 response; media: the class that says its type.

    extra: what OpenAPI cannot see in the handler. is_admin: unknown (404, not 405) unless `admin.enabled`.
    """

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    answer: Any = dict[str, Any]
    extra: dict[str, Any] | None = None
    media: type[Response] = JSONAnswer
    is_admin: bool = False


ROUTES = (
    Row("POST", "/classify", post_classify, ClassifyResponse, _classify_body()),
    Row("POST", "/v1/classify", post_v1_classify, ClassifyV1Response, _body(ClassifyV1Request) | TASK),
    Row("POST", "/predict", post_predict, list[Score] | list[list[Score]], _body(PredictRequest) | TASK),
    Row("GET", "/livez", get_livez),
    Row("GET", "/readyz", get_readyz),
    Row("GET", "/health", get_readyz),
    Row("GET", "/info", get_info),
    Row("GET", "/v1/models", get_models),
    Row("GET", "/deployments", get_deployments),
    Row("GET", "/deployments/{name}", get_deployment, extra=NAME),
    Row("POST", "/feedback", post_feedback, FeedbackResponse, _body(FeedbackRequest)),
    Row("GET", "/experiments", get_experiments, ReportList, PAGE | {"parameters": [FORMAT]}),
    Row("GET", "/experiments/{name}", get_experiment, Report, PAGE | {"parameters": [*NAME["parameters"], FORMAT]}),
    Row("PATCH", "/experiments/{name}", patch_experiment, Report, _body(ExperimentPatch) | NAME, is_admin=True),
    Row("GET", "/metrics", get_metrics, str, media=PlainTextResponse),
)


class PlainRoute(APIRoute):
    """A route whose handler is called as it is: no dependencies to solve, no response to serialise again."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """The endpoint itself."""
        return self.endpoint


async def _no_such_route(request: Request) -> Response:
    """What an admin route answers where there is no admin; its path has other methods, so that it must be said."""
    raise ApiError("route_not_found", "no such route")


def methods_of(request: Request) -> list[str]:
    """What the request's path answers to; the framework would name the methods of its first route only."""
    routes = [route for route in request.app.routes if isinstance(route, Route) and route.endpoint != _no_such_route]
    found = {
        method
        for route in routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


def add_routes(app: FastAPI, is_admin: bool) -> None:
    """Put the table into the application; HEAD is answered by the edge."""
    app.router.route_class = PlainRoute
    for row in ROUTES:
        exists = is_admin or not row.is_admin
        app.add_api_route(
            row.path,
            row.handler if exists else _no_such_route,
            methods=[row.method],
            include_in_schema=exists,
            response_model=row.answer,
            response_class=row.media,
            responses={"default": {"model": ErrorResponse, "description": "The one error dialect"}},
            openapi_extra=row.extra,
        )
