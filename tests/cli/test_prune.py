"""`secateur prune`."""

import json
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
        (("--method", "random"), "give one of --keep and --budget"),
        (("--method", "random", "--keep", "2", "--budget", "1MB"), "give one of --keep and --budget"),
        (("--method", "random", "--budget", "10"), "10 bytes are too few: the smallest child"),
        (("--method", "random", "--keep", "2", "--option", "x=1"), "random has no option 'x': it has no options"),
        (("--method", "random", "--keep", "2", "--allocation", "global"), "ranks experts within a layer only"),
        (("--method", "random", "--keep", "2", "--exempt", "9"), "layer 9 has no experts"),
        (("--method", "random", "--keep", "2", "--semantics", "tie"), "semantics is 'tie', random can do slice, zero"),
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


def test_every_flag_reaches_the_child(toy: Any, rows_file: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    ran = run_cli(
        "prune", "--method", "task-mass", "--finetuned", toy.finetuned, "--data", rows_file, "--keep", "2,4",
        "--out", tmp_path / "child", "--option", "variant=squared", "--exempt", "1", "--protect", "0:3,0:1",
        "--stats", tmp_path / "stats.safetensors", "--semantics", "zero", "--max-class-loss", "1.0",
        "--ignore-super-experts", "--json",
    )  # fmt: skip
    assert ran.code == 2
    assert "layer 0 is to keep 2 experts, and 2 are protected" in ran.err
    ran = run_cli(
        "prune", "--method", "task-mass", "--finetuned", toy.finetuned, "--data", rows_file, "--keep", "2,4",
        "--out", tmp_path / "child", "--option", "variant=squared", "--exempt", "1", "--protect", "0:3",
        "--stats", tmp_path / "stats.safetensors", "--semantics", "zero", "--max-class-loss", "1.0",
        "--ignore-super-experts", "--json",
    )  # fmt: skip
    assert ran.code == 0
    report = ran.document
    assert report["experts_kept"] == [2, 4]
    assert 3 in report["kept"][0]
    assert report["semantics"] == "zero"
    assert 0 < report["kept_slots"][0] < 1
    manifest = json.loads((tmp_path / "child" / "secateur.json").read_text())
    assert manifest["options"] == {
        "keep": [2, 4], "seed": 0, "exempt": [1], "protected": {"0": [3]}, "keep_super": False, "variant": "squared",
    }  # fmt: skip
    assert (tmp_path / "stats.safetensors").is_file()


def test_a_budget_on_the_command_line(toy: Any, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    request = ("prune", "--method", "random", "--finetuned", toy.finetuned, "--json")
    whole = run_cli(*request, "--keep", 4, "--out", tmp_path / "all")
    limit = whole.document["bytes"]["parent"] - 1
    ran = run_cli(*request, "--budget", limit, "--out", tmp_path / "child")
    assert ran.document["experts_kept"] == [3, 3]
    assert ran.document["bytes"]["child"] <= limit


def test_a_person_reads_what_the_dev_rows_say(toy: Any, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    labels = ("red", "green", "[bold]blue")
    lines = [
        {"text": f"w{i % 19} w{i * 3 % 19}", "label": labels[i % 3], "split": "dev" if i % 4 else "train"}
        for i in range(40)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = run_cli(
        "prune", "--method", "frequency", "--finetuned", toy.finetuned, "--data", file, "--keep", 2,
        "--semantics", "zero", "--out", tmp_path / "child",
    )  # fmt: skip
    assert ran.code == 0
    assert "on 30 rows of rows.jsonl" in ran.out
    assert "worst class: " in ran.out
    assert "of choices meet a cut expert" in ran.err
