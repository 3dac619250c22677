"""TSEP: fine-tune on the task, and drop experts on the way that do little of the work. arXiv 2206.00277.

Legend: E experts, T tokens, K chosen experts per token.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from kernels.routing import SKIP, ExpertWeights, Routing
from models.classifier import Classifier, MoELayer
from models.config import Semantics
from models.errors import PlanError
from models.pruning.method import Job, Method, Option
from models.pruning.plan import FloatArray, IntArray, LayerPlan, keep_best
from models.pruning.stats import Core
from models.training.config import RECOVER_DEFAULTS
from models.training.loop import Step, train, training_device

BoolArray = npt.NDArray[np.bool_]


def tsep(job: Job) -> dict[int, LayerPlan]:
    """Fine-tune a copy on the calibration rows for `steps` steps; every `window` steps drop experts, at the end the
    last until job.keep are left. A dropped expert's logit is -inf before the softmax and the choice.

    An expert's proficiency in a window is its share of the gates of all alive experts; hit_rate multiplies its gates by
    how often it was chosen first. schedule=eager: a share below beta / alive drops it. staged: equally many are dropped
    at the end of every window. Never fewer are left than the layer shall keep, and never is a protected one dropped.
    The paper's text was not available: what its two schedules do exactly is our reading.

    The paper trains on for as long again, when few are left. Here the plan is what counts, and the copy's weights are
    thrown away with it: `secateur recover` does that half on all rows instead of the calibration rows. Routers are
    under SGD as in fine-tuning. Raises PlanError without rows and their labels, or for a window or steps below 1.
    """
    options = job.options
    if not job.sequences or len(job.labels) != len(job.sequences):
        raise PlanError("tsep fine-tunes on task data: give --data FILE")
    for name in ("window", "steps"):
        if options[name] < 1:
            raise PlanError(f"{name} is {options[name]}, must be at least 1")
    if options["beta"] < 0:
        raise PlanError(f"beta is {options['beta']}, must be 0 or more")
    kept = {layer: job.keep[layer] for layer, stats in job.stats.items() if job.keep[layer] < stats.num_experts}
    if not kept:
        return {}
    for layer, keep in kept.items():
        if len(job.protect.get(layer, ())) > keep:
            raise PlanError(f"layer {layer} is to keep {keep} experts, and {len(job.protect[layer])} are protected")
    run = DroppingRun(job, kept)
    config = replace(RECOVER_DEFAULTS, seed=job.seed, epochs=1, min_steps=options["steps"], batch_tokens=1024)
    train(run.model, run, config, None, "fine-tuning and dropping experts", job.progress)
    run.end_window(1.0)
    return {layer: dropping.plan(job.semantics) for layer, dropping in run.dropping.items()}


@dataclass
class LayerDropping:
    """Who is alive in one layer, and what they have done since the window began."""

    keep: int
    protect: tuple[int, ...]
    alive_E: BoolArray
    mass_E: FloatArray = field(init=False)
    count_E: IntArray = field(init=False)
    share_E: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.share_E = np.zeros(self.alive_E.size)
        self.begin()

    def begin(self) -> None:
        self.mass_E = np.zeros(self.alive_E.size)
        self.count_E = np.zeros(self.alive_E.size, dtype=np.int64)

    def add(self, slot_N: IntArray, gate_N: FloatArray) -> None:
        chosen = slot_N >= 0
        self.mass_E += np.bincount(slot_N[chosen], gate_N[chosen], minlength=self.alive_E.size)
        self.count_E += np.bincount(slot_N[chosen], minlength=self.alive_E.size)

    def end(self, hit_rate: bool, beta: float | None, most: int) -> None:
        """Close the window: drop who is below beta / alive, if beta is given, then the least until `most` are left."""
        work_E = np.where(self.alive_E, self.mass_E * (self.count_E if hit_rate else 1), 0.0)
        self.share_E = work_E / max(work_E.sum(), np.finfo(np.float64).tiny)
        worst_first = np.lexsort((-np.arange(work_E.size), self.share_E))
        below_E = self.share_E < (0.0 if beta is None else beta / self.alive_E.sum())
        for expert in worst_first:
            left = int(self.alive_E.sum())
            if left > self.keep and self.alive_E[expert] and expert not in self.protect:
                self.alive_E[expert] = left <= most and not below_E[expert]
        self.begin()

    def plan(self, semantics: Semantics) -> LayerPlan:
        return replace(keep_best(self.alive_E, self.keep, semantics), score_E=self.share_E)


class DroppingRun:
    """The objective of the run: cross-entropy of the rows, counting gates on the way and dropping between windows."""

    def __init__(self, job: Job, kept: Mapping[int, int]) -> None:
        self.job, self.options = job, job.options
        self.label_N = torch.tensor(job.labels)
        self.model: Classifier = copy.deepcopy(job.parent).float().requires_grad_(True).to(training_device())
        self.dropping = {
            layer: LayerDropping(keep, job.protect.get(layer, ()), np.ones(job.stats[layer].num_experts, dtype=bool))
            for layer, keep in kept.items()
        }
        self.steps = 0
        for layer in kept:
            self._layer(layer).policy = replace(self._layer(layer).policy, slice=True)

    def epoch(self, generator: np.random.Generator) -> list[tuple[int, Any]]:
        return list(enumerate(self.job.sequences))

    def loss(self, step: Step) -> torch.Tensor:
        logits_BC = self.model(self.model.pack(step.sequences), self.count)
        loss = F.cross_entropy(logits_BC, self.label_N[list(step.rows)].to(self.model.device))
        self.steps += 1
        if self.steps < self.options["steps"] and self.steps % self.options["window"] == 0:
            self.end_window(self.steps / self.options["steps"])
        return loss

    def count(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: ExpertWeights
    ) -> None:
        if layer in self.dropping:
            slot_N, gate_N = routing.slot_TK.flatten(), routing.weight_TK.detach().flatten()
            self.dropping[layer].add(slot_N.cpu().numpy(), gate_N.double().cpu().numpy())

    def end_window(self, share: float) -> None:
        """After this share of the run; after all of it only job.keep are left."""
        for layer, dropping in self.dropping.items():
            total, keep = dropping.alive_E.size, dropping.keep
            staged = self.options["schedule"] == "staged"
            most = total - int((total - keep) * share) if staged or share == 1 else total
            dropping.end(self.options["hit_rate"], None if staged else self.options["beta"], most)
            self.hide(layer, dropping.alive_E)

    def hide(self, layer: int, alive_E: BoolArray) -> None:
        """Take the dropped experts out of the router's sight. Their optimiser state goes on to exist, but nothing ever
        reads their weights again."""
        table_VE = self._layer(layer).table_VE
        table_VE[0, torch.from_numpy(~alive_E).to(table_VE.device)] = SKIP

    def _layer(self, index: int) -> MoELayer:
        layer = self.model.layers[index]
        assert isinstance(layer, MoELayer)
        return layer


TSEP = Method(
    name="tsep",
    summary="fine-tune on the calibration rows and drop experts that do little of the work (arXiv 2206.00277)",
    plan=tsep,
    semantics=("slice",),
    needs=(Core,),
    options=(
        Option("schedule", "eager", "drop below a threshold, or equally many per window", ("eager", "staged")),
        Option("beta", 0.1, "eager drops below this fraction of an even share"),
        Option("window", 100, "steps between two drops"),
        Option("steps", 400, "steps until only the wanted number is left"),
        Option("hit_rate", False, "weigh an expert's gates by how often it was chosen"),
    ),
)
