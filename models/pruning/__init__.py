"""Cutting experts: methods turn statistics into plans, `apply` turns a plan into a smaller model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.config import Semantics
from models.pruning.frequency import frequency
from models.pruning.plan import LayerPlan
from models.pruning.random import random
from models.pruning.router_norm_change import router_norm_change


@dataclass(frozen=True)
class Method:
    """A pruning method: its plan function and what it has to be given.

    plan is called as plan(stats, keep, semantics, **options) for every MoE layer; options names what it accepts.
    """

    name: str
    plan: Callable[..., LayerPlan]
    summary: str
    default_semantics: Semantics
    needs_data: bool = False
    needs_pretrained: bool = False
    options: tuple[str, ...] = ()


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="router-norm-change",
            plan=router_norm_change,
            summary="keep experts whose router row grew most in fine-tuning (arXiv 2405.16646); no data",
            default_semantics="zero",
            needs_pretrained=True,
            options=("allow_flat",),
        ),
        Method(
            name="frequency",
            plan=frequency,
            summary="keep experts the router chooses most often on task data",
            default_semantics="slice",
            needs_data=True,
        ),
        Method(
            name="random", plan=random, summary="a random keep-set by seed, the baseline", default_semantics="slice"
        ),
    )
}

__all__ = ["METHODS", "LayerPlan", "Method"]
