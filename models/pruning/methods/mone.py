"""MoNE: replace an expert whose output hardly varies by its mean output. arXiv 2507.00390.

Legend: E experts, D model width.
"""

from dataclasses import replace

import numpy as np

from models.config import Semantics
from models.pruning.method import Method, Option, each_layer
from models.pruning.plan import FloatArray, LayerPlan, keep_best
from models.pruning.stats import Core, LayerStats, Means


def mone(
    stats: LayerStats, keep: int, semantics: Semantics, score: str = "fusion", unbiased: bool = False
) -> LayerPlan:
    """Keep what is used much and varies much; under `constant` each cut expert adds its mean output instead.

    The constant of expert e is the mean of f over the tokens routed to it, or zero where there is none; its gate still
    multiplies it. Under `zero` and `slice` the score is the same and the constants are not used. Raises PlanError
    without task data.
    """
    score_E = novice_score(stats, score, unbiased)
    if semantics != "constant":
        return keep_best(score_E, keep, semantics)
    const_ED = mean_outputs(stats).astype(np.float32)
    return replace(keep_best(score_E, keep, "zero"), semantics=semantics, const_ED=const_ED)


def novice_score(stats: LayerStats, score: str = "fusion", unbiased: bool = False) -> FloatArray:
    """score_E = mass * fluctuation (fusion), or either alone.

    mass = sum of g / tokens. fluctuation = sqrt(mean nf^2 - ||mean f||^2), the standard deviation of f over the routed
    tokens, all dimensions together; unbiased divides its sum of squares by n - 1 instead of n. The released code's
    fusion weight cancels and its normalisers differ between the two means; this is the formula those stand for.
    """
    core = stats.need(Core)
    mass_E = core.g_E / core.tokens
    if score == "mass":
        return np.asarray(mass_E)
    mean_ED, count_E = mean_outputs(stats), np.maximum(core.n_E, 1)
    # Rounding may take the difference of two equal numbers below 0.
    variance_E = np.maximum(core.f2_E / count_E - (mean_ED**2).sum(1), 0.0)
    if unbiased:
        variance_E = variance_E * count_E / np.maximum(count_E - 1, 1)
    fluctuation_E = np.sqrt(variance_E)
    return np.asarray(fluctuation_E if score == "fluctuation" else mass_E * fluctuation_E)


def mean_outputs(stats: LayerStats) -> FloatArray:
    """float64 [E, D]: mean of f over the tokens routed to each expert; zero where there is none."""
    count_E = np.maximum(stats.need(Core).n_E, 1)
    return np.asarray(stats.need(Means).fsum_ED / count_E[:, None])


MONE = Method(
    name="mone",
    summary="replace experts of low mass and low variation by their mean output (arXiv 2507.00390)",
    plan=each_layer(mone),
    semantics=("constant", "zero", "slice"),
    needs=(Core, Means),
    options=(
        Option("score", "fusion", "mass times fluctuation, or either alone", ("fusion", "mass", "fluctuation")),
        Option("unbiased", False, "divide the variance by n - 1"),
    ),
    score=novice_score,
)
