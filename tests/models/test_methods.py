"""Methods: hand-computed keep-sets, refusals, and what every method must have in common."""

import numpy as np
import numpy.typing as npt
import pytest

from models.errors import PlanError
from models.pruning import METHODS, LayerPlan
from models.pruning.frequency import frequency
from models.pruning.random import random
from models.pruning.router_norm_change import norm_change, router_norm_change
from models.pruning.stats import LayerStats, RouterPair, RoutingCounts

# Right triangles: norms 5, 5, 13, 10 before and 10, 5, 12, 17 after, so the change is 5, 0, -1, 7.
BEFORE = np.array([[3, 4], [0, 5], [5, 12], [6, 8]], dtype=np.float64)
AFTER = np.array([[6, 8], [5, 0], [12, 0], [8, 15]], dtype=np.float64)


def stats(
    before: npt.NDArray[np.float64] = BEFORE, after: npt.NDArray[np.float64] = AFTER, half: bool = False
) -> LayerStats:
    counts = RoutingCounts(num_tokens=4, count_E=np.array([3, 3, 2, 0]))
    return LayerStats(
        layer=0, num_experts=4, top_k=2, seed=1, counts=counts, routers=RouterPair(before, after, stored_in_16_bit=half)
    )


def test_norm_change_is_signed_and_of_norms() -> None:
    # absolute changes would be (5, 0, 1, 7); norms of the difference (5, 7.07, 13.9, 7.28)
    assert norm_change(RouterPair(BEFORE, AFTER, False)).tolist() == [5, 0, -1, 7]


def test_router_norm_change_cuts_the_row_that_shrank_first() -> None:
    assert router_norm_change(stats(), 3, "zero").kept == (0, 1, 3)
    assert router_norm_change(stats(), 2, "zero").kept == (0, 3)


def test_frozen_router_is_refused() -> None:
    with pytest.raises(PlanError, match="router was frozen"):
        router_norm_change(stats(after=BEFORE), 2, "zero", allow_flat=True)


def test_router_that_hardly_moved_is_refused_unless_allowed() -> None:
    nudged = BEFORE.copy()
    nudged[0] *= 1 + 1e-7
    with pytest.raises(PlanError, match="did not move"):
        router_norm_change(stats(after=nudged), 2, "zero")
    assert router_norm_change(stats(after=nudged), 1, "zero", allow_flat=True).kept == (0,)


def test_16_bit_files_need_more_movement() -> None:
    nudged = BEFORE.copy()
    nudged[0] *= 1 + 1e-3
    assert router_norm_change(stats(after=nudged), 1, "zero").kept == (0,)
    with pytest.raises(PlanError, match="did not move"):
        router_norm_change(stats(after=nudged, half=True), 1, "zero")


def test_routers_scaled_alike_are_refused() -> None:
    with pytest.raises(PlanError, match="scaled alike"):
        router_norm_change(stats(after=0.9 * BEFORE), 2, "zero")


def test_router_norm_change_without_a_base_says_what_to_give() -> None:
    with pytest.raises(PlanError, match="--pretrained"):
        router_norm_change(LayerStats(layer=0, num_experts=4, top_k=2), 2, "zero")


def test_frequency_keeps_the_most_chosen() -> None:
    assert frequency(stats(), 3, "slice").kept == (0, 1, 2)
    assert frequency(stats(), 1, "slice").kept == (0,)


def test_frequency_without_data_says_what_to_give() -> None:
    with pytest.raises(PlanError, match="--data"):
        frequency(LayerStats(layer=0, num_experts=4, top_k=2), 2, "slice")


def test_frequency_without_tokens_is_refused() -> None:
    empty = LayerStats(0, 4, 2, counts=RoutingCounts(0, np.zeros(4, dtype=np.int64)))
    with pytest.raises(PlanError, match="no calibration token"):
        frequency(empty, 2, "slice")


def test_random_is_fixed_by_seed_and_layer() -> None:
    def kept(seed: int, layer: int) -> tuple[int, ...]:
        return random(LayerStats(layer=layer, num_experts=64, top_k=2, seed=seed), 32, "zero").kept

    assert kept(0, 0) == kept(0, 0)
    assert len({kept(0, 0), kept(1, 0), kept(0, 1)}) == 3


def test_random_is_uniform_over_experts() -> None:
    hits = np.zeros(8)
    for seed in range(2000):
        hits[list(random(LayerStats(0, 8, 2, seed=seed), 2, "zero").kept)] += 1
    # 500 expected each, deviation 19: six deviations
    assert np.abs(hits - 500).max() < 116


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def plan(self, name: str, keep: int) -> LayerPlan:
        return METHODS[name].plan(stats(), keep, METHODS[name].default_semantics)

    def test_rows_sum_to_one_and_slots_are_reached(self, name: str) -> None:
        for keep in (1, 2, 3):
            plan = self.plan(name, keep)
            assert plan.mix_KE.sum(1) == pytest.approx(np.ones(keep), abs=1e-9)
            assert set(plan.route_E[plan.route_E >= 0].tolist()) == set(range(keep))
            for slot, old in enumerate(plan.kept):
                assert plan.route_E[old] == slot

    def test_new_slots_follow_old_order(self, name: str) -> None:
        assert list(self.plan(name, 3).kept) == sorted(self.plan(name, 3).kept)

    def test_keeping_all_is_the_identity(self, name: str) -> None:
        assert self.plan(name, 4).is_identity

    def test_same_input_same_plan(self, name: str) -> None:
        assert self.plan(name, 2).kept == self.plan(name, 2).kept

    def test_permuting_experts_permutes_the_keep_set(self, name: str) -> None:
        if name == "random":
            return  # ids are all it has
        permutation = np.array([2, 0, 3, 1])
        counts = RoutingCounts(4, np.array([9, 7, 5, 3])[permutation])
        pair = RouterPair(BEFORE[permutation], AFTER[permutation], False)
        moved = METHODS[name].plan(LayerStats(0, 4, 2, counts=counts, routers=pair), 2, "zero")
        counts = RoutingCounts(4, np.array([9, 7, 5, 3]))
        plain = METHODS[name].plan(
            LayerStats(0, 4, 2, counts=counts, routers=RouterPair(BEFORE, AFTER, False)), 2, "zero"
        )
        assert {int(permutation[e]) for e in moved.kept} == set(plain.kept)
