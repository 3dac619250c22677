"""Random: the baseline every method has to beat."""

import numpy as np

from models.config import Semantics
from models.pruning.method import Method, each_layer
from models.pruning.plan import LayerPlan, keep_best
from models.pruning.stats import LayerStats


def random(stats: LayerStats, keep: int, semantics: Semantics) -> LayerPlan:
    """A uniformly random keep-set, fixed by the seed and the layer's index."""
    generator = np.random.default_rng([stats.seed, stats.layer])
    return keep_best(generator.permutation(stats.num_experts), keep, semantics)


RANDOM = Method(
    name="random",
    summary="a random keep-set by seed, the baseline",
    plan=each_layer(random),
    semantics=("slice", "zero"),
)
