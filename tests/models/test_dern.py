"""DERN: which neurons go where, by hand; a permuted copy changes nothing; above every cosine it is plain pruning."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoint import load_checkpoint
from models.classifier import Classifier
from models.errors import PlanError
from models.pruning.apply import apply
from models.pruning.guards import plan_around
from models.pruning.methods.dern import dern, importance, reassigned
from models.pruning.plan import LayerPlan, keep_best
from models.pruning.post import Neurons
from models.pruning.stats import Core, LayerStats, Weights
from tests.models.golden import golden


def hand_stats(*count: int) -> LayerStats:
    """Three experts of two neurons (gate, up, down) in one dimension. Expert 1 goes if it was chosen least:
    its (2, 0, 0) fits (1, 0, 0) of expert 0, its (0, 1, 1) has cosine .7071 to (0, 1, 0), .5 to (-1, 1, 0)."""
    neuron_EFW = np.array([[[1, 0, 0], [0, 1, 0]], [[2, 0, 0], [0, 1, 1]], [[-1, 0, 0], [-1, 1, 0]]], dtype=np.float32)
    gate_EF, up_EF, down_EF = neuron_EFW.transpose(2, 0, 1)
    weights = Weights(
        np.zeros((3, 1), np.float32), np.concatenate((gate_EF, up_EF), axis=1)[:, :, None], down_EF[:, None]
    )
    stats = golden().only([0, 1, 2])
    return stats.having(weights, replace(stats.need(Core), n_E=np.array(count)))


def handed_on(plan: LayerPlan) -> Neurons:
    (post,) = plan.post
    assert isinstance(post, Neurons)
    return post


def test_importance_is_frequency_times_gate() -> None:
    assert importance(golden()).tolist() == pytest.approx([3 * 1.85, 3 * 1.45, 2 * 0.7, 0])
    assert importance(golden(), "frequency").tolist() == [3, 3, 2, 0]


def test_neurons_go_to_the_nearest_kept_one() -> None:
    post = handed_on(dern(hand_stats(3, 1, 4), 2, "slice", score="frequency"))
    assert post.expert_J.tolist() == [1, 1]
    assert post.neuron_J.tolist() == [0, 1]
    assert post.to_J.tolist() == [0, 0]
    assert post.at_J.tolist() == [0, 1]
    assert post.weight_J.tolist() == [1, 1]
    assert post.own_KF.tolist() == [[3, 3], [4, 4]]


def test_a_neuron_is_compared_whole() -> None:
    # Kept are 1 and 2. (1, 0, 0) is 1 from (2, 0, 0) however long that is; (0, 1, 0) is .7071 from both of its
    # candidates, (0, 1, 1) and (-1, 1, 0): the lower slot.
    post = handed_on(dern(hand_stats(1, 4, 3), 2, "slice", score="frequency"))
    assert list(zip(post.neuron_J.tolist(), post.to_J.tolist(), post.at_J.tolist(), strict=True)) == [
        (0, 0, 0),
        (1, 0, 1),
    ]


@pytest.mark.parametrize(("alpha", "moved"), [(0.70, [0, 1]), (0.71, [0]), (0.99, [0])])
def test_only_neurons_above_alpha_are_handed_on(alpha: float, moved: list[int]) -> None:
    post = handed_on(dern(hand_stats(3, 1, 4), 2, "slice", score="frequency", alpha=alpha))
    assert post.neuron_J.tolist() == moved


def test_neurons_of_experts_that_were_never_chosen_are_lost() -> None:
    assert dern(hand_stats(3, 0, 4), 2, "slice").post == ()


def test_a_protected_expert_that_was_never_chosen_has_a_weight_to_divide_by() -> None:
    post = reassigned(hand_stats(0, 2, 4), keep_best([1, 0, 1], 2, "slice"), alpha=0.4)
    assert post.to_J.tolist() == [0, 0]
    assert post.weight_J.tolist() == [2, 2]
    assert post.own_KF.tolist() == [[1, 1], [4, 4]]


def test_a_protected_expert_is_given_no_neurons() -> None:
    stats = hand_stats(3, 1, 4)
    plan = plan_around(lambda s, k: dern(s, k, "slice"), stats, 2, (0,))
    assert plan.kept == (0, 2)
    assert handed_on(plan).to_J.tolist() == [1]  # cosine .5 to (-1, 1, 0)
    assert handed_on(plan).expert_J.tolist() == [1]
    assert handed_on(plan).own_KF.tolist() == [[1, 1], [4, 4]]


def test_two_neurons_may_go_to_one_place() -> None:
    stats = hand_stats(3, 1, 4)
    weights = stats.need(Weights)
    weights.w_in_EGD[1], weights.w_out_EDF[1] = np.array([[2], [3], [0], [0.5]]), np.zeros((1, 2))
    post = handed_on(dern(stats, 2, "slice", score="frequency"))
    assert post.to_J.tolist() == [0, 0]
    assert post.at_J.tolist() == [0, 0]


def test_permuting_experts_permutes_what_is_kept_and_handed_on() -> None:
    order = [2, 0, 1]
    plain, moved = dern(hand_stats(3, 1, 4), 2, "slice"), dern(hand_stats(3, 1, 4).only(order), 2, "slice")
    assert sorted(order[e] for e in moved.kept) == sorted(plain.kept)
    to = [[order[p.kept[k]] if p is moved else p.kept[k] for k in handed_on(p).to_J] for p in (plain, moved)]
    assert to[0] == to[1]
    assert handed_on(plain).at_J.tolist() == handed_on(moved).at_J.tolist()


def test_without_data_or_weights_it_says_what_is_missing() -> None:
    with pytest.raises(PlanError, match="--data"):
        dern(LayerStats(layer=0, num_experts=4, top_k=2), 2, "slice")
    with pytest.raises(PlanError, match="weights"):
        dern(golden(), 2, "slice")


@pytest.fixture
def model(pristine: Path) -> Classifier:
    return load_checkpoint(pristine).model


def stats_of(model: Classifier, *count: int) -> LayerStats:
    layer: Any = model.layers[0]
    weights = Weights(*(t.detach().numpy() for t in (layer.w_router_ED, layer.w_in_PGD, layer.w_out_PDF)))
    stats = golden()
    return stats.having(weights, replace(stats.need(Core), n_E=np.array(count), g_E=np.array(count) / 2))


def tensors(model: Classifier) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.layers[0].named_parameters()}


def test_a_permuted_copy_of_a_kept_expert_leaves_it_as_it_was(model: Classifier) -> None:
    layer: Any = model.layers[0]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.w_in_PGD[3] = layer.w_in_PGD[1][torch.cat((order, order + 12))]
        layer.w_out_PDF[3] = layer.w_out_PDF[1][:, order]
    plan = dern(stats_of(model, 5, 7, 6, 2), 3, "slice")
    assert plan.kept == (0, 1, 2)
    post = handed_on(plan)
    assert post.to_J.tolist() == [1] * 12
    assert post.at_J.tolist() == order.tolist()
    child, plain = (tensors(apply(model, {0: p})) for p in (plan, replace(plan, post=())))
    for name in ("w_in_PGD", "w_out_PDF"):
        torch.testing.assert_close(child[name], plain[name], rtol=1e-6, atol=1e-6)


def test_neurons_are_averaged_by_use(model: Classifier) -> None:
    """Expert 3 is expert 1, permuted and doubled: the same directions, so that 5 and 1 uses give (5 + 2) / 6 of it."""
    layer: Any = model.layers[0]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.w_in_PGD[3] = 2 * layer.w_in_PGD[1][torch.cat((order, order + 12))]
        layer.w_out_PDF[3] = 2 * layer.w_out_PDF[1][:, order]
    child = tensors(apply(model, {0: dern(stats_of(model, 9, 5, 8, 1), 3, "slice")}))
    for name in ("w_in_PGD", "w_out_PDF"):
        torch.testing.assert_close(child[name][1], getattr(layer, name)[1] * 7 / 6, rtol=1e-6, atol=1e-6)
        assert torch.equal(child[name][0], getattr(layer, name)[0])


def test_alpha_above_one_is_plain_pruning(model: Classifier) -> None:
    stats = stats_of(model, 5, 7, 6, 2)
    plan = dern(stats, 2, "slice", alpha=1.01)
    assert plan.post == ()
    child, plain = apply(model, {0: plan}), apply(model, {0: keep_best([5, 7, 6, 2], 2, "slice")})
    for (name, mine), (_, theirs) in zip(child.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert dern(stats, 2, "slice", alpha=-1.01).post != ()
