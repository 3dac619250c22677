"""What the service says about itself: tasks, deployments, limits."""

from typing import Any

import service as package
from service.deployments import Deployment, Registry, Task, default_activation
from service.runtime import Runtime
from service.savings import dtype_name, saved_bytes

OWNER = "secateur"


def info(runtime: Runtime) -> dict[str, Any]:
    """The body of `GET /info`. A task without a ready deployment has no labels yet."""
    settings = runtime.settings
    checkpoints = [d.checkpoint for d in runtime.registry.deployments.values() if d.is_ready]
    return {
        "version": package.__version__,
        "device": str(checkpoints[0].model.device) if checkpoints else settings.models.device,
        "dtype": dtype_name(checkpoints[0]) if checkpoints else settings.models.dtype,
        "backend": checkpoints[0].model.backend.name if checkpoints else None,
        "tasks": {task.name: _task(task) for task in runtime.registry.tasks.values()},
        "limits": settings.limits.model_dump(),
    }


def openai_models(registry: Registry, created: int) -> dict[str, Any]:
    """The body of `GET /v1/models`: deployments that can answer now."""
    data = [
        {
            "id": deployment.name,
            "object": "model",
            "created": created,
            "owned_by": OWNER,
            "task": deployment.task,
            "role": deployment.role,
        }
        for deployment in registry.deployments.values()
        if deployment.is_ready
    ]
    return {"object": "list", "data": data}


def deployment_document(registry: Registry, deployment: Deployment) -> dict[str, Any]:
    """One element of `GET /deployments`; what only a loaded checkpoint knows is null before."""
    document: dict[str, Any] = {
        "name": deployment.name,
        "task": deployment.task,
        "role": deployment.role,
        "state": deployment.state.value,
        "error": deployment.error_code,
        "load_seconds": deployment.load_seconds,
        "dtype": None,
        "backend": None,
        "bytes": None,
        "memory_saved": None,
        "experts_kept": None,
        "experts_total": None,
        "artifact_sha256": None,
        "parent_sha256": None,
        "method": None,
    }
    if not deployment.is_ready:
        return document
    checkpoint = deployment.checkpoint
    manifest = checkpoint.manifest
    saved = saved_bytes(registry.tasks[deployment.task], deployment)
    return document | {
        "dtype": dtype_name(checkpoint),
        "backend": checkpoint.model.backend.name,
        "bytes": checkpoint.weight_bytes(),
        "memory_saved": saved and {"bytes": saved[0], "ratio": saved[0] / saved[1], "basis": saved[2]},
        "experts_kept": checkpoint.experts_kept,
        "experts_total": checkpoint.experts_total,
        "artifact_sha256": checkpoint.artifact_sha256,
        "parent_sha256": manifest.parent_sha256 if manifest else None,
        "method": manifest.method if manifest else "none",
    }


def _task(task: Task) -> dict[str, Any]:
    checkpoint = task.reference
    return {
        "labels": checkpoint.labels if checkpoint else None,
        "problem_type": checkpoint.problem_type if checkpoint else None,
        "activation": default_activation(checkpoint) if checkpoint else None,
        "reads": checkpoint.encoder.reads if checkpoint else None,
        "max_tokens": checkpoint.encoder.max_tokens if checkpoint else None,
        "full": task.full.name,
        "default": task.default.name,
    }
