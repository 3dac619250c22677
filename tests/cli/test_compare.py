"""`secateur compare`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_table_and_the_document(toy: Any, rows_file: Path, run_cli: Callable[..., Any]) -> None:
    arguments = ("compare", toy.finetuned, toy.pretrained, "--data", rows_file, "--split", "all", "--margin", "0.05")
    found = run_cli(*arguments, "--json").document
    against = run_cli(
        "evaluate", toy.finetuned, toy.pretrained, "--data", rows_file, "--split", "all", "--json"
    ).document
    (agreement,) = against["against_first"]
    assert found["rows"] == 12
    assert (found["only_control"], found["only_candidate"]) == (agreement["only_a"], agreement["only_b"])
    assert found["agreement"] == agreement["rate"]
    assert [timing["quantile"] for timing in found["timings"]] == [0.5, 0.95]
    ran = run_cli(*arguments)
    assert ran.code == 0
    assert "by 5 points or more" in ran.out
    assert "candidate / control" in ran.out


def test_a_split_without_rows(toy: Any, rows_file: Path, run_cli: Callable[..., Any]) -> None:
    ran = run_cli("compare", toy.finetuned, toy.pretrained, "--data", rows_file, "--split", "dev")
    assert ran.code == 2
    assert "Traceback" not in ran.err
