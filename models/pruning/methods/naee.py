"""NAEE: search for the keep-set whose layer output is nearest to the old one. arXiv 2402.14800 (ACL 2024).

Legend: S sampled tokens, E experts, D model width, B keep-sets tried at once, R ranks: a token's experts in the order
of its router logits. With at most E - keep experts hidden, no token looks further than R = E - keep + top-k of them.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np
import numpy.typing as npt

from models.config import Semantics
from models.errors import PlanError
from models.pruning.apply import apply
from models.pruning.calibrate import calibrate
from models.pruning.method import Job, Method, Option
from models.pruning.plan import FloatArray, IntArray, LayerPlan, keep_best
from models.pruning.stats import LayerStats, Sample

BoolArray = npt.NDArray[np.bool_]

# Every keep-set is tried up to this number of them, which covers all of them for up to 16 experts.
MAX_EXHAUSTIVE = 20_000
# Elements of one [S, B, R] array: half the 16 experts of 512 tokens took .72 s, .95 s with 30,000 and 1.27 s with 8
# million elements; 64 and 128 experts differ less.
CHUNK_ELEMENTS = 500_000
# Losses closer than this, as a share of the old output's norm, are equal: the square root of float64 rounding is 1e-8.
SAME = 1e-7


def naee(job: Job) -> dict[int, LayerPlan]:
    """Keep, in each layer, the set that minimises sum_b ||MoE(X_b) - MoE_keep(X_b)||_F over the sampled tokens.

    MoE_keep hides the other experts from the router, which chooses anew and re-forms its gates. norm: batches b of one
    token each, or the whole sample as one batch; the sample does not remember the paper's batches of one text.
    search=auto: every keep-set if there are at most 20,000, else experts are taken away one at a time, always the one
    that is missed least, and then each kept one is exchanged once for the cut one that helps most, if any does.
    sampled: the best of `subsets` random ones, as published for wide layers. mode=layerwise judges each layer on the
    inputs it has in the unpruned model; progressive on those that come through the layers before as pruned, which
    costs a pass over the rows for each layer but the first.
    The paper also skips a token's second expert while serving, where g2 < beta g1 with beta the layer's median of
    g2 / g1. That is left out: beta is a number per layer, found on data, which a checkpoint, the router's policy and
    the routes of all backends would have to carry, and what it saves depends on the request, so that no size or count
    of operations that we report would change.
    Raises PlanError without sampled tokens, where more experts are protected than may stay, and for progressive without
    rows or with fewer experts than a token chooses.
    """
    layers = [layer for layer, stats in job.stats.items() if job.keep[layer] < stats.num_experts]
    options = {name: value for name, value in job.options.items() if name != "mode"}
    is_progressive = job.options["mode"] == "progressive"
    if is_progressive:
        _refuse_progressive(job, layers)
    plans: dict[int, LayerPlan] = {}
    for number, layer in enumerate(layers, start=1):
        stats = job.stats[layer]
        if is_progressive and plans:
            stats = _sampled_anew(job, plans, stats)
        plans[layer] = nearest(stats, job.keep[layer], job.semantics, job.protect.get(layer, ()), **options)
        if is_progressive:
            job.progress(number, len(layers), "searching layer by layer")
    return plans


def _refuse_progressive(job: Job, layers: list[int]) -> None:
    if len(layers) > 1 and not job.sequences:
        raise PlanError("naee: mode=progressive runs the rows through pruned layers: give --data FILE")
    for layer in layers:
        if job.keep[layer] < job.stats[layer].top_k:
            raise PlanError(
                f"naee: mode=progressive runs models with some layers pruned, where tokens still choose "
                f"{job.stats[layer].top_k} experts: keep as many, or use mode=layerwise"
            )


def _sampled_anew(job: Job, plans: Mapping[int, LayerPlan], stats: LayerStats) -> LayerStats:
    """The layer's sample of the same tokens, as they arrive through the layers planned so far."""
    model, size = apply(job.parent, plans), stats.need(Sample).size
    return stats.having(*calibrate(model, job.sequences, (Sample,), seed=stats.seed, sample=size)[stats.layer])


