"""M-SMoE: the most used experts lead groups that the others join. arXiv 2310.01334 (ICLR 2024).

Legend: E experts, K groups, D model width.
"""

import numpy as np

from models.config import Semantics
from models.errors import PlanError
from models.pruning.method import Method, Option, each_layer
from models.pruning.plan import FloatArray, IntArray, LayerPlan, merge_groups
from models.pruning.similarity import cosine, inner_products, output_gram, weight_gram
from models.pruning.stats import Core, Gram, LayerStats, Sample, Weights


def m_smoe(
    stats: LayerStats,
    keep: int,
    semantics: Semantics,
    similarity: str = "router_logits",
    align: str = "weight",
    weights: str = "frequency",
    max_group: int = 0,
) -> LayerPlan:
    """The `keep` most used experts head a group each; every other expert joins the head most similar to it.

    share_e = n_e / sum n; W'_k = sum over the group of share_e W_e / sum over the group of share (frequency), after
    each member's neurons were permuted to fit its head's; or the plain mean (uniform), fitted to the lowest member.
    Router rows stay and share the merged expert (`tie`); `slice` mixes them alike, for loaders that cannot tie.
    Allocating globally on shares gives the paper's heads. Raises PlanError without task data, or if groups of max_group
    cannot hold all experts.
    """
    share_E = usage(stats)
    similarity_EE = similarities(stats, similarity, align == "weight")
    group_E = joined(similarity_EE, share_E, keep, max_group or stats.num_experts)
    weight_E = share_E if weights == "frequency" else np.ones_like(share_E)
    return merge_groups(group_E, weight_E, semantics, align == "weight", score_E=share_E)


def usage(stats: LayerStats, **_: object) -> FloatArray:
    """share_E = n_e / sum n. Raises PlanError if no token was seen."""
    count_E = stats.need(Core).n_E
    return np.asarray(count_E / max(count_E.sum(), 1))


def joined(similarity_EE: FloatArray, share_E: FloatArray, keep: int, max_group: int) -> IntArray:
    """int64 [E]: the head that each expert joins, heads their own.

    The most used choose first, each the most similar head whose group has room; ties go to the lower id.
    """
    if keep * max_group < share_E.size:
        raise PlanError(f"{keep} groups of at most {max_group} cannot hold {share_E.size} experts: raise max_group")
    order = np.argsort(-share_E, kind="stable")
    heads = np.sort(order[:keep])
    group_E = np.arange(share_E.size)
    room = np.full(keep, max_group - 1)
    for expert in order[keep:]:
        choice = int(np.where(room > 0, similarity_EE[expert, heads], -np.inf).argmax())
        room[choice] -= 1
        group_E[expert] = heads[choice]
    return group_E


def similarities(stats: LayerStats, similarity: str, align: bool) -> FloatArray:
    """float64 [E, E]: cosines of raw router logits over tokens, of router rows, of weights or of sampled outputs."""
    match similarity:
        case "router_logits":
            return cosine(stats.need(Gram).hgram_EE)
        case "router_weight":
            return cosine(inner_products(stats.need(Weights).router_ED))
        case "weight":
            return cosine(weight_gram(stats.need(Weights), int(usage(stats).argmax()) if align else None))
        case _:
            return cosine(output_gram(stats.need(Sample).f_SED))


M_SMOE = Method(
    name="m-smoe",
    summary="merge each expert into the most similar of the most used ones (arXiv 2310.01334)",
    plan=each_layer(m_smoe),
    semantics=("tie", "slice"),
    needs=(Core,),
    options=(
        Option(
            "similarity",
            "router_logits",
            "cosine of what",
            ("router_logits", "router_weight", "weight", "output"),
            needs={
                "router_logits": (Gram,),
                "router_weight": (Weights,),
                "weight": (Weights,),
                "output": (Sample,),
            },
        ),
        Option("align", "weight", "permute neurons to fit the head's before mixing", ("weight", "none")),
        Option("weights", "frequency", "what members weigh in the mean", ("frequency", "uniform")),
        Option("max_group", 0, "most experts in a group; 0 is no limit"),
    ),
    score=usage,
    allocation="global",
)
