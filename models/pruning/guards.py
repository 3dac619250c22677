"""What no method may do, whatever it scores: cut experts that carry a model, rank on noise, give up a class.

Legend: E experts before, K after.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from models.config import ModelConfig
from models.errors import PlanError
from models.evaluate import Evaluation
from models.pruning.plan import IntArray, LayerPlan
from models.pruning.post import Neurons, Post, Project
from models.pruning.stats import Core, Gram, LayerStats, Sample

# A super-expert (arXiv 2507.23279): an early layer's expert whose activations dwarf those of all others.
SUPER_PERCENTILE = 99.5
SUPER_SHARE = 0.1
SUPER_DISTANCE = 10.0
SUPER_LAYERS = 0.75
# A kept expert that fewer tokens chose is known by hardly more than noise.
FEWEST_TOKENS = 10
log = logging.getLogger("secateur.pruning")
Experts = Mapping[int, tuple[int, ...]]


def super_experts(stats: Mapping[int, LayerStats], num_layers: int) -> dict[int, tuple[int, ...]]:
    """Experts by layer that may not be cut: their greatest |f_d| is above the 99.5th percentile of all experts in all
    layers, interpolated, above a tenth of the greatest, and above ten times the median; only in the first three
    quarters of the layers. Empty where no activations were collected.

    The first two are those of arXiv 2507.23279. Of fewer than 200 experts the percentile lies below the greatest value,
    so that they alone would always find one; the last asks that it is far from the others, as in the paper's models.
    """
    greatest = {layer: found.fmax_E for layer, s in stats.items() if (found := s.get(Core)) is not None}
    if not greatest:
        return {}
    every = np.concatenate(list(greatest.values())).astype(np.float64)
    bound = max(
        float(np.percentile(every, SUPER_PERCENTILE)),
        SUPER_SHARE * float(every.max()),
        SUPER_DISTANCE * float(np.median(every)),
    )
    early = {layer: np.flatnonzero(f > bound) for layer, f in greatest.items() if layer < SUPER_LAYERS * num_layers}
    return {layer: tuple(ids.tolist()) for layer, ids in early.items() if ids.size}


def together(*sets: Experts) -> dict[int, tuple[int, ...]]:
    """The union of several choices of experts, layer by layer."""
    layers = sorted({layer for chosen in sets for layer in chosen})
    return {layer: tuple(sorted({e for chosen in sets for e in chosen.get(layer, ())})) for layer in layers}


def is_alone(plan: LayerPlan, expert: int) -> bool:
    """True if the expert stays as it is: in a slot of its own, which no other router row leads to, nor any neuron."""
    slot = int(plan.route_E[expert])
    return (
        slot >= 0
        and np.count_nonzero(plan.mix_KE[slot]) == 1
        and plan.mix_KE[slot, expert] == 1.0
        and np.count_nonzero(plan.route_E == slot) == 1
        and not any(isinstance(step, Neurons) and slot in step.to_J for step in plan.post)
    )


def plan_around(plan: Callable[..., LayerPlan], stats: LayerStats, keep: int, protected: tuple[int, ...]) -> LayerPlan:
    """plan(stats, keep), in which the protected experts stay; where they would not, the others are planned alone.

    Scores are those of the first plan. Raises PlanError if nothing would be left to choose.
    """
    first = plan(stats, keep)
    if all(is_alone(first, expert) for expert in protected):
        return first
    if len(protected) >= keep:
        raise PlanError(
            f"layer {stats.layer} is to keep {keep} experts, and {len(protected)} are protected "
            f"({', '.join(map(str, protected))}): keep more, protect fewer, or pass --ignore-super-experts"
        )
    others = np.setdiff1d(np.arange(stats.num_experts), protected)
    rest = plan(stats.only(others), keep - len(protected))
    return replace(_widened(rest, others, np.array(protected)), score_E=first.score_E)


def _widened(rest: LayerPlan, others: IntArray, protected: IntArray) -> LayerPlan:
    """A plan for `others` as one for all experts, in which the protected ones have slots of their own."""
    num_old, split = others.size + protected.size, rest.keep
    wide_KE = np.zeros((split + protected.size, num_old))
    wide_KE[:split, others] = rest.mix_KE
    wide_KE[np.arange(split, len(wide_KE)), protected] = 1.0
    # By the rows that lead to a slot: its lowest member may weigh nothing.
    lowest_K = np.append([others[np.flatnonzero(rest.route_E == k)[0]] for k in range(split)], protected)
    order_K = np.argsort(lowest_K, kind="stable")
    place_K = np.argsort(order_K)
    route_E = np.full(num_old, -1, dtype=np.int64)
    route_E[others] = np.where(rest.route_E >= 0, place_K[rest.route_E], -1)
    route_E[protected] = place_K[split:]
    const_ED = None
    if rest.const_ED is not None:
        const_ED = np.zeros((num_old, rest.const_ED.shape[1]), dtype=np.float32)
        const_ED[others] = rest.const_ED
    router_KE = None
    if rest.router_mix_KE is not None:
        router_KE = wide_KE.copy()
        router_KE[:split, others] = rest.router_mix_KE
        router_KE = router_KE[order_K]
    post = tuple(_widened_post(step, others, place_K, num_old) for step in rest.post)
    return replace(
        rest, mix_KE=wide_KE[order_K], route_E=route_E, const_ED=const_ED, router_mix_KE=router_KE, post=post
    )


def _widened_post(step: Post, others: IntArray, place_K: IntArray, num_old: int) -> Post:
    if isinstance(step, Project):
        members_KE = np.zeros((place_K.size, num_old), dtype=np.bool_)
        members_KE[np.ix_(place_K[: len(step.members_KE)], others)] = step.members_KE
        return replace(step, members_KE=members_KE)
    if not isinstance(step, Neurons):
        raise TypeError(f"{type(step).__name__} is for whole plans: it does not say which experts it is about")
    own_KF = np.ones((place_K.size, step.own_KF.shape[1]))
    own_KF[place_K[: len(step.own_KF)]] = step.own_KF
    return Neurons(others[step.expert_J], step.neuron_J, place_K[step.to_J], step.at_J, step.weight_J, own_KF)


def refuse_lost(plans: Mapping[int, LayerPlan], protect: Experts, method: str) -> None:
    """Raises PlanError if a plan for the whole model cut or merged an expert that has to stay."""
    for layer, experts in protect.items():
        for expert in experts:
            if layer in plans and not is_alone(plans[layer], expert):
                raise PlanError(
                    f"{method} would cut or merge expert {expert} of layer {layer}, which is protected: keep more "
                    "experts, or choose another method"
                )


def refuse_compressed(config: ModelConfig) -> None:
    """Raises PlanError for a model whose experts are no longer matrices to rank, mix or cut."""
    for index in config.moe_layers:
        if config.layers[index].compression is not None:
            raise PlanError(f"layer {index} is compressed already: prune its parent instead")


def warn_of_thin_data(stats: Mapping[int, LayerStats], plans: Mapping[int, LayerPlan]) -> list[str]:
    """What the calibration data is too small for, a line per layer, logged as warnings too."""
    warnings = []
    for layer, plan in plans.items():
        core = stats[layer].get(Core)
        if core is None:
            continue
        unrouted = int((core.n_E == 0).sum())
        # A merged expert is known by the tokens of all its members.
        token_K = (plan.mix_KE != 0) @ core.n_E
        problems = []
        if unrouted > plan.route_E.size - plan.keep:
            problems.append(f"{unrouted} of {plan.route_E.size} experts saw no token")
        if (token_K < FEWEST_TOKENS).any():
            slot = int(token_K.argmin())
            problems.append(f"kept expert {plan.kept[slot]} saw {int(token_K[slot])}")
        if problems:
            warnings.append(f"layer {layer}: the calibration data is too small: {', '.join(problems)}")
    for warning in warnings:
        log.warning("%s", warning)
    return warnings


@dataclass(frozen=True)
class Forecast:
    """What a plan will do to the calibration tokens. kept_slots: the share of (token, choice) pairs whose expert still
    runs. lost_tokens: the share of tokens that lose every expert; None where that was not counted."""

    kept_slots: float
    lost_tokens: float | None


def forecast(stats: LayerStats, plan: LayerPlan) -> Forecast | None:
    """The plan's effect by the counts of the calibration data, or None without them."""
    core = stats.get(Core)
    if core is None or not core.n_E.sum():
        return None
    cut_E = plan.route_E < 0 if plan.semantics != "slice" else np.zeros(plan.route_E.size, dtype=bool)
    kept = float(core.n_E[~cut_E].sum() / core.n_E.sum())
    return Forecast(kept, _lost_tokens(stats, core, cut_E))


