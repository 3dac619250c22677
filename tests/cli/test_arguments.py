"""Numbers and paths on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.errors import PlanError
from service.cli.arguments import parse_bytes, parse_keep, parse_layers, parse_options, parse_protected


@pytest.mark.parametrize(("text", "value"), [("8", 8), ("1", 1), ("0.5", 0.5), ("1.0", 1.0), (".25", 0.25)])
def test_keep_is_a_count_or_with_a_point_a_ratio(text: str, value: float) -> None:
    assert parse_keep(text) == value
    assert type(parse_keep(text)) is type(value)


def test_keep_is_a_count_for_each_layer_with_commas() -> None:
    assert parse_keep("4,8,8,4") == (4, 8, 8, 4)


@pytest.mark.parametrize(
    "text", ["0", "-1", "0.0", "-0.5", "1.5", "8.0", "half", "", ".", "nan", "1e3", "inf", "0,5", "4,", "4,0.5"]
)
def test_keep_refuses_the_rest_and_says_what_it_takes(text: str) -> None:
    with pytest.raises(PlanError, match="count such as 8, a ratio"):
        parse_keep(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("5000000", 5000000), ("5MB", 5000000), ("4.5 MiB", 4718592), ("1kB", 1000), ("0.5GB", 500000000)],
)
def test_a_budget_is_a_number_of_bytes_with_or_without_a_unit(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "0", "-5", "5 XB", "MB", "1.2.3MB", "5mb", "0.1"])
def test_a_budget_refuses_the_rest(text: str) -> None:
    with pytest.raises(PlanError, match="must be a number of bytes such as"):
        parse_bytes(text)


def test_layers_experts_and_options_are_lists() -> None:
    assert parse_layers("3,0,3") == (0, 3)
    assert parse_layers("") == ()
    assert parse_protected("2:1, 0:5,0:2") == {0: (2, 5), 2: (1,)}
    assert parse_protected("") == {}
    assert parse_options(["a=1", "b-c=x=y"]) == {"a": "1", "b-c": "x=y"}


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_layers, "first", "--exempt is 'first'"),
        (parse_layers, "1,", "--exempt is '1,'"),
        (parse_protected, "5", "must be pairs layer:expert"),
        (parse_protected, "0:-1", "must be pairs layer:expert"),
        (parse_options, ["alpha"], "--option is 'alpha', must be NAME=VALUE"),
        (parse_options, ["=1"], "must be NAME=VALUE"),
        (parse_options, ["a=1", "a=2"], "--option a is given twice"),
    ],
)
def test_malformed_lists_are_refused(parse: Callable[[Any], Any], text: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse(text)


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