def nearest(
    stats: LayerStats,
    keep: int,
    semantics: Semantics,
    protect: tuple[int, ...] = (),
    search: str = "auto",
    subsets: int = 100_000,
    norm: str = "token",
) -> LayerPlan:
    """One layer's plan; every set that is tried holds the protected experts."""
    if len(protect) > keep:
        raise PlanError(f"layer {stats.layer} is to keep {keep} experts, but {len(protect)} are protected")
    if subsets < 1:
        raise PlanError(f"subsets is {subsets}, must be at least 1")
    loss = KeepLoss(stats, keep, norm)
    fixed_E = np.isin(np.arange(stats.num_experts), protect)
    if search == "sampled":
        kept_E = _sampled(loss, fixed_E, keep, subsets, np.random.default_rng([stats.seed, stats.layer]))
    elif math.comb(stats.num_experts - len(protect), keep - len(protect)) <= MAX_EXHAUSTIVE:
        kept_E = _exhaustive(loss, fixed_E, keep)
    else:
        kept_E = _swapped(loss, fixed_E, _greedy(loss, fixed_E, keep))
    return replace(keep_best(kept_E, keep, semantics), score_E=None)


class KeepLoss:
    """The loss of keep-sets, without running an expert again: a token's change is sum_e c_e f_e with c = new gate - old
    gate, so its square is c^T G c, where G holds the inner products of that token's sampled outputs."""

    def __init__(self, stats: LayerStats, keep: int, norm: str = "token") -> None:
        sample = stats.need(Sample)
        if not len(sample.h_SE):
            raise PlanError(f"layer {stats.layer} saw no calibration token")
        self.num_experts, self.norm, self.normalize = stats.num_experts, norm, stats.normalize
        self.num_chosen = min(stats.top_k, keep)
        num_ranks = stats.num_experts - keep + self.num_chosen
        logits_SE = sample.h_SE.astype(np.float64)
        odds_SE = np.exp(logits_SE - logits_SE.max(1, keepdims=True))
        self.p_SE = odds_SE / odds_SE.sum(1, keepdims=True)
        self.expert_SR = np.argsort(-logits_SE, axis=1, kind="stable")[:, :num_ranks]
        self.p_SR = np.take_along_axis(self.p_SE, self.expert_SR, axis=1)
        # One token at a time: the sample's outputs in float64 would be the largest array by far.
        ranked = (f_ED[order].astype(np.float64) for f_ED, order in zip(sample.f_SED, self.expert_SR, strict=True))
        self.gram_SRR = np.stack([f_RD @ f_RD.T for f_RD in ranked])
        # Summed over all ranks as in `gates`: where the choice does not change, the change is exactly 0.
        self.old_SR = np.where(np.arange(num_ranks) < stats.top_k, self.p_SR, 0.0)
        if stats.normalize:
            self.old_SR /= self.old_SR.sum(1, keepdims=True)
        self.tolerance = SAME * float(self._total(np.einsum("sr,srq,sq->s", self.old_SR, self.gram_SRR, self.old_SR)))

    def __call__(self, kept_BE: BoolArray) -> FloatArray:
        """float64 [B]: the loss of each keep-set, of which none may be smaller than the `keep` given before."""
        chunk = max(1, CHUNK_ELEMENTS // self.p_SR.size)
        return np.concatenate([self._losses(kept_BE[i : i + chunk]) for i in range(0, len(kept_BE), chunk)])

    def _losses(self, kept_BE: BoolArray) -> FloatArray:
        change_SBR = self.gates(kept_BE) - self.old_SR[:, None]
        return self._total(np.maximum(((change_SBR @ self.gram_SRR) * change_SBR).sum(2), 0.0))

    def gates(self, kept_BE: BoolArray) -> FloatArray:
        """float64 [S, B, R]: what the router gives each token's experts, by rank, when only those kept are visible."""
        kept_SBR = kept_BE[np.arange(len(kept_BE))[:, None], self.expert_SR[:, None]]
        chosen_SBR = kept_SBR & (kept_SBR.cumsum(2, dtype=np.int32) <= self.num_chosen)
        gate_SBR = np.where(chosen_SBR, self.p_SR[:, None], 0.0)
        mass_SB = gate_SBR.sum(2) if self.normalize else self.p_SE @ kept_BE.T
        return np.asarray(gate_SBR / np.maximum(mass_SB, np.finfo(np.float64).tiny)[:, :, None])

    def _total(self, square_S: FloatArray) -> FloatArray:
        """Squared changes [S, ...] -> norms [...]."""
        return np.asarray(np.sqrt(square_S.sum(0)) if self.norm == "sample" else np.sqrt(square_S).sum(0))

    def best(self, loss_B: FloatArray) -> int:
        """The first of the least losses."""
        return int(np.flatnonzero(loss_B <= loss_B.min() + self.tolerance)[0])


def _exhaustive(loss: KeepLoss, fixed_E: BoolArray, keep: int) -> BoolArray:
    """Sets come in lexical order, so that ties keep the lower ids."""
    sets = combinations(np.flatnonzero(~fixed_E).tolist(), keep - int(fixed_E.sum()))
    return _best_of(loss, fixed_E, np.array(list(sets), dtype=np.int64))


def _sampled(loss: KeepLoss, fixed_E: BoolArray, keep: int, subsets: int, generator: np.random.Generator) -> BoolArray:
    free = np.flatnonzero(~fixed_E)
    shuffled_BE = free[generator.random((subsets, free.size), dtype=np.float32).argsort(1)]
    return _best_of(loss, fixed_E, shuffled_BE[:, : keep - int(fixed_E.sum())])


def _best_of(loss: KeepLoss, fixed_E: BoolArray, ids_BK: IntArray) -> BoolArray:
    kept_BE = np.tile(fixed_E, (len(ids_BK), 1))
    np.put_along_axis(kept_BE, ids_BK, True, axis=1)
    return np.asarray(kept_BE[loss.best(loss(kept_BE))])


def _greedy(loss: KeepLoss, fixed_E: BoolArray, keep: int) -> BoolArray:
    kept_E = np.ones(loss.num_experts, dtype=bool)
    while kept_E.sum() > keep:
        candidates = np.flatnonzero(kept_E & ~fixed_E)[::-1]  # ties lose the higher id
        kept_E[candidates[loss.best(loss(_without(kept_E, candidates)))]] = False
    return kept_E


def _swapped(loss: KeepLoss, fixed_E: BoolArray, kept_E: BoolArray) -> BoolArray:
    """Each kept expert is exchanged at most once; the least visible first, an order that does not depend on ids."""
    use_E = loss.p_SE.sum(0)
    for expert in sorted(np.flatnonzero(kept_E & ~fixed_E).tolist(), key=lambda e: use_E[e]):
        others = np.flatnonzero(~kept_E)
        swapped_BE = np.vstack([kept_E, _without(kept_E, np.full(others.size, expert))])
        swapped_BE[np.arange(others.size) + 1, others] = True
        kept_E = swapped_BE[loss.best(loss(swapped_BE))]
    return kept_E


def _without(kept_E: BoolArray, experts: IntArray) -> BoolArray:
    kept_BE = np.tile(kept_E, (experts.size, 1))
    kept_BE[np.arange(experts.size), experts] = False
    return kept_BE


NAEE = Method(
    name="naee",
    summary="keep the set that changes each layer's output least on sampled tokens (arXiv 2402.14800)",
    plan=naee,
    semantics=("slice",),
    needs=(Sample,),
    options=(
        Option("search", "auto", "exhaustive or greedy by size (auto), or random keep-sets", ("auto", "sampled")),
        Option("subsets", 100_000, "how many random keep-sets search=sampled tries"),
        Option("norm", "token", "sum the change per token, or take it over the whole sample", ("token", "sample")),
        Option(
            "mode",
            "layerwise",
            "judge layers on the unpruned model's inputs, or with the layers before as pruned",
            ("layerwise", "progressive"),
        ),
    ),
)
