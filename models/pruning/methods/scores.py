"""Scores from sums over calibration tokens: keep the experts with the greatest.

Legend: E experts, T tokens. Over the tokens routed to an expert, n is their number, g the gate that multiplied its
output and nf that output's L2 norm before the gate. Most published scores are one formula (arXiv 2606.15716),

    score = 1 / n^b * sum of g^alpha * nf^beta,

and differ in (b, alpha, beta) alone:

    frequency  (0, 0, 0)  how often it was chosen.
    soft-mass  (0, 1, 0)  its gates; mass=all adds the router's probabilities over all tokens, chosen or not.
    ean        (0, 0, 1)  how much it put out.
    reap       (1, 1, 1)  mean contribution where chosen (arXiv 2510.13999), with the gates as served.
    man        (1, 0, 1)  mean norm where chosen, gates left out: what is best kept for any task (arXiv 2606.15716).
    msan       (1, 0, 2)  mean squared norm.
    task-mass  (0, 1, 1)  what it contributed to this task; variant=squared is (0, 2, 2).

easy-ep (arXiv 2504.06792) weighs each term of task-mass by how much the routed experts turned the token's residual
stream. An expert that no token chose scores 0 by all of them. The router rows of cut experts leave with them (`slice`)
unless `zero` is asked for.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from models.config import Semantics
from models.pruning.method import Method, Option, each_layer
from models.pruning.plan import FloatArray, LayerPlan, keep_best
from models.pruning.stats import Core, LayerStats


def activation_score(stats: LayerStats, b: int, alpha: int, beta: int) -> FloatArray:
    """float64 [E]: 1 / n^b * sum of g^alpha * nf^beta; 0 where n is 0. Raises PlanError if no token was seen."""
    core = stats.need(Core)
    sums = {
        (0, 0): core.n_E,
        (1, 0): core.g_E,
        (0, 1): core.f_E,
        (0, 2): core.f2_E,
        (1, 1): core.gf_E,
        (2, 2): core.gf2_E,
    }
    return np.asarray(sums[alpha, beta] / np.maximum(core.n_E, 1) ** b, dtype=np.float64)


def soft_mass(stats: LayerStats, mass: str = "slots") -> FloatArray:
    """float64 [E]: sum of g where chosen (slots), or of the router's probability over all tokens (all)."""
    return activation_score(stats, 0, 1, 0) if mass == "slots" else stats.need(Core).p_E


def task_mass(stats: LayerStats, variant: str = "linear") -> FloatArray:
    """float64 [E]: sum of g nf (linear), or of (g nf)^2 (squared)."""
    power = 1 if variant == "linear" else 2
    return activation_score(stats, 0, power, power)


def easy_ep(stats: LayerStats) -> FloatArray:
    """float64 [E]: sum of w g nf, w = max(0, 1 - cos(residual before, residual after the routed experts))."""
    return stats.need(Core).wgf_E


def score_method(
    name: str, summary: str, score: Callable[..., FloatArray], *options: Option, allocation: str = "uniform"
) -> Method:
    """The method that keeps each layer's greatest score(stats, **options)."""

    def plan(stats: LayerStats, keep: int, semantics: Semantics, **chosen: bool | int | float | str) -> LayerPlan:
        return keep_best(score(stats, **chosen), keep, semantics)

    return Method(name, summary, each_layer(plan), ("slice", "zero"), (Core,), options, score, allocation=allocation)


def _formula(b: int, alpha: int, beta: int) -> Callable[[LayerStats], FloatArray]:
    return partial(activation_score, b=b, alpha=alpha, beta=beta)


METHODS = (
    score_method("frequency", "keep experts the router chooses most often on task data", _formula(0, 0, 0)),
    score_method(
        "soft-mass",
        "keep experts with the greatest sum of gates",
        soft_mass,
        Option("mass", "slots", "count gates of chosen experts (slots) or probabilities of all", ("slots", "all")),
    ),
    score_method("ean", "keep experts with the greatest sum of output norms", _formula(0, 0, 1)),
    score_method("reap", "keep experts with the greatest mean gated output norm (arXiv 2510.13999)", _formula(1, 1, 1)),
    score_method(
        "man", "keep experts with the greatest mean output norm, for any task (arXiv 2606.15716)", _formula(1, 0, 1)
    ),
    score_method(
        "msan", "keep experts with the greatest mean squared output norm (arXiv 2606.15716)", _formula(1, 0, 2)
    ),
    score_method(
        "task-mass",
        "keep experts with the greatest sum of gated output norms on task data (arXiv 2606.15716)",
        task_mass,
        Option("variant", "linear", "sum gated norms (linear) or their squares (squared)", ("linear", "squared")),
    ),
    score_method(
        "easy-ep",
        "task-mass weighed by how much a token's residual stream is turned (arXiv 2504.06792)",
        easy_ep,
    ),
)
