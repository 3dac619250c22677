"""Sub-MoE: merge experts of like outputs inside the subspace their weights share. arXiv 2506.23266.

Legend: E experts, K groups, S sampled tokens, D model width.
"""

from dataclasses import replace

import numpy as np

from models.config import Semantics
from models.errors import PlanError
from models.pruning.clustering import kmeans
from models.pruning.method import Method, Option, each_layer
from models.pruning.plan import LayerPlan, merge_groups
from models.pruning.post import Project
from models.pruning.similarity import output_gram
from models.pruning.stats import Core, LayerStats, Sample


def sub_moe(
    stats: LayerStats, keep: int, semantics: Semantics, rank: int = 0, align: str = "none", restarts: int = 10
) -> LayerPlan:
    """Spherical k-means on the experts' sampled outputs, then a frequency-weighted mean in a joint subspace.

    Joint SVD of a group's matrices side by side, [W_1 .. W_m] = U S V^T, with U shared and the parts of V averaged by
    a_e = n_e / sum over the group of n. At rank r that is U_r U_r^T sum_e a_e W_e, and at full rank (rank = 0) the mean
    itself. Router rows stay and share the merged expert (`tie`).
    Only the paper's abstract was available: k-means on cosines of outputs is its idea, this form of it is ours.
    Raises PlanError without task data or for a negative rank.
    """
    if rank < 0:
        raise PlanError(f"rank is {rank}, must be 0 (full) or more")
    count_E = stats.need(Core).n_E
    gram_EE = output_gram(stats.need(Sample).f_SED)
    group_E = kmeans(gram_EE, keep, (stats.seed, stats.layer), restarts, spherical=True)
    plan = merge_groups(group_E, count_E, semantics, align == "weight", score_E=count_E.astype(float))
    if rank == 0:
        return plan
    return replace(plan, post=(Project(rank, plan.route_E == np.arange(keep)[:, None]),))


SUB_MOE = Method(
    name="sub-moe",
    summary="merge experts of like outputs in the subspace their weights share (arXiv 2506.23266)",
    plan=each_layer(sub_moe),
    semantics=("tie",),
    needs=(Core, Sample),
    options=(
        Option("rank", 0, "of the joint subspace; 0 is full, which averages"),
        Option("align", "none", "permute neurons to fit before mixing (weight)", ("none", "weight")),
        Option("restarts", 10, "starts of k-means, of which the best counts"),
    ),
)
