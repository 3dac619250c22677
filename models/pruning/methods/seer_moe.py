"""SEER-MoE: count heavy hitters, spend the budget over all layers at once. arXiv 2404.05089."""

from models.pruning.method import Option
from models.pruning.methods.scores import activation_score, score_method, soft_mass
from models.pruning.plan import FloatArray
from models.pruning.stats import LayerStats


def heavy_hitters(stats: LayerStats, count: str = "soft") -> FloatArray:
    """score_E = sum over all tokens of the router's probability (soft), or times chosen (hard).

    The paper's own formula was not available: that the soft count takes every token's full softmax, and not only the
    gates of chosen experts, is our reading of "heavy-hitters counting". As in the paper, scores are compared over all
    layers (global allocation); its fine-tuning with a penalty on router entropy is not part of the cut.
    """
    return soft_mass(stats, "all") if count == "soft" else activation_score(stats, 0, 0, 0)


SEER_MOE = score_method(
    "seer-moe",
    "keep heavy hitters by accumulated router probability, over all layers at once (arXiv 2404.05089)",
    heavy_hitters,
    Option("count", "soft", "add up router probabilities (soft) or choices (hard)", ("soft", "hard")),
    allocation="global",
)
