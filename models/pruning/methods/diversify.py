"""Diversifying: merge experts of similar knowledge, router rows included. arXiv 2407.09590 (Findings of ACL 2025).

Legend: E experts, K groups, M members of a group, S sampled tokens, D model width.
"""

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.optimize
import torch

from kernels import reference
from kernels.routing import RouterPolicy
from models.config import Semantics
from models.errors import PlanError
from models.pruning.clustering import agglomerative, spectral
from models.pruning.method import Method, Option, each_layer
from models.pruning.plan import FloatArray, IntArray, LayerPlan, merge_groups
from models.pruning.similarity import cosine, linear_cka, weight_gram
from models.pruning.stats import Core, LayerStats, Sample, Weights

# Added to the unit trace of a least-squares problem: equal experts get equal weights, others are moved by this much.
RIDGE = 1e-9


def diversify(
    stats: LayerStats,
    keep: int,
    semantics: Semantics,
    similarity: str = "cka",
    grouping: str = "average",
    alpha: str = "uniform",
) -> LayerPlan:
    """Group the experts that do alike, then W'_k = sum over the group of alpha_e W_e, neurons aligned first.

    Similarity: linear CKA of sampled outputs, or the cosine of all weights laid end to end. Grouping: average linkage
    on 1 - similarity, or spectral clustering of it. alpha: uniform, by times chosen, or fitted (`fitted_weights`).
    Router rows are mixed by the same alpha (`slice`), which is not the sum of the members' probabilities; `tie` keeps
    them. The paper's own similarity and merging formulas were not available: those here are ours.
    Raises PlanError without the sample, counts or weights that the options read.
    """
    similarity_EE = _similarities(stats, similarity)
    if grouping == "average":
        group_E = agglomerative(1 - similarity_EE, keep, "average")
    else:
        group_E = spectral(np.maximum(similarity_EE, 0.0), keep, (stats.seed, stats.layer))
    return merge_groups(group_E, _alphas(stats, group_E, alpha), semantics, align=True)


def _sample(stats: LayerStats) -> Sample:
    sample = stats.need(Sample)
    if not len(sample.f_SED):
        raise PlanError(f"layer {stats.layer} saw no calibration token")
    return sample


def _similarities(stats: LayerStats, similarity: str) -> FloatArray:
    if similarity == "cka":
        return linear_cka(_sample(stats).f_SED)
    weights = stats.need(Weights)
    norm_E = np.linalg.norm(weights.w_out_EDF.reshape(len(weights.w_out_EDF), -1), axis=1)
    return cosine(weight_gram(weights, int(norm_E.argmax())))


def _alphas(stats: LayerStats, group_E: IntArray, alpha: str) -> npt.NDArray[np.number]:
    match alpha:
        case "uniform":
            return np.ones(group_E.size)
        case "frequency":
            return stats.need(Core).n_E
        case _:
            sample = _sample(stats)
            return fitted_weights(group_E, gates(stats, sample.h_SE), sample.f_SED)


def fitted_weights(group_E: IntArray, gate_SE: FloatArray, f_SED: npt.NDArray[np.float32]) -> FloatArray:
    """float64 [E]: per group, the weights alpha >= 0 of sum 1 that change the sampled layer output least.

    To first order a merged expert puts out sum_e alpha_e f_e, and its gate is the sum of its members' gates g_e, so
    the group's error is |sum_e g_e f_e - (sum_e g_e) (sum_e alpha_e f_e)|^2, summed over the sample. As alpha sums to
    1, that is alpha^T Q alpha with Q the inner products of the members' own errors sum_e g_e f_e - (sum_e g_e) f_m.
    """
    alpha_E = np.ones(group_E.size)
    for group in np.unique(group_E):
        members = np.flatnonzero(group_E == group)
        gate_SM, f_SMD = gate_SE[:, members], f_SED[:, members].astype(np.float64)
        wanted_SD = np.einsum("sm,smd->sd", gate_SM, f_SMD)
        error_SMD = wanted_SD[:, None] - gate_SM.sum(1)[:, None, None] * f_SMD
        error_MN = error_SMD.transpose(1, 0, 2).reshape(members.size, -1)
        alpha_E[members] = _least_on_simplex(error_MN @ error_MN.T)
    return alpha_E


def _least_on_simplex(quadratic_MM: FloatArray) -> FloatArray:
    """argmin of a^T Q a over a >= 0 of sum 1, for Q without negative eigenvalues.

    b >= 0 that minimises b^T Q b + (sum b - 1)^2 points the same way: for b = s a the best s leaves q / (1 + q), which
    grows with q = a^T Q a.
    """
    size = len(quadratic_MM)
    trace = float(quadratic_MM.trace()) or 1.0
    factor_MM = scipy.linalg.cholesky(quadratic_MM / trace + RIDGE * np.eye(size))
    solution, _ = scipy.optimize.nnls(np.vstack((factor_MM, np.ones(size))), np.append(np.zeros(size), 1.0))
    return np.asarray(solution / solution.sum())


def gates(stats: LayerStats, h_SE: npt.NDArray[np.float32]) -> FloatArray:
    """float64 [S, E]: the gates that top-k gives these logits, 0 where not chosen."""
    policy = RouterPolicy(top_k=stats.top_k, normalize=stats.normalize)
    every_1E = torch.arange(stats.num_experts, dtype=torch.int32)[None]
    routing = reference.route(torch.from_numpy(h_SE), every_1E, policy)
    gate_SE = torch.zeros(h_SE.shape, dtype=torch.float64)
    return np.asarray(gate_SE.scatter_(1, routing.slot_TK.long(), routing.weight_TK.double()))


DIVERSIFY = Method(
    name="diversify",
    summary="merge experts of similar outputs together with their router rows (arXiv 2407.09590)",
    plan=each_layer(diversify),
    semantics=("slice", "tie"),
    options=(
        Option(
            "similarity",
            "cka",
            "CKA of sampled outputs, or cosine of weights",
            ("cka", "weight"),
            needs={"cka": (Sample,), "weight": (Weights,)},
        ),
        Option("grouping", "average", "average linkage or spectral clustering", ("average", "spectral")),
        Option(
            "alpha",
            "uniform",
            "what members weigh: all alike, by use, or what changes sampled outputs least",
            ("uniform", "frequency", "fit"),
            needs={"frequency": (Core,), "fit": (Sample,)},
        ),
    ),
)
