"""Merging methods: groups and weights by hand, planted copies found, merged copies reproduce what they copy.

Legend: E experts, T tokens, S sampled tokens, D model width, F expert inner width.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kernels import reference
from kernels.routing import RouterPolicy
from models.checkpoint import load_checkpoint
from models.classifier import Classifier
from models.errors import PlanError
from models.pruning.apply import apply
from models.pruning.clustering import canonical
from models.pruning.guards import plan_around
from models.pruning.methods.diversify import diversify, fitted_weights, gates
from models.pruning.methods.hc_smoe import hc_smoe
from models.pruning.methods.m_smoe import joined, m_smoe, usage
from models.pruning.methods.sub_moe import sub_moe
from models.pruning.methods.uncurl import logit_affinity, uncurl
from models.pruning.plan import LayerPlan
from models.pruning.post import Project
from models.pruning.similarity import weight_gram
from models.pruning.stats import Core, Dense, Gram, LayerStats, Means, Sample, Weights
from tests.models.golden import golden

Array = npt.NDArray[np.float64]
# p of one token: .5, .25, .15, .10.
LOGITS = np.log(np.array([[0.5, 0.25, 0.15, 0.10]], dtype=np.float32))


def counted(stats: LayerStats, *count: int) -> LayerStats:
    return stats.having(replace(stats.need(Core), n_E=np.array(count)))


def sampled(*outputs: Any, logits: npt.ArrayLike | None = None) -> Sample:
    """One list per expert of its outputs [S][D]."""
    f_SED = np.array(outputs, dtype=np.float32).transpose(1, 0, 2)
    size = len(f_SED)
    h_SE = np.zeros(f_SED.shape[:2]) if logits is None else np.asarray(logits)
    return Sample(
        size, np.arange(size, dtype=np.uint64), np.zeros((size, 1), np.float32), h_SE.astype(np.float32), f_SED
    )


def scattered(seed: int, groups: list[int]) -> LayerStats:
    """Random statistics of every kind, equal within a group, up to the order of neurons; every count differs.

    The first member of each group is used most.
    """
    generator = np.random.default_rng(seed)
    num_kinds, num_experts = max(groups) + 1, len(groups)
    logits_TE = generator.normal(size=(60, num_kinds))[:, groups]
    f_SED = generator.normal(size=(20, num_kinds, 6))[:, groups]
    gate_EFD, up_EFD, down_EFD = generator.normal(size=(3, num_kinds, 8, 5)).astype(np.float32)[:, groups]
    for expert in range(num_experts):
        order = generator.permutation(8)
        for weight in (gate_EFD, up_EFD, down_EFD):
            weight[expert] = weight[expert][order]
    is_first = np.array([groups.index(g) == e for e, g in enumerate(groups)])
    count_E = generator.permutation(np.arange(1, num_experts + 1)) + 100 * is_first
    sums = {name: np.ones(num_experts) for name in ("g_E", "f_E", "f2_E", "gf_E", "gf2_E", "wgf_E", "p_E")}
    return LayerStats(layer=0, num_experts=num_experts, top_k=2, seed=seed).having(
        Core(tokens=np.array(60), n_E=count_E, fmax_E=np.ones(num_experts, np.float32), **sums),
        Gram(logits_TE.T @ logits_TE, logits_TE.sum(0), np.zeros((num_experts, num_experts), dtype=np.int64)),
        Means(count_E[:, None] * f_SED.mean(0)),
        Dense(20 * f_SED.mean(0), np.array(20)),
        Sample(20, np.arange(20, dtype=np.uint64), np.zeros((20, 5), np.float32), logits_TE[:20].astype(np.float32),
               f_SED.astype(np.float32)),
        Weights(
            generator.normal(size=(num_kinds, 5)).astype(np.float32)[groups],
            np.concatenate((gate_EFD, up_EFD), axis=1),
            down_EFD.transpose(0, 2, 1),
        ),
    )  # fmt: skip


MERGES: dict[str, Callable[[LayerStats, int], LayerPlan]] = {
    "uncurl": lambda s, k: uncurl(s, k, "tie"),
    "uncurl rbf": lambda s, k: uncurl(s, k, "slice", affinity="rbf", weights="uniform", router="head"),
    "m-smoe": lambda s, k: m_smoe(s, k, "tie"),
    "m-smoe router_weight": lambda s, k: m_smoe(s, k, "slice", similarity="router_weight"),
    "m-smoe weight": lambda s, k: m_smoe(s, k, "tie", similarity="weight"),
    "m-smoe output": lambda s, k: m_smoe(s, k, "tie", similarity="output", weights="uniform"),
    "diversify": lambda s, k: diversify(s, k, "slice"),
    "diversify weight": lambda s, k: diversify(s, k, "tie", similarity="weight", alpha="frequency"),
    "diversify spectral": lambda s, k: diversify(s, k, "tie", grouping="spectral", alpha="fit"),
    "hc-smoe": lambda s, k: hc_smoe(s, k, "tie"),
    "hc-smoe single": lambda s, k: hc_smoe(s, k, "tie", linkage="single", signature="routed_mean"),
    "sub-moe": lambda s, k: sub_moe(s, k, "tie", rank=2),
}


@pytest.mark.parametrize("name", MERGES)
class TestEveryMerge:
    GROUPS = (0, 1, 2, 3, 4, 5, 1, 0, 5, 3, 2, 4)

    def test_planted_pairs_are_always_found(self, name: str) -> None:
        for seed in range(10):
            assert MERGES[name](scattered(seed, list(self.GROUPS)), 6).route_E.tolist() == list(self.GROUPS)

    def test_a_single_planted_pair_is_found(self, name: str) -> None:
        for seed in range(10):
            plan = MERGES[name](scattered(seed, [0, 1, 2, 3, 1, 4, 5, 6]), 7)
            assert plan.route_E.tolist() == [0, 1, 2, 3, 1, 4, 5, 6]

    def test_permuting_experts_permutes_the_partition(self, name: str) -> None:
        for seed in range(5):
            stats = scattered(seed, list(self.GROUPS))
            order = np.random.default_rng(seed).permutation(12)
            plain, moved = MERGES[name](stats, 6), MERGES[name](stats.only(order), 6)
            assert canonical(plain.route_E[order]).tolist() == moved.route_E.tolist()
            assert moved.mix_KE[moved.route_E].diagonal() == pytest.approx(
                plain.mix_KE[plain.route_E].diagonal()[order], abs=1e-6
            )

    def test_keeping_all_is_the_identity(self, name: str) -> None:
        plan = MERGES[name](scattered(0, list(range(6))), 6)
        assert replace(plan, post=()).is_identity

    def test_any_count_is_met_and_repeats(self, name: str) -> None:
        stats = scattered(3, list(range(9)))
        for keep in range(1, 9):
            plan, again = MERGES[name](stats, keep), MERGES[name](stats, keep)
            assert plan.keep == keep
            assert (plan.mix_KE == again.mix_KE).all()
            assert (plan.mix_KE >= 0).all()

    def test_a_group_that_was_never_chosen_is_averaged_evenly(self, name: str) -> None:
        stats = scattered(1, [0, 1, 2, 0, 1, 2])
        count_E = np.array([0, 5, 7, 0, 3, 2])
        means = Means(count_E[:, None] * stats.need(Dense).dsum_ED)
        plan = MERGES[name](stats.having(replace(stats.need(Core), n_E=count_E), means), 3)
        assert plan.mix_KE.sum(1) == pytest.approx(np.ones(3))
        if not name.startswith("m-smoe"):  # there, experts that are never chosen lead no group
            assert plan.mix_KE[0].tolist() == pytest.approx([0.5, 0, 0, 0.5, 0, 0])


def test_protected_experts_stay_apart_beside_groups_whose_lowest_member_weighs_nothing() -> None:
    means = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [0.0, 0.0]])
    stats = counted(golden(), 0, 1, 2, 3).having(Dense(means, np.array(1)))
    plan = plan_around(lambda s, k: hc_smoe(s, k, "tie"), stats, 3, (1,))
    assert plan.route_E.tolist() == [0, 1, 2, 0]
    plan = plan_around(lambda s, k: hc_smoe(s, k, "tie"), stats, 2, (2,))
    assert plan.route_E.tolist() == [0, 0, 1, 0]
    plan = plan_around(lambda s, k: hc_smoe(s, k, "tie"), stats, 2, (1,))
    assert plan.route_E.tolist() == [0, 1, 0, 0]
    assert plan.mix_KE == pytest.approx(np.array([[0, 0, 0.4, 0.6], [0, 1, 0, 0]]))


def test_without_data_methods_say_what_to_give() -> None:
    bare = LayerStats(layer=0, num_experts=4, top_k=2)
    for plan in (uncurl, m_smoe, hc_smoe, sub_moe, diversify):
        with pytest.raises(PlanError, match="--data"):
            plan(bare, 2, "tie")


def test_without_tokens_methods_refuse() -> None:
    stats = golden()
    empty = stats.having(replace(stats.need(Core), tokens=np.array(0)))
    for plan in (uncurl, m_smoe, hc_smoe, sub_moe):
        with pytest.raises(PlanError, match="no calibration token"):
            plan(empty, 2, "tie")
    no_sample = Sample(8, np.zeros(0, np.uint64), *(np.zeros((0, 4, 1)[:n], np.float32) for n in (2, 2, 3)))
    with pytest.raises(PlanError, match="no calibration token"):
        diversify(stats.having(no_sample), 2, "tie")


class TestUncurl:
    def test_cosines_of_logit_columns(self) -> None:
        cosine = 2 * logit_affinity(golden()) - 1
        pairs = {(0, 1): 0, (0, 2): 0.9487, (1, 2): 0.3162, (0, 3): 0.2425, (1, 3): 0.9701, (2, 3): 0.5369}
        for (i, j), expected in pairs.items():
            assert cosine[i, j] == cosine[j, i] == pytest.approx(expected, abs=5e-5)

    def test_rbf_of_squared_distances_over_their_median(self) -> None:
        # Squared distances 5, 2, 17, 9, 10, 13: median 9.5.
        affinity = logit_affinity(golden(), "rbf")
        assert affinity[0] == pytest.approx(np.exp(-np.array([0, 5, 2, 17]) / 9.5))
        assert affinity[1, 2:] == pytest.approx(np.exp(-np.array([9, 10]) / 9.5))

    def test_two_groups(self) -> None:
        plan = uncurl(counted(golden(), 3, 3, 1, 1), 2, "slice")
        assert plan.route_E.tolist() == [0, 1, 0, 1]
        assert plan.mix_KE.tolist() == [[0.75, 0, 0.25, 0], [0, 0.75, 0, 0.25]]
        assert plan.align
        assert plan.router_mix_KE is None
        # By distance, column 3 is far from all others.
        assert uncurl(golden(), 2, "slice", affinity="rbf").route_E.tolist() == [0, 0, 0, 1]

    def test_options(self) -> None:
        stats = counted(golden(), 1, 3, 3, 1)
        even = uncurl(stats, 2, "slice", weights="uniform", router="head")
        assert even.mix_KE.tolist() == [[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]
        assert even.router_mix_KE is not None
        assert even.router_mix_KE.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
        unused = uncurl(counted(golden(), 3, 0, 1, 0), 2, "slice", router="head")
        assert unused.mix_KE.tolist() == [[0.75, 0, 0.25, 0], [0, 0.5, 0, 0.5]]
        assert unused.router_mix_KE is not None
        assert unused.router_mix_KE.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
        with pytest.raises(PlanError, match="under slice only"):
            uncurl(stats, 2, "tie", router="head")

    def test_a_row_whose_logit_never_changes_is_alone(self) -> None:
        logits_TE = np.array([[2.0, 1.0, 3.0, 1.0], [0.0, 1.0, 1.0, 4.0]])
        stats = golden()
        stats = stats.having(
            replace(stats.need(Core), tokens=np.array(2)),
            Gram(logits_TE.T @ logits_TE, logits_TE.sum(0), np.zeros((4, 4), dtype=np.int64)),
        )
        for affinity in ("logit_cosine", "rbf"):
            assert uncurl(stats, 3, "slice", affinity=affinity).route_E.tolist() == [0, 1, 0, 2]
            assert uncurl(stats, 2, "slice", affinity=affinity).route_E.tolist() == [0, 1, 0, 0]


class TestMSmoe:
    def test_heads_groups_and_weights(self) -> None:
        stats = counted(golden(), 4, 3, 2, 1)
        assert usage(stats).tolist() == [0.4, 0.3, 0.2, 0.1]
        plan = m_smoe(stats, 2, "tie")
        assert plan.mix_KE == pytest.approx(np.array([[2 / 3, 0, 1 / 3, 0], [0, 3 / 4, 0, 1 / 4]]))
        assert plan.route_E.tolist() == [0, 1, 0, 1]
        assert plan.kept == (0, 1)
        assert plan.align
        assert m_smoe(stats, 2, "slice").route_E.tolist() == [0, 1, 0, 1]

    def test_options(self) -> None:
        stats = counted(golden(), 1, 2, 3, 4)
        assert m_smoe(stats, 2, "tie").kept == (2, 3)
        even = m_smoe(stats, 2, "tie", weights="uniform", align="none")
        assert even.mix_KE.tolist() == [[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]
        assert not even.align

    def test_router_rows_as_similarity(self) -> None:
        rows = np.array([[1, 0], [0, 1], [0.1, 5], [7, 0.2]], dtype=np.float32)
        weights = Weights(rows, np.zeros((4, 2, 2), np.float32), np.zeros((4, 2, 1), np.float32))
        plan = m_smoe(counted(golden(), 4, 3, 2, 1).having(weights), 2, "tie", similarity="router_weight")
        assert plan.route_E.tolist() == [0, 1, 1, 0]

    def test_the_most_used_choose_first_where_room_is_short(self) -> None:
        similarity = np.eye(4)
        similarity[2, :2], similarity[3, :2] = (0.8, 0.2), (0.9, 0.1)
        share = np.array([0.4, 0.3, 0.2, 0.1])
        assert joined(similarity, share, 2, 4).tolist() == [0, 1, 0, 0]
        assert joined(similarity, share, 2, 2).tolist() == [0, 1, 0, 1]
        assert joined(similarity, share[::-1], 2, 4).tolist()[2:] == [2, 3]

    def test_ties_lead_and_join_the_lower_id(self) -> None:
        assert joined(np.ones((4, 4)), np.full(4, 0.25), 2, 4).tolist() == [0, 1, 0, 0]

    def test_groups_that_cannot_hold_all_are_refused(self) -> None:
        with pytest.raises(PlanError, match="cannot hold 4 experts"):
            m_smoe(golden(), 3, "tie", max_group=1)


class TestDiversify:
    def test_groups_by_cka(self) -> None:
        # CKA 0.5 of experts 0 and 1, 0 of 0 and 2, 0.5 of 1 and 2; expert 3 is 2, doubled and shifted.
        outputs = [[1, -1, 0, 0], [1, -1, 1, -1], [0, 0, 1, -1], [5, 5, 7, 3]]
        stats = golden().having(sampled(*([[v] for v in row] for row in outputs)))
        for grouping in ("average", "spectral"):
            plan = diversify(stats, 3, "slice", grouping=grouping)
            assert plan.route_E.tolist() == [0, 1, 2, 2]
            assert plan.mix_KE[2].tolist() == [0, 0, 0.5, 0.5]
            assert plan.align
        assert diversify(stats, 3, "slice", alpha="frequency").mix_KE[2].tolist() == [0, 0, 1, 0]
        # 0 to 1 and the pair to 1 are both 0.5 away: exactly two groups all the same.
        assert diversify(stats, 2, "slice").keep == 2

    def test_gates_are_those_of_the_router(self) -> None:
        stats = replace(golden(), normalize=False)
        assert gates(stats, LOGITS)[0] == pytest.approx([0.5, 0.25, 0, 0])
        assert gates(golden(), LOGITS)[0] == pytest.approx([2 / 3, 1 / 3, 0, 0])

    def test_fit_of_one_token_is_its_gates(self) -> None:
        # Wanted .75 * 1 + .25 * 3 = 1.5; the group's gate is 1, so 1 a + 3 (1 - a) = 1.5.
        f_SED = np.array([[[1.0], [3.0]]], dtype=np.float32)
        fitted = fitted_weights(np.array([0, 0]), np.array([[0.75, 0.25]]), f_SED)
        assert fitted == pytest.approx([0.75, 0.25], abs=1e-6)

    def test_fit_beats_every_other_mixture(self) -> None:
        for seed in range(5):
            generator = np.random.default_rng(seed)
            gate_SE = generator.uniform(size=(8, 3)) * (generator.uniform(size=(8, 3)) < 0.7)
            f_SED = generator.normal(size=(8, 3, 2)).astype(np.float32)

            def error(alpha_E: Array, gate_SE: Array = gate_SE, f_SED: npt.NDArray[np.float32] = f_SED) -> float:
                wanted_SD = np.einsum("se,sed->sd", gate_SE, f_SED)
                merged_SD = gate_SE.sum(1)[:, None] * np.einsum("e,sed->sd", alpha_E, f_SED)
                return float(((wanted_SD - merged_SD) ** 2).sum())

            fitted = fitted_weights(np.zeros(3, dtype=np.int64), gate_SE, f_SED)
            assert fitted.sum() == pytest.approx(1)
            assert (fitted >= 0).all()
            others = [error(alpha) for alpha in generator.dirichlet(np.ones(3), size=2000)]
            assert error(fitted) <= min(others)

    def test_fit_of_equal_or_unused_experts_is_even(self) -> None:
        f_SED = np.random.default_rng(0).normal(size=(6, 1, 3)).repeat(4, 1).astype(np.float32)
        gate_SE = np.array([[0.6, 0.4, 0, 0]] * 6)
        f_SED[:, 3] *= 2
        assert fitted_weights(np.array([0, 0, 1, 1]), gate_SE, f_SED) == pytest.approx(np.full(4, 0.5), abs=1e-6)

    def test_weights_are_compared_in_the_reference_order(self) -> None:
        stats = scattered(0, [0, 1, 0])
        gram = weight_gram(stats.need(Weights), 1)
        assert gram[0, 2] == pytest.approx(gram[0, 0], rel=1e-6)
        assert weight_gram(stats.need(Weights))[0, 2] < 0.9 * gram[0, 0]

    def test_slicing_equal_experts_changes_the_gate(self) -> None:
        # Averaging rows 0 and 1 leaves .58579 of the probability that both had together.
        outputs = [[1, -1, 0, 0], [1, -1, 0, 0], [0, 0, 1, -1], [1, 1, -1, -1]]
        plan = diversify(golden().having(sampled(*([[v] for v in row] for row in outputs))), 3, "slice")
        assert plan.route_E.tolist() == [0, 0, 1, 2]
        mixed_TK = torch.from_numpy(LOGITS @ plan.mix_KE.T)
        routing = reference.route(mixed_TK, torch.arange(3, dtype=torch.int32)[None], RouterPolicy(top_k=1))
        assert routing.weight_TK.item() == pytest.approx(0.58579, abs=1e-5)


class TestHcSmoe:
    POINTS = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [5.0, 2.0]])

    @pytest.mark.parametrize(("keep", "route"), [(4, [0, 1, 2, 3]), (3, [0, 0, 1, 2]), (2, [0, 0, 1, 1])])
    @pytest.mark.parametrize("linkage", ["average", "single"])
    def test_clusters_of_mean_outputs(self, linkage: Any, keep: int, route: list[int]) -> None:
        stats = counted(golden(), 1, 3, 0, 0).having(Dense(7 * self.POINTS, np.array(7)))
        plan = hc_smoe(stats, keep, "tie", linkage=linkage)
        assert plan.route_E.tolist() == route
        assert plan.is_identity == (keep == 4)
        if keep == 2:
            assert plan.mix_KE.tolist() == [[0.25, 0.75, 0, 0], [0, 0, 0.5, 0.5]]
        assert not plan.align
        assert hc_smoe(stats, keep, "tie", linkage=linkage, align="weight").align

    def test_routed_means_are_another_signature(self) -> None:
        # (4, 5.33), (6.33, 11.67), (1.5, -3), (0, 0): distances 6.75, 8.7, 6.67, 15.4, 13.3, 3.35.
        assert hc_smoe(golden(), 3, "tie", signature="routed_mean").route_E.tolist() == [0, 1, 2, 2]
        plan = hc_smoe(golden(), 2, "tie", signature="routed_mean")
        assert plan.mix_KE.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 1, 0]]
        with pytest.raises(PlanError, match="--data"):
            hc_smoe(golden(), 2, "tie")


class TestSubMoe:
    OUTPUTS = ([[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0.1, 3], [3, 0]], [[9, 0.1], [0, 9]])

    def test_groups_by_direction_of_outputs(self) -> None:
        plan = sub_moe(counted(golden(), 3, 1, 3, 1).having(sampled(*self.OUTPUTS)), 2, "tie")
        assert plan.route_E.tolist() == [0, 1, 1, 0]
        assert plan.mix_KE.tolist() == [[0.75, 0, 0, 0.25], [0, 0.25, 0.75, 0]]
        assert plan.post == ()
        assert not plan.align

    def test_a_negative_rank_is_refused(self) -> None:
        with pytest.raises(PlanError, match="rank is -1"):
            sub_moe(golden().having(sampled(*self.OUTPUTS)), 2, "tie", rank=-1)

    def test_rank_asks_for_the_projection_of_each_group(self) -> None:
        plan = sub_moe(golden().having(sampled(*self.OUTPUTS)), 2, "tie", rank=3, align="weight")
        (project,) = plan.post
        assert isinstance(project, Project)
        assert project.rank == 3
        assert project.members_KE.tolist() == [[True, False, False, True], [False, True, True, False]]
        assert plan.align


@pytest.fixture
def model(pristine: Path) -> Classifier:
    return load_checkpoint(pristine).model


def plant_copy(model: Classifier, source: int, copy: int) -> None:
    """Layer 0's expert `copy` becomes the source with its neurons in another order."""
    layer: Any = model.layers[0]
    width = layer.w_out_PDF.shape[2]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.w_in_PGD[copy] = layer.w_in_PGD[source][torch.cat((order, order + width))]
        layer.w_out_PDF[copy] = layer.w_out_PDF[source][:, order]


