"""What a forward pass adds to the metrics, whichever lane ran it."""

from service.deployments import Deployment
from service.forward import Ran
from service.metrics import Metrics


def measure_batch(metrics: Metrics, deployment: Deployment, items: int, tokens: int, ran: Ran) -> None:
    """Count a batch of so many items and tokens by the deployment that ran it."""
    variant, task = deployment.name, deployment.task
    metrics.observe("batch_items", items, variant=variant)
    metrics.observe("batch_tokens", tokens, variant=variant)
    metrics.inc("batches_total", variant=variant, outcome=ran.outcome)
    kept = ran.routed_slots - ran.dropped_slots
    metrics.inc("routed_slots_total", kept, task=task, variant=variant, outcome="kept")
    metrics.inc("routed_slots_total", ran.dropped_slots, task=task, variant=variant, outcome="pruned")
