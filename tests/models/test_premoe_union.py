"""PreMoe unions: sets by hand, the cap, saved statistics of further tasks, and the ranking file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from models.errors import PlanError
from models.manifest import Rows
from models.pruning.method import Job
from models.pruning.methods.premoe_union import PREMOE_UNION, save_ranking, tcess, union
from models.pruning.stats import Core, LayerStats
from models.pruning.store import Meta, Stored, save
from tests.models.golden import golden

OPTIONS = {option.name: option.default for option in PREMOE_UNION.options}
# Two tasks whose best pairs are {0, 1} and {1, 3}.
FIRST, SECOND = np.array([4.0, 3.0, 2.0, 1.0]), np.array([0.0, 30.0, 10.0, 60.0])


def of_task(gf_E: Any, layer: int = 0) -> LayerStats:
    """Statistics whose task-mass is gf_E."""
    gf_E = np.asarray(gf_E, dtype=np.float64)
    core = golden().need(Core)
    arrays = {name: np.resize(value, gf_E.size) for name, value in vars(core).items() if name.endswith("_E")}
    return LayerStats(layer, gf_E.size, 2, groups=(replace(core, **{**arrays, "gf_E": gf_E}),))


def saved(file: Path, layers: dict[int, LayerStats], parent: str = "") -> Path:
    rows = Rows(name="rows", rows=4, sha256=file.name)
    meta = Meta(
        parent_sha256=parent,
        data=(rows,),
        kind="softmax",
        top_k=2,
        normalize=False,
        dtype="float32",
        seed=0,
        sample=0,
    )
    save(file, Stored(meta, layers))
    return file


def job(keep: int, first: Any = FIRST, **options: Any) -> Job:
    return Job(cast(Any, None), {0: of_task(first)}, {0: keep}, "slice", {**OPTIONS, **options})


def test_union_holds_every_member() -> None:
    plan = union([FIRST, SECOND], 2, 4, "slice")
    assert plan.kept == (0, 1, 3)
    # shares of 10 and of 100
    assert plan.score_E == pytest.approx([0.4, 0.6, 0.3, 0.7])


def test_union_of_one_is_itself() -> None:
    assert union([FIRST], 2, 4, "slice").kept == (0, 1)
    assert union([FIRST, FIRST, 7 * FIRST], 2, 4, "slice").kept == (0, 1)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_order_of_tasks_does_not_matter(most: int) -> None:
    generator = np.random.default_rng(0)
    tasks = list(generator.random((5, 12)) ** 8)
    plan, other = union(tasks, 4, most, "slice"), union(tasks[::-1], 4, most, "slice")
    assert plan.kept == other.kept
    assert plan.score_E is not None
    assert other.score_E is not None
    assert plan.score_E.tolist() == other.score_E.tolist()


def test_a_cap_drops_the_lowest_summed_share_of_the_union() -> None:
    assert union([FIRST, SECOND], 2, 2, "slice").kept == (1, 3)
    assert union([FIRST, SECOND], 2, 1, "slice").kept == (3,)
    # expert 1 is second in both tasks and best in sum, but in no task's set of one
    assert union([np.array([5.0, 4.0, 0.0]), np.array([0.0, 4.0, 5.0])], 1, 3, "slice").kept == (0, 2)


def test_protected_experts_belong_to_the_union() -> None:
    assert union([FIRST, SECOND], 2, 4, "slice", (2,)).kept == (0, 1, 2, 3)
    assert union([FIRST, SECOND], 2, 2, "slice", (2,)).kept == (2, 3)
    assert union([FIRST, SECOND], 2, 2, "slice", (0, 2)).kept == (0, 2)
    with pytest.raises(PlanError, match="at most 1 experts may stay, but 2 are protected"):
        union([FIRST, SECOND], 2, 1, "slice", (0, 2))


def test_permuting_experts_permutes_the_union() -> None:
    order_E = np.array([2, 0, 3, 1])
    plan = union([FIRST[order_E], SECOND[order_E]], 2, 4, "slice")
    assert {int(order_E[e]) for e in plan.kept} == {0, 1, 3}


def test_a_task_without_any_mass_brings_only_ties() -> None:
    plan = union([FIRST, np.zeros(4)], 1, 4, "slice")
    assert plan.kept == (0,)
    assert plan.score_E == pytest.approx(FIRST / 10)


def test_further_tasks_come_from_saved_statistics(tmp_path: Path) -> None:
    file = saved(tmp_path / "second.safetensors", {0: of_task(SECOND)})
    third = saved(tmp_path / "third.safetensors", {0: of_task(SECOND[::-1])})
    assert PREMOE_UNION.plan(job(3, also=str(file)))[0].kept == (0, 1, 3)
    assert PREMOE_UNION.plan(job(3, also=f"{file}, {third}", per_task_keep=1))[0].kept == (0, 3)
    # keeping three at most, each task brings three: the union is everything, and the lowest sum goes
    assert PREMOE_UNION.plan(job(3, also=f"{file}"))[0].semantics == "slice"


def test_a_small_union_cuts_a_layer_that_may_keep_all(tmp_path: Path) -> None:
    file = saved(tmp_path / "second.safetensors", {0: of_task(SECOND)})
    assert PREMOE_UNION.plan(job(4, also=str(file), per_task_keep=2))[0].kept == (0, 1, 3)
    assert PREMOE_UNION.plan(job(4, also=str(file))) == {}
    with pytest.raises(PlanError, match="per_task_keep is -1"):
        PREMOE_UNION.plan(job(4, per_task_keep=-1))


def test_protected_experts_of_a_job_stay() -> None:
    assert PREMOE_UNION.plan(replace(job(2), protect={0: (3,)}))[0].kept == (0, 3)


def test_statistics_of_another_parent_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "other.safetensors", {0: of_task(SECOND)}, parent="another")
    with pytest.raises(PlanError, match=r"other.safetensors holds statistics of another checkpoint"):
        PREMOE_UNION.plan(job(3, also=str(file)))
    with pytest.raises(PlanError, match="is missing"):
        PREMOE_UNION.plan(job(3, also=str(tmp_path / "absent")))


def test_tcess_is_the_mean_gate() -> None:
    assert tcess(golden()) == pytest.approx([1.85 / 4, 1.45 / 4, 0.7 / 4, 0])
    ranked = Job(cast(Any, None), {0: golden()}, {0: 1}, "slice", {**OPTIONS, "score": "tcess"})
    assert PREMOE_UNION.plan(ranked)[0].kept == (0,)
    assert PREMOE_UNION.plan(replace(ranked, options=OPTIONS))[0].kept == (1,)


def test_one_ranking_serves_every_ratio(tmp_path: Path) -> None:
    file = tmp_path / "ranking.jsonl"
    save_ranking(file, {3: of_task(SECOND, 3), 1: golden()}, "abc")
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first == {
        "layer": 1,
        "experts": [1, 0, 2, 3],
        "scores": pytest.approx([18.05, 12.25, 4.5, 0]),
        "score": "task-mass",
        "data_sha256": "abc",
    }
    assert (second["layer"], second["experts"], second["scores"]) == (3, [3, 1, 2, 0], [60, 30, 10, 0])
    for keep in (1, 2, 3, 4):
        assert tuple(sorted(second["experts"][:keep])) == union([SECOND], keep, 4, "slice").kept
    save_ranking(file, {0: golden()}, "abc", "tcess")
    assert json.loads(file.read_text())["experts"] == [0, 1, 2, 3]


def test_a_manifest_keeps_the_names_of_files_and_not_where_they_lie() -> None:
    recorded = PREMOE_UNION.recorded({**OPTIONS, "also": "/home/me/a.safetensors, b.safetensors"})
    assert recorded == {**OPTIONS, "also": "a.safetensors,b.safetensors"}
    assert PREMOE_UNION.recorded(OPTIONS) == OPTIONS
