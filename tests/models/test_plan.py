"""Plans: what may be planned, and how a score becomes a plan."""

from dataclasses import replace

import numpy as np
import pytest

from models.errors import PlanError
from models.pruning.method import Method, Option, each_layer
from models.pruning.plan import LayerPlan, keep_best, merge_groups
from models.pruning.post import Project
from models.pruning.stats import Core, Dense, Gram, Means


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
        ([[0.0, 1.0], [1.0, 0.0]], [1, 0], "slice", "in the order of their lowest old id"),
    ],
)
def test_impossible_plans_are_refused(mix: list[list[float]], route: list[int], semantics: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        LayerPlan(np.array(mix), np.array(route), semantics)  # type: ignore[arg-type]


def test_router_rows_are_mixed_under_slice_only() -> None:
    mix = np.array([[0.5, 0.5]])
    assert LayerPlan(mix, np.array([0, 0]), "slice", router_mix_KE=mix).keep == 1
    with pytest.raises(PlanError, match="under slice only, not under tie"):
        LayerPlan(mix, np.array([0, 0]), "tie", router_mix_KE=mix)


def test_an_expert_in_two_merges_cannot_be_aligned() -> None:
    mix = np.array([[0.5, 0.5, 0], [0, 0.5, 0.5]])
    assert LayerPlan(mix, np.array([0, 0, 1]), "tie").keep == 2
    with pytest.raises(PlanError, match="several merges"):
        LayerPlan(mix, np.array([0, 0, 1]), "tie", align=True)


def test_groups_are_numbered_by_their_lowest_member_and_weighted_by_share() -> None:
    plan = merge_groups([7, 3, 7, 3], [3.0, 0.0, 1.0, 0.0], "tie")
    assert plan.mix_KE.tolist() == [[0.75, 0, 0.25, 0], [0, 0.5, 0, 0.5]]
    assert plan.route_E.tolist() == [0, 1, 0, 1]
    with pytest.raises(PlanError, match="finite and not negative"):
        merge_groups([0, 1], [1.0, -1.0], "tie")


def test_a_plan_with_further_steps_is_no_identity() -> None:
    plan = LayerPlan(np.eye(2), np.arange(2), "slice")
    assert plan.is_identity
    assert not replace(plan, post=(Project(1, np.eye(2) > 0),)).is_identity


OPTIONS = Method(
    name="toy",
    summary="",
    plan=each_layer(keep_best),
    semantics=("slice",),
    needs=(Core,),
    options=(
        Option("flag", False, "a switch"),
        Option("count", 3, "a number"),
        Option("alpha", 0.5, "a share"),
        Option("also_from", "", "a text"),
        Option("kind", "a", "one of three", ("a", "b", "c"), needs={"b": (Dense,), "c": (Means, Gram)}),
    ),
)


def test_options_are_read_by_the_type_of_their_default() -> None:
    assert OPTIONS.read_options({}) == {"flag": False, "count": 3, "alpha": 0.5, "also_from": "", "kind": "a"}
    given = {"flag": "True", "count": "-2", "alpha": "1e-3", "also-from": "x=1", "kind": "c"}
    read = OPTIONS.read_options(given)
    assert read == {"flag": True, "count": -2, "alpha": 0.001, "also_from": "x=1", "kind": "c"}
    assert [type(value) for value in read.values()] == [bool, int, float, str, str]
    assert OPTIONS.read_options({"flag": "FALSE"})["flag"] is False


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("flag", "yes", "toy: option flag is 'yes', must be true or false"),
        ("count", "2.5", "toy: option count is '2.5', must be an integer"),
        ("alpha", "half", "toy: option alpha is 'half', must be a number"),
        ("alpha", "nan", "toy: option alpha is 'nan', must be a finite number"),
        ("kind", "d", "toy: option kind is 'd', must be one of a, b, c"),
        ("size", "1", "toy has no option 'size': its options are flag, count, alpha, also-from, kind"),
    ],
)
def test_options_that_make_no_sense_name_what_is_allowed(name: str, text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        OPTIONS.read_options({name: text})


def test_a_choice_may_need_further_statistics() -> None:
    assert OPTIONS.needed(OPTIONS.read_options({})) == {Core}
    assert OPTIONS.needed(OPTIONS.read_options({"kind": "b"})) == {Core, Dense}
    assert OPTIONS.needed(OPTIONS.read_options({"kind": "c"})) == {Core, Means, Gram}
