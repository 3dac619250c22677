"""UNCURL: merge experts whose router logits rise and fall together on the task. arXiv 2409.01483.

Legend: E experts, K groups, T tokens; h_e is the column of expert e's raw router logits over T tokens.
"""

from dataclasses import replace

import numpy as np

from models.config import Semantics
from models.pruning.clustering import spectral
from models.pruning.method import Method, Option, each_layer
from models.pruning.plan import FloatArray, LayerPlan, merge_groups
from models.pruning.similarity import cosine, squared_distances
from models.pruning.stats import Core, Gram, LayerStats

# Variance of a logit column below this fraction of its mean square is rounding: such a row says nothing about tokens.
FLAT = 1e-12


def uncurl(
    stats: LayerStats,
    keep: int,
    semantics: Semantics,
    affinity: str = "logit_cosine",
    weights: str = "frequency",
    router: str = "mix",
    restarts: int = 10,
) -> LayerPlan:
    """Spectral clustering of the experts by their task logits, then an aligned weighted mean of each group.

    W'_k = sum over the group of n_e W_e / sum over the group of n (frequency), or the plain mean (uniform, and where no
    member was chosen); neurons are permuted to fit the group's heaviest member first. Under `slice` the router rows are
    mixed alike (mix) or the most used member's stays (head); under `tie` all stay.
    The paper's own affinity and its treatment of merged router rows were not available: both, and the weights of the
    mean, are our reading of its three steps. Raises PlanError without task data.
    """
    count_E = stats.need(Core).n_E.astype(np.float64)
    group_E = spectral(logit_affinity(stats, affinity), keep, (stats.seed, stats.layer), restarts)
    weight_E = count_E if weights == "frequency" else np.ones_like(count_E)
    plan = merge_groups(group_E, weight_E, semantics, align=True, score_E=count_E)
    if router == "mix":
        return plan
    used_KE = np.where(plan.route_E == np.arange(keep)[:, None], count_E, -1.0)
    return replace(plan, router_mix_KE=np.eye(count_E.size)[used_KE.argmax(1)])


def logit_affinity(stats: LayerStats, affinity: str = "logit_cosine") -> FloatArray:
    """float64 [E, E] in [0, 1]; 0 to all others for an expert whose logit is the same for every token.

    logit_cosine: (cos(h_i, h_j) + 1) / 2. rbf: exp(-|h_i - h_j|^2 / s), s the median of the squared distances, so that
    the scale of logits does not matter.
    """
    logits = stats.need(Gram)
    if affinity == "rbf":
        distance_EE = squared_distances(logits.hgram_EE)
        median = np.median(distance_EE[~np.eye(len(distance_EE), dtype=bool)])
        affinity_EE = np.exp(-distance_EE / (median or 1.0))
    else:
        affinity_EE = (cosine(logits.hgram_EE) + 1) / 2
    square_E = logits.hgram_EE.diagonal()
    flat_E = square_E - logits.hsum_E**2 / stats.need(Core).tokens <= FLAT * square_E
    affinity_EE[flat_E] = affinity_EE[:, flat_E] = 0.0
    np.fill_diagonal(affinity_EE, 1.0)
    return np.asarray(affinity_EE)


UNCURL = Method(
    name="uncurl",
    summary="merge experts whose router logits on the task go together (arXiv 2409.01483)",
    plan=each_layer(uncurl),
    semantics=("slice", "tie"),
    needs=(Core, Gram),
    options=(
        Option("affinity", "logit_cosine", "how alike two logit columns are", ("logit_cosine", "rbf")),
        Option("weights", "frequency", "what members weigh in the mean", ("frequency", "uniform")),
        Option("router", "mix", "under slice: mix router rows alike, or keep the most used one", ("mix", "head")),
        Option("restarts", 10, "starts of k-means, of which the best counts"),
    ),
)
