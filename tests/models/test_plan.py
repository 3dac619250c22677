"""Plans: what may be planned, and how a score becomes a plan."""

import numpy as np
import pytest

from models.errors import PlanError
from models.pruning.plan import LayerPlan, keep_best


def test_keep_best_is_one_hot_in_old_order() -> None:
    plan = keep_best([5.0, 0.0, -1.0, 7.0], 2, "zero")
    assert plan.kept == (0, 3)
    assert plan.mix_KE.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert plan.route_E.tolist() == [0, -1, -1, 1]


def test_ties_keep_the_lower_id() -> None:
    assert keep_best([1.0, 2.0, 2.0, 2.0], 2, "zero").kept == (1, 2)
    # wide enough that an unstable sort really shuffles
    scores = np.arange(512) % 3
    assert keep_best(scores, 200, "zero").kept == tuple(sorted([*range(2, 512, 3), *range(1, 512, 3)][:200]))


@pytest.mark.parametrize("keep", [0, 5])
def test_keep_outside_the_experts_is_refused(keep: int) -> None:
    with pytest.raises(PlanError, match=f"keep is {keep}, must be between 1 and 4"):
        keep_best([1.0, 2.0, 3.0, 4.0], keep, "zero")


def test_nan_score_is_refused() -> None:
    with pytest.raises(PlanError, match="expert 1 is not finite"):
        keep_best([1.0, np.nan, 3.0], 1, "zero")


def test_merge_of_the_style_guide_is_a_valid_plan() -> None:
    mix = np.array([[1, 0, 0], [0, 0.75, 0.25]])
    plan = LayerPlan(mix, np.array([0, 1, 1]), "tie")
    assert plan.kept == (0, 1)
    assert not plan.is_identity


@pytest.mark.parametrize(
    ("mix", "route", "semantics", "message"),
    [
        ([[0.5, 0.4]], [0, 0], "tie", "sum to 1"),
        ([[np.nan, 1.0]], [0, 0], "tie", "finite"),
        ([[1.0, 0.0], [0.0, 1.0]], [0, 0], "slice", "reach each of the 2"),
        ([[1.0, 0.0]], [0, -1], "tie", "no expert may be dropped"),
        ([[1.0, 0.0]], [0, -1], "constant", "need a vector"),
        ([[1.0, 0.0]], [0], "zero", "1 entries for 2 experts"),
    ],
)
def test_impossible_plans_are_refused(mix: list[list[float]], route: list[int], semantics: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        LayerPlan(np.array(mix), np.array(route), semantics)  # type: ignore[arg-type]
