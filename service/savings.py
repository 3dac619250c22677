"""What weights cost and what pruning saved, measured from the loaded tensors."""

from models.checkpoint import Checkpoint
from models.memory import held_bytes, resident_bytes
from service.deployments import Deployment, Registry, Task
from service.metrics import Metrics


def publish_weights(metrics: Metrics, registry: Registry) -> None:
    """Set every gauge that depends on which checkpoints are loaded."""
    loaded = [deployment for deployment in registry.deployments.values() if deployment.is_ready]
    metrics.set("weights_unique_bytes", resident_bytes(deployment.checkpoint.model for deployment in loaded))
    # A full deployment that has loaded since moves its variants from the basis `manifest` to `loaded`.
    metrics.clear("memory_saved_bytes", "memory_saved_ratio")
    for deployment in loaded:
        _publish_deployment(metrics, deployment)
        _publish_savings(metrics, registry.tasks[deployment.task], deployment)


def saved_bytes(task: Task, deployment: Deployment) -> tuple[int, int, str] | None:
    """Return (bytes saved, bytes of the baseline, basis), both sides served alone; None if no baseline is known.

    What a variant costs is what its storages hold, not what its shapes declare: an expert that is cut and still
    allocated saves nothing. Basis `loaded`: the task's full deployment in this process. Basis `manifest`: the parent
    that the manifest records, at the size it would have in this dtype.
    """
    checkpoint = deployment.checkpoint
    if task.full.is_ready:
        baseline, basis = held_bytes(task.full.checkpoint.model), "loaded"
    elif checkpoint.manifest is not None and checkpoint.manifest.parent is not None:
        baseline, basis = checkpoint.manifest.parent.parameters * checkpoint.model.dtype.itemsize, "manifest"
    else:
        return None
    return baseline - held_bytes(checkpoint.model), baseline, basis


def alone_bytes(checkpoint: Checkpoint) -> int:
    """Bytes a checkpoint needs when served by itself."""
    return sum(checkpoint.weight_bytes().values())


def _publish_deployment(metrics: Metrics, deployment: Deployment) -> None:
    checkpoint, names = deployment.checkpoint, {"task": deployment.task, "variant": deployment.name}
    if deployment.allocator_delta is not None:
        metrics.set("load_allocator_delta_bytes", deployment.allocator_delta, variant=deployment.name)
    for part, size in checkpoint.weight_bytes().items():
        metrics.set("weights_bytes", size, **names, part=part)
    for state, counts in (("kept", checkpoint.experts_kept), ("total", checkpoint.experts_total)):
        metrics.set("experts", sum(counts), variant=deployment.name, state=state)
        for layer, count in enumerate(counts):
            metrics.set("layer_experts", count, variant=deployment.name, layer=layer, state=state)
    manifest = checkpoint.manifest
    metrics.set(
        "deployment_info",
        1,
        **names,
        role=deployment.role,
        artifact_sha256=checkpoint.artifact_sha256,
        parent_sha256=(manifest.parent_sha256 if manifest else None) or "",
        method=manifest.method if manifest else "none",
        dtype=dtype_name(checkpoint),
        device=str(checkpoint.model.device),
    )


def _publish_savings(metrics: Metrics, task: Task, deployment: Deployment) -> None:
    saved = saved_bytes(task, deployment)
    if saved is None:
        return
    difference, baseline, basis = saved
    names = {"task": task.name, "variant": deployment.name, "basis": basis}
    metrics.set("memory_saved_bytes", difference, **names)
    metrics.set("memory_saved_ratio", difference / baseline, **names)


def dtype_name(checkpoint: Checkpoint) -> str:
    """The dtype of the weights, as in `float32`."""
    return str(checkpoint.model.dtype).removeprefix("torch.")
