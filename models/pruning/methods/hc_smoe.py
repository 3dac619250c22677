"""HC-SMoE: merge experts whose mean outputs are near each other. arXiv 2410.08589 (ICML 2025).

Legend: E experts, D model width.
"""

from scipy.spatial.distance import cdist

from models.config import Semantics
from models.pruning.clustering import Linkage, agglomerative
from models.pruning.method import Method, Option, each_layer
from models.pruning.methods.mone import mean_outputs
from models.pruning.plan import FloatArray, LayerPlan, merge_groups
from models.pruning.stats import Core, Dense, LayerStats, Means


def hc_smoe(
    stats: LayerStats,
    keep: int,
    semantics: Semantics,
    linkage: Linkage = "average",
    signature: str = "dense",
    align: str = "none",
) -> LayerPlan:
    """Agglomerative clustering of signatures by Euclidean distance; members weigh by how often they were chosen.

    W'_k = sum over the cluster of n_e W_e / sum over the cluster of n, evenly where no member was ever chosen. Router
    rows stay as they are and share the merged expert (`tie`). Raises PlanError without task data.
    """
    count_E = stats.need(Core).n_E
    signature_ED = signatures(stats, signature)
    cluster_E = agglomerative(cdist(signature_ED, signature_ED), keep, linkage)
    return merge_groups(cluster_E, count_E, semantics, align == "weight", score_E=count_E.astype(float))


def signatures(stats: LayerStats, signature: str = "dense") -> FloatArray:
    """float64 [E, D]. dense: each expert's mean output over all calibration tokens, whatever the router said of them.
    routed_mean: over its own tokens only, which is cheap to collect, and another method than the paper's."""
    if signature == "routed_mean":
        return mean_outputs(stats)
    dense = stats.need(Dense)
    return dense.dsum_ED / dense.dtokens


HC_SMOE = Method(
    name="hc-smoe",
    summary="merge experts whose mean outputs are near each other (arXiv 2410.08589)",
    plan=each_layer(hc_smoe),
    semantics=("tie",),
    needs=(Core,),
    options=(
        Option("linkage", "average", "distance of clusters: mean or least one of their members", ("average", "single")),
        Option(
            "signature",
            "dense",
            "mean output over all tokens (dense) or over an expert's own (routed_mean: cheap, not the paper's)",
            ("dense", "routed_mean"),
            needs={"dense": (Dense,), "routed_mean": (Means,)},
        ),
        Option("align", "none", "permute neurons to fit before mixing (weight)", ("none", "weight")),
    ),
)
