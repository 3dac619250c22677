"""A stranger's own rows, from a CSV file to an answer over HTTP, by the commands of the README alone."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.server import serving

NUM_ROWS = 300
# Three classes that differ in a word; a model that learns anything tells them apart.
WORDS = {"fruit": "apple pear plum cherry", "tool": "hammer saw drill file", "bird": "robin wren crow gull"}
# 300 short rows are one batch of the default size: smaller batches and more rounds make steps to learn from.
TRAINING = "epochs: 30\nbatch_tokens: 256\nmax_tokens: 16\nlearning_rate: 0.005\n"
FILLER = ["the", "a", "one", "my", "your", "old", "new", "small", "big", "some", "that", "this", "very", "quite"]


def write_rows(file: Path) -> None:
    generator = random.Random(5)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        for number in range(NUM_ROWS):
            label = list(WORDS)[number % 3]
            words = [*generator.choices(FILLER, k=4), generator.choice(WORDS[label].split())]
            generator.shuffle(words)
            writer.writerow({"text": " ".join(words), "label": label})


def test_from_a_csv_file_to_an_answer(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    rows, base, full, cut, recovered = (tmp_path / name for name in ("rows.csv", "base", "full", "cut", "recovered"))
    write_rows(rows)
    hyper = tmp_path / "training.yaml"
    hyper.write_text(TRAINING)

    assert run_cli("pretrain", "--data", rows, "--size", "tiny", "--config", hyper, "--out", base).code == 0
    trained = run_cli("finetune", "--base", base, "--data", rows, "--config", hyper, "--out", full, "--json")
    assert trained.code == 0, trained.err
    assert trained.document["labels"] == ["bird", "fruit", "tool"]
    assert trained.document["accuracy_rows"] == 30  # a tenth of the rows is held out
    assert trained.document["accuracy"] > 0.9

    options = ("--method", "router-norm-change", "--finetuned", full, "--pretrained", base, "--keep", "0.5")
    pruned = run_cli("prune", *options, "--out", cut, "--json")
    assert pruned.code == 0, pruned.err
    assert pruned.document["experts_kept"] == [4, 4]

    again = run_cli(
        "recover", "--base", cut, "--teacher", full, "--data", rows, "--config", hyper, "--out", recovered, "--json"
    )
    assert again.code == 0, again.err
    report = run_cli("evaluate", full, recovered, "--data", rows, "--json").document
    assert [one["rows"] for one in report["checkpoints"]] == [NUM_ROWS, NUM_ROWS]
    assert all(one["accuracy"] > 0.9 for one in report["checkpoints"])

    config = tmp_path / "secateur.yaml"
    config.write_text(
        "version: 1\n"
        "models: {root: .}\n"
        "deployments:\n"
        "  things-full: {path: full, role: full}\n"
        "  things-pruned: {path: recovered, role: pruned}\n"
        "tasks:\n"
        "  things: {deployments: [things-full, things-pruned], full: things-full, default: things-pruned}\n"
    )
    with serving(tmp_path, "--config", str(config)) as client:
        for variant, served in (("auto", "things-pruned"), ("full", "things-full")):
            answer = client.post("/classify", json={"task": "things", "inputs": "my old hammer", "variant": variant})
            assert answer.status_code == 200, answer.text
            assert answer.json()["variant"] == served
            assert answer.json()["data"][0]["label"] == "tool"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("text,label\nonly one class,a\nstill one,a\n", "a classifier needs at least 2"),
        ("text,class\nx,a\n", "column 'label' is missing"),
        ("text,label\n,a\n", "line 2: text is '', must be a non-empty string"),
    ],
)
def test_rows_that_cannot_train_end_in_one_line(
    text: str, problem: str, toy: Any, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(text)
    ran = run_cli("finetune", "--base", toy.pretrained, "--data", rows, "--out", tmp_path / "out", "--json")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert problem in ran.err
    assert not (tmp_path / "out").exists()


def test_an_unknown_hyper_parameter_is_named_with_its_neighbour(
    toy: Any, rows_file: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    hyper = tmp_path / "training.yaml"
    hyper.write_text(json.dumps({"learning_rat": 0.1}))
    ran = run_cli(
        "finetune", "--base", toy.pretrained, "--data", rows_file, "--config", hyper, "--out", tmp_path / "out"
    )
    assert ran.code == 2
    assert "did you mean learning_rate" in ran.err
