"""Dashboard, recording rules and alerts ask only for what the service exports, under these names and labels."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.dashboard import DASHBOARD, plain, written
from benchmarks.dashboard_panels import COLUMNS, DATA_SOURCE, grafana_document, panels
from service.metrics import PREFIX, TABLE
from tests.service.conftest import Harness
from tests.service.test_selection import experiments
from tests.service.toys import toy_loader, toy_settings

DOCKER = Path(__file__).resolve().parents[2] / "docker"
RULES = [
    rule
    for name in ("rules.yml", "alerts.yml")
    for group in yaml.safe_load((DOCKER / "prometheus" / name).read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
# What Prometheus itself adds.
SCRAPED = {"instance", "job"}
PLAIN: dict[str, set[str]] = {"": set()}
SUFFIXES = {"counter": PLAIN, "gauge": PLAIN, "histogram": {"_bucket": {"le"}, "_sum": set(), "_count": set()}}
# Exported name -> its labels.
EXPORTED = {
    PREFIX + row.name + suffix: frozenset({*row.labels, *extra})
    for row in TABLE
    for suffix, extra in SUFFIXES[row.kind].items()
}
# Words of the language that these expressions use.
WORDS = {
    *("sum", "min", "max", "rate", "increase", "histogram_quantile", "absent", "time"),
    *("by", "on", "group_left", "and", "or", "bool"),
}
GROUPING = re.compile(r"\b(by|on|group_left)\s*\(([\w\s,]*)\)")
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*?)\})?(?:\[\w+\])?")
# A quiet server has no sample of these: nothing failed, no shadow or cascade ran, no label came.
SILENT = {
    *("fallbacks_total", "rejected_total", "invalid_outputs_total", "events_written_total", "events_dropped_total"),
    *("feedback_total", "cascade_items_total", "experiment_pairs_total", "shadow_dropped_total"),
    *("experiment_difference", "experiment_lower", "experiment_upper", "experiment_units", "experiment_agreement"),
    *("experiment_srm_alarm", "experiment_traffic_percent", "experiment_verdict"),
}


@dataclass(frozen=True)
class Asked:
    """What an expression asks for. metrics: name and labels of each selector; grouped: labels it sorts by."""

    metrics: tuple[tuple[str, frozenset[str]], ...]
    grouped: frozenset[str]
    words: frozenset[str]


def read(expr: str) -> Asked:
    """The names in a PromQL expression. The regular expressions know what ours use, and `words` shows the rest."""
    grouped = {label for _, labels in GROUPING.findall(expr) for label in re.findall(r"\w+", labels)}
    found = [
        (name, frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels)))
        for name, labels in SELECTOR.findall(GROUPING.sub(" ", plain(expr)))
    ]
    metrics = tuple((name, labels) for name, labels in found if name.startswith("secateur") or name == "up")
    return Asked(metrics, frozenset(grouped), frozenset({name for name, _ in found} - {name for name, _ in metrics}))


RECORDED = {rule["record"]: read(rule["expr"]).grouped - {"le"} for rule in RULES if "record" in rule}
NAMED = {**EXPORTED, **RECORDED, "up": frozenset()}


def expressions() -> Iterator[tuple[str, str, set[str]]]:
    """(where, expression, labels that its texts show) of everything that asks Prometheus."""
    for panel in panels():
        for query in panel.queries:
            yield panel.title, query.expr, set(re.findall(r"{{(\w+)}}", query.legend))
    for rule in RULES:
        shown = {
            label for text in rule.get("annotations", {}).values() for label in re.findall(r"\$labels\.(\w+)", text)
        }
        yield rule.get("record") or rule["alert"], rule["expr"], shown


def labels_of(name: str) -> frozenset[str]:
    return NAMED[name] | SCRAPED


@pytest.mark.parametrize(("where", "expr", "shown"), list(expressions()))
def test_names_and_labels_are_those_of_the_table(where: str, expr: str, shown: set[str]) -> None:
    asked = read(expr)
    assert asked.words <= WORDS
    assert asked.metrics
    for name, labels in asked.metrics:
        assert name in NAMED
        assert labels <= labels_of(name)
    known = frozenset().union(*(labels_of(name) for name, _ in asked.metrics))
    assert asked.grouped <= known
    assert shown <= (asked.grouped or known)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """Name -> labels of each sample that a server with a running experiment exported after some traffic."""
    harness = Harness(toy_settings(tmp_path_factory.mktemp("dashboard"), experiments=experiments()), toy_loader())
    harness.wait_loaded()
    for number in range(8):
        assert harness.classify(["0 1", "2"], subject=f"user-{number}").status_code == 200
    samples: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(harness.client.get("/metrics").text):
        samples.setdefault(family.name, [])
        samples.setdefault(family.name + "_total", [])
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample.labels)
    harness.close()
    return samples


def test_a_real_scrape_has_them(scraped: dict[str, list[dict[str, str]]]) -> None:
    asked = {pair for _, expr, _ in expressions() for pair in read(expr).metrics if pair[0].startswith(PREFIX)}
    assert len(asked) > 40
    for name, labels in asked:
        assert name in scraped
        if name.removeprefix(PREFIX) not in SILENT:
            assert scraped[name], f"{name} has no sample"
            assert all(labels <= set(sample) for sample in scraped[name])


def test_values_asked_for_exist(scraped: dict[str, list[dict[str, str]]]) -> None:
    """Of labels with fixed values: a filter for a value that is never set draws nothing, for ever."""
    fixed = re.compile(r'(secateur_\w+)\{[^}]*?\b(outcome|state|role)="(\w+)"')
    asked = {found for _, expr, _ in expressions() for found in fixed.findall(plain(expr))}
    assert asked
    for name, label, value in asked:
        if name.removeprefix(PREFIX) not in SILENT:
            assert value in {sample[label] for sample in scraped[name]}


def test_the_committed_dashboard_is_the_one_that_is_written() -> None:
    """If this fails: python -m benchmarks.dashboard --write."""
    assert DASHBOARD.read_text(encoding="utf-8") == written()


def test_the_dashboard_is_provisioned_and_asks_the_provisioned_source() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    sources: Any = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))
    assert {source["uid"] for source in sources["datasources"]} == {DATA_SOURCE["uid"]}
    providers: Any = yaml.safe_load((provisioning / "dashboards" / "secateur.yaml").read_text(encoding="utf-8"))
    compose: Any = yaml.safe_load((DOCKER.parent / "compose.yaml").read_text(encoding="utf-8"))
    grafana = compose["services"]["grafana"]
    folder = providers["providers"][0]["options"]["path"]
    assert f"./docker/grafana/dashboards:{folder}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/{DASHBOARD.name}"


def test_panels_do_not_overlap_and_fill_their_rows() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in grafana_document()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
    assert len(taken) == COLUMNS * max(y + 1 for _, y in taken)


@pytest.mark.parametrize(
    ("expr", "metrics", "grouped"),
    [
        ('sum by (a, b) (rate(secateur_x{c="d", e=~"$task"}[5m]))', [("secateur_x", {"c", "e"})], {"a", "b"}),
        ("secateur:y:z * on (a) group_left () up", [("secateur:y:z", set()), ("up", set())], {"a"}),
    ],
)
def test_the_reader_reads(expr: str, metrics: list[tuple[str, set[str]]], grouped: set[str]) -> None:
    assert read(expr) == Asked(
        tuple((name, frozenset(labels)) for name, labels in metrics), frozenset(grouped), read(expr).words
    )
    assert read(expr).words <= WORDS


def test_a_renamed_metric_is_noticed() -> None:
    """The positive control: an expression of a metric that is not exported does not pass."""
    with pytest.raises(AssertionError):
        test_names_and_labels_are_those_of_the_table("renamed", "rate(secateur_request_total[5m])", set())
    with pytest.raises(AssertionError):
        test_names_and_labels_are_those_of_the_table("misspelt", "sum(secatur_requests_total)", set())
    with pytest.raises(AssertionError):
        test_names_and_labels_are_those_of_the_table("label", 'secateur_ready{task="x"}', set())
