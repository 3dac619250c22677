"""Clustering: partitions a person can see, canonical numbering, exact counts, planted groups, similarities."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.spatial.distance import cdist

from models.errors import PlanError
from models.pruning.clustering import Linkage, agglomerative, canonical, kmeans, spectral
from models.pruning.similarity import cosine, inner_products, linear_cka, output_gram, squared_distances

# Distances 1, 2, 4, 4.472, 5, 5.385.
POINTS = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [5.0, 2.0]])
# On a line, neighbours 1, 1, 1, 1.5 and 1.2 apart: single linkage chains the first four, average linkage does not.
CHAIN = np.array([[0.0], [1.0], [2.0], [3.0], [4.5], [5.7]])


def distances(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(cdist(points, points))


def blobs(groups: list[int], seed: int = 0) -> npt.NDArray[np.float64]:
    """One unit direction per group in 12 dimensions, and a hundredth of noise."""
    generator = np.random.default_rng(seed)
    centres = np.linalg.qr(generator.normal(size=(12, 12)))[0]
    return np.asarray(centres[groups] + 0.01 * generator.normal(size=(len(groups), 12)))


def test_groups_are_numbered_by_their_lowest_member() -> None:
    assert canonical([7, 3, 7, 0, 3]).tolist() == [0, 1, 0, 2, 1]
    assert canonical([5]).tolist() == [0]


@pytest.mark.parametrize(("num_groups", "expected"), [(4, [0, 1, 2, 3]), (3, [0, 0, 1, 2]), (2, [0, 0, 1, 1])])
@pytest.mark.parametrize("linkage", ["average", "single"])
def test_agglomerative_on_four_points(linkage: Linkage, num_groups: int, expected: list[int]) -> None:
    assert agglomerative(distances(POINTS), num_groups, linkage).tolist() == expected


def test_linkages_differ_on_a_chain() -> None:
    assert agglomerative(distances(CHAIN), 2, "single").tolist() == [0, 0, 0, 0, 1, 1]
    # Pairs at 1, 1 and 1.2; then {0,1} and {2,3} are 2 apart, {2,3} and {4,5} 2.6.
    assert agglomerative(distances(CHAIN), 3, "average").tolist() == [0, 0, 1, 1, 2, 2]
    assert agglomerative(distances(CHAIN), 3, "single").tolist() == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("linkage", ["average", "single"])
def test_equal_heights_still_give_exactly_the_count(linkage: Linkage) -> None:
    equal = np.ones((6, 6)) - np.eye(6)
    for num_groups in range(1, 7):
        assert agglomerative(equal, num_groups, linkage).max() + 1 == num_groups
        assert agglomerative(0 * equal, num_groups, linkage).max() + 1 == num_groups


def test_one_expert_is_one_group() -> None:
    one = np.ones((1, 1))
    assert agglomerative(0 * one, 1, "average").tolist() == [0]
    assert spectral(one, 1, [0]).tolist() == [0]
    assert kmeans(one, 1, [0]).tolist() == [0]


def test_spectral_finds_blocks_and_puts_loners_alone() -> None:
    affinity = np.full((6, 6), 0.01)
    for block in ([0, 3], [1, 4, 5]):
        affinity[np.ix_(block, block)] = 0.9
    np.fill_diagonal(affinity, 1.0)
    affinity[2, :] = affinity[:, 2] = 0.0
    affinity[2, 2] = 1.0
    assert spectral(affinity, 3, [0]).tolist() == [0, 1, 2, 0, 1, 1]
    assert spectral(affinity, 2, [0]).tolist() == [0, 0, 1, 0, 0, 0]
    assert spectral(affinity, 1, [0]).tolist() == [0] * 6


def test_more_loners_than_groups_share_the_last() -> None:
    affinity = np.eye(5)
    affinity[0, 4] = affinity[4, 0] = 0.5
    assert spectral(affinity, 3, [0]).tolist() == [0, 1, 2, 2, 0]
    assert spectral(affinity, 4, [0]).tolist() == [0, 1, 2, 3, 0]
    assert spectral(affinity, 5, [0]).tolist() == [0, 1, 2, 3, 4]
    assert spectral(np.eye(5), 3, [0]).tolist() == [0, 1, 2, 2, 2]


def test_spectral_separates_what_kmeans_cannot() -> None:
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], 1)
    points = np.concatenate([ring, 4 * ring])
    affinity = np.exp(-2 * squared_distances(inner_products(points)))
    expected = [0] * 20 + [1] * 20
    assert spectral(affinity, 2, [0]).tolist() == expected
    assert kmeans(inner_products(points), 2, [0]).tolist() != expected


def test_kmeans_minimises_squared_distances() -> None:
    # 2 + 3.66 about the means 1 and 4.4; single linkage's split loses 5 + .72.
    assert kmeans(inner_products(CHAIN), 2, [0]).tolist() == [0, 0, 0, 1, 1, 1]
    assert kmeans(inner_products(POINTS), 2, [0]).tolist() == [0, 0, 1, 1]


def test_spherical_kmeans_ignores_length() -> None:
    points = np.array([[1.0, 0.1], [100.0, 0.0], [0.0, 1.0], [0.1, 100.0]])
    assert kmeans(inner_products(points), 2, [0], spherical=True).tolist() == [0, 0, 1, 1]
    assert kmeans(inner_products(points), 3, [0], spherical=False).tolist() == [0, 1, 0, 2]
    for seed in range(5):
        generator = np.random.default_rng(seed)
        points, length = generator.normal(size=(20, 3)), np.exp(generator.normal(size=(20, 1)))
        same = [kmeans(inner_products(p), 5, [seed], 2, spherical=True).tolist() for p in (points, length * points)]
        assert same[0] == same[1]


def test_a_single_start_may_be_poor_and_the_best_of_ten_is_not() -> None:
    points = np.array([[0.0], [1.0], [4.0], [5.0], [8.0], [9.0], [12.0], [13.0]])
    expected = [0, 0, 1, 1, 2, 2, 3, 3]
    single = [kmeans(inner_products(points), 4, [seed], restarts=1).tolist() for seed in range(40)]
    assert any(found != expected for found in single)
    assert all(kmeans(inner_products(points), 4, [seed]).tolist() == expected for seed in range(40))


def test_no_start_at_all_is_refused() -> None:
    with pytest.raises(PlanError, match="restarts is 0"):
        kmeans(np.eye(3), 2, [0], restarts=0)


def test_equal_errors_give_the_lexically_first_partition() -> None:
    square = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    assert all(kmeans(inner_products(square), 2, [seed], restarts=20).tolist() == [0, 0, 1, 1] for seed in range(10))


def test_fewer_distinct_points_than_groups_still_fill_all_groups() -> None:
    points = np.ones((5, 3))
    for spherical in (False, True):
        for num_groups in range(1, 6):
            group_E = kmeans(inner_products(points), num_groups, [1], spherical=spherical)
            assert group_E.max() + 1 == num_groups
            assert canonical(group_E).tolist() == group_E.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_permuting_experts_permutes_the_partition(seed: int) -> None:
    groups = [0, 1, 2, 3, 0, 1, 2, 3, 3, 4, 4, 0]
    points = blobs(groups, seed)
    order = np.random.default_rng(seed).permutation(len(groups))
    gram, moved = inner_products(points), inner_products(points[order])
    for found, again in (
        (kmeans(gram, 5, [seed]), kmeans(moved, 5, [seed])),
        (kmeans(gram, 5, [seed], spherical=True), kmeans(moved, 5, [seed], spherical=True)),
        (spectral(np.maximum(gram, 0), 5, [seed]), spectral(np.maximum(moved, 0), 5, [seed])),
        (agglomerative(distances(points), 5, "average"), agglomerative(distances(points[order]), 5, "average")),
        (agglomerative(distances(points), 5, "single"), agglomerative(distances(points[order]), 5, "single")),
    ):
        assert found.tolist() == canonical(groups).tolist()
        assert canonical(found[order]).tolist() == again.tolist()


def test_cosine_of_an_empty_vector() -> None:
    assert cosine([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 4.0]]).tolist() == [[1, 0, 0.5], [0, 1, 0], [0.5, 0, 1]]


def test_cka_by_hand() -> None:
    # One feature, four tokens, centred: inner products 2 of (1,-1,0,0) and (1,-1,1,-1), squares 2 and 4: 4 / 8.
    outputs = np.array([[1, -1, 0, 0], [1, -1, 1, -1], [0, 0, 1, -1]], dtype=np.float32)
    cka = linear_cka(outputs.T[:, :, None] + np.float32(3))
    assert cka == pytest.approx(np.array([[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]), abs=1e-12)


def test_cka_sees_through_rotation_scale_and_shift() -> None:
    generator = np.random.default_rng(0)
    x_SD = generator.normal(size=(30, 5))
    rotation = np.linalg.qr(generator.normal(size=(5, 5)))[0]
    others = [x_SD, 3 * x_SD @ rotation + 7, generator.normal(size=(30, 5)), np.ones((30, 5))]
    cka = linear_cka(np.stack(others, 1).astype(np.float32))
    assert cka[0, 1] == pytest.approx(1, abs=1e-6)
    assert cka[0, 2] < 0.5
    assert cka[0, 3] == 0
    direct = np.linalg.norm((x_SD - x_SD.mean(0)).T @ (others[2] - others[2].mean(0))) ** 2
    for other in (x_SD, others[2]):
        direct /= np.linalg.norm((other - other.mean(0)).T @ (other - other.mean(0)))
    assert cka[0, 2] == pytest.approx(direct, rel=1e-5)


def test_output_gram_is_the_sum_over_tokens() -> None:
    f_SED = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], dtype=np.float32)
    assert output_gram(f_SED).tolist() == [[1 + 4 + 25 + 36, 3 + 8 + 35 + 48], [3 + 8 + 35 + 48, 9 + 16 + 49 + 64]]
