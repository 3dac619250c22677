"""Every instrument the service exports, as one table on a registry of its own.

Names lack the prefix `secateur_`. Label values come from the configuration or from fixed sets, never from user text.
Latency buckets are the same for all variants; each task's `slo_ms` is added as an exact bound.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics import MetricWrapperBase

PREFIX = "secateur_"
LATENCY_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
INPUT_TOKENS = tuple(float(2**power) for power in range(4, 13))
BATCH_ITEMS = tuple(float(2**power) for power in range(9))
BATCH_TOKENS = tuple(float(2**power) for power in range(17))
CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
# Tasks with more classes get no series per label.
MAX_LABEL_SERIES = 50


@dataclass(frozen=True)
class Instrument:
    """One row of the table. buckets: for histograms, upper bounds in the unit of the name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


def _counter(name: str, labels: str, help: str) -> Instrument:
    return Instrument(name, "counter", tuple(labels.split()), help)


def _gauge(name: str, labels: str, help: str) -> Instrument:
    return Instrument(name, "gauge", tuple(labels.split()), help)


def _histogram(name: str, labels: str, help: str, buckets: tuple[float, ...]) -> Instrument:
    return Instrument(name, "histogram", tuple(labels.split()), help, buckets)


TABLE = (
    _counter("http_requests_total", "route method code", "HTTP exchanges by route template."),
    _counter("requests_total", "task variant code", "Classify requests whose task and variant are known."),
    _histogram("request_duration_seconds", "task variant", "Arrival to answer, status 200.", LATENCY_SECONDS),
    _histogram("tokenization_duration_seconds", "task variant", "Admission to tokens.", LATENCY_SECONDS),
    _histogram("queue_duration_seconds", "task variant", "Tokens to first batch start.", LATENCY_SECONDS),
    _histogram("inference_duration_seconds", "task variant", "First batch start to last end.", LATENCY_SECONDS),
    _counter("items_total", "task variant lane outcome", "Items that left the engine."),
    _counter("tokens_total", "task variant kind", "Tokens in answers with status 200; packed batches have no padding."),
    _histogram("input_tokens", "task", "Tokens of an input before truncation.", INPUT_TOKENS),
    _counter("truncated_inputs_total", "task", "Inputs that were cut to the model's length."),
    _histogram("batch_items", "variant", "Items of a batch.", BATCH_ITEMS),
    _histogram("batch_tokens", "variant", "Tokens of a batch.", BATCH_TOKENS),
    _counter("batches_total", "variant outcome", "Batches by how they ended: ok, split, retried, failed."),
    _counter("routed_slots_total", "task variant outcome", "Routed (token, choice) pairs by fate of the expert."),
    _gauge("inflight_items", "state", "Items inside the engine."),
    _gauge("inflight_limit_items", "", "Items that may be inside the engine."),
    _counter("rejected_total", "reason", "Requests refused before any work."),
    _counter("invalid_outputs_total", "task variant kind", "Items whose logits were not finite."),
    _counter("predictions_total", "task variant label", "Predicted labels in answers with status 200."),
    _histogram("prediction_confidence", "task variant", "Score of the predicted label, 0 to 1.", CONFIDENCES),
    _gauge("deployment_state", "task variant state", "1 for the state the deployment is in."),
    _gauge(
        "deployment_info",
        "task variant role artifact_sha256 parent_sha256 method dtype device",
        "1; what a loaded deployment is.",
    ),
    _counter("deployment_loads_total", "variant outcome", "Attempts to load a deployment: ok, failed."),
    _gauge("deployment_load_seconds", "variant", "Time from file to tested."),
    _gauge("weights_bytes", "task variant part", "Bytes the variant needs when served alone."),
    _gauge("weights_unique_bytes", "", "Bytes of weights this process holds."),
    _gauge("load_allocator_delta_bytes", "variant", "Growth of the device's allocator by loading; absent on a CPU."),
    _gauge("device_memory_allocated_bytes", "device", "Bytes in tensors, by the device's allocator; absent on a CPU."),
    _gauge("device_memory_reserved_bytes", "device", "Bytes the allocator holds, tensors and cache; absent on a CPU."),
    _gauge("device_memory_peak_bytes", "device", "Most bytes in tensors since the start; absent on a CPU."),
    _gauge("device_memory_total_bytes", "device", "Bytes the device has; absent on a CPU."),
    _gauge("layer_experts", "variant layer state", "Experts of a layer: kept, and total before pruning."),
    _gauge("experts", "variant state", "Experts of all layers: kept, and total before pruning."),
    _gauge("memory_saved_bytes", "task variant basis", "Bytes saved against the full variant, each served alone."),
    _gauge("memory_saved_ratio", "task variant basis", "memory_saved_bytes over the full variant's bytes."),
    _counter("fallbacks_total", "task intended served reason", "Answers by another deployment than intended."),
    _counter("experiment_assignments_total", "experiment arm source", "Requests that met an experiment."),
    _counter("experiment_pairs_total", "experiment outcome", "Shadow pairs: agree, disagree, candidate_failed."),
    _counter("shadow_dropped_total", "experiment reason", "Sampled items never run: busy, draining, unavailable."),
    _counter("shadow_seconds_total", "task variant", "Time in the passes of shadows."),
    _counter("cascade_items_total", "task outcome", "Items of cascades: accepted, escalated, fallback."),
    _gauge("experiment_difference", "experiment", "Accuracy of the candidate minus that of the control, estimated."),
    _gauge("experiment_lower", "experiment", "Lower end of the difference's interval."),
    _gauge("experiment_upper", "experiment", "Upper end of the difference's interval."),
    _gauge("experiment_units", "experiment", "Units in the comparison."),
    _gauge("experiment_agreement", "experiment", "Share of shadow pairs with the same label."),
    _gauge("experiment_srm_alarm", "experiment", "1 while the arms' counts contradict the configured weights."),
    _gauge("experiment_traffic_percent", "experiment", "Share of the task's traffic that is enrolled."),
    _gauge("experiment_verdict", "experiment verdict", "1 for the verdict of the report."),
    _counter("events_written_total", "kind", "Records committed: exposure, pair, feedback."),
    _counter("events_dropped_total", "kind reason", "Records given up: queue_full, storage, shutdown."),
    _gauge("event_queue_depth", "", "Records that wait for the writer."),
    _gauge("storage_writable", "", "1 while the last transaction succeeded."),
    _counter("feedback_total", "task outcome", "Labels received: matched, orphan, replaced, unchanged, conflict."),
    _gauge("ready", "", "1 while /readyz answers 200."),
    _gauge("auth_open", "", "1 while anyone who reaches the port may call."),
    _gauge("worker_heartbeat_timestamp_seconds", "", "When the worker thread was last seen, Unix time."),
    _counter("worker_failures_total", "", "Deaths and stalls of the worker thread."),
    _gauge("build_info", "version torch", "1; what is running."),
)


