"""Frequency: keep the experts that the router chose most often on task data."""

from models.config import Semantics
from models.pruning.plan import LayerPlan, keep_best
from models.pruning.stats import LayerStats


def frequency(stats: LayerStats, keep: int, semantics: Semantics) -> LayerPlan:
    """score_E = times expert e was chosen over the calibration tokens. Raises PlanError if no token was seen."""
    return keep_best(stats.need_counts().count_E, keep, semantics)
