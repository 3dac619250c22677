"""Guards: what stays whatever a method scores, what is warned about, and what is refused."""

from dataclasses import fields, replace
from typing import Any, cast

import numpy as np
import pytest

from models.classifier import Classifier
from models.config import Semantics
from models.errors import PlanError
from models.evaluate import ClassRecall, Evaluation
from models.pruning.guards import (
    forecast,
    is_alone,
    plan_around,
    refuse_class_loss,
    refuse_lost,
    super_experts,
    together,
    warn_of_thin_data,
)
from models.pruning.method import Job, each_layer
from models.pruning.plan import LayerPlan, keep_best, merge_groups
from models.pruning.post import Neurons, Project
from models.pruning.stats import Core, Gram, LayerStats, Means, Sample
from tests.models.golden import golden


def with_fmax(*layers: list[float]) -> dict[int, LayerStats]:
    """Layers whose experts have these greatest activations, and nothing else of interest."""
    stats = {}
    for layer, values in enumerate(layers):
        zero = np.zeros(len(values))
        sums = dict.fromkeys(("g_E", "f_E", "f2_E", "gf_E", "gf2_E", "wgf_E", "p_E"), zero)
        core = Core(np.array(1), zero.astype(np.int64), fmax_E=np.array(values, dtype=np.float32), **sums)
        stats[layer] = LayerStats(layer, len(values), 2, groups=(core,))
    return stats


def test_the_one_outsize_expert_of_400_is_found() -> None:
    rows = [[1.0] * 100 for _ in range(4)]
    rows[1][37] = 100.0
    assert super_experts(with_fmax(*rows), 4) == {1: (37,)}


def test_small_models_interpolate_the_percentile() -> None:
    # of 8 values, P99.5 lies .035 from the greatest on the way to the next
    assert super_experts(with_fmax([1, 2, 3, 50], [1, 2, 3, 4]), 2) == {0: (3,)}
    assert super_experts(with_fmax([2, 2, 2, 2], [2, 2, 2, 2]), 2) == {}


def test_late_layers_have_no_super_experts() -> None:
    quiet = [1.0] * 8
    assert super_experts(with_fmax(quiet, quiet, quiet, [*quiet[1:], 50.0]), 4) == {}
    assert super_experts(with_fmax(quiet, quiet, [*quiet[1:], 50.0], quiet), 4) == {2: (7,)}


def test_the_greatest_of_a_small_model_is_no_super_expert_unless_it_dwarfs_the_others() -> None:
    assert super_experts(with_fmax([1.0, 2.0, 3.0, 9.0]), 2) == {}
    assert super_experts(with_fmax([1.0, 2.0, 3.0, 26.0]), 2) == {0: (3,)}  # more than ten times the median, 2.5


def test_without_activations_there_is_nothing_to_find() -> None:
    assert super_experts({0: LayerStats(0, 4, 2)}, 1) == {}


def test_choices_of_experts_are_united() -> None:
    assert together({0: (3,), 2: (1,)}, {0: (1, 3)}) == {0: (1, 3), 2: (1,)}


def frequency(stats: LayerStats, keep: int, semantics: Semantics = "zero") -> LayerPlan:
    return keep_best(stats.need(Core).n_E, keep, semantics)


def test_a_protected_expert_takes_the_place_of_the_worst_kept_one() -> None:
    plan = plan_around(frequency, golden(), 2, (3,))
    assert plan.kept == (0, 3)
    assert plan.route_E.tolist() == [0, -1, -1, 1]
    assert plan.score_E is not None
    assert plan.score_E.tolist() == [3, 3, 2, 0]


def test_what_stays_anyway_changes_nothing() -> None:
    plan = plan_around(frequency, golden(), 2, (1,))
    assert plan.mix_KE.tolist() == frequency(golden(), 2).mix_KE.tolist()


def test_a_protected_expert_is_never_merged() -> None:
    def pairs(stats: LayerStats, keep: int) -> LayerPlan:
        group_E = np.minimum(np.arange(stats.num_experts), keep - 1)
        return merge_groups(group_E, stats.need(Core).n_E, "tie", align=True)

    assert not is_alone(pairs(golden(), 2), 1)
    plan = plan_around(pairs, golden(), 2, (1,))
    assert is_alone(plan, 1)
    # experts 0, 2 and 3 merge by their counts 3, 2 and 0; new slots follow the lowest old id
    assert plan.mix_KE == pytest.approx(np.array([[0.6, 0, 0.4, 0], [0, 1, 0, 0]]))
    assert plan.route_E.tolist() == [0, 1, 0, 0]
    assert plan.align