def logits_of(model: Classifier) -> torch.Tensor:
    return model.classify(([3, 9, 27, 1], [5], [8, 8, 8, 41, 2, 7, 13])).logits_BC


def weights_of(model: Classifier) -> Weights:
    layer: Any = model.layers[0]
    return Weights(*(t.detach().numpy() for t in (layer.w_router_ED, layer.w_in_PGD, layer.w_out_PDF)))


ALIGNED: dict[str, Callable[[LayerStats], LayerPlan]] = {
    "uncurl": lambda s: uncurl(s, 3, "tie"),
    "m-smoe": lambda s: m_smoe(s, 3, "tie"),
    "m-smoe weight": lambda s: m_smoe(s, 3, "tie", similarity="weight"),
    "diversify": lambda s: diversify(s, 3, "tie", alpha="fit"),
    "diversify weight": lambda s: diversify(s, 3, "tie", similarity="weight"),
    "hc-smoe": lambda s: hc_smoe(s, 3, "tie", align="weight"),
    "sub-moe": lambda s: sub_moe(s, 3, "tie", align="weight", rank=16),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_two_permuted_copies_merge_into_the_expert_they_copy(name: str, model: Classifier) -> None:
    plant_copy(model, 1, 3)
    stats = counted(scattered(0, [0, 1, 2, 1]), 5, 7, 4, 3).having(weights_of(model))
    plan = ALIGNED[name](stats)
    assert plan.route_E.tolist() == [0, 1, 2, 1]
    merged = apply(model, {0: plan})
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=1e-5, atol=1e-6)
    blurred = apply(model, {0: replace(plan, align=False)})
    assert not torch.allclose(logits_of(blurred), logits_of(model), rtol=1e-2, atol=1e-2)


