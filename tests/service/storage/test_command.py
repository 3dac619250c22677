"""`secateur storage`: what is in a database, its schema, and old rows."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from models.errors import ConfigError
from service.cli.storage import app
from service.metrics import Metrics
from service.sections import Storage
from service.storage.database import connect
from service.storage.store import Store
from service.storage.upgrade import upgrade
from tests.service.storage.conftest import KEY
from tests.service.storage.records import exposure, label, send

DAY = 86_400.0


@pytest.fixture
def config(url: str, tmp_path: Path) -> Path:
    file = tmp_path / "secateur.yaml"
    document = {
        "version": 1,
        "models": {"root": str(tmp_path)},
        "deployments": {"mood-full": {"path": "full", "role": "full"}},
        "tasks": {"mood": {"deployments": ["mood-full"], "full": "mood-full"}},
        "storage": {"url": url},
    }
    file.write_text(json.dumps(document))
    return file


def run(command: str, config: Path, *options: str) -> Result:
    return CliRunner().invoke(app, [command, "--config", str(config), *options], catch_exceptions=True)


def fill(url: str) -> Store:
    store = Store.open(Storage(url=url), KEY, Metrics())
    store.record(exposure("a", at=DAY))
    send(store, label("a"))
    return store


def test_info_tells_of_a_database_in_use(config: Path, url: str) -> None:
    store = fill(url)
    found = json.loads(run("info", config, "--json").stdout)
    assert (found["schema"], found["oldest"]) == (found["newest"], "1970-01-02T00:00:00+00:00")
    assert (found["rows"]["exposures"], found["rows"]["feedback"], found["rows"]["pairs"]) == (1, 1, 0)
    assert found["bytes"] > 0
    assert "exposures" in run("info", config).stdout
    store.close()


def test_prune_deletes_old_rows(config: Path, url: str) -> None:
    fill(url).close()
    result = run("prune", config, "--days", "30")
    assert result.stderr.endswith("2 rows deleted\n"), "the answer and its unit; the label is new"
    assert json.loads(run("info", config, "--json").stdout)["rows"]["feedback"] == 1


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_prune_leaves_a_file_in_use_alone(config: Path, url: str) -> None:
    store = fill(url)
    result = run("prune", config)
    assert isinstance(result.exception, ConfigError)
    assert "another process uses" in result.exception.message
    store.close()


def test_upgrade_brings_the_newest_schema(config: Path, url: str) -> None:
    engine = connect(url)
    upgrade(engine, "1")
    engine.dispose()
    assert "this version writes schema" in run("info", config).stderr
    assert run("upgrade", config).exit_code == 0
    assert run("info", config).stderr == ""


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_info_makes_no_file(config: Path, tmp_path: Path) -> None:
    result = run("info", config)
    assert isinstance(result.exception, ConfigError)
    assert "does not exist" in result.exception.message
    assert not (tmp_path / "secateur.db").exists()
