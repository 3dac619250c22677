"""The route table: thin handlers over the parts that do the work."""

import time
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response

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
from service.body import read_json
from service.classification import classify
from service.errors import ApiError
from service.jsonio import JSONAnswer
from service.runtime import runtime_of
from service.schemas import ClassifyRequest, ClassifyV1Request, PredictRequest, Query, Shape, check_texts, parse

router = APIRouter(responses={"default": {"model": ErrorResponse, "description": "The one error dialect"}})
STARTED = int(time.time())


def _body(shape: type[Shape]) -> dict[str, Any]:
    """The OpenAPI entry of a body that the handler reads itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": shape.model_json_schema()}}}}


async def _query(request: Request, shape: type[Shape]) -> Query:
    limits = runtime_of(request).settings.limits
    query = parse(shape, await read_json(request, limits), request.query_params.get("task"))
    check_texts(query, limits)
    return query


@router.post("/classify", response_model=ClassifyResponse, openapi_extra=_body(ClassifyRequest))
async def post_classify(request: Request) -> Response:
    """Classify texts with a task's deployment."""
    return await classify(request, await _query(request, ClassifyRequest), classify_document)


@router.post("/v1/classify", response_model=ClassifyV1Response, openapi_extra=_body(ClassifyV1Request))
async def post_v1_classify(request: Request) -> Response:
    """Classify texts in the shape of vLLM and SGLang; `?task=` names a task."""
    return await classify(request, await _query(request, ClassifyV1Request), v1_document)


@router.post("/predict", response_model=list[Score] | list[list[Score]], openapi_extra=_body(PredictRequest))
async def post_predict(request: Request) -> Response:
    """Classify texts in the shape of TEI and Hugging Face inference; `?task=` names a task."""
    return await classify(request, await _query(request, PredictRequest), predict_document)


@router.get("/livez")
async def get_livez(request: Request) -> Response:
    """Answers 200 while the event loop and the worker thread beat."""
    runtime_of(request).check_live()
    return JSONAnswer({"status": "live"})


@router.get("/readyz")
@router.get("/health")
async def get_readyz(request: Request) -> Response:
    """Answers 200 while requests can be served."""
    runtime = runtime_of(request)
    runtime.check_ready()
    states = {name: deployment.state.value for name, deployment in runtime.registry.deployments.items()}
    return JSONAnswer({"status": runtime.status, "deployments": states})


@router.get("/info")
async def get_info(request: Request) -> Response:
    """Version, device, tasks with their labels, and limits."""
    return JSONAnswer(reports.info(runtime_of(request)))


@router.get("/v1/models")
async def get_models(request: Request) -> Response:
    """The deployments that can answer now, as an OpenAI list."""
    return JSONAnswer(reports.openai_models(runtime_of(request).registry, STARTED))


@router.get("/deployments")
async def get_deployments(request: Request) -> Response:
    """State, bytes, experts and provenance of every deployment."""
    registry = runtime_of(request).registry
    documents = [reports.deployment_document(registry, deployment) for deployment in registry.deployments.values()]
    return JSONAnswer({"object": "list", "data": documents})


@router.get("/deployments/{name}")
async def get_deployment(request: Request, name: str) -> Response:
    """State, bytes, experts and provenance of one deployment."""
    registry = runtime_of(request).registry
    if name not in registry.deployments:
        raise ApiError("deployment_not_found", "no deployment has this name", "name")
    return JSONAnswer(reports.deployment_document(registry, registry.deployments[name]))


@router.get("/metrics")
async def get_metrics(request: Request) -> Response:
    """Prometheus text format 0.0.4."""
    runtime = runtime_of(request)
    runtime.publish()
    return Response(runtime.metrics.expose(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
