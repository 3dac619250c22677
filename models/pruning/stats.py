"""What methods may know about one layer: sums over calibration tokens, the two routers, the weights.

Legend: T tokens, E experts, D model width, F expert inner width, G = 2F (F if not gated), C classes, S sampled tokens.
Statistics come in groups, each one frozen dataclass that adds up over batches, shards and machines; reading a group
that nobody filled says who would fill it. p is the router's score of every expert, g the gate that really multiplies a
chosen expert's output (0 where not chosen), f the output before that gate and nf its L2 norm. Sums per expert run over
the tokens routed to it, unless they say otherwise.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from models.errors import PlanError
from models.pruning.plan import FloatArray, IntArray

Float32Array = npt.NDArray[np.float32]
G = TypeVar("G", bound="Group")


class Group:
    """One frozen dataclass of arrays. Fields add up, except those whose metadata names another way."""

    needed_for: str = ""

    def __add__(self: G, other: G) -> G:
        merged = {
            f.name: f.metadata.get("merge", np.add)(getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)  # type: ignore[arg-type]
        }
        return type(self)(**merged)


# Metadata of a field that keeps the greatest value instead of the sum.
GREATEST = {"merge": np.maximum}


@dataclass(frozen=True)
class Core(Group):
    """What every data-driven score is made of.

    tokens  int64 []: tokens seen.       n_E   int64: times chosen.        g_E   sum of g.
    f_E     sum of nf.                   f2_E  sum of nf^2.                gf_E  sum of g nf.   gf2_E  sum of g^2 nf^2.
    wgf_E   sum of w g nf, w = max(0, 1 - cos(r, r + m)): r the residual stream before the block, m what the routed
            experts add to it (EASY-EP, arXiv 2504.06792).
    fmax_E  float32: greatest |f_d| over tokens and dimensions.
    p_E     sum of p over all tokens, chosen or not.
    """

    needed_for = "counts and gates"

    tokens: IntArray
    n_E: IntArray
    g_E: FloatArray
    f_E: FloatArray
    f2_E: FloatArray
    gf_E: FloatArray
    gf2_E: FloatArray
    wgf_E: FloatArray
    fmax_E: Float32Array = field(metadata=GREATEST)
    p_E: FloatArray


@dataclass(frozen=True)
class Means(Group):
    """fsum_ED: sum of f over routed tokens; divided by Core.n_E it is the mean output."""

    fsum_ED: FloatArray


@dataclass(frozen=True)
class Gram(Group):
    """Raw router logits h against each other: hgram_EE sum of h h^T, hsum_E sum of h, over all tokens.

    coact_EE: int64, tokens that chose both; its diagonal is Core.n_E.
    """

    hgram_EE: FloatArray
    hsum_E: FloatArray
    coact_EE: IntArray


@dataclass(frozen=True)
class Dense(Group):
    """Every expert on every token, whatever the router says: dsum_ED sum of f, dtokens int64 []."""

    dsum_ED: FloatArray
    dtokens: IntArray


@dataclass(frozen=True)
class Inputs(Group):
    """Squared gated inputs of each weight's columns: xg2_ED sum of (g x)^2, ag2_EF sum of (g a)^2 with a the
    activation that enters the down projection."""

    xg2_ED: FloatArray
    ag2_EF: FloatArray


@dataclass(frozen=True)
class Classes(Group):
    """n_CE int64: times chosen by tokens of examples of each label; tokens_C int64: tokens of each label."""

    n_CE: IntArray
    tokens_C: IntArray


@dataclass(frozen=True)
class Sample(Group):
    """S tokens drawn evenly by hash, whatever the batching: key_S uint64 (the smallest win), size the S wanted.

    x_SD float32 the layer's input, h_SE float32 router logits, f_SED float32 the outputs of all experts.
    """

    size: int
    key_S: npt.NDArray[np.uint64]
    x_SD: Float32Array
    h_SE: Float32Array
    f_SED: Float32Array

    def __add__(self, other: "Sample") -> "Sample":
        keys = np.concatenate((self.key_S, other.key_S))
        best = np.argsort(keys, kind="stable")[: self.size]
        names = ("x_SD", "h_SE", "f_SED")
        joined = {name: np.concatenate((getattr(self, name), getattr(other, name)))[best] for name in names}
        return Sample(self.size, keys[best], **joined)


@dataclass(frozen=True)
class RouterPair:
    """The same router before and after fine-tuning: float64 [E, D]. stored_in_16_bit: either file holds it so."""

    pretrained_ED: FloatArray
    finetuned_ED: FloatArray
    stored_in_16_bit: bool


@dataclass(frozen=True)
class Weights:
    """The layer's own tensors, float32: router_ED, w_in_EGD, w_out_EDF (views where they are stored so)."""

    router_ED: Float32Array
    w_in_EGD: Float32Array
    w_out_EDF: Float32Array
    gated: bool = True


# What an error tells the user who asked for a method without its statistics.
SOURCES: dict[type, str] = {
    RouterPair: "this method compares routers before and after fine-tuning: give --pretrained DIR",
    Weights: "this method compares the experts' weights, which come with the checkpoint",
}
# What calibrate fills by a pass over data.
DATA_GROUPS: tuple[type, ...] = (Core, Means, Gram, Dense, Inputs, Classes, Sample)
FROM_DATA = "this method calibrates on task data: give --data FILE"
N = TypeVar("N")


@dataclass(frozen=True)
class LayerStats:
    """Everything a method may read about one layer. normalize: gates are divided by their sum (R2 instead of R1)."""

    layer: int
    num_experts: int
    top_k: int
    seed: int = 0
    normalize: bool = False
    groups: tuple[Any, ...] = ()

    def need(self, group: type[N]) -> N:
        """The group's statistics. Raises PlanError naming the flag that fills it, or a layer that saw no token."""
        found = self.get(group)
        if found is None:
            raise PlanError(SOURCES.get(group, FROM_DATA))
        if isinstance(found, Core) and int(found.tokens) == 0:
            raise PlanError(f"layer {self.layer} saw no calibration token")
        return found

    def get(self, group: type[N]) -> N | None:
        return next((g for g in self.groups if isinstance(g, group)), None)

    def only(self, experts: npt.ArrayLike) -> "LayerStats":
        """The statistics of these experts alone, in this order, as if the layer had no others."""
        ids = np.asarray(experts, dtype=np.int64)
        groups = tuple(replace(g, **_columns(g, ids)) for g in self.groups)
        return replace(self, num_experts=ids.size, top_k=min(self.top_k, ids.size), groups=groups)

    def having(self, *groups: Any) -> "LayerStats":
        """A copy with these groups, in place of any of the same kind."""
        kinds = {type(g) for g in groups}
        return replace(self, groups=(*(g for g in self.groups if type(g) not in kinds), *groups))


def _columns(group: Any, ids: IntArray) -> dict[str, Any]:
    """The arrays of a group with an axis of experts, which their names end in E for, cut down to these ids."""
    chosen = {}
    for f in fields(group):
        value, axes = getattr(group, f.name), f.name.rpartition("_")[2]
        if isinstance(value, np.ndarray) and len(axes) == value.ndim and "E" in axes:
            for axis, letter in enumerate(axes):
                value = np.take(value, ids, axis) if letter == "E" else value
            chosen[f.name] = value
    return chosen


def row_norms(matrix_ED: npt.ArrayLike) -> FloatArray:
    """L2 norm of each row in float64."""
    norms: FloatArray = np.linalg.norm(np.asarray(matrix_ED, dtype=np.float64), axis=1)
    return norms
