"""Router-norm change and random: keep-sets computed by hand, refusals, chance."""

import numpy as np
import numpy.typing as npt
import pytest

from models.errors import PlanError
from models.pruning.methods.random import random
from models.pruning.methods.router_norm_change import norm_change, router_norm_change
from models.pruning.stats import LayerStats, RouterPair

# Right triangles: norms 5, 5, 13, 10 before and 10, 5, 12, 17 after, so the change is 5, 0, -1, 7.
BEFORE = np.array([[3, 4], [0, 5], [5, 12], [6, 8]], dtype=np.float64)
AFTER = np.array([[6, 8], [5, 0], [12, 0], [8, 15]], dtype=np.float64)


def stats(
    before: npt.NDArray[np.float64] = BEFORE, after: npt.NDArray[np.float64] = AFTER, half: bool = False
) -> LayerStats:
    return LayerStats(layer=0, num_experts=4, top_k=2, seed=1, groups=(RouterPair(before, after, half),))


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
