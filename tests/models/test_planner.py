"""The search from a tiny parent to a child on disk: what is read, what is claimed, and that it goes on where it was."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoint import load_checkpoint, save_checkpoint
from models.dataset import Row
from models.errors import CheckpointError, DataError, PlanError
from models.evaluate import agreement, evaluate
from models.pruning import METHODS, candidates, planner, workbench
from models.pruning.candidates import Candidate, ratios
from models.pruning.confirm import numbered
from models.pruning.journal import Journal
from models.pruning.plan import keep_best
from models.pruning.planner import Request, plan
from models.pruning.prune import prune
from models.pruning.workbench import digest
from models.tokenizer import TextEncoder

TRAIN, DEV, TEST = 40, 240, 30
FEW = ("router-norm-change", "frequency", "naee", "mone", "hc-smoe", "random")
SECRET = "w57"  # a word of test rows alone


@dataclass(frozen=True)
class Task:
    """A parent, what it was fine-tuned from, and rows that it labels itself: it is always right."""

    parent: Path
    base: Path
    rows: list[dict[str, str]]

    def dev(self) -> list[Row]:
        return [
            Row(row["text"], row["label"], row["split"], row["group"]) for row in self.rows if row["split"] == "dev"
        ]

    def write(self, file: Path, rows: list[dict[str, str]] | None = None) -> Path:
        file.write_text("".join(json.dumps(row) + "\n" for row in (self.rows if rows is None else rows)))
        return file


@pytest.fixture(scope="session")
def task(
    tmp_path_factory: pytest.TempPathFactory,
    pristine: Path,
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
) -> Task:
    folder = tmp_path_factory.mktemp("task")
    base = write_oracle(make_oracle("qwen3_moe", seed=1), folder / "base")
    parent = load_checkpoint(pristine)
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number, split in enumerate(["train"] * TRAIN + ["dev"] * DEV + ["test"] * TEST):
        words = [
            f"w{int(i)}"
            for i in torch.randint(0, 50, (int(torch.randint(3, 12, (1,), generator=generator)),), generator=generator)
        ]
        text = " ".join(words + ([SECRET] if split == "test" else []))
        label = parent.labels[int(parent.model.classify([parent.encoder.encode(text).ids]).logits_BC.argmax())]
        # The label of a test row is one that no model knows: whoever looks at it fails.
        rows.append(
            {"text": text, "label": "secret" if split == "test" else label, "split": split, "group": f"g{number // 3}"}
        )
    return Task(pristine, base, rows)


def few_methods_and_a_steady_clock(patch: pytest.MonkeyPatch) -> None:
    """Enough kinds of methods; and latencies decide ties, so that they have to be the same for plans to be."""
    patch.setattr(candidates, "METHODS", {name: METHODS[name] for name in FEW})
    latency = {"single_seconds": 0.001, "batch_seconds": 0.002, "batch_rows": 8}
    patch.setattr(workbench, "measure_latency", lambda model, sequences: latency)


@pytest.fixture(autouse=True)
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    few_methods_and_a_steady_clock(monkeypatch)


@pytest.fixture(scope="session")
def done(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, dict[str, Any]]:
    """One plan that nobody may change."""
    folder = tmp_path_factory.mktemp("plan")
    request = Request(task.parent, task.write(folder / "rows.jsonl"), folder / "out", task.base, tolerance=15.0)
    with pytest.MonkeyPatch.context() as patch:
        few_methods_and_a_steady_clock(patch)
        return request, plan(request)


def findings(document: dict[str, Any]) -> dict[str, Any]:
    """What must be equal between two plans of the same request."""
    return {key: value for key, value in document.items() if key != "seconds"}


def test_the_child_passed_is_not_behind_and_is_what_was_measured(done: tuple[Request, dict[str, Any]]) -> None:
    request, document = done
    assert document == json.loads((request.out / "plan.json").read_text())
    passed = [step["name"] for step in document["ladder"] if step["result"] == "passed"]
    points = {point["name"]: point for point in document["front"]}
    sizes = {name: point["bytes"] for name, point in points.items()}
    assert document["smallest"] == passed[-1] == min(passed, key=sizes.__getitem__)
    good = [name for name in passed if points[name]["accuracy"] >= points[document["reference"]]["accuracy"]]
    assert document["chosen"] in good
    assert document["behind_reference"] is False
    child = load_checkpoint(request.out / "child")
    child.verify()
    assert child.manifest is not None
    assert child.manifest.bytes == sizes[document["chosen"]] < document["parent"]["bytes"]
    point = next(point for point in document["front"] if point["name"] == document["chosen"])
    assert point["difference"]["lower"] > -0.15
    assert point["experts"] == list(child.experts_kept)


def test_a_smaller_one_that_passed_but_is_behind_is_written_beside(
    done: tuple[Request, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "taken", lambda passed, reference, runs: passed[0])
    document = plan(replace(done[0], out=tmp_path / "out"))
    sizes = {point["name"]: point["bytes"] for point in document["front"]}
    assert sizes[document["smallest"]] < sizes[document["chosen"]]
    assert not (done[0].out / "smallest").exists()
    for name, place in (("chosen", "child"), ("smallest", "smallest")):
        child = load_checkpoint(tmp_path / "out" / place)
        child.verify()
        assert child.manifest is not None
        assert child.manifest.bytes == sizes[document[name]]


def test_the_reference_keeps_half_and_is_the_nearest_on_the_rows_that_choose(
    done: tuple[Request, dict[str, Any]],
) -> None:
    document, choosing = done[1], done[1]["rows"]["choosing"]

    def distance(name: str) -> float:
        losses = document["measured"][name]["losses"], document["measured"]["none none keep 1"]["losses"]
        child_N, parent_N = (np.exp(-np.frombuffer(bytes.fromhex(x), dtype="<f4")[:choosing]) for x in losses)
        return float(np.abs(child_N - parent_N).mean())

    halves = [x["name"] for x in document["tried"] if x["keep"] == 0.5 and x["rows"] >= choosing]
    alive = [x["name"] for x in document["tried"] if x["name"] in halves and x["state"] in ("front", "beaten")]
    assert len(alive) > 1
    assert document["reference"] == min(alive, key=distance)


def test_accuracy_is_that_of_evaluate_on_the_dev_rows(task: Task, done: tuple[Request, dict[str, Any]]) -> None:
    request, document = done
    rows = task.dev()
    child = load_checkpoint(request.out / "child")
    before, after = evaluate(load_checkpoint(task.parent), rows), evaluate(child, rows)
    point = next(point for point in document["front"] if point["name"] == document["chosen"])
    assert point["accuracy"] == pytest.approx(after.accuracy)
    assert tuple(point["accuracy_interval"]) == pytest.approx(after.accuracy_interval)
    assert document["parent"]["accuracy"] == before.accuracy == 1.0
    assert point["difference"]["rows"] == document["rows"]["confirming"]
    assert agreement(before, after).difference <= 0


def test_dev_rows_choose_or_confirm_and_no_group_does_both(task: Task) -> None:
    parent = load_checkpoint(task.parent)
    rows = task.dev()
    dev, choosing = planner._in_order(parent, rows, seed=0)
    assert len(dev.truth) == DEV
    assert not set(dev.group_N[:choosing]) & set(dev.group_N[choosing:])
    assert choosing == pytest.approx(DEV / 5, abs=3)
    other, _ = planner._in_order(parent, rows, seed=1)
    assert other.group_N != dev.group_N


def test_what_is_tested_and_in_which_order_does_not_depend_on_rows_that_confirm(
    task: Task, done: tuple[Request, dict[str, Any]], tmp_path: Path
) -> None:
    """Other labels on those rows: whatever was chosen by them would come out otherwise."""
    parent = load_checkpoint(task.parent)
    rows = task.dev()
    dev, choosing = planner._in_order(parent, rows, seed=0)
    confirming = {
        row.group
        for row, number in zip(rows, numbered([row.group for row in rows]), strict=True)
        if number in dev.group_N[choosing:]
    }
    others = dict(zip(parent.labels, (*parent.labels[1:], parent.labels[0]), strict=True))
    changed = [
        row | ({"label": others[row["label"]]} if row["split"] == "dev" and row["group"] in confirming else {})
        for row in task.rows
    ]
    file = task.write(tmp_path / "rows.jsonl", changed)
    document = plan(replace(done[0], data=file, out=tmp_path / "out"))

    def before_confirming(found: dict[str, Any]) -> tuple[Any, ...]:
        dropped = [(x["name"], x["reason"]) for x in found["tried"] if x["state"] != "front"]
        return [step["name"] for step in found["ladder"]], found["reference"], dropped

    assert document["parent"]["accuracy"] < 0.5
    assert len(document["ladder"]) > 1
    assert before_confirming(document) == before_confirming(done[1])


def test_test_rows_are_never_looked_at(
    task: Task, done: tuple[Request, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = TextEncoder.encode

    def watched(encoder: TextEncoder, text: str) -> Any:
        seen.append(text)
        return encode(encoder, text)

    monkeypatch.setattr(TextEncoder, "encode", watched)
    file = task.write(tmp_path / "rows.jsonl")
    document = plan(replace(done[0], data=file, out=tmp_path / "out"))
    assert seen
    assert not [text for text in seen if SECRET in text]
    bare = task.write(tmp_path / "bare.jsonl", [row for row in task.rows if row["split"] != "test"])
    found = findings(plan(replace(done[0], data=bare, out=tmp_path / "bare")))
    assert {**found, "request": findings(document)["request"]} == findings(document)
    assert findings(document) == findings(done[1])


class Notes:
    """Journal.note, counting, and failing after so many."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int | None = None) -> None:
        note = Journal.note
        self.names: list[str] = []

        def counted(journal: Journal, section: str, name: str, value: Any) -> None:
            note(journal, section, name, value)
            self.names.append(name)
            if len(self.names) == last:
                raise KeyboardInterrupt

        patch.setattr(Journal, "note", counted)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_an_interrupted_plan_goes_on_to_the_same_end(
    share: float, done: tuple[Request, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        whole = Notes(patch)
        plan(replace(done[0], out=tmp_path / "whole"))
    request, last = replace(done[0], out=tmp_path / "out"), max(1, round(share * len(whole.names)))
    with monkeypatch.context() as patch:
        Notes(patch, last)
        with pytest.raises(KeyboardInterrupt):
            plan(request)
    assert "chosen" not in json.loads((request.out / "plan.json").read_text())
    rest = Notes(monkeypatch)
    assert findings(plan(request)) == findings(done[1])
    assert rest.names == whole.names[last:]


def test_a_finished_plan_answers_from_its_file(
    done: tuple[Request, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(done[0], out=tmp_path / "out")
    shutil.copytree(done[0].out, request.out)

    def never(*arguments: Any) -> None:
        raise AssertionError("nothing is left to measure")

    monkeypatch.setattr(Journal, "note", never)
    assert findings(plan(request)) == findings(done[1])


def test_a_child_that_was_changed_meanwhile_is_refused(done: tuple[Request, dict[str, Any]], tmp_path: Path) -> None:
    request = replace(done[0], out=tmp_path / "out")
    shutil.copytree(done[0].out, request.out)
    shutil.rmtree(request.out / "child")
    chosen = next(point for point in done[1]["front"] if point["name"] == done[1]["chosen"])
    keep = tuple(chosen["experts"])
    other = prune(request.finetuned, "random", keep, request.out / "child", semantics=chosen["semantics"], seed=3)
    assert other.manifest is not None
    assert other.manifest.bytes == chosen["bytes"]
    with pytest.raises(CheckpointError, match="not the child that was measured"):
        plan(request)


def test_another_request_in_the_same_place_is_refused(done: tuple[Request, dict[str, Any]]) -> None:
    with pytest.raises(PlanError, match="its tolerance differs"):
        plan(replace(done[0], tolerance=14.0))
    with pytest.raises(PlanError, match="its pretrained sha256 differs"):
        plan(replace(done[0], pretrained=None))


def test_a_foreign_file_is_refused(done: tuple[Request, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[1]")
    with pytest.raises(PlanError, match="is no plan"):
        plan(replace(done[0], out=tmp_path))


def test_everything_is_accounted_for(done: tuple[Request, dict[str, Any]]) -> None:
    tried = done[1]["tried"]
    assert len({x["name"] for x in tried}) == len(tried)
    assert all(x["reason"] for x in tried if x["state"] != "front")
    assert all(x["rows"] > 0 for x in tried if x["state"] in ("front", "beaten", "dropped"))
    assert {x["method"] for x in tried} | set(done[1]["left_out"]) == set(FEW)
    assert done[1]["left_out"] == {"naee": "searches all keep-sets of a layer: ask for it with --thorough"}
    # Two ratios of four experts that choose two: three, and two; router-norm change is watched where it was planned.
    assert [found["keep"] for found in done[1]["router_norm_change"]] == [0.5]


def test_every_method_is_tried_or_left_out_for_a_reason(
    done: tuple[Request, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "METHODS", METHODS)
    document = plan(replace(done[0], out=tmp_path / "out"))
    assert {x["method"] for x in document["tried"]} | set(document["left_out"]) == set(METHODS)
    assert {"eep", "naee", "premoe-union"} <= set(document["left_out"])
    assert not [x["name"] for x in document["tried"] if x["state"] == "impossible"]


def test_thorough_tries_slow_methods_and_shares_out_by_score(
    done: tuple[Request, dict[str, Any]], tmp_path: Path
) -> None:
    document = plan(replace(done[0], out=tmp_path / "out", thorough=True))
    assert document["left_out"] == {}
    assert "naee" in {x["method"] for x in document["tried"]}
    assert {x["allocation"] for x in document["tried"] if x["method"] == "mone"} == {"uniform", "global"}


def test_without_a_base_router_norm_change_is_left_out_and_said(task: Task, tmp_path: Path) -> None:
    request = Request(task.parent, task.write(tmp_path / "rows.jsonl"), tmp_path / "out", tolerance=15.0)
    document = plan(request)
    assert "give --pretrained" in document["left_out"]["router-norm-change"]
    assert document["router_norm_change"] == []


def test_a_budget_is_kept(done: tuple[Request, dict[str, Any]], tmp_path: Path) -> None:
    smallest = min(point["bytes"] for point in done[1]["front"])
    document = plan(replace(done[0], out=tmp_path / "out", budget=smallest + 100, tolerance=90.0))
    assert all(point["bytes"] <= smallest + 100 for point in document["front"])
    assert any("the budget is" in x["reason"] for x in document["tried"])
    with pytest.raises(PlanError, match=r"nothing can be tried: takes .* the budget is 10"):
        plan(replace(done[0], out=tmp_path / "none", budget=10))


def test_nothing_passes_is_an_answer(done: tuple[Request, dict[str, Any]], tmp_path: Path) -> None:
    document = plan(replace(done[0], out=tmp_path / "out", tolerance=0.0))
    assert document["chosen"] is None
    assert document["child"] is None
    assert document["smallest"] is None
    assert document["behind_reference"] is None
    assert not (tmp_path / "out" / "child").exists()
    assert document["front"]


@pytest.mark.parametrize("tolerance", [-0.5, 100.0, float("nan")])
def test_a_tolerance_that_is_none_is_refused(tolerance: float, done: tuple[Request, dict[str, Any]]) -> None:
    with pytest.raises(PlanError, match="--tolerance is"):
        plan(replace(done[0], tolerance=tolerance))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("train", "test"), "has no dev rows"),
        (("test",), "test rows only"),
        (("dev",), "no row has split 'train'"),
    ],
)
def test_rows_that_cannot_judge_are_refused(
    splits: tuple[str, ...], message: str, task: Task, done: tuple[Request, dict[str, Any]], tmp_path: Path
) -> None:
    file = task.write(tmp_path / "rows.jsonl", [row for row in task.rows if row["split"] in splits])
    with pytest.raises(DataError, match=message):
        plan(replace(done[0], data=file, out=tmp_path / "out"))


def test_too_few_groups_are_refused(task: Task, done: tuple[Request, dict[str, Any]], tmp_path: Path) -> None:
    rows = [row | {"group": str(number % 3)} for number, row in enumerate(task.rows)]
    with pytest.raises(DataError, match="are of 3 groups"):
        plan(replace(done[0], data=task.write(tmp_path / "rows.jsonl", rows), out=tmp_path / "out"))


def test_ratios_are_counts_that_differ_and_feed_the_router(task: Task) -> None:
    config = load_checkpoint(task.parent).model.config
    assert ratios(config, more=False) == [0.75, 0.5]


def test_plans_that_make_the_same_child_have_the_same_digest() -> None:
    one = {0: keep_best([1.0, 2.0, 3.0], 2, "zero")}
    assert digest(one) == digest({0: keep_best([10.0, 20.0, 30.0], 2, "zero")})
    assert digest(one) != digest({0: keep_best([3.0, 2.0, 1.0], 2, "zero")})
    assert digest(one) != digest({0: keep_best([1.0, 2.0, 3.0], 2, "slice")})
    assert digest(one) != digest({1: one[0]})


def test_a_candidate_reads_like_its_command() -> None:
    assert str(Candidate("frequency", "zero", 0.5)) == "frequency zero keep 0.5"
    assert str(Candidate("mone", "constant", (3, 4), "global")) == "mone constant keep 3,4 global"


def test_weights_are_measured_as_they_are_stored(task: Task, tmp_path: Path) -> None:
    """A merge of bfloat16 experts is no bfloat16 number until it is rounded."""
    parent = load_checkpoint(task.parent)
    half = save_checkpoint(
        tmp_path / "half", parent.model, parent.raw_config, task.parent / "tokenizer.json", dtype="bfloat16"
    )
    file = task.write(tmp_path / "rows.jsonl")
    document = plan(Request(half.path, file, tmp_path / "out", tolerance=90.0))
    assert document["parent"]["bytes"] == half.manifest.bytes  # type: ignore[union-attr]
    assert document["chosen"] is not None
    assert np.isfinite([point["accuracy"] for point in document["front"]]).all()
