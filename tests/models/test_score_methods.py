"""Scores by hand: every row of the golden table, its order of pruning, and what doubling and permuting must not change.

Legend: E experts.
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from models.errors import PlanError
from models.pruning.method import Job, Method
from models.pruning.methods.scores import METHODS as SCORE_METHODS
from models.pruning.methods.seer_moe import SEER_MOE
from models.pruning.plan import LayerPlan
from models.pruning.stats import Core, LayerStats
from tests.models.golden import golden

METHODS = {method.name: method for method in (*SCORE_METHODS, SEER_MOE)}
# p of two more tokens that chose others: what the router gave them counts for mass=all only.
P_ALL = np.array([0.1, 0.2, 2.0, 0.5])
# method, options, scores, and which expert goes first, second, third
TABLE: list[tuple[str, dict[str, Any], list[float], list[int]]] = [
    ("frequency", {}, [3, 3, 2, 0], [3, 2, 1, 0]),
    ("soft-mass", {"mass": "slots"}, [1.85, 1.45, 0.70, 0], [3, 2, 1, 0]),
    ("soft-mass", {"mass": "all"}, [0.1, 0.2, 2.0, 0.5], [0, 1, 3, 2]),
    ("ean", {}, [20, 40, 15, 0], [3, 2, 0, 1]),
    ("task-mass", {"variant": "linear"}, [12.25, 18.05, 4.50, 0], [3, 2, 0, 1]),
    ("task-mass", {"variant": "squared"}, [56.3125, 120.8025, 10.25, 0], [3, 2, 0, 1]),
    ("easy-ep", {}, [5.5, 5.0, 2.9, 0], [3, 2, 1, 0]),
    ("reap", {}, [12.25 / 3, 18.05 / 3, 2.25, 0], [3, 2, 0, 1]),
    ("man", {}, [20 / 3, 40 / 3, 7.5, 0], [3, 0, 2, 1]),
    ("msan", {}, [50, 186, 62.5, 0], [3, 0, 2, 1]),
    ("seer-moe", {"count": "soft"}, [0.1, 0.2, 2.0, 0.5], [0, 1, 3, 2]),
    ("seer-moe", {"count": "hard"}, [3, 3, 2, 0], [3, 2, 1, 0]),
]
rows = pytest.mark.parametrize(("name", "options", "scores", "order"), TABLE)


def stats() -> LayerStats:
    return golden().having(replace(golden().need(Core), p_E=P_ALL))


def score(name: str, layer: LayerStats, options: dict[str, Any]) -> npt.NDArray[np.float64]:
    function = METHODS[name].score
    assert function is not None
    return function(layer, **options)


def plans(method: Method, layer: LayerStats, keep: int, options: dict[str, Any]) -> dict[int, LayerPlan]:
    return method.plan(Job(cast(Any, None), {0: layer}, {0: keep}, method.semantics[0], options))


def permuted(layer: LayerStats, order_E: npt.NDArray[np.int64]) -> LayerStats:
    core = layer.need(Core)
    arrays = {name: value[order_E] for name, value in vars(core).items() if name.endswith("_E")}
    return layer.having(replace(core, **arrays))


@rows
def test_scores_are_the_golden_ones(name: str, options: dict[str, Any], scores: list[float], order: list[int]) -> None:
    assert score(name, stats(), options) == pytest.approx(scores, rel=1e-12)


@rows
def test_experts_go_in_the_golden_order(
    name: str, options: dict[str, Any], scores: list[float], order: list[int]
) -> None:
    for cut in (1, 2, 3):
        plan = plans(METHODS[name], stats(), 4 - cut, options)[0]
        assert plan.kept == tuple(sorted(order[cut:]))
        assert plan.semantics == "slice"
        assert plan.score_E == pytest.approx(scores)


@rows
def test_keeping_all_plans_nothing(name: str, options: dict[str, Any], scores: list[float], order: list[int]) -> None:
    assert plans(METHODS[name], stats(), 4, options) == {}


@rows
def test_doubling_every_token_doubles_sums_and_leaves_means(
    name: str, options: dict[str, Any], scores: list[float], order: list[int]
) -> None:
    core = stats().need(Core)
    factor = 1 if name in ("reap", "man", "msan") else 2
    doubled = score(name, stats().having(core + core), options)
    assert doubled == pytest.approx([factor * value for value in scores], rel=1e-12)


@rows
def test_permuting_experts_permutes_scores(
    name: str, options: dict[str, Any], scores: list[float], order: list[int]
) -> None:
    order_E = np.array([2, 0, 3, 1])
    assert score(name, permuted(stats(), order_E), options).tolist() == score(name, stats(), options)[order_E].tolist()


@pytest.mark.parametrize("name", METHODS)
class TestEveryScore:
    def test_defaults_are_the_options_defaults(self, name: str) -> None:
        options = {option.name: option.default for option in METHODS[name].options}
        assert score(name, stats(), {}).tolist() == score(name, stats(), options).tolist()

    def test_ties_keep_the_lower_ids(self, name: str) -> None:
        even = permuted(stats(), np.zeros(4, dtype=np.int64))
        assert plans(METHODS[name], even, 2, {})[0].kept == (0, 1)

    def test_without_data_it_says_what_to_give(self, name: str) -> None:
        with pytest.raises(PlanError, match="--data"):
            plans(METHODS[name], LayerStats(layer=0, num_experts=4, top_k=2), 2, {})

    def test_without_tokens_it_is_refused(self, name: str) -> None:
        empty = stats().having(replace(stats().need(Core), tokens=np.array(0)))
        with pytest.raises(PlanError, match="layer 0 saw no calibration token"):
            plans(METHODS[name], empty, 2, {})
