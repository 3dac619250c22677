"""Numbers and paths on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.errors import PlanError
from service.cli.arguments import parse_keep


@pytest.mark.parametrize(("text", "value"), [("8", 8), ("1", 1), ("0.5", 0.5), ("1.0", 1.0), (".25", 0.25)])
def test_keep_is_a_count_or_with_a_point_a_ratio(text: str, value: float) -> None:
    assert parse_keep(text) == value
    assert type(parse_keep(text)) is type(value)


@pytest.mark.parametrize("text", ["0", "-1", "0.0", "-0.5", "1.5", "8.0", "half", "", ".", "nan", "1e3", "inf", "0,5"])
def test_keep_refuses_the_rest_and_says_what_it_takes(text: str) -> None:
    with pytest.raises(PlanError, match="count such as 8 or a ratio"):
        parse_keep(text)


@pytest.mark.parametrize("command", [("inspect",), ("classify", "-"), ("evaluate", "--data", __file__)])
def test_a_missing_checkpoint_is_a_user_error_in_one_line(
    command: tuple[str, ...], tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    name, *rest = command
    ran = run_cli(name, tmp_path / "absent", *rest)
    assert ran.code == 2
    assert ran.out == ""
    assert "does not exist" in " ".join(ran.err.replace("│", " ").split())


def test_an_unknown_command_is_a_user_error(run_cli: Callable[..., Any]) -> None:
    assert run_cli("prun").code == 2