def test_who_is_alone() -> None:
    """Of three experts: 0 stays, 1 takes over the router row of 2 but none of its weight."""
    plan = LayerPlan(np.array([[1.0, 0, 0], [0, 1, 0]]), np.array([0, 1, 1]), "tie")
    assert [is_alone(plan, expert) for expert in range(3)] == [True, False, False]
    one = np.array([0])
    foreign = Neurons(expert_J=one + 2, neuron_J=one, to_J=one, at_J=one, weight_J=np.ones(1), own_KF=np.ones((2, 3)))
    assert not is_alone(replace(plan, post=(foreign,)), 0)


def test_constants_router_rows_and_post_steps_keep_their_experts() -> None:
    """Planned for experts 0, 2, 3 alone: 0 and 2 are one, 3 is cut or kept; expert 1 is put back in between."""
    constants = np.arange(6, dtype=np.float32).reshape(3, 2)
    mix = np.array([[0.5, 0.5, 0], [0, 0, 1]])
    members = mix > 0
    # neuron 7 of expert 2 goes to place 5 of slot 1
    expert_J, neuron_J, to_J, at_J = (np.array([number]) for number in (2, 7, 1, 5))
    step = Neurons(expert_J, neuron_J, to_J, at_J, np.array([0.5]), np.array([[1.0] * 3, [2.0] * 3]))

    def plan(stats: LayerStats, keep: int) -> LayerPlan:
        if stats.num_experts == 4:
            return merge_groups([0, 0, 0, 0], np.ones(4), "slice")
        post = (Project(3, members), step)
        return LayerPlan(mix, np.array([0, 0, 1]), "slice", const_ED=constants, router_mix_KE=mix[::-1], post=post)

    wide = plan_around(plan, golden(), 3, (1,))
    assert wide.mix_KE.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert wide.route_E.tolist() == [0, 1, 0, 2]
    assert wide.router_mix_KE is not None
    assert wide.router_mix_KE.tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0.5, 0, 0.5, 0]]
    assert wide.const_ED is not None
    assert wide.const_ED.tolist() == [[0, 1], [0, 0], [2, 3], [4, 5]]
    project, neurons = wide.post
    assert isinstance(project, Project)
    assert project.members_KE.tolist() == [[True, False, True, False], [False] * 4, [False, False, False, True]]
    assert isinstance(neurons, Neurons)
    # expert 2 of the three is expert 3 of all, slot 1 of the two is slot 2 of all; neuron and place stay
    assert [neurons.expert_J, neurons.neuron_J, neurons.to_J, neurons.at_J] == [3, 7, 2, 5]
    assert neurons.own_KF[:, 0].tolist() == [1, 1, 2]


def test_nothing_left_to_choose_is_refused() -> None:
    with pytest.raises(PlanError, match="layer 0 is to keep 2 experts, and 2 are protected"):
        plan_around(frequency, golden(), 2, (2, 3))


def test_a_plan_for_the_whole_model_may_not_lose_a_protected_expert() -> None:
    plans = {0: frequency(golden(), 2)}
    refuse_lost(plans, {0: (0, 1), 5: (2,)}, "eep")
    with pytest.raises(PlanError, match="eep would cut or merge expert 2 of layer 0, which is protected"):
        refuse_lost(plans, {0: (0, 2)}, "eep")


def test_statistics_of_some_experts_are_theirs_alone() -> None:
    generator = np.random.default_rng(0)
    sample = Sample(5, np.arange(5, dtype=np.uint64), *(
        generator.normal(size=size).astype(np.float32) for size in ((5, 2), (5, 4), (5, 4, 2))
    ))  # fmt: skip
    stats = golden().having(sample)
    part = stats.only([3, 1])
    assert (part.num_experts, part.top_k) == (2, 2)
    assert part.need(Core).n_E.tolist() == [0, 3]
    assert part.need(Core).tokens == 4
    assert part.need(Means).fsum_ED.tolist() == stats.need(Means).fsum_ED[[3, 1]].tolist()
    gram = stats.need(Gram)
    assert part.need(Gram).hgram_EE.tolist() == gram.hgram_EE[[3, 1]][:, [3, 1]].tolist()
    assert part.need(Sample).f_SED.tolist() == sample.f_SED[:, [3, 1]].tolist()
    assert part.need(Sample).x_SD is sample.x_SD
    whole = stats.only(range(4))
    for mine, theirs in zip(whole.groups, stats.groups, strict=True):
        for f in fields(mine):
            np.testing.assert_array_equal(getattr(mine, f.name), getattr(theirs, f.name))


def job(*stats: LayerStats, keep: int = 2, protect: dict[int, tuple[int, ...]] | None = None) -> Job:
    by_layer = {s.layer: s for s in stats}
    parent = cast(Classifier, None)
    return Job(parent, by_layer, dict.fromkeys(by_layer, keep), "zero", protect=protect or {})


