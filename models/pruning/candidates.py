"""What can be tried: methods, what cut rows mean, how many experts stay, and what lies between two sizes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from models.config import ModelConfig
from models.pruning import METHODS, Method
from models.pruning.stats import RouterPair

RATIOS = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)
MORE_RATIOS = (0.875, 0.625, 0.4375, 0.3125, 0.21875, 0.15625)
# Methods that run the model for every keep-set they look at, or enumerate keep-sets.
SLOW = {"eep": "searches by running the model", "naee": "searches all keep-sets of a layer", "tsep": "trains"}
NOT_ALONE = {"premoe-union": "unites what several tasks keep, and here is one"}
# Weights inside experts, with all of them kept: pattern by pattern instead of ratio by ratio.
PATTERNS = {"moe-pruner": ("0.5", "2:4", "0.75")}
NEIGHBOURS = 8
# The ratio that is taken where nobody looks further.
HALF = 0.5
# What a ranking has to beat.
BASELINE = "random"


@dataclass(frozen=True)
class Candidate:
    """One way to cut. keep: a ratio of each layer's experts, or a count for each layer. options: as texts."""

    method: str
    semantics: str
    keep: float | tuple[int, ...]
    allocation: str = "uniform"
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        keep = ",".join(map(str, self.keep)) if isinstance(self.keep, tuple) else f"{self.keep:.4g}"
        words = [self.method, self.semantics, "keep", keep]
        words += [self.allocation] if self.allocation != "uniform" else []
        return " ".join(words + [f"{name}={value}" for name, value in self.options])


PARENT = Candidate("none", "none", 1.0)


def methods(thorough: bool, has_pretrained: bool) -> tuple[list[str], dict[str, str]]:
    """Methods to be tried, and of the others, why not."""
    left_out = dict(NOT_ALONE)
    for name, method in METHODS.items():
        if name in SLOW and not thorough:
            left_out[name] = f"{SLOW[name]}: ask for it with --thorough"
        if RouterPair in method.needs and not has_pretrained:
            left_out[name] = "compares routers before and after fine-tuning: give --pretrained"
    return [name for name in METHODS if name not in left_out], {n: left_out[n] for n in METHODS if n in left_out}


def ratios(config: ModelConfig, more: bool) -> list[float]:
    """Shares of experts to keep, descending: each another count, none below what a token chooses."""
    totals = [config.layers[layer].num_rows for layer in config.moe_layers]
    wanted = {*RATIOS, config.top_k / max(totals), *(MORE_RATIOS if more else ())}
    found: dict[tuple[int, ...], float] = {}
    for ratio in sorted(wanted, reverse=True):
        counts = tuple(round(ratio * total) for total in totals)
        if min(counts) >= config.top_k and counts != tuple(totals):
            found.setdefault(counts, ratio)
    return list(found.values())


def recipes(method: Method, shares: Iterable[float], thorough: bool) -> Iterator[Candidate]:
    """Every way to use a method at these ratios: layers alike, and shared out by score where that is the method's own
    way; thorough: wherever it has scores."""
    if method.keeps_all:
        for pattern in PATTERNS.get(method.name, ()):
            yield Candidate(method.name, method.semantics[0], 1.0, options=(("pattern", pattern),))
        return
    semantics = ("zero",) if method.name == BASELINE else method.semantics
    allocations = {"uniform": None, method.allocation: None}
    if thorough and method.score is not None:
        allocations["global"] = None
    for ratio, meaning, allocation in product(shares, semantics, allocations):
        yield Candidate(method.name, meaning, ratio, allocation)


def neighbours(config: ModelConfig, leader: Candidate, counts: Sequence[int]) -> Iterator[Candidate]:
    """The same recipe shared out by score, or with some layers lowered half the way to the next smaller ratio.

    counts: experts that the leader keeps in each layer that has any.
    """
    if METHODS[leader.method].keeps_all:
        return
    if isinstance(leader.keep, float) and METHODS[leader.method].score is not None:
        smaller = [ratio for ratio in ratios(config, False) if ratio < leader.keep]
        yield replace(leader, allocation="global")
        yield from (replace(leader, keep=ratio, allocation="global") for ratio in smaller[:1])
    totals = [config.layers[layer].num_rows for layer in config.moe_layers]
    below = [
        max((c for r in ratios(config, False) if (c := round(r * total)) < count), default=count)
        for count, total in zip(counts, totals, strict=True)
    ]
    halfway = [(count + least) // 2 for count, least in zip(counts, below, strict=True)]
    recipe = replace(leader, allocation="uniform")
    yield replace(recipe, keep=tuple(halfway))
    for layer in range(0, len(counts), max(1, math.ceil(len(counts) / NEIGHBOURS))):
        yield replace(recipe, keep=(*counts[:layer], halfway[layer], *counts[layer + 1 :]))
