"""DERN: cut experts, and hand their neurons on to the kept ones. arXiv 2509.10377 (Findings of EMNLP 2025).

Legend: E experts, K kept, F expert inner width, W what a neuron is made of, J neurons handed on.
"""

from dataclasses import replace

import numpy as np

from models.config import Semantics
from models.pruning.method import Method, Option, each_layer
from models.pruning.plan import FloatArray, LayerPlan, keep_best
from models.pruning.post import Neurons
from models.pruning.similarity import neurons
from models.pruning.stats import Core, LayerStats, Weights


def dern(
    stats: LayerStats, keep: int, semantics: Semantics, score: str = "frequency_gate", alpha: float = 0.4
) -> LayerPlan:
    """Keep the experts of greatest use; average every neuron of the others into the kept neuron most like it.

    score_E = n_e * sum of g_e (frequency_gate) or n_e (frequency). A neuron is its gate row, up row and down column as
    one vector; it is handed on if its greatest cosine to any kept neuron is above alpha, and is lost otherwise. Neurons
    weigh as often as their expert was chosen; the width stays F.
    Only the paper's abstract was available: cosines of whole neurons, that the nearest neuron decides which expert it
    goes to, and the weights of the average are our reading. Raises PlanError without task data.
    """
    plan = keep_best(importance(stats, score), keep, semantics)
    handed_on = reassigned(stats, plan, alpha)
    return replace(plan, post=(handed_on,)) if handed_on.expert_J.size else plan


def importance(stats: LayerStats, score: str = "frequency_gate", **_: object) -> FloatArray:
    """float64 [E]: times chosen, times the sum of its gates or alone."""
    core = stats.need(Core)
    return core.n_E * core.g_E if score == "frequency_gate" else core.n_E.astype(np.float64)


def reassigned(stats: LayerStats, plan: LayerPlan, alpha: float) -> Neurons:
    """Where each neuron of a cut expert goes: ties to the lower slot and place; nowhere if its expert was never chosen.

    A kept expert that was never chosen counts as chosen once, so that its neurons have a weight.
    """
    neuron_EFW = neurons(stats.need(Weights))
    length_EF = np.linalg.norm(neuron_EFW, axis=2)
    unit_EFW = neuron_EFW / np.where(length_EF > 0, length_EF, 1.0)[:, :, None]
    count_E, every_F = stats.need(Core).n_E, np.arange(neuron_EFW.shape[1])
    moves = []
    for expert in np.flatnonzero((plan.route_E < 0) & (count_E > 0)):
        best_F = np.full(every_F.size, alpha, dtype=np.float64)
        to_F, at_F = np.full(every_F.size, -1), np.zeros(every_F.size, dtype=np.int64)
        for slot, kept in enumerate(plan.kept):
            cosine_FF = unit_EFW[expert] @ unit_EFW[kept].T
            nearest_F = cosine_FF.argmax(1)
            value_F = cosine_FF[every_F, nearest_F]
            better_F = value_F > best_F
            best_F[better_F], to_F[better_F], at_F[better_F] = value_F[better_F], slot, nearest_F[better_F]
        found = np.flatnonzero(to_F >= 0)
        moves.append((np.full(found.size, expert), found, to_F[found], at_F[found]))
    expert_J, neuron_J, to_J, at_J = np.concatenate(moves, axis=1) if moves else np.zeros((4, 0), dtype=np.int64)
    own_K = np.maximum(count_E[list(plan.kept)], 1).astype(np.float64)
    return Neurons(
        expert_J=expert_J,
        neuron_J=neuron_J,
        to_J=to_J,
        at_J=at_J,
        weight_J=count_E[expert_J].astype(np.float64),
        own_KF=np.repeat(own_K[:, None], every_F.size, axis=1),
    )


DERN = Method(
    name="dern",
    summary="cut experts and average their neurons into the most similar kept ones (arXiv 2509.10377)",
    plan=each_layer(dern),
    semantics=("slice",),
    needs=(Core, Weights),
    options=(
        Option(
            "score",
            "frequency_gate",
            "what to keep: times chosen times gates, or times chosen",
            ("frequency_gate", "frequency"),
        ),
        Option("alpha", 0.4, "least cosine at which a neuron is handed on; above 1, none is"),
    ),
    score=importance,
)
