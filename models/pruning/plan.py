"""A plan is a matrix: which old experts make each new one, and what each old router row means afterwards.

Legend: E experts before, K experts after (methods never use K for top-k), D model width.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.config import Semantics
from models.errors import PlanError
from models.pruning.post import Post

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer's experts.

    mix_KE     float64 [K, E]: new expert k is sum_e mix[k, e] * W_e. One-hot rows prune, weighted rows merge.
    route_E    int64 [E]: the new slot of old router row e, or -1 for dropped.
    semantics  slice: dropped rows leave the router. zero: they stay, and add nothing. tie: rows share slots, none is
               dropped. constant: a dropped row adds its vector from const_ED.
    score_E    float64 [E] or None: the method's score, higher is kept.
    const_ED   float32 [E, D] or None: read for dropped rows under `constant` only.
    router_mix_KE  float64 [K, E] or None: under `slice`, the new router rows as sums of old ones; None is mix_KE.
    align      before mixing, permute each member's neurons to fit its group's heaviest member: a neuron is a gate row,
               an up row and a down column together, and which place it has means nothing.
    post       what happens to the mixed weights, in order (models/pruning/post.py).
    """

    mix_KE: FloatArray
    route_E: IntArray
    semantics: Semantics
    score_E: FloatArray | None = None
    const_ED: npt.NDArray[np.float32] | None = None
    router_mix_KE: FloatArray | None = None
    align: bool = False
    post: tuple[Post, ...] = ()

    def __post_init__(self) -> None:
        num_new, num_old = self.mix_KE.shape
        if self.route_E.shape != (num_old,):
            raise PlanError(f"route has {self.route_E.size} entries for {num_old} experts")
        if not np.isfinite(self.mix_KE).all() or not np.allclose(self.mix_KE.sum(1), 1.0, rtol=0, atol=1e-9):
            raise PlanError("every row of mix must be finite and sum to 1")
        if set(range(num_new)) != set(self.route_E[self.route_E >= 0].tolist()):
            raise PlanError(f"route must reach each of the {num_new} new experts, and no other")
        lowest = [int(np.flatnonzero(self.route_E == k)[0]) for k in range(num_new)]
        if lowest != sorted(lowest):
            raise PlanError("new experts must be in the order of their lowest old id")
        if self.router_mix_KE is not None and self.semantics != "slice":
            raise PlanError(f"router rows can be mixed under slice only, not under {self.semantics}")
        if self.align and ((self.mix_KE != 0).sum(0) > 1).any():
            raise PlanError("an expert in several merges cannot be aligned to each of them")
        if self.semantics == "tie" and (self.route_E < 0).any():
            raise PlanError("tie keeps every router row: no expert may be dropped")
        if self.semantics == "constant" and (self.route_E < 0).any() and self.const_ED is None:
            raise PlanError("constant semantics need a vector for each dropped expert")

    @property
    def keep(self) -> int:
        return int(self.mix_KE.shape[0])

    @property
    def kept(self) -> tuple[int, ...]:
        """Old ids by new slot: the kept expert, or a merge's heaviest member."""
        return tuple(int(e) for e in self.mix_KE.argmax(1))

    @property
    def is_identity(self) -> bool:
        return not self.post and np.array_equal(self.mix_KE, np.eye(self.route_E.size))


def keep_best(score_E: npt.ArrayLike, keep: int, semantics: Semantics) -> LayerPlan:
    """The `keep` experts with the greatest score; ties keep the lower id; new slots follow old order.

    Raises PlanError for a NaN score or a count outside 1..E.
    """
    score = np.asarray(score_E, dtype=np.float64)
    if not np.isfinite(score).all():
        raise PlanError(f"score of expert {int(np.flatnonzero(~np.isfinite(score))[0])} is not finite")
    if not 1 <= keep <= score.size:
        raise PlanError(f"keep is {keep}, must be between 1 and {score.size}")
    kept = np.sort(np.argsort(-score, kind="stable")[:keep])
    mix = np.zeros((keep, score.size))
    mix[np.arange(keep), kept] = 1.0
    route = np.full(score.size, -1, dtype=np.int64)
    route[kept] = np.arange(keep)
    return LayerPlan(mix, route, semantics, score_E=score)


def merge_groups(
    group_E: npt.ArrayLike,
    weight_E: npt.ArrayLike,
    semantics: Semantics,
    align: bool = False,
    score_E: FloatArray | None = None,
) -> LayerPlan:
    """One new expert per group label: the weighted mean of its members, whose weights are normalised per group.

    Groups are numbered by their lowest member, whatever the labels are. A group whose weights are all 0 is averaged
    evenly. semantics: `tie` (rows keep their logits and share the merged expert) or `slice` (rows are mixed alike).
    Raises PlanError for a negative or NaN weight.
    """
    group, weight = np.asarray(group_E), np.asarray(weight_E, dtype=np.float64)
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise PlanError("merge weights must be finite and not negative")
    _, first = np.unique(group, return_index=True)
    labels = group[np.sort(first)]
    mix = np.zeros((labels.size, group.size))
    route = np.zeros(group.size, dtype=np.int64)
    for k, label in enumerate(labels):
        members = np.flatnonzero(group == label)
        share = weight[members] if weight[members].sum() > 0 else np.ones(members.size)
        mix[k, members] = share / share.sum()
        route[members] = k
    return LayerPlan(mix, route, semantics, score_E=score_E, align=align)
