"""The README cannot drift: its commands run, its answers have the real shape, its tree is the disk."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.pruning import METHODS
from service.cli import app
from service.demo_results import results_table
from service.metrics import PREFIX, TABLE
from tests.cli.server import serving
from tests.cli.test_stranger import TRAINING, write_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:8000"
# Blocks that are not run here, and what runs them.
CHECKED_ELSEWHERE = {
    "make test\nmake check\n": ".ci/run",
}
# These start a server that the curl blocks after them talk to.
SERVERS = {
    "make serve\n": (),  # which ends in `secateur serve`; the installation is .ci/run's
    "secateur serve --config secateur.yaml\n": ("--config", "secateur.yaml"),
}
# Not in a clone, or not ours: made by running, building or testing.
IGNORED = {".git", ".venv", ".hypothesis", "build", "runs", "__pycache__", "pruned", ".secateur"}
IGNORED |= {f"secateur.db{end}" for end in ("", "-wal", "-shm", ".key", ".lock")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place like the root of a clone, with a stranger's rows and the configuration files that the README shows."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    write_rows(tmp_path / "rows.csv")
    for block in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)
        assert name, "each YAML block begins with the name of its file"
        (tmp_path / name[1]).write_text(block, encoding="utf-8")
    return tmp_path


@pytest.mark.timeout(900)
def test_every_command_of_the_readme_runs_in_order(folder: Path) -> None:
    answers: list[str] = []
    with ExitStack() as servers:
        address = ""
        for block in blocks("bash"):
            if block in CHECKED_ELSEWHERE:
                continue
            if block in SERVERS:
                servers.close()
                client: httpx.Client = servers.enter_context(serving(folder, *SERVERS[block]))
                address = f"{client.base_url.host}:{client.base_url.port}"
                continue
            answers.append(run(block.replace(ADDRESS, address), folder))
    (shown,) = blocks("json")
    assert shape(json.loads(answers[0])) == shape(json.loads(shown))
    assert [item["label"] for item in json.loads(answers[0])["data"]] == ["de", "fr"]
    assert json.loads(answers[-1])["data"][0]["label"] == "tool"


def test_every_snippet_of_the_readme_runs() -> None:
    assert blocks("python")
    for block in blocks("python"):
        command = [sys.executable, "-W", "error", "-c", block]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def run(block: str, folder: Path) -> str:
    """Standard output of a block as bash runs it, stopping at the first command that fails."""
    if shutil.which("curl") is None and "curl " in block:
        pytest.skip("this machine has no curl")
    script = f'secateur() {{ "{sys.executable}" -m service "$@"; }}\n{block}'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("curl -s ", "curl --no-progress-meter --fail-with-body ")],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shape(value: Any) -> Any:
    """The keys and types of a document, without its values; a list is as its first element."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def test_the_hyper_parameters_shown_are_those_that_the_strangers_test_trusts() -> None:
    (shown,) = [block for block in blocks("yaml") if block.startswith("# training.yaml")]
    assert shown == "# training.yaml\n" + TRAINING


def test_the_table_of_commands_is_the_command_line() -> None:
    table = README.split("| command | does |")[1].split("\n\n")[0]
    listed = {
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall("`(.+?)`", cell)
    }
    groups = {f"{group.name} {command.name}" for group in app.registered_groups for command in commands_of(group)}
    assert {name.removeprefix("secateur ") for name in listed} == {
        *(str(command.name) for command in app.registered_commands),
        *groups,
    }


def commands_of(group: Any) -> list[Any]:
    return list(group.typer_instance.registered_commands)


def test_every_metric_named_is_exported_with_these_labels() -> None:
    exported = {PREFIX + row.name: set(row.labels) for row in TABLE}
    named = re.findall(rf"`({PREFIX}\w+)(?:\{{(.*?)\}})?`", README)
    assert len(named) > 5
    for name, labels in named:
        assert name in exported
        assert not labels or set(labels.split(",")) == exported[name]


def test_the_tree_is_the_disk() -> None:
    tree = set(tree_of_readme())
    covered = tuple(path for path in tree if path.endswith("/") and not any(o.startswith(path) for o in tree - {path}))
    files = set(files_on_disk())
    assert {path for path in tree if not path.endswith("/")} == {path for path in files if not path.startswith(covered)}
    assert all(any(path.startswith(folder) for path in files) for folder in covered)


def tree_of_readme() -> Iterator[str]:
    """Paths of the README's tree, folders with a slash; each line must say something about its path."""
    parents: list[str] = []
    for line in README.split("## The tree\n\n```\n")[1].split("\n```")[0].splitlines():
        indent, name, text = re.fullmatch(r"( *)(\S+) +(\S.*)", line).groups()  # type: ignore[union-attr]
        assert text
        parents[len(indent) // 2 :] = [name]
        yield "".join(parents)


def files_on_disk() -> Iterator[str]:
    """Files that belong to the project: where git is there, those it does not ignore; else all but known clutter."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        yield from (path for path in listed if path and (ROOT / path).exists())
        return
    for directory, folders, files in os.walk(ROOT):
        folders[:] = [n for n in folders if n not in IGNORED and not n.endswith((".egg-info", "_cache"))]
        yield from ((Path(directory) / file).relative_to(ROOT).as_posix() for file in files)


def test_the_results_are_those_that_were_measured() -> None:
    """If this fails after a new build: paste the output of `secateur demo results` between the markers."""
    shown = README.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    table = "".join(line + "\n" for line in shown.splitlines() if line.startswith("|"))
    assert table == results_table()


def test_the_page_of_methods_lists_every_method_with_its_meanings_and_options() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(METHODS)
    for name, summary, meanings, _, options in rows:
        method = METHODS[name.strip("`")]
        assert summary == method.summary
        assert meanings.split(", ") == list(method.semantics)
        assert [option for option in options.split(", ") if option] == [
            o.name.replace("_", "-") for o in method.options
        ]
    assert f"one of {len(METHODS)} methods" in README
