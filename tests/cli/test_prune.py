"""`secateur prune`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import load_checkpoint


def test_router_norm_change_keeps_the_experts_whose_rows_grew_most(
    toy: Any, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    out = tmp_path / "child"
    options = ("--method", "router-norm-change", "--finetuned", toy.finetuned, "--pretrained", toy.pretrained)
    ran = run_cli("prune", *options, "--keep", "0.5", "--out", out, "--json")
    assert ran.code == 0
    report = ran.document
    # Row e grew by e/4 of its norm; how norms are spread is random, but row 0 did not grow at all.
    assert all(0 not in kept for kept in report["kept"])
    assert (report["experts_kept"], report["experts_total"]) == ([2, 2], [4, 4])
    assert report["semantics"] == "zero"
    # Two experts in each of two layers, three matrices of 16 x 8 each; under `zero` the router keeps its rows.
    removed = 2 * 2 * 3 * 16 * 8
    assert report["parameters"]["parent"] - report["parameters"]["child"] == removed
    assert report["bytes"]["parent"] - report["bytes"]["child"] == 4 * removed
    child = load_checkpoint(out)
    child.verify()
    assert child.artifact_sha256 == report["artifact_sha256"]


def test_a_person_reads_what_was_removed(
    toy: Any, rows_file: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    out = tmp_path / "child"
    ran = run_cli(
        "prune", "--method", "frequency", "--finetuned", toy.finetuned, "--data", rows_file, "--keep", 3, "--out", out
    )
    assert ran.code == 0
    assert "25.0 %" in ran.out
    assert f"verified and written to {out}" in ran.err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--method", "router-norm-change", "--keep", "2"), "--pretrained DIR"),
        (("--method", "frequency", "--keep", "2"), "--data FILE"),
        (("--method", "guess", "--keep", "2"), "method is 'guess', must be one of router-norm-change"),
        (("--method", "random", "--keep", "1"), "fewer than the top-2"),
        (("--method", "random", "--keep", "5"), "only 4 experts"),
        (("--method", "random", "--keep", "many"), "--keep is 'many'"),
        (("--method", "random", "--keep", "2", "--semantics", "tie"), "use slice or zero"),
    ],
)
def test_requests_that_make_no_sense_end_in_one_line_and_write_nothing(
    options: tuple[str, ...], problem: str, toy: Any, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    ran = run_cli("prune", *options, "--finetuned", toy.finetuned, "--out", tmp_path / "child", "--json")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert problem in ran.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(toy: Any, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    ran = run_cli("prune", "--method", "random", "--keep", 2, "--finetuned", toy.finetuned, "--out", tmp_path)
    assert ran.code == 2
    assert "exists already" in " ".join(ran.err.replace("│", " ").split())
