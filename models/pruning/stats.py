"""What methods may know about one layer: routing statistics of task data, and the two routers.

Legend: E experts, D model width. Groups are filled on demand; reading one that nobody filled says who would fill it.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from models.errors import PlanError
from models.pruning.plan import FloatArray, IntArray


@dataclass(frozen=True)
class RoutingCounts:
    """Sums over calibration tokens. num_tokens: tokens seen. count_E: int64 [E], times each expert was chosen."""

    num_tokens: int
    count_E: IntArray

    def __add__(self, other: "RoutingCounts") -> "RoutingCounts":
        return RoutingCounts(self.num_tokens + other.num_tokens, self.count_E + other.count_E)


@dataclass(frozen=True)
class RouterPair:
    """The same router before and after fine-tuning: float64 [E, D]. stored_in_16_bit: either file holds it so."""

    pretrained_ED: FloatArray
    finetuned_ED: FloatArray
    stored_in_16_bit: bool


@dataclass(frozen=True)
class LayerStats:
    """Everything a method may read about one layer."""

    layer: int
    num_experts: int
    top_k: int
    seed: int = 0
    counts: RoutingCounts | None = None
    routers: RouterPair | None = None

    def need_counts(self) -> RoutingCounts:
        """Raises PlanError unless calibration rows were given and a token was seen."""
        if self.counts is None:
            raise PlanError("this method counts routing decisions on task data: give --data FILE")
        if self.counts.num_tokens == 0:
            raise PlanError(f"layer {self.layer} saw no calibration token")
        return self.counts

    def need_routers(self) -> RouterPair:
        """Raises PlanError unless a pretrained checkpoint was given."""
        if self.routers is None:
            raise PlanError("this method compares routers before and after fine-tuning: give --pretrained DIR")
        return self.routers

    def with_counts(self, counts: RoutingCounts) -> "LayerStats":
        return replace(self, counts=counts)


def row_norms(matrix_ED: npt.ArrayLike) -> FloatArray:
    """L2 norm of each row in float64."""
    norms: FloatArray = np.linalg.norm(np.asarray(matrix_ED, dtype=np.float64), axis=1)
    return norms
