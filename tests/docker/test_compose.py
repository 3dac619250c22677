"""The rules that the compose files keep: pinned images, numeric users, nothing writable, loopback ports, bounded."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "compose.yaml"
OVERRIDES = sorted((ROOT / "docker").glob("compose.*.yaml"))
PROFILES = ((), ("grafana",), ("postgres",), ("grafana", "postgres"))
VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])([^}]*))?\}")
# What these files ask the person to make first, and defaults that differ on a GPU.
OVERRIDDEN = {"compose.gpu.yaml": {"SECATEUR_IMAGE", "SECATEUR_MEMORY"}}
DEMANDED = {"SECATEUR_HASH_KEY": "0" * 64}


class ComposeLoader(yaml.SafeLoader):
    """Reads `!reset VALUE` as VALUE, which takes back what the first file said."""


ComposeLoader.add_multi_constructor("!", lambda loader, _, node: loader.construct_yaml_seq(node))


@cache
def document(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=ComposeLoader)


SERVICES = [
    pytest.param(path, name, id=f"{path.name}:{name}")
    for path in (BASE, *OVERRIDES)
    for name in document(path)["services"]
    if path == BASE or name not in document(BASE)["services"]
]


@pytest.mark.parametrize(("path", "name"), SERVICES)
def test_service_keeps_the_rules(path: Path, name: str) -> None:
    service = document(path)["services"][name]
    image = VARIABLE.sub(lambda match: match[3], service["image"])
    assert re.fullmatch(r"[\w/.-]+:(dev|v?\d+\.\d+(\.\d+)?(-\w+)?)", image), "an exact version"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "cpus", "pids_limit"} <= set(service)
    assert not {"privileged", "ulimits", "cap_add", "pid", "ipc"} & set(service)
    if service.get("network_mode") == "none":  # a tool that is run once
        assert service["profiles"]
        return
    assert "network_mode" not in service
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["restart"] == "unless-stopped"
    assert name == "secateur" or service["healthcheck"]["test"], "the service's own is in the image"


@pytest.mark.parametrize("path", [BASE, *OVERRIDES], ids=lambda path: path.name)
def test_ports_are_on_loopback_and_may_be_chosen(path: Path) -> None:
    for service in document(path)["services"].values():
        for port in service.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z_]+-\d+\}:\d+", port)


@pytest.mark.parametrize("path", [BASE, *OVERRIDES], ids=lambda path: path.name)
def test_files_are_mounted_read_only_and_exist(path: Path) -> None:
    for service in document(path)["services"].values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                source, _, mode = volume.split(":")
                assert mode == "ro"
                assert (ROOT / source).exists()


def test_everything_starts_without_profiles_and_the_rest_does_not() -> None:
    profiles = {name: service.get("profiles") for name, service in document(BASE)["services"].items()}
    assert profiles == {"secateur": None, "prometheus": None, "grafana": ["grafana"], "postgres": ["postgres"]}


def test_a_stop_is_given_the_time_of_a_drain() -> None:
    seconds = float(document(BASE)["services"]["secateur"]["stop_grace_period"].removesuffix("s"))
    server = Settings.model_fields["server"].default
    assert seconds >= server.ready_off_seconds + server.drain_seconds + 5


def test_every_variable_is_documented_with_its_default() -> None:
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE))
    used: set[str] = set()
    for path in (BASE, *OVERRIDES):
        text = re.sub(r"^\s*#.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name, operator, default in VARIABLE.findall(text):
            used.add(name)
            assert name in documented
            if operator == "-" and name not in OVERRIDDEN.get(path.name, set()):
                assert documented[name] == default
    assert used == set(documented)


def test_the_services_variables_are_keys_of_the_configuration() -> None:
    for path in (BASE, *OVERRIDES):
        for name in document(path)["services"].get("secateur", {}).get("environment", {}):
            if name.startswith("SECATEUR_") and name not in ("SECATEUR_CONFIG", "SECATEUR_HASH_KEY"):
                section, key = name.removeprefix("SECATEUR_").lower().split("__")
                assert key in vars(Settings.model_fields[section].default)


@pytest.fixture(scope="session")
def compose() -> list[str]:
    """The command, where it is installed; it needs no engine for this."""
    command = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*command, "version"], capture_output=True, check=False).returncode:
        pytest.skip("this machine has no docker compose")
    return command


@pytest.mark.parametrize("profiles", PROFILES, ids=lambda profiles: "+".join(profiles) or "none")
@pytest.mark.parametrize("override", [None, *OVERRIDES], ids=lambda path: path.name if path else "alone")
def test_compose_accepts_every_profile_and_override(
    compose: list[str], profiles: tuple[str, ...], override: Path | None, tmp_path: Path
) -> None:
    files = [word for path in (BASE, override) if path for word in ("--file", str(path))]
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    nothing = tmp_path / ".env"
    nothing.touch()
    done = subprocess.run(
        [*compose, "--env-file", str(nothing), *files, *chosen, "config", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), **DEMANDED},
    )
    assert done.returncode == 0, done.stderr
    # JSON is YAML.
    services = yaml.safe_load(done.stdout)["services"]
    expected = {"secateur", "prometheus", *profiles}
    assert set(services) - {"balancer", "postgres"} == expected - {"postgres"}
    if override and override.name == "compose.replicas.yaml":
        assert {"balancer", "postgres"} <= set(services)
        assert not services["secateur"].get("ports")
        assert services["secateur"]["depends_on"]["postgres"]["required"]
