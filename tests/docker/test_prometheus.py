"""Prometheus' own opinion of its configuration, where promtool is installed, and what holds without it."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"


def read(name: str) -> Any:
    return yaml.safe_load((PROMETHEUS / name).read_text(encoding="utf-8"))


ALERTS = [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]
RECORDED = [rule["record"] for group in read("rules.yml")["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "rules.yml", "alerts.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "config", "--syntax-only", "prometheus.keys.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_is_content(arguments: tuple[str, ...]) -> None:
    if not shutil.which("promtool"):
        pytest.skip("this machine has no promtool; make test-containers runs it in Prometheus' image")
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_has_a_unit_test() -> None:
    tests = read("rules_test.yml")["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in ALERTS}
    asked = " ".join(case["expr"] for test in tests for case in test.get("promql_expr_test", []))
    # The other alerts' tests go through the recorded ratio of the queue.
    assert {name for name in RECORDED if name not in asked} == {"secateur:inflight:ratio"}


def test_alerts_say_how_bad_and_what() -> None:
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


def test_the_operations_page_explains_every_alert() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(Secateur\w+)`", page, re.MULTILINE) == [rule["alert"] for rule in ALERTS]


def test_with_keys_everything_else_is_the_same() -> None:
    with_key = read("prometheus.keys.yml")
    (job,) = with_key["scrape_configs"]
    assert job.pop("authorization") == {"credentials_file": "/run/secrets/metrics_key"}
    assert with_key == read("prometheus.yml")


def test_prometheus_finds_what_compose_mounts() -> None:
    compose: Any = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    mounted = {volume.split(":")[1] for volume in compose["services"]["prometheus"]["volumes"]}
    assert {"/etc/prometheus/prometheus.yml", *read("prometheus.yml")["rule_files"]} <= mounted
