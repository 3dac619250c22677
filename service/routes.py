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
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from service import reports
from service.answers import (
    ClassifyResponse,
    ClassifyV1Response,
    ErrorResponse,
    Score,
    classify_document,
    predict_document,
    v1_document,
)
from service.body import is_form, read_form, read_json
from service.classification import classify
from service.errors import ApiError
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


def _body(shape: type[Shape]) -> dict[str, Any]:
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

    extra: what OpenAPI cannot see in the handler.
    """

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    answer: Any = dict[str, Any]
    extra: dict[str, Any] | None = None
    media: type[Response] = JSONAnswer


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
    Row("GET", "/metrics", get_metrics, str, media=PlainTextResponse),
)


class PlainRoute(APIRoute):
    """A route whose handler is called as it is: no dependencies to solve, no response to serialise again."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """The endpoint itself."""
        return self.endpoint


def add_routes(app: FastAPI) -> None:
    """Put the table into the application; HEAD is answered by the edge."""
    app.router.route_class = PlainRoute
    for row in ROUTES:
        app.add_api_route(
            row.path,
            row.handler,
            methods=[row.method],
            response_model=row.answer,
            response_class=row.media,
            responses={"default": {"model": ErrorResponse, "description": "The one error dialect"}},
            openapi_extra=row.extra,
        )
