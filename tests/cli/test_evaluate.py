"""`secateur evaluate`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import load_checkpoint
from models.dataset import read_rows
from models.manifest import MANIFEST_FILE


def test_the_numbers_are_those_of_the_model(toy: Any, rows_file: Path, run_cli: Callable[..., Any]) -> None:
    loaded = load_checkpoint(toy.finetuned)
    rows = read_rows(rows_file, "test")
    logits_BC = loaded.model.classify([loaded.encoder.encode(row.text).ids for row in rows]).logits_BC
    right = sum(loaded.labels[i] == row.label for i, row in zip(logits_BC.argmax(1).tolist(), rows, strict=True))
    report = run_cli("evaluate", toy.finetuned, toy.pretrained, "--data", rows_file, "--json").document
    first, second = report["checkpoints"]
    assert first["rows"] == len(rows) == 4
    assert first["accuracy"] == pytest.approx(right / 4)
    assert "predictions" not in first
    (against,) = report["against_first"]
    assert against["checkpoint"] == "pretrained"
    assert against["difference"] == pytest.approx(second["accuracy"] - first["accuracy"])


@pytest.mark.parametrize(("split", "rows"), [("test", 4), ("train", 8), ("all", 12)])
def test_split_chooses_the_rows(split: str, rows: int, toy: Any, rows_file: Path, run_cli: Callable[..., Any]) -> None:
    report = run_cli("evaluate", toy.finetuned, "--data", rows_file, "--split", split, "--json").document
    assert report["checkpoints"][0]["rows"] == rows


def test_a_person_sees_intervals_recalls_and_the_comparison(
    toy: Any, rows_file: Path, run_cli: Callable[..., Any]
) -> None:
    ran = run_cli("evaluate", toy.finetuned, toy.pretrained, "--data", rows_file, "--split", "all")
    assert ran.code == 0
    for word in ("accuracy", "macro-F1", "same label", "recall by class", "[bold]blue", "red"):
        assert word in ran.out


def test_checkpoints_with_other_labels_are_not_compared(
    toy: Any, rows_file: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    other = Path(shutil.copytree(toy.finetuned, tmp_path / "other"))
    (other / MANIFEST_FILE).unlink()
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {"0": "green", "1": "red", "2": "[bold]blue"}
    (other / "config.json").write_text(json.dumps(config))
    ran = run_cli("evaluate", toy.finetuned, other, "--data", rows_file, "--json")
    assert (ran.code, ran.out) == (2, "")
    assert "other has other labels than finetuned" in ran.err


def test_rows_that_cannot_be_read_name_the_line(toy: Any, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "w1", "label": "red"}\n{"text": "w2"}\n')
    ran = run_cli("evaluate", toy.finetuned, "--data", file)
    assert ran.code == 2
    assert "line 2: label" in ran.err