class Metrics:
    """The instruments of TABLE. Thread safe."""

    def __init__(self, slo_seconds: Iterable[float] = ()) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        bounds = tuple(sorted({*LATENCY_SECONDS, *slo_seconds}))
        self._instruments = {row.name: self._build(row, bounds) for row in TABLE}

    def _build(self, row: Instrument, latency_bounds: tuple[float, ...]) -> MetricWrapperBase:
        name = PREFIX + row.name
        if row.kind == "counter":
            return Counter(name, row.help, row.labels, registry=self.registry)
        if row.kind == "gauge":
            return Gauge(name, row.help, row.labels, registry=self.registry)
        buckets = latency_bounds if row.buckets is LATENCY_SECONDS else row.buckets
        return Histogram(name, row.help, row.labels, registry=self.registry, buckets=buckets)

    def _child(self, name: str, labels: dict[str, object]) -> MetricWrapperBase:
        instrument = self._instruments[name]
        return instrument.labels(**labels) if labels else instrument

    def inc(self, name: str, amount: float = 1, /, **labels: object) -> None:
        """Add to a counter."""
        child = self._child(name, labels)
        assert isinstance(child, Counter)
        child.inc(amount)

    def observe(self, name: str, value: float, /, **labels: object) -> None:
        """Add an observation to a histogram."""
        child = self._child(name, labels)
        assert isinstance(child, Histogram)
        child.observe(value)

    def set(self, name: str, value: float, /, **labels: object) -> None:
        """Set a gauge."""
        child = self._child(name, labels)
        assert isinstance(child, Gauge)
        child.set(value)

    def clear(self, *names: str) -> None:
        """Remove every series of some instruments."""
        for name in names:
            self._instruments[name].clear()

    def expose(self) -> bytes:
        """The text format 0.0.4."""
        return generate_latest(self.registry)
