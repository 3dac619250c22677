"""Images on the command line: from an .npz of rows to a pruned checkpoint that labels a PNG; an imported original."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from models.checkpoint import load_checkpoint
from tests.models.test_vision import vmoe_arrays
from tests.models.tiny_vision import tiny_vision

Run = Callable[..., Any]
# A bright half tells the class; few steps suffice.
CLASSES = ("left", "right", "top")
TRAINING = "epochs: 1\nmin_steps: 30\nbatch_tokens: 160\nlearning_rate: 0.01\nshift: 0\n"


def rows(count: int, classes: tuple[str, ...], seed: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    label_N = np.arange(count) % len(classes)
    pictures = generator.integers(0, 60, (count, 14, 14), dtype=np.uint8)
    for picture, label in zip(pictures, label_N, strict=True):
        (picture[:, :7], picture[:, 7:], picture[:7], picture[7:])[label][:] += 150
    return pictures, label_N


def write(file: Path, classes: tuple[str, ...]) -> Path:
    (x_train, y_train), (x_test, y_test) = rows(200, classes, 0), rows(40, classes, 1)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    np.savez(file, classes=np.array(classes), **arrays)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "two.npz", CLASSES[:2])
    write(tmp_path / "three.npz", CLASSES)
    (tmp_path / "training.yaml").write_text(TRAINING)
    return tmp_path


def test_from_rows_to_a_label(folder: Path, run_cli: Run) -> None:
    data, config = folder / "three.npz", folder / "training.yaml"

    def run(*arguments: object) -> Any:
        ran = run_cli(*arguments, "--json")
        assert ran.code == 0, ran.err
        return ran.document

    family = ("--family", "vmoe", "--size", "tiny", "--config", config)
    run("pretrain", "--data", folder / "two.npz", *family, "--out", folder / "base")
    full = run("finetune", "--base", folder / "base", "--data", data, "--config", config, "--out", folder / "full")
    assert (full["labels"], full["accuracy_rows"]) == (list(CLASSES), 20)
    assert full["training"]["router_optimizer"] == "sgd"
    assert len(full["training"]["router_movement"]) == 2
    before, after = (load_file(folder / name / "model.safetensors") for name in ("base", "full"))
    name = "encoder.0.moe.router.weight"
    assert not np.array_equal(before[name], after[name])
    cut = ("--finetuned", folder / "full", "--pretrained", folder / "base", "--keep", 4, "--data", data)
    run("prune", "--method", "router-norm-change", *cut, "--out", folder / "cut")
    base = ("--base", folder / "cut", "--teacher", folder / "full", "--data", data, "--config", config)
    run("recover", *base, "--out", folder / "pruned")
    found = run("evaluate", folder / "full", folder / "cut", folder / "pruned", "--data", data)["checkpoints"]
    assert [checkpoint["rows"] for checkpoint in found] == [40] * 3
    assert found[0]["accuracy"] > 0.9
    assert found[2]["accuracy"] > 0.9
    facts = run("inspect", folder / "pruned", "--verify")
    assert (facts["reads"], facts["experts_kept"], facts["verified"]) == ("image", [4, 4], True)
    assert facts["tokenizer_sha256"] is None
    pictures, label_N = rows(3, CLASSES, 2)
    files = []
    for number, picture in enumerate(pictures):
        files.append(folder / f"{number}.png")
        Image.fromarray(picture).save(files[-1])
    answers = run("classify", folder / "pruned", *files)["data"]
    assert [answer["label"] for answer in answers] == [CLASSES[label] for label in label_N]
    assert {answer["tokens"] for answer in answers} == {5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrain", "--data", "two.npz"), "rows are images, qwen3_moe reads texts"),
        (("pretrain", "--data", "two.npz", "--data", "three.npz", "--family", "vmoe"), "give one --data FILE.npz"),
        (("pretrain", "--data", "rows.csv", "--family", "vmoe"), "rows are texts, a V-MoE reads images"),
        (("pretrain", "--data", "two.npz", "--family", "vmoe", "--size", "huge"), "size is 'huge'"),
        (("pretrain", "--data", "two.npz", "--family", "vmoe", "--config", "crop.yaml"), "crop has no meaning"),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(
    folder: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "rows.csv").write_text("text,label\na,b\nc,d\n")
    (folder / "crop.yaml").write_text("crop: 0.5\n")
    ran = run_cli(*arguments, "--out", "out")
    assert ran.code == 2
    assert message in ran.err
    assert not (folder / "out").exists()


def test_an_original_checkpoint_is_imported(folder: Path, run_cli: Run) -> None:
    model = tiny_vision(image_mean=[0.5], image_std=[0.5])
    np.savez(folder / "vmoe.npz", **vmoe_arrays(model))  # type: ignore[arg-type]
    (folder / "labels.txt").write_text("cat\ndog\nowl\n")
    command = ("import-vmoe", folder / "vmoe.npz", "--top-k", 2, "--labels", folder / "labels.txt")
    document = run_cli(*command, "--out", folder / "imported", "--json").document
    assert document["labels"] == ["cat", "dog", "owl"]
    load_checkpoint(folder / "imported").verify()
    assert json.loads((folder / "imported" / "config.json").read_text())["image_size"] == 8
    ran = run_cli("import-vmoe", folder / "two.npz", "--out", folder / "nothing")
    assert ran.code == 1
    assert "array embedding/kernel is missing" in ran.err


def test_a_file_that_is_no_image(folder: Path, run_cli: Run) -> None:
    np.savez(folder / "vmoe.npz", **vmoe_arrays(tiny_vision(image_mean=[0.5], image_std=[0.5])))  # type: ignore[arg-type]
    run_cli("import-vmoe", folder / "vmoe.npz", "--out", folder / "imported")
    ran = run_cli("classify", folder / "imported", folder / "training.yaml")
    assert (ran.code, ran.err) == (2, "error: the input is no PNG, JPEG or WebP image, and this model reads images\n")
    ran = run_cli("classify", folder / "imported", "a lovely day")
    assert "is not a file: this checkpoint reads images" in ran.err