def test_slicing_equal_experts_is_not_a_no_op(model: Classifier) -> None:
    plant_copy(model, 1, 3)
    plan = m_smoe(counted(scattered(0, [0, 1, 2, 1]), 5, 7, 4, 3), 3, "slice")
    assert plan.route_E.tolist() == [0, 1, 2, 1]
    assert not torch.allclose(logits_of(apply(model, {0: plan})), logits_of(model), rtol=1e-2, atol=1e-2)


def test_joint_projection_by_rank(model: Classifier) -> None:
    stats = counted(golden(), 0, 7, 1, 3).having(sampled([[1, 0]], [[0, 1]], [[-1, -1]], [[0, 1]]))
    old: Any = model.layers[0]
    averaged = {name: 0.7 * getattr(old, name)[1] + 0.3 * getattr(old, name)[3] for name in ("w_in_PGD", "w_out_PDF")}
    for rank in (0, 16, 3):
        new: Any = apply(model, {0: sub_moe(stats, 3, "tie", rank=rank)}).layers[0]
        assert new.table_VE.tolist() == [[0, 1, 2, 1]]
        for name, mean in averaged.items():
            assert torch.allclose(getattr(new, name)[1], mean, atol=1e-6) == (rank != 3)
            assert torch.equal(getattr(new, name)[2], getattr(old, name)[2])
        if rank == 3:
            # [W_1, W_3] = U S V^T; the down projection is one matrix, gate and up are one each.
            for part, name in ((slice(0, 16), "w_out_PDF"), (slice(0, 12), "w_in_PGD"), (slice(12, 24), "w_in_PGD")):
                both = torch.cat((getattr(old, name)[1, part], getattr(old, name)[3, part]), dim=1)
                leading = torch.linalg.svd(both.double())[0][:, :3]
                expected = leading @ leading.T @ averaged[name][part].double()
                torch.testing.assert_close(getattr(new, name)[1, part], expected.float(), rtol=1e-5, atol=1e-6)