def test_errors_name_the_layer_and_the_expert() -> None:
    spoiled = golden(layer=7)
    core = replace(spoiled.need(Core), gf_E=np.array([1, 2, np.nan, 3]))

    def plan(stats: LayerStats, keep: int, semantics: Semantics) -> LayerPlan:
        return keep_best(stats.need(Core).gf_E, keep, semantics)

    with pytest.raises(PlanError, match="layer 7: score of expert 2 is not finite"):
        each_layer(plan)(job(golden(layer=3), spoiled.having(core)))
    with pytest.raises(PlanError, match=r"^layer 7 saw no calibration token$"):
        each_layer(plan)(job(spoiled.having(replace(core, tokens=np.array(0)))))


def test_layers_that_keep_all_are_not_planned_and_protected_ones_are_planned_around() -> None:
    plans = each_layer(frequency)(job(golden(layer=1), golden(layer=2), protect={2: (3,)}))
    assert {layer: plan.kept for layer, plan in plans.items()} == {1: (0, 1), 2: (0, 3)}
    assert each_layer(frequency)(job(golden(), keep=4)) == {}


def test_thin_data_is_warned_about() -> None:
    def many(n_E: list[int]) -> LayerStats:
        return golden().having(replace(golden().need(Core), n_E=np.array(n_E)))

    fine = many([300, 300, 200, 0])
    assert warn_of_thin_data({0: fine}, {0: frequency(fine, 3)}) == []
    assert warn_of_thin_data({0: fine}, {0: keep_best([0, 1, 2, 3], 4, "zero")}) == [
        "layer 0: the calibration data is too small: 1 of 4 experts saw no token, kept expert 3 saw 0"
    ]
    assert warn_of_thin_data({0: golden()}, {0: frequency(golden(), 2)}) == [
        "layer 0: the calibration data is too small: kept expert 0 saw 3"
    ]
    # merged experts are known by the tokens of all their members
    merged = merge_groups([0, 0, 1, 1], np.ones(4), "tie")
    assert warn_of_thin_data({0: many([6, 6, 10, 0])}, {0: merged}) == []
    assert warn_of_thin_data({0: LayerStats(0, 4, 2)}, {0: merged}) == []


def test_the_forecast_of_the_fixture() -> None:
    kept_01 = forecast(golden(), frequency(golden(), 2))
    assert kept_01 is not None
    assert (kept_01.kept_slots, kept_01.lost_tokens) == (6 / 8, 0.0)
    cut_01 = forecast(golden(), keep_best([0, 0, 1, 1], 2, "zero"))
    assert cut_01 is not None
    # two of four tokens chose exactly 0 and 1
    assert (cut_01.kept_slots, cut_01.lost_tokens) == (2 / 8, 2 / 4)
    semantics: Semantics
    for semantics in ("slice", "tie"):
        plan = merge_groups([0, 0, 1, 1], np.ones(4), semantics)
        found = forecast(golden(), plan)
        assert found is not None
        assert (found.kept_slots, found.lost_tokens) == (1.0, 0.0)
    assert forecast(LayerStats(0, 4, 2), frequency(golden(), 2)) is None


def test_lost_tokens_of_other_k() -> None:
    only_core = replace(golden(), groups=(golden().need(Core),))
    plan = keep_best([0, 0, 0, 1], 1, "zero")
    top_1, top_2, top_3 = (replace(only_core, top_k=k) for k in (1, 2, 3))
    found = [forecast(stats, plan) for stats in (top_1, top_2)]
    assert [f.lost_tokens for f in found if f] == [1.0, None]
    logits = np.array([[4, 3, 2, 1], [4, 3, 1, 2]], dtype=np.float32)
    nothing = np.zeros((2, 4, 2), dtype=np.float32)
    sample = Sample(2, np.arange(2, dtype=np.uint64), nothing[:, 0], logits, nothing)
    of_3 = forecast(top_3.having(sample), plan)
    assert of_3 is not None
    assert of_3.lost_tokens == 0.5


def evaluation(**recalls: float) -> Evaluation:
    empty: dict[str, Any] = {f.name: 0 for f in fields(Evaluation)}
    found = tuple(ClassRecall(label, 10, value, 0.0, 1.0) for label, value in recalls.items())
    return Evaluation(**empty | {"recalls": found})


def test_a_class_may_not_lose_more_than_the_limit() -> None:
    before = evaluation(spam=0.9, ham=0.8, other=0.5)
    after = evaluation(spam=0.875, ham=0.5, other=0.75)
    refuse_class_loss(before, after, 0.31)
    refuse_class_loss(before, evaluation(spam=1.0, ham=0.8, other=0.5), 0.0)
    with pytest.raises(PlanError, match=r"class 'ham' loses 30.0 points of recall, more than the 2.0 allowed \(2 of 3"):
        refuse_class_loss(before, after, 0.02)
