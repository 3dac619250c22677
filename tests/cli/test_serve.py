"""`secateur serve` and `secateur check-config`."""

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.cli.greeting import curl_line
from service.settings import load_settings
from tests.cli.server import serving

CONFIG = """
version: 1
models: {root: ROOT}
deployments:
  toy-full: {path: finetuned, role: full}
tasks:
  toy: {deployments: [toy-full], full: toy-full}
"""


@pytest.fixture
def config(toy: Any, tmp_path: Path) -> Path:
    file = tmp_path / "secateur.yaml"
    file.write_text(CONFIG.replace("ROOT", str(toy.finetuned.parent)))
    return file


def test_the_printed_curl_line_works(config: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "--config", str(config)) as client:
        out = tmp_path / "serve.out"
        deadline = time.monotonic() + 10
        while "curl" not in out.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)  # another process writes the file
        (line,) = [line for line in out.read_text().splitlines() if "curl" in line]
        command = shlex.split(line)
        assert command[:2] == ["curl", "-s"]
        assert command[2] == f"{client.base_url}/classify"
        headers = dict([command[command.index("-H") + 1].split(": ")])
        answer = httpx.post(command[2], content=command[command.index("-d") + 1], headers=headers)
    assert answer.status_code == 200
    assert answer.json()["task"] == "toy"


@pytest.mark.parametrize(
    ("host", "address"),
    [("0.0.0.0", "127.0.0.1:7"), ("::", "[::1]:7"), ("127.0.0.1", "127.0.0.1:7"), ("localhost", "localhost:7")],
)
def test_an_address_that_means_everywhere_is_reached_by_loopback(host: str, address: str, config: Path) -> None:
    settings = load_settings(config, {"server": {"host": host, "port": 7}, "auth": {"mode": "open"}})
    assert f" http://{address}/classify " in curl_line(settings)
    assert f" http://{address}/classify -F task=" in curl_line(settings, "image")


def test_check_config_prints_what_is_in_effect(
    config: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_LIMITS__MAX_INPUTS", "7")
    document = run_cli("check-config", "--config", config, "--json").document
    assert document["limits"]["max_inputs"] == 7
    assert document["deployments"]["toy-full"]["role"] == "full"
    assert yaml.safe_load(run_cli("check-config", "--config", config).out) == document


@pytest.mark.parametrize(
    "url",
    ["postgresql://secateur:sesame@db/ab", "postgresql+psycopg://u@db/ab?password=sesame"],
)
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_check_config_keeps_the_databases_password_to_itself(
    config: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, url: str, flags: tuple[str, ...]
) -> None:
    monkeypatch.setenv("SECATEUR_STORAGE__URL", url)
    monkeypatch.setenv("SECATEUR_HASH_KEY", "sesame" * 8)
    printed = run_cli("check-config", "--config", config, *flags).out
    assert "sesame" not in printed
    assert "db/" in printed


def test_the_environment_can_name_the_configuration(
    config: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CONFIG", str(config))
    assert "toy" in run_cli("check-config", "--json").document["tasks"]


def test_the_shipped_configuration_is_valid(run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEUR_CONFIG", raising=False)
    document = run_cli("check-config", "--json").document
    assert len(document["deployments"]) == 8
    assert {experiment["task"] for experiment in document["experiments"].values()} == set(document["tasks"])


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_wrong_configuration_ends_in_one_line(command: str, config: Path, run_cli: Callable[..., Any]) -> None:
    config.write_text(config.read_text() + "limitz: {max_inputs: 7}\n")
    ran = run_cli(command, "--config", config)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert "limitz" in ran.err
    assert "limits" in ran.err


def test_a_port_that_is_taken_ends_in_one_clear_line(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [
            sys.executable,
            "-m",
            "service",
            "serve",
            "--config",
            str(config),
            "--port",
            str(taken.getsockname()[1]),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: server: cannot listen")
    assert "choose another --port" in done.stderr
