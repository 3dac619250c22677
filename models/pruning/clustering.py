"""Partitions of a layer's experts into exactly K groups, from distances, affinities or inner products.

Legend: E experts, K groups. Every function returns int64 [E], the group of each expert; groups are numbered by their
lowest member, so that equal partitions are equal arrays. All expect 1 <= K <= E.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.cluster.hierarchy
import scipy.linalg
from scipy.spatial.distance import squareform

from models.errors import PlanError
from models.pruning.plan import FloatArray, IntArray
from models.pruning.similarity import cosine, squared_distances

Linkage = Literal["average", "single"]
MAX_ROUNDS = 100
# What two sums of the same float64 terms in another order may differ by, relative to the terms: less is a tie.
NOISE = 1e-12


def canonical(group_E: npt.ArrayLike) -> IntArray:
    """The same partition with its groups numbered by their lowest member."""
    _, first, group = np.unique(np.asarray(group_E), return_index=True, return_inverse=True)
    return np.asarray(first.argsort().argsort()[group], dtype=np.int64)


def agglomerative(distance_EE: npt.ArrayLike, num_groups: int, linkage: Linkage) -> IntArray:
    """Join the two nearest groups until num_groups are left: nearest by the mean or the least of members' distances."""
    distance = np.asarray(distance_EE, dtype=np.float64)
    group_E = np.arange(len(distance))
    if len(distance) == 1:
        return canonical(group_E)
    tree = scipy.cluster.hierarchy.linkage(squareform(distance, checks=False), linkage)
    # Step s joins the two named groups as group E + s. A cut at some height could not part joins of equal height.
    for step, (left, right) in enumerate(tree[: len(distance) - num_groups, :2].astype(np.int64)):
        group_E[(group_E == left) | (group_E == right)] = len(distance) + step
    return canonical(group_E)


def spectral(affinity_EE: npt.ArrayLike, num_groups: int, seed: Sequence[int], restarts: int = 10) -> IntArray:
    """Normalised spectral clustering of a symmetric affinity without negative entries.

    The eigenvectors of the num_groups lowest eigenvalues of I - A_deg^-1/2 A A_deg^-1/2, A_deg the row sums, give each
    expert a vector, which is scaled to length 1 and goes to `kmeans`. Only inner products of these vectors are used, so
    neither signs nor order of eigenvectors matter. An expert without affinity to any other is a group of its own, as
    long as a group is left for the others.
    """
    affinity = np.asarray(affinity_EE, dtype=np.float64)
    alone_E = affinity.sum(1) == affinity.diagonal()
    joined, alone = np.flatnonzero(~alone_E), np.flatnonzero(alone_E)
    num_joined = min(max(num_groups - alone.size, 1), joined.size)
    group_E = np.zeros(len(affinity), dtype=np.int64)
    group_E[alone] = np.minimum(num_joined + np.arange(alone.size), num_groups - 1)
    if num_joined > 1:
        root = 1 / np.sqrt(affinity[np.ix_(joined, joined)].sum(1))
        laplacian = np.eye(joined.size) - root[:, None] * affinity[np.ix_(joined, joined)] * root
        _, vectors = scipy.linalg.eigh(laplacian, subset_by_index=(0, num_joined - 1))
        group_E[joined] = kmeans(cosine(vectors @ vectors.T), num_joined, seed, restarts)
    return canonical(group_E)


def kmeans(
    gram_EE: npt.ArrayLike, num_groups: int, seed: Sequence[int], restarts: int = 10, spherical: bool = False
) -> IntArray:
    """k-means on vectors given by their inner products: the best of several seeded starts.

    Starts are k-means++; the partition with the least sum of squared distances to group means wins, of equal ones the
    first in lexicographic order. spherical: vectors and means are scaled to length 1, so the sum of cosines to them is
    what is greatest. A vector equally near to two means goes to the one it is with, else to the lower.
    Raises PlanError without a start.
    """
    if restarts < 1:
        raise PlanError(f"restarts is {restarts}, must be at least 1")
    gram = cosine(gram_EE) if spherical else np.asarray(gram_EE, dtype=np.float64)
    generator = np.random.default_rng(seed)
    runs = [_converged(gram, _spread(gram, num_groups, generator), spherical) for _ in range(restarts)]
    best = min(error for error, _ in runs) + NOISE * float(gram.trace())
    return np.array(min(tuple(group_E.tolist()) for error, group_E in runs if error <= best), dtype=np.int64)


def _spread(gram_EE: FloatArray, num_groups: int, generator: np.random.Generator) -> IntArray:
    """k-means++: each further centre is an expert drawn by its squared distance to the nearest so far."""
    distance_EE = squared_distances(gram_EE)
    centres = [int(generator.integers(len(gram_EE)))]
    while len(centres) < num_groups:
        far_E = distance_EE[:, centres].min(1)
        far_E[far_E <= NOISE * gram_EE.diagonal()] = 0.0
        if not far_E.any():  # fewer distinct experts than groups: split equal ones, lowest first
            far_E[:] = np.isin(np.arange(len(far_E)), centres, invert=True)
            far_E[np.flatnonzero(far_E)[1:]] = 0.0
        centres.append(int(generator.choice(far_E.size, p=far_E / far_E.sum())))
    group_E = np.asarray(distance_EE[:, centres].argmin(1), dtype=np.int64)
    group_E[centres] = np.arange(num_groups)
    return group_E


def _converged(gram_EE: FloatArray, group_E: IntArray, spherical: bool) -> tuple[float, IntArray]:
    """Lloyd's rounds until no expert moves: the error, and the partition."""
    every = np.arange(len(gram_EE))
    num_groups = int(group_E.max()) + 1
    tie = NOISE * float(gram_EE.trace()) / len(gram_EE)
    distance_EK = _distances(gram_EE, group_E, num_groups, spherical)
    for _ in range(MAX_ROUNDS):
        nearer_E = distance_EK.min(1) < distance_EK[every, group_E] - tie
        if not nearer_E.any():
            break
        group_E = np.where(nearer_E, distance_EK.argmin(1), group_E)
        for empty in np.setdiff1d(np.arange(num_groups), group_E):
            own_E = distance_EK[every, group_E]
            shared_E = np.bincount(group_E, minlength=num_groups)[group_E] > 1
            group_E[np.where(shared_E, own_E, -np.inf).argmax()] = empty
        distance_EK = _distances(gram_EE, group_E, num_groups, spherical)
    return float(distance_EK[every, group_E].sum()), canonical(group_E)


def _distances(gram_EE: FloatArray, group_E: IntArray, num_groups: int, spherical: bool) -> FloatArray:
    """[E, K]: squared distance of every expert to every group's mean, or 1 - cosine to it."""
    member_KE = (group_E == np.arange(num_groups)[:, None]).astype(np.float64)
    product_EK = gram_EE @ member_KE.T
    square_K = np.einsum("ke,ek->k", member_KE, product_EK)
    if spherical:
        return np.asarray(1 - product_EK / np.sqrt(np.maximum(square_K, NOISE)))
    size_K = member_KE.sum(1)
    return np.asarray(gram_EE.diagonal()[:, None] - 2 * product_EK / size_K + square_K / size_K**2)
