"""`secateur plan`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import load_checkpoint
from models.pruning import METHODS, candidates
from tests.cli.conftest import NUM_WORDS


@pytest.fixture(autouse=True)
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("router-norm-change", "frequency", "hc-smoe", "random")
    monkeypatch.setattr(candidates, "METHODS", {name: METHODS[name] for name in few})


@pytest.fixture(scope="session")
def labelled(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that the parent gets right, two thirds of them dev; test rows have a label that it does not know."""
    parent, rows = load_checkpoint(toy.finetuned), []
    for first in range(1, NUM_WORDS):
        for second in range(1, NUM_WORDS):
            text = f"w{first} w{second} w{(first * second) % NUM_WORDS}"
            label = parent.labels[int(parent.model.classify([parent.encoder.encode(text).ids]).logits_BC.argmax())]
            split = ("train", "dev", "dev", "test")[(first + second) % 4]
            rows.append({"text": text, "label": "unknown" if split == "test" else label, "split": split})
    file = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def arguments(toy: Any, rows: Path, out: Path, tolerance: str = "60") -> tuple[object, ...]:
    options = ("--finetuned", toy.finetuned, "--pretrained", toy.pretrained, "--data", rows, "--out", out)
    return "plan", *options, "--tolerance", tolerance


def test_a_plan_leaves_a_child_a_document_and_a_page(
    toy: Any, labelled: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    out = tmp_path / "plan"
    ran = run_cli(*arguments(toy, labelled, out), "--json")
    assert ran.code == 0
    report = ran.document
    assert report["chosen"]
    assert "measured" not in report
    assert report == {k: v for k, v in json.loads((out / "plan.json").read_text()).items() if k in report}
    load_checkpoint(out / "child").verify()
    assert "<title>Plan for finetuned on rows.jsonl</title>" in (out / "plan.html").read_text()
    assert "plan.html has the plot" in ran.err
    again = run_cli(*arguments(toy, labelled, out))
    assert again.code == 0
    for words in ("what stays of it", "parent", "accuracy, %", "FLOPs per token", "one row, p50", report["chosen"]):
        assert words in again.out
    assert "router-norm change" in again.err
    assert "no more than" in again.err


def test_nothing_passing_has_its_own_exit_code_and_still_a_page(
    toy: Any, labelled: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    ran = run_cli(*arguments(toy, labelled, tmp_path / "plan", tolerance="0"))
    assert ran.code == 3
    assert "Nothing passes: " in ran.err
    assert "Nothing passes: " in (tmp_path / "plan" / "plan.html").read_text()
    assert not (tmp_path / "plan" / "child").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--tolerance", "-1"), "--tolerance is -1.0, must be points of accuracy from 0 up to 100"),
        (("--budget", "much"), "--budget is 'much', must be a number of bytes"),
        (("--budget", "10"), "nothing can be tried: takes "),
    ],
)
def test_requests_that_make_no_sense(
    change: tuple[str, str], message: str, toy: Any, labelled: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    ran = run_cli(*arguments(toy, labelled, tmp_path / "plan"), *change)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert not (tmp_path / "plan" / "child").exists()


def test_rows_without_dev_are_refused(toy: Any, rows_file: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    ran = run_cli(*arguments(toy, rows_file, tmp_path / "plan"))
    assert ran.code == 2
    assert "rows.jsonl has no dev rows" in ran.err
    assert not (tmp_path / "plan").exists()
