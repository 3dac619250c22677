"""`secateur demo`: what it prints; what the build does is tested with the demo itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from models.errors import SecateurError
from models.progress import Progress

FULL = {"rows": 100, "accuracy": 0.9, "accuracy_interval": [0.825, 0.945], "macro_f1": 0.88, "parameters": 1000}
PRUNED = FULL | {
    "accuracy": 0.89,
    "parameters": 600,
    "against_full": {"difference": -0.01, "difference_interval": [-0.03, 0.01]},
}
RESULTS = {"weather": {"full": FULL, "pruned": PRUNED}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the build, which takes half an hour, by one that answers at once; returns what it was asked for."""
    calls: list[Any] = []

    def build_demo(out: Path, quick: bool, only: Sequence[str], progress: Progress) -> dict[str, Any]:
        calls.append((out, quick, tuple(only)))
        progress(1, 2, "pretraining")
        return RESULTS

    monkeypatch.setattr("service.demo.build_demo", build_demo)
    return calls


def test_build_prints_a_table_per_task(asked: list[Any], tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    ran = run_cli("demo", "build", "--quick", "--out", tmp_path)
    assert asked == [(tmp_path, True, ())]
    assert "weather, 100 test rows" in ran.out
    assert "0.890 [0.825, 0.945]" in ran.out
    assert "-0.010 [-0.030, 0.010]" in ran.out
    assert "40.0 %" in ran.out
    assert f"secateur serve --config {tmp_path / 'secateur.yaml'}" in ran.err


def test_build_prints_one_document(asked: list[Any], tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    document = run_cli("demo", "build", "--task", "a", "--task", "b", "--out", tmp_path, "--json").document
    assert asked == [(tmp_path, False, ("a", "b"))]
    assert document == {"out": str(tmp_path), "quick": False, "tasks": RESULTS}


def test_path_makes_the_children_and_says_where_the_configuration_is(
    monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., Any]
) -> None:
    monkeypatch.setattr("service.demo.ensure_demo", lambda progress: Path("a/secateur.yaml"))
    assert run_cli("demo", "path").out == "a/secateur.yaml\n"
    assert run_cli("demo", "path", "--json").document == {"config": "a/secateur.yaml"}


def test_a_demo_without_its_parents_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., Any]
) -> None:
    def ensure_demo(progress: Progress) -> Path:
        raise SecateurError("spam/full is missing: run `secateur demo build`")

    monkeypatch.setattr("service.demo.ensure_demo", ensure_demo)
    ran = run_cli("serve")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: spam/full is missing: run `secateur demo build`\n"
