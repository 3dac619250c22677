"""The grid of the pruning benchmark: what is measured, and what comes first where time is short.

A cell is one child: a method with one meaning of cut experts, at one keep ratio of one task, for one seed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from models.pruning import METHODS
from models.pruning.method import Method
from models.pruning.stats import Sample

RATIOS = (0.75, 0.5, 0.375, 0.25)
SEEDS = (0, 1, 2)
FLAGSHIP, CHANCE, USAGE = "router-norm-change", "random", "frequency"
# Beside each method's own meaning of cut experts: those that a fair comparison with the flagship needs.
ALSO = ((FLAGSHIP, "slice"), (CHANCE, "zero"), (USAGE, "zero"))
# Methods that draw numbers by themselves; those that read sampled tokens draw those.
DRAWING = frozenset({CHANCE, "uncurl", "eep", "tsep"})
# Less than a user would take, so that the grid ends: eep's own 32 and 50 are 832 passes over the calibration rows.
CHEAPER: Mapping[str, Mapping[str, str]] = {
    "eep": {"population": "16", "generations": "10"},
    "tsep": {"steps": "200", "window": "50"},
}
# Keeps every expert and a share of each one's weights instead.
WITHIN_EXPERTS = frozenset({"moe-pruner"})
# What is trained again after the cut, the most wanted first, where it lost over a point: one or two methods of every
# meaning of cut experts.
RECOVERED = (
    (FLAGSHIP, "zero"),
    (CHANCE, "zero"),
    ("m-smoe", "tie"),
    ("mone", "constant"),
    (USAGE, "slice"),
)
RECOVERED_RATIOS = (0.25, 0.5)
# Small children tell methods apart, large ones hardly.
RATIOS_BY_INTEREST = (0.25, 0.5, 0.375, 0.75)


@dataclass(frozen=True)
class Cell:
    """One child, trained again after the cut or not."""

    task: str
    method: str
    semantics: str
    ratio: float
    seed: int = 0
    recovered: bool = False

    @property
    def name(self) -> str:
        again = ", recovered" if self.recovered else ""
        return f"{self.task} {self.method} {self.semantics} keep {self.ratio:g} seed {self.seed}{again}"

    @property
    def keep(self) -> float:
        return 1.0 if self.method in WITHIN_EXPERTS else self.ratio

    @property
    def options(self) -> dict[str, str]:
        """What this benchmark sets; everything else is the method's default."""
        pattern = {"pattern": f"{1 - self.ratio:g}"} if self.method in WITHIN_EXPERTS else {}
        return {**CHEAPER.get(self.method, {}), **pattern}


def draws(method: Method) -> bool:
    """Whether another seed can give another child."""
    return method.name in DRAWING or Sample in method.needed(method.read_options({}))


def grid(tasks: Iterable[str], ratios: Sequence[float] = RATIOS, methods: Mapping[str, Method] = METHODS) -> list[Cell]:
    """All cells, the most important first."""
    pairs: list[tuple[str, str]] = [(name, method.semantics[0]) for name, method in methods.items()]
    pairs += [(name, semantics) for name, semantics in ALSO if name in methods]
    cells = [
        Cell(task, name, semantics, ratio, seed)
        for task in tasks
        for name, semantics in dict.fromkeys(pairs)
        for ratio in ratios
        for seed in (SEEDS if draws(methods[name]) else SEEDS[:1])
    ]
    cells += [
        Cell(task, name, semantics, ratio, recovered=True)
        for task in tasks
        for name, semantics in RECOVERED
        if name in methods
        for ratio in RECOVERED_RATIOS
        if ratio in ratios
    ]
    return sorted(cells, key=importance)


def importance(cell: Cell) -> tuple[int, ...]:
    """First the flagship, chance and usage at all ratios; then, ratio by ratio, all other methods and recovery; then
    further seeds."""
    ratio = RATIOS_BY_INTEREST.index(cell.ratio) if cell.ratio in RATIOS_BY_INTEREST else len(RATIOS_BY_INTEREST)
    if cell.recovered:
        return 1, ratio, 1, RECOVERED.index((cell.method, cell.semantics))
    if cell.method in (FLAGSHIP, CHANCE, USAGE):
        return 0, ratio, cell.seed
    return (2 if cell.seed else 1), ratio, 0, cell.seed
