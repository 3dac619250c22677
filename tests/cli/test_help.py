"""Help is fast, complete, and shows how each command is used."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from models.pruning import METHODS
from service.cli import app

COMMANDS = sorted(
    [str(command.name) for command in app.registered_commands]
    + [
        f"{group.name} {command.name}"
        for group in app.registered_groups
        for command in (group.typer_instance.registered_commands if group.typer_instance else ())
    ]
)
LIST_HEAVY_MODULES = (
    "import sys; from service.cli import main\n"
    "try: main(sys.argv[1:])\n"
    "finally: print([m for m in ('torch', 'fastapi', 'scipy', 'numpy') if m in sys.modules], file=sys.stderr)"
)


def test_help_imports_nothing_heavy() -> None:
    """What keeps it under a second (0.2 s measured): time itself is the machine's, and no test's business."""
    done = subprocess.run(
        [sys.executable, "-c", LIST_HEAVY_MODULES, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_a_worked_example(command: str, run_cli: Callable[..., Any]) -> None:
    ran = run_cli(*command.split(), "--help")
    assert ran.code == 0
    assert "Example:" in ran.out
    assert f"secateur {command}" in ran.out


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "prune"])
def test_only_prune_needs_the_methods_for_its_help(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIST_HEAVY_MODULES, *command.split(), "--help"], capture_output=True, text=True
    )
    assert done.stderr.strip() == "[]"


def test_help_of_prune_lists_exactly_the_methods_there_are(run_cli: Callable[..., Any]) -> None:
    out = run_cli("prune", "--help").out
    listed = re.findall(r"^ {3}([a-z-]+): ", out.split("Methods:")[1].split("╭")[0], re.MULTILINE)
    assert listed == list(METHODS)


def test_help_of_prune_lists_the_options_of_each_method(run_cli: Callable[..., Any]) -> None:
    out = " ".join(run_cli("prune", "--help").out.split())
    for method in METHODS.values():
        assert f"[{', '.join(method.semantics)}]" in out
        for option in method.options:
            assert f" {option.name.replace('_', '-')}=" in out, (method.name, option.name)
            assert " ".join(option.help.split()) in out
