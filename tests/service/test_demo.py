"""The demo: the chain runs from rows to verified children, and the shipped checkpoints are what the README says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.checkpoint import load_checkpoint
from models.dataset import read_rows
from models.errors import SecateurError
from models.evaluate import evaluate
from service.demo import CHECKPOINTS, DEMO, TASKS, DemoTask, build_demo, ensure_demo

RESULTS = DEMO / "results.json"
MAX_SHIPPED_BYTES = 26_000_000


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoints with children cut beside them, as a first `secateur serve` leaves them."""
    copy = tmp_path_factory.mktemp("demo") / "checkpoints"
    shutil.copytree(CHECKPOINTS, copy, ignore=shutil.ignore_patterns("pruned"))
    ensure_demo(checkpoints=copy)
    return copy


def test_quick_build_makes_every_part(tmp_path: Path) -> None:
    results = build_demo(tmp_path / "demo", quick=True)
    assert set(results) == {task.name for task in TASKS}
    for task in TASKS:
        child = load_checkpoint(tmp_path / "demo" / "checkpoints" / task.name / "pruned")
        child.verify()
        assert child.manifest is not None
        assert child.manifest.method == "router-norm-change"
        assert results[task.name]["pruned"]["parameters"] < results[task.name]["full"]["parameters"]
    made = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert made.keys() == results.keys()


def test_shipped_checkpoints_are_small() -> None:
    files = [file for file in CHECKPOINTS.rglob("*") if file.is_file() and "pruned" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= MAX_SHIPPED_BYTES


def test_children_follow_from_the_routers_in_the_files(children: Path) -> None:
    for task in TASKS:
        before = load_file(children / task.base / "model.safetensors")
        template = "encoder.{}.moe.router.weight" if task.base == "image-base" else "model.layers.{}.mlp.gate.weight"
        child = load_checkpoint(children / task.name / "pruned")
        parent = load_checkpoint(children / task.name / "full")
        assert child.manifest is not None
        for index in child.model.config.moe_layers:
            layer, name = child.manifest.layers[index], template.format(index)
            after = parent.model.layers[index].w_router_ED.double().numpy()  # type: ignore[operator]
            change = np.linalg.norm(after, axis=1) - np.linalg.norm(before[name].astype(np.float64), axis=1)
            assert layer.kept == tuple(sorted(np.argsort(change)[-task.keep :].tolist()))


def test_children_lose_at_least_a_third_of_all_parameters(children: Path) -> None:
    for task in TASKS:
        manifest = load_checkpoint(children / task.name / "pruned").manifest
        assert manifest is not None
        assert manifest.parent is not None
        assert manifest.parameters <= manifest.parent.parameters * 2 / 3


def test_ensure_demo_keeps_what_is_there_and_replaces_what_is_stale(children: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(children, copy)
    weights = copy / "spam" / "pruned" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    ensure_demo(checkpoints=copy)
    assert weights.stat().st_mtime_ns == before
    shutil.rmtree(copy / "spam" / "pruned")
    shutil.copytree(copy / "language" / "pruned", copy / "spam" / "pruned")
    ensure_demo(checkpoints=copy)
    assert load_checkpoint(copy / "spam" / "pruned").labels == ("ham", "spam")


def test_a_missing_parent_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="secateur demo build"):
        ensure_demo(checkpoints=tmp_path)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_recorded_accuracies_are_reproduced(task: object, children: Path) -> None:
    assert isinstance(task, DemoTask)
    name = task.name
    recorded = json.loads(RESULTS.read_text())[name]
    rows = read_rows(task.data, "test")
    for variant in ("full", "pruned"):
        result = evaluate(load_checkpoint(children / name / variant), rows)
        # Another CPU may round a borderline row the other way; 2 rows in a thousand is far inside the interval.
        assert result.accuracy == pytest.approx(recorded[variant]["accuracy"], abs=0.002)
        assert result.parameters == recorded[variant]["parameters"]
