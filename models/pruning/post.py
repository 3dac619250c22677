"""What a plan may do to the experts' weights after they were selected or mixed; `apply` carries it out.

Legend: K experts after, F expert inner width, D model width.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.config import Structure


@dataclass(frozen=True)
class Project:
    """Replace each merged matrix stack by its projection on the `rank` leading left singular vectors that the group's
    members share (Sub-MoE, arXiv 2506.23266). members_KE: bool [K, E], who belongs to which group."""

    rank: int
    members_KE: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Neurons:
    """Average foreign neurons into the kept experts' (DERN, arXiv 2509.10377): a neuron is a gate row, an up row and a
    down column. expert_J, neuron_J: the old expert and neuron that goes to new expert to_J at place at_J, with weight
    weight_J; each place is then divided by its own weight own_KF plus what it received."""

    expert_J: npt.NDArray[np.int64]
    neuron_J: npt.NDArray[np.int64]
    to_J: npt.NDArray[np.int64]
    at_J: npt.NDArray[np.int64]
    weight_J: npt.NDArray[np.float64]
    own_KF: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Factor:
    """Store each matrix as U V of this rank plus S: `ratio` of its rows, or columns, where the rest weighs most
    (MC-SMoE, arXiv 2310.01334). What weighs: norms of a row, columns weighted by inner_KD for what reads the layer's
    input and by down_KF for the down projection, evenly if None."""

    rank: int
    ratio: float
    structure: Structure = "row"
    inner_KD: npt.NDArray[np.float64] | None = None
    down_KF: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Mask:
    """Zero the lowest |w| * norm of each row, and store only the others (MoE-Pruner, arXiv 2410.12013).

    pattern: `0.5`, the share to zero, or `2:4`, kept of each group of neighbours. targets: which of gate, up and down.
    inner_KD, down_KF: norms of the columns, as in Factor.
    """

    pattern: str
    targets: tuple[str, ...]
    inner_KD: npt.NDArray[np.float64] | None = None
    down_KF: npt.NDArray[np.float64] | None = None


Post = Project | Neurons | Factor | Mask
