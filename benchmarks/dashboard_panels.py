"""What the dashboard shows: rows of panels with their queries, and the Grafana document made from them.

Queries may use the variables `$task`, `$variant` and `$experiment`, regular expressions, and `$__rate_interval`, which
Grafana sets to a span that holds several scrapes.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

DATA_SOURCE = {"type": "prometheus", "uid": "prometheus"}
COLUMNS = 24
SCHEMA_VERSION = 39
EVERYTHING = ".*"
# Name of a variable -> the query for its values.
VARIABLES = {
    "task": "label_values(secateur_deployment_state, task)",
    "variant": 'label_values(secateur_deployment_state{task=~"$task"}, variant)',
    "experiment": "label_values(secateur_experiment_traffic_percent, experiment)",
}
# The labels that these variables narrow a query to.
ARMS = 'task=~"$task", variant=~"$variant"'
ARM = 'variant=~"$variant"'
TASK = 'task=~"$task"'
CUT = f'{ARMS}, outcome="pruned"'
EXPERIMENT = 'experiment=~"$experiment"'

Kind = Literal["stat", "lines", "bars"]


@dataclass(frozen=True)
class Query:
    """A PromQL expression and how its series are called, with `{{label}}` for the value of a label."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One drawing. unit: Grafana's name of it; limits: (value, colour) from which a stat has that colour.

    words: what a value is shown as instead of its number. says_name: a stat whose series' name is all there is to say.
    """

    title: str
    kind: Kind
    unit: str
    queries: tuple[Query, ...]
    help: str
    limits: tuple[tuple[float, str], ...] = ()
    words: tuple[tuple[str, str], ...] = ()
    says_name: bool = False


@dataclass(frozen=True)
class Row:
    """Panels side by side, of equal width. height: in Grafana's units of 30 pixels."""

    title: str
    panels: tuple[Panel, ...]
    height: int = 8


