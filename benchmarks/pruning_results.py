"""What the pruning benchmark has measured so far: a file per task, and comparisons on the same rows.

Legend: N test rows, G groups of rows that are not independent, S seeds, B bootstrap samples.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from benchmarks.pruning_cells import Cell

SAMPLES = 2000
# A gap of up to this share of the rows is not worth closing.
WORTH_RECOVERING = 0.01
Verdict = Literal["ahead", "tied", "behind"]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Parent:
    """The unpruned model of a task on its test rows. right: which rows it has right, packed. bytes: as stored."""

    task: str
    sha256: str
    accuracy: float
    rows: int
    right: str
    groups: tuple[str, ...]
    bytes: int
    parameters: int
    experts: tuple[int, ...]
    setting: str

    @cached_property
    def weights(self) -> "Weights":
        return Weights(self.groups)


@dataclass(frozen=True)
class Outcome:
    """One cell's child on the same rows, or why there is none.

    kept_slots: of all (token, choice) pairs of the test rows, those that ran an expert. same_as: the cell whose child
    has the same weights and routes, whose answers are then taken over.
    """

    cell: Cell
    parent: str
    seconds: float = 0.0
    refused: str = ""
    accuracy: float = 0.0
    right: str = ""
    bytes: int = 0
    parameters: int = 0
    kept_slots: float = 0.0
    fingerprint: str = ""
    same_as: str = ""


def packed(right: Sequence[bool] | BoolArray) -> str:
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def unpacked(right: str, rows: int) -> BoolArray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(right), dtype=np.uint8), count=rows).astype(bool)


def append(file: Path, outcome: Outcome) -> None:
    """One JSON line, so that a run that is cut off leaves what it had."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(outcome)) + "\n")


def read(file: Path, parent: Parent) -> dict[Cell, Outcome]:
    """The outcomes of this parent's children; later lines win, and half a line at the end is left out."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        outcome = Outcome(**{**values, "cell": Cell(**values["cell"])})
        if outcome.parent == parent.sha256:
            found[outcome.cell] = outcome
    return found


def save_parent(file: Path, parent: Parent) -> None:
    file.write_text(json.dumps({f.name: getattr(parent, f.name) for f in fields(parent)}) + "\n", encoding="utf-8")


def read_parent(file: Path) -> Parent:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return Parent(**{**values, "groups": tuple(values["groups"]), "experts": tuple(values["experts"])})


class Weights:
    """How often each group was drawn in each bootstrap sample; the same for every comparison of a task."""

    def __init__(self, groups: Sequence[str], samples: int = SAMPLES) -> None:
        names = [group or f"\0{number}" for number, group in enumerate(groups)]  # a row without group is its own
        _, self.group_N = np.unique(names, return_inverse=True)
        num_groups = int(self.group_N.max()) + 1
        generator = np.random.default_rng(0)
        self.count_BG = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=samples)
        self.rows_B = self.count_BG @ np.bincount(self.group_N)

    def accuracies(self, right_SN: BoolArray) -> npt.NDArray[np.float64]:
        """float64 [B, S]: each seed's accuracy in each sample."""
        num_groups = self.count_BG.shape[1]
        sum_GS = np.stack([np.bincount(self.group_N, right_N, num_groups) for right_N in right_SN], axis=1)
        return np.asarray((self.count_BG @ sum_GS) / self.rows_B[:, None])


@dataclass(frozen=True)
class Contrast:
    """Accuracy of a minus accuracy of b on the same rows, as fractions, with a 95 % interval."""

    difference: float
    lower: float
    upper: float

    @property
    def verdict(self) -> Verdict:
        return "ahead" if self.lower > 0 else "behind" if self.upper < 0 else "tied"


def contrast(a_SN: BoolArray, b_SN: BoolArray, weights: Weights) -> Contrast:
    """Mean accuracy over the seeds of a, less that of b; the bootstrap draws groups of rows, and seeds where there are
    several, so that the interval also holds what another draw would have done."""
    generator = np.random.default_rng(1)
    means = []
    for right_SN in (a_SN, b_SN):
        accuracy_BS = weights.accuracies(right_SN)
        seed_BS = generator.integers(0, len(right_SN), accuracy_BS.shape)
        means.append(np.take_along_axis(accuracy_BS, seed_BS, axis=1).mean(1))
    lower, upper = np.quantile(means[0] - means[1], (0.025, 0.975))
    # A mean over seeds of equal answers is off by rounding, which is nobody's lead; + 0.0 turns -0.0 into 0.0.
    figures = (round(float(value), 9) + 0.0 for value in (a_SN.mean() - b_SN.mean(), lower, upper))
    return Contrast(*figures)


def seeds_of(
    outcomes: Mapping[Cell, Outcome], task: str, method: str, semantics: str, ratio: float, recovered: bool = False
) -> list[Outcome]:
    """The measured cells that differ in the seed alone."""
    wanted = (task, method, semantics, ratio, recovered)
    return [
        outcome
        for cell, outcome in outcomes.items()
        if (cell.task, cell.method, cell.semantics, cell.ratio, cell.recovered) == wanted and not outcome.refused
    ]


def rights(outcomes: Iterable[Outcome], rows: int) -> BoolArray:
    """bool [S, N]."""
    return np.stack([unpacked(outcome.right, rows) for outcome in outcomes])


def is_settled(cell: Cell, outcomes: Mapping[Cell, Outcome], parent: Parent) -> bool:
    """Whether this would train a child again that has too little to gain, or that does not exist."""
    cut = outcomes.get(replace(cell, recovered=False))
    if not cell.recovered or cut is None:
        return False
    return bool(cut.refused) or round(parent.accuracy - cut.accuracy, 9) <= WORTH_RECOVERING


def against_parent(found: Sequence[Outcome], parent: Parent) -> Contrast:
    return contrast(rights(found, parent.rows), unpacked(parent.right, parent.rows)[None], parent.weights)


def against(a: Sequence[Outcome], b: Sequence[Outcome], parent: Parent) -> Contrast:
    return contrast(rights(a, parent.rows), rights(b, parent.rows), parent.weights)