def _lost_tokens(stats: LayerStats, core: Core, cut_E: npt.NDArray[np.bool_]) -> float | None:
    gram, sample = stats.get(Gram), stats.get(Sample)
    if not cut_E.any():
        return 0.0
    if stats.top_k == 1:
        return float(core.n_E[cut_E].sum() / core.n_E.sum())
    if stats.top_k == 2 and gram is not None:
        return float(np.triu(gram.coact_EE[np.ix_(cut_E, cut_E)], k=1).sum() / core.tokens)
    if sample is not None and len(sample.h_SE):
        row_SK = np.argsort(-sample.h_SE, axis=1, kind="stable")[:, : stats.top_k]
        return float(cut_E[row_SK].all(1).mean())
    return None


def class_losses(before: Evaluation, after: Evaluation) -> dict[str, float]:
    """Recall that each class lost, as a fraction; negative where it gained."""
    kept = {recall.label: recall.recall for recall in after.recalls}
    return {recall.label: recall.recall - kept[recall.label] for recall in before.recalls}


def refuse_class_loss(before: Evaluation, after: Evaluation, limit: float) -> None:
    """Raises PlanError naming the class that lost most, if that is more than the limit (a fraction)."""
    losses = class_losses(before, after)
    worst = max(losses, key=lambda label: losses[label])
    if losses[worst] > limit:
        over = sum(loss > limit for loss in losses.values())
        raise PlanError(
            f"class {worst!r} loses {100 * losses[worst]:.1f} points of recall, more than the {100 * limit:.1f} "
            f"allowed ({over} of {len(losses)} classes do): keep more experts, or raise --max-class-loss"
        )