def _rate(metric: str, labels: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def _quantile(quantile: float, metric: str) -> Query:
    inner = _rate(f"{metric}_bucket", ARMS, "task, variant, le")
    return Query(f"histogram_quantile({quantile}, {inner})", "{{variant}}")


def _latency(quantile: float) -> Panel:
    name = f"p{100 * quantile:g}"
    return Panel(
        name,
        "lines",
        "s",
        (_quantile(quantile, "secateur_request_duration_seconds"),),
        f"Arrival to answer, {name} of each deployment. Arms of an experiment get like traffic: compare their lines.",
    )


GOOD, BAD, WARN = "green", "red", "orange"
IS_ZERO_BAD = ((0, BAD), (1, GOOD))
IS_ONE_BAD = ((0, GOOD), (1, BAD))
NO_YES = (("0", "no"), ("1", "yes"))

NOW = Row(
    "Now",
    (
        Panel(
            "Ready",
            "stat",
            "none",
            (Query("min(secateur_ready)", "ready"),),
            "Whether every replica answers.",
            IS_ZERO_BAD,
            NO_YES,
        ),
        Panel(
            "Requests per second",
            "stat",
            "reqps",
            (Query(f"sum(rate(secateur_requests_total{{{ARMS}}}[$__rate_interval]))", "requests"),),
            "Classify requests whose task and deployment are known, refused ones too.",
        ),
        Panel(
            "Failed",
            "stat",
            "percentunit",
            (Query(f"max(secateur:requests:error_ratio{{{ARMS}}})", "worst deployment"),),
            "Share of answers with a 5xx status in the last five minutes, of the deployment that fails most.",
            ((0, GOOD), (0.001, WARN), (0.01, BAD)),
        ),
        Panel(
            "p95, pruned over full",
            "stat",
            "none",
            (Query(f"secateur:request_duration:p95_ratio{{{ARMS}}}", "{{variant}}"),),
            "Below 1 the pruned deployment is the faster one.",
            ((0, GOOD), (1, WARN), (1.2, BAD)),
        ),
        Panel(
            "Memory saved",
            "stat",
            "percentunit",
            (Query(f"secateur:memory_saved:ratio{{{ARMS}}} > 0", "{{variant}}"),),
            "Of the full deployment's weights, each served alone. An experiment holds both, see the row on memory.",
        ),
        Panel(
            "Anyone may call",
            "stat",
            "none",
            (Query("max(secateur_auth_open)", "open"),),
            "1 while auth.mode is open: no key is asked for.",
            IS_ONE_BAD,
            NO_YES,
        ),
    ),
    height=5,
)

TRAFFIC = Row(
    "Traffic and errors",
    (
        Panel(
            "Requests by deployment",
            "lines",
            "reqps",
            (Query(_rate("secateur_requests_total", ARMS, "task, variant"), "{{variant}}"),),
            "What each deployment was asked, whatever came of it.",
        ),
        Panel(
            "Answers by status",
            "lines",
            "reqps",
            (Query(_rate("secateur_requests_total", ARMS, "code"), "{{code}}"),),
            "429 is an overload that lost nothing; 5xx are failures.",
        ),
        Panel(
            "Refused before any work",
            "lines",
            "reqps",
            (Query(_rate("secateur_rejected_total", "", "reason"), "{{reason}}"),),
            "Bodies, keys and requests that were turned away, and why.",
        ),
        Panel(
            "Answered by another deployment",
            "lines",
            "reqps",
            (
                Query(
                    _rate("secateur_fallbacks_total", TASK, "intended, served, reason"),
                    "{{served}} for {{intended}}: {{reason}}",
                ),
            ),
            "Fallbacks. Experiments count them for the deployment that was meant.",
        ),
    ),
)

LATENCY = Row("Latency by arm", (_latency(0.5), _latency(0.95), _latency(0.99)))

BATCHES = Row(
    "Queue and batches",
    (
        Panel(
            "Items inside",
            "lines",
            "short",
            (
                Query("sum by (state) (secateur_inflight_items)", "{{state}}"),
                Query("sum(secateur_inflight_limit_items)", "limit"),
            ),
            "Near the limit, further requests are refused with 429.",
        ),
        Panel(
            "Wait for a batch, p95",
            "lines",
            "s",
            (_quantile(0.95, "secateur_queue_duration_seconds"),),
            "From tokens to the start of the first batch.",
        ),
        Panel(
            "Tokens per batch",
            "lines",
            "short",
            (
                Query(
                    f"{_rate('secateur_batch_tokens_sum', ARM, 'variant')}"
                    f" / {_rate('secateur_batch_tokens_count', ARM, 'variant')}",
                    "{{variant}}",
                ),
            ),
            "Mean. More tokens per batch is more throughput and a longer wait.",
        ),
        Panel(
            "Batches by how they ended",
            "lines",
            "short",
            (Query(_rate("secateur_batches_total", ARM, "outcome"), "{{outcome}}"),),
            "split and retried: out of memory or a poisonous item, worked around.",
        ),
    ),
)

MEMORY = Row(
    "Memory",
    (
        Panel(
            "Weights of each deployment, served alone",
            "bars",
            "bytes",
            (Query(f"sum by (variant) (max by (variant, part) (secateur_weights_bytes{{{ARMS}}}))", "{{variant}}"),),
            "Measured from the tensors, shared storage once.",
        ),
        Panel(
            "Saved against the full deployment",
            "bars",
            "bytes",
            (Query(f"max by (variant) (secateur_memory_saved_bytes{{{ARMS}}})", "{{variant}}"),),
            "What serving this deployment alone would save.",
        ),
        Panel(
            "Weights a replica holds",
            "lines",
            "bytes",
            (Query("max(secateur_weights_unique_bytes)", "weights"),),
            "All loaded deployments together: while full and pruned run side by side, pruning costs memory.",
        ),
    ),
)

EXPERTS = Row(
    "Experts",
    (
        Panel(
            "Experts kept, by layer",
            "bars",
            "short",
            (
                Query(
                    f'max by (variant, layer) (secateur_layer_experts{{{ARM}, state="kept"}}) > 0',
                    "{{variant}} layer {{layer}}",
                ),
            ),
            "How many experts each layer still has. Layers without experts are left out.",
        ),
        Panel(
            "Routed to experts that were cut",
            "lines",
            "percentunit",
            (
                Query(
                    f"{_rate('secateur_routed_slots_total', CUT, 'task, variant')}"
                    f" / {_rate('secateur_routed_slots_total', ARMS, 'task, variant')}",
                    "{{variant}}",
                ),
            ),
            "Share of the router's choices that met a cut expert. It rises when traffic is not what was pruned for.",
        ),
    ),
    height=12,
)

EXPERIMENTS = Row(
    "Experiments",
    (
        Panel(
            "Verdict",
            "stat",
            "none",
            (
                Query(
                    f"max by (experiment, verdict) (secateur_experiment_verdict{{{EXPERIMENT}}}) == 1",
                    "{{experiment}}: {{verdict}}",
                ),
            ),
            "The word of each report; GET /experiments/NAME has the sentence.",
            says_name=True,
        ),
        Panel(
            "Accuracy, candidate minus control",
            "lines",
            "percentunit",
            (
                Query(f"max by (experiment) (secateur_experiment_upper{{{EXPERIMENT}}})", "{{experiment}} upper"),
                Query(f"max by (experiment) (secateur_experiment_difference{{{EXPERIMENT}}})", "{{experiment}}"),
                Query(f"max by (experiment) (secateur_experiment_lower{{{EXPERIMENT}}})", "{{experiment}} lower"),
            ),
            "With the interval that holds at every look. Not worse: its lower end is above minus the margin.",
        ),
        Panel(
            "Units compared",
            "lines",
            "short",
            (Query(f"max by (experiment) (secateur_experiment_units{{{EXPERIMENT}}})", "{{experiment}}"),),
            "Each subject or input counts once.",
        ),
        Panel(
            "Agreement of shadow pairs",
            "lines",
            "percentunit",
            (
                Query(f"max by (experiment) (secateur_experiment_agreement{{{EXPERIMENT}}})", "{{experiment}}"),
                Query(f"secateur:experiment_pairs:agreement_ratio{{{EXPERIMENT}}}", "{{experiment}}, last 15 minutes"),
            ),
            "Share of shadowed items that both deployments label alike.",
        ),
    ),
)

LABELS = Row(
    "Assignments and labels",
    (
        Panel(
            "Assigned",
            "lines",
            "reqps",
            (
                Query(
                    _rate("secateur_experiment_assignments_total", EXPERIMENT, "experiment, arm"),
                    "{{experiment}}: {{arm}}",
                ),
            ),
            "Requests by the arm they were meant for.",
        ),
        Panel(
            "Ratio of the arms is off",
            "stat",
            "none",
            (Query(f"max by (experiment) (secateur_experiment_srm_alarm{{{EXPERIMENT}}})", "{{experiment}}"),),
            "Sample ratio mismatch: the counts contradict the weights, and the verdict is invalid.",
            IS_ONE_BAD,
            NO_YES,
        ),
        Panel(
            "Labels received",
            "lines",
            "reqps",
            (Query(_rate("secateur_feedback_total", TASK, "task, outcome"), "{{task}}: {{outcome}}"),),
            "POST /feedback. orphan: a label for an item not seen yet, joined when it comes.",
        ),
        Panel(
            "Cascades and shadows",
            "lines",
            "reqps",
            (
                Query(_rate("secateur_cascade_items_total", TASK, "task, outcome"), "{{task}}: {{outcome}}"),
                Query(
                    _rate("secateur_shadow_dropped_total", EXPERIMENT, "experiment, reason"),
                    "{{experiment}} dropped: {{reason}}",
                ),
            ),
            "Where cascades were answered, and shadow items that were let go because the device was busy.",
        ),
    ),
)

HEALTH = Row(
    "Health",
    (
        Panel(
            "Worker last seen",
            "lines",
            "s",
            (Query("time() - secateur_worker_heartbeat_timestamp_seconds", "{{instance}}"),),
            "Seconds. Idle it beats every second, and while a batch runs after the batch.",
        ),
        Panel(
            "Worker failures and bad outputs",
            "lines",
            "short",
            (
                Query("sum(secateur_worker_failures_total)", "worker failures"),
                Query(f"sum by (variant) (secateur_invalid_outputs_total{{{ARMS}}})", "{{variant}} not a number"),
            ),
            "Both stay at zero in a healthy service.",
        ),
        Panel(
            "Records waiting",
            "lines",
            "short",
            (
                Query("sum(secateur_event_queue_depth)", "waiting"),
                Query(_rate("secateur_events_written_total", "", "kind"), "{{kind}} written per second"),
                Query("sum by (reason) (secateur_events_dropped_total)", "dropped: {{reason}}"),
            ),
            "Records of experiments. Dropped ones make a verdict invalid above one in a thousand.",
        ),
        Panel(
            "Deployments by state",
            "lines",
            "short",
            (
                Query(f"sum by (state) (secateur_deployment_state{{{ARMS}}})", "{{state}}"),
                Query("min(secateur_storage_writable)", "storage writable"),
            ),
            "Every deployment should be ready, and storage writable (1) where experiments run.",
        ),
    ),
)

ROWS = (NOW, TRAFFIC, LATENCY, BATCHES, MEMORY, EXPERTS, EXPERIMENTS, LABELS, HEALTH)


def panels() -> tuple[Panel, ...]:
    """Every panel, in order."""
    return tuple(panel for row in ROWS for panel in row.panels)


def grafana_document() -> dict[str, Any]:
    """The dashboard as Grafana reads it from a file; the same every time."""
    tops = accumulate((row.height + 1 for row in ROWS), initial=0)
    drawn = [entry for row, top in zip(ROWS, tops, strict=False) for entry in _row(row, top)]
    return {
        "uid": "secateur",
        "title": "Secateur",
        "description": "Full and pruned classifiers side by side: traffic, latency, memory, experiments, health.",
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "tags": ["secateur"],
        "templating": {"list": [_variable(name, query) for name, query in VARIABLES.items()]},
        "panels": [{**entry, "id": number} for number, entry in enumerate(drawn, start=1)],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": DATA_SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": EVERYTHING,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _row(row: Row, top: int) -> list[dict[str, Any]]:
    width = COLUMNS // len(row.panels)
    title = {"type": "row", "title": row.title, "collapsed": False, "gridPos": _place(0, top, COLUMNS, 1)}
    places = [_place(width * column, top + 1, width, row.height) for column in range(len(row.panels))]
    return [title, *(_panel(panel, place) for panel, place in zip(row.panels, places, strict=True))]


def _place(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    is_momentary = panel.kind != "lines"
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": DATA_SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "instant": is_momentary,
            "range": not is_momentary,
        }
        for number, query in enumerate(panel.queries)
    ]
    steps = [{"value": None if at == 0 else at, "color": colour} for at, colour in panel.limits or ((0, "blue"),)]
    words = (
        [{"type": "value", "options": {value: {"text": word} for value, word in panel.words}}] if panel.words else []
    )
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "mappings": words,
        "noValue": "none",
    }
    if panel.kind != "lines":
        defaults["color"] = {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"}
    return {
        "type": {"stat": "stat", "lines": "timeseries", "bars": "bargauge"}[panel.kind],
        "title": panel.title,
        "description": panel.help,
        "datasource": DATA_SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": OPTIONS[panel.kind] | ({"textMode": "name"} if panel.says_name else {}),
    }


_LAST = {"reduceOptions": {"calcs": ["lastNotNull"], "values": False}}
OPTIONS: dict[Kind, dict[str, Any]] = {
    "stat": {**_LAST, "textMode": "auto", "colorMode": "background", "graphMode": "none", "wideLayout": False},
    "lines": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
    "bars": {**_LAST, "orientation": "horizontal", "displayMode": "basic", "showUnfilled": True},
}
