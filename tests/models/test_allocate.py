"""How many experts each layer keeps: hand examples, exact totals, budgets against the bytes that are really stored."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import memory
from models.checkpoint import load_checkpoint
from models.config import LayerShape, ModelConfig, Semantics
from models.errors import PlanError
from models.pruning.allocate import Budget, Keep, Rules, allocate, share_out, stored_parameters
from models.pruning.apply import apply
from models.pruning.plan import FloatArray, LayerPlan, keep_best

# The example of arXiv 2310.01334's rule: shares of two layers of four experts, four slots in all.
SHARES = {0: np.array([0.7, 0.1, 0.1, 0.1]), 1: np.array([0.3, 0.3, 0.2, 0.2])}


@pytest.fixture
def config(pristine: Path) -> ModelConfig:
    return load_checkpoint(pristine).model.config


def counts(config: ModelConfig, keep: Keep, semantics: Semantics = "zero", **rules: Any) -> dict[int, int]:
    return allocate(config, keep, semantics, Rules(**rules), 4, lambda layer: SHARES[layer])


def test_global_gives_the_best_shares_what_the_floor_leaves() -> None:
    assert share_out(SHARES, 4, {0: 1, 1: 1}) == {0: 1, 1: 3}
    assert share_out(SHARES, 4, {0: 2, 1: 2}) == {0: 2, 1: 2}


def test_global_totals_are_exact_and_ties_go_to_the_lower_layer() -> None:
    equal = {0: np.ones(4), 1: np.ones(4), 2: np.ones(4)}
    assert share_out(equal, 5, dict.fromkeys(equal, 1)) == {0: 3, 1: 1, 2: 1}
    generator = np.random.default_rng(0)
    scores = {layer: generator.random(16) for layer in range(4)}
    for total in range(8, 65):
        shared = share_out(scores, total, dict.fromkeys(scores, 2))
        assert sum(shared.values()) == total
        assert min(shared.values()) >= 2


def test_scores_are_compared_by_their_share_of_the_layer() -> None:
    # a thousand times the scale changes nothing; a layer without any score has shares of 0
    assert share_out({0: 1000 * SHARES[0], 1: SHARES[1]}, 4, {0: 1, 1: 1}) == {0: 1, 1: 3}
    assert share_out({0: np.zeros(4), 1: SHARES[1]}, 4, {0: 1, 1: 1}) == {0: 1, 1: 3}


def test_protected_experts_are_the_first_of_their_layer() -> None:
    # layer 0's expert 3 takes its floor, so that its .7 competes with what is left of layer 1: .3, .2 and .2
    assert share_out(SHARES, 4, {0: 1, 1: 1}, {0: (3,)}) == {0: 2, 1: 2}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({0: np.array([1.0, -0.1]), 1: np.ones(2)}, "layer 0: scores below 0 have no share"),
        ({0: np.ones(2), 1: np.array([1.0, np.nan])}, "layer 1: score of expert 1 is not finite"),
    ],
)
def test_scores_without_a_share_are_refused(scores: dict[int, FloatArray], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        share_out(scores, 3, {0: 1, 1: 1})


@pytest.mark.parametrize(
    ("keep", "expected"), [(3, (3, 3)), (0.5, (2, 2)), (0.9, (4, 4)), (1.0, (4, 4)), ((2, 4), (2, 4)), (4, (4, 4))]
)
def test_counts_ratios_and_lists(config: ModelConfig, keep: Keep, expected: tuple[int, ...]) -> None:
    assert tuple(counts(config, keep).values()) == expected


def test_exempt_layers_keep_all(config: ModelConfig) -> None:
    assert counts(config, 2, exempt=(1,)) == {0: 2, 1: 4}
    assert counts(config, 2, exempt=(0, 1)) == {0: 4, 1: 4}
    assert counts(config, 3, exempt=(0,), allocation="global") == {0: 4, 1: 3}
    with pytest.raises(PlanError, match="layer 0 is exempt and keeps all 4 experts, keep says 2"):
        counts(config, (2, 3), exempt=(0,))


def test_global_shares_the_total_of_the_request(config: ModelConfig) -> None:
    top_1 = replace(config, top_k=1)
    assert counts(top_1, 2, allocation="global") == {0: 1, 1: 3}
    assert counts(config, 2, allocation="global") == {0: 2, 1: 2}
    assert counts(config, 0.75, allocation="global") == {0: 2, 1: 4}


@pytest.mark.parametrize(
    ("keep", "rules", "message"),
    [
        (5, {}, "keep is 5, but layer 0 has only 4 experts"),
        (1, {}, "keep is 1, fewer than the top-2 experts"),
        (0, {"allow_lower_k": True}, "at least one expert must stay"),
        (0.0, {}, "a fraction above 0"),
        (0.1, {"allow_lower_k": True}, "at least one expert must stay"),
        ((2, 1), {}, "keep is 1, fewer than the top-2"),
        ((2,), {}, "keep lists 1 counts, the model has 2 layers"),
        ((2, 3), {"allocation": "global"}, "leaves nothing to allocate"),
        (Budget(100), {}, "100 bytes are too few: the smallest child of these rules takes"),
        (Budget(100), {"exempt": (0, 1)}, "100 bytes are too few"),
    ],
)
def test_requests_no_layer_can_meet_are_refused(
    config: ModelConfig, keep: Keep, rules: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        counts(config, keep, **rules)


def test_fewer_than_top_k_only_when_allowed(config: ModelConfig) -> None:
    assert counts(config, 1, allow_lower_k=True) == {0: 1, 1: 1}


def cut(semantics: Semantics, total: int, keep: int) -> LayerPlan:
    if semantics == "tie":
        route = np.minimum(np.arange(total), keep - 1)
        mix = np.eye(total)[:keep]
        return LayerPlan(mix, route, "tie")
    plan = keep_best(np.arange(total), keep, "zero")
    return LayerPlan(plan.mix_KE, plan.route_E, semantics, const_ED=np.ones((total, 16), dtype=np.float32))


@pytest.mark.parametrize("semantics", ["slice", "zero", "tie", "constant"])
def test_predicted_parameters_are_those_of_the_child(pristine: Path, semantics: Semantics) -> None:
    model = load_checkpoint(pristine).model
    for keep in ({0: 2, 1: 3}, {0: 4, 1: 2}, {0: 4, 1: 4}):
        plans = {layer: cut(semantics, 4, count) for layer, count in keep.items() if count < 4}
        child = apply(model, plans)
        assert stored_parameters(model.config, keep, semantics) == memory.num_parameters(child)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("semantics", ["slice", "zero", "tie", "constant"])
def test_a_budget_keeps_the_most_that_fits(config: ModelConfig, semantics: Semantics, allocation: str) -> None:
    deep = replace(config, layers=(LayerShape.unpruned(4),) * 2)
    sizes = {
        total: 4 * stored_parameters(deep, {0: total // 2, 1: total - total // 2}, semantics) for total in range(4, 9)
    }
    for total, size in sizes.items():
        for spare in (0, 1):
            got = sum(counts(deep, Budget(size + spare), semantics, allocation=allocation).values())
            assert got == (total - total % 2 if allocation == "uniform" else total)
        if total > 4:
            fewer = sum(counts(deep, Budget(size - 1), semantics, allocation=allocation).values())
            assert fewer == ((total - 1) - (total - 1) % 2 if allocation == "uniform" else total - 1)
