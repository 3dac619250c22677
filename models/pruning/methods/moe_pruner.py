"""MoE-Pruner: zeros inside the experts, by weight times what the router sends there. arXiv 2410.12013.

Legend: E experts, T tokens, K chosen experts per token, D model width, F expert inner width. Of one matrix: Y rows,
X columns.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from models.batches import by_length
from models.classifier import Classifier
from models.compressed import MATRICES, matrix_sizes
from models.errors import PlanError
from models.pruning.apply import apply
from models.pruning.calibrate import BATCH_TOKENS, COLLECTORS, Ran, Recorder, Tokens
from models.pruning.compress import read_pattern
from models.pruning.method import Job, Method, Option
from models.pruning.plan import FloatArray, LayerPlan
from models.pruning.post import Mask
from models.pruning.stats import Core, Inputs, LayerStats

log = logging.getLogger("secateur.pruning")


def moe_pruner(job: Job) -> dict[int, LayerPlan]:
    """S_ij = |W_ij| sqrt(sum_t (g_t x_tj)^2) over the tokens routed to the expert; every output row loses its lowest.

    g_t is the gate as served, x_t the matrix's input: of gate and up the layer's input, of down the activation that
    enters it (which the paper does not spell out). pattern `0.5` zeroes that share of each row, `2:4` the lowest two of
    each four neighbouring inputs. gate=false leaves g out, which is Wanda (arXiv 2306.11695). An expert that no token
    reached is scored by |W| alone, with a warning. sequential: a layer's inputs come through the layers before it as
    pruned; else all come from the parent in one pass. Masks are stored as bits and only the kept values beside them;
    GPUs with sparse tensor cores multiply 2:4 as it is (models.sparse). The paper's expert-wise distillation is a part
    of recovery: `expert_distill` of TrainConfig.
    Prints each layer's load CV, std(n) / mean(n): the paper finds that even loads favour pruning weights, uneven ones
    pruning experts. Raises PlanError unless all experts are kept, for an unknown pattern or target, and where rows are
    needed but only statistics were given.
    """
    targets = _check(job)
    layers = [layer for layer in job.stats if layer not in job.exempt]
    if job.options["gate"] and not job.options["sequential"]:
        inputs = {layer: job.stats[layer].need(Inputs) for layer in layers}
        return {layer: _plan(job, job.stats[layer], inputs[layer], targets) for layer in layers}
    if not job.sequences:
        raise PlanError("moe-pruner runs the rows through the layers: give --data FILE, or sequential=false")
    return _sequential(job, targets, layers)


def _check(job: Job) -> tuple[str, ...]:
    """The matrices to prune, of those that experts have."""
    sizes = matrix_sizes(job.parent.config)
    targets = tuple(name.strip() for name in str(job.options["targets"]).split(","))
    unknown = [name for name in targets if name not in MATRICES]
    if unknown:
        raise PlanError(f"moe-pruner: targets name {unknown[0]!r}, must be some of {', '.join(MATRICES)}")
    targets = tuple(name for name in targets if name in sizes)
    if not targets:
        raise PlanError(f"moe-pruner: this model's experts have {', '.join(sizes)} and no other matrix to prune")
    for layer, keep in job.keep.items():
        if keep != job.stats[layer].num_experts:
            raise PlanError(
                f"moe-pruner cuts weights, not experts: keep all {job.stats[layer].num_experts} (--keep 1.0)"
            )
    for name in targets:
        read_pattern(str(job.options["pattern"]), sizes[name][1])
    return targets


def _plan(job: Job, stats: LayerStats, inputs: Inputs, targets: tuple[str, ...]) -> LayerPlan:
    core = stats.get(Core)
    if core is not None and core.n_E.any():
        log.info("layer %d: load CV %.2f", stats.layer, core.n_E.std() / core.n_E.mean())
    unseen = np.flatnonzero(~inputs.xg2_ED.any(1))
    if unseen.size:
        log.warning(
            "layer %d: no token reached expert %s, pruned by |W| alone", stats.layer, ", ".join(map(str, unseen))
        )
    num_experts = stats.num_experts
    step = Mask(str(job.options["pattern"]), targets, _norms(inputs.xg2_ED), _norms(inputs.ag2_EF))
    return LayerPlan(np.eye(num_experts), np.arange(num_experts), job.semantics, post=(step,))


def _norms(sum_EX: FloatArray) -> FloatArray:
    """Square roots; ones for an expert without any input."""
    return np.where(sum_EX.any(1, keepdims=True), np.sqrt(sum_EX), 1.0)


def _sequential(job: Job, targets: tuple[str, ...], layers: Sequence[int]) -> dict[int, LayerPlan]:
    """Layer by layer, one pass over the rows for each: what enters it through the layers pruned so far."""
    plans: dict[int, LayerPlan] = {}
    model, found = job.parent, None
    for number, layer in enumerate(layers, start=1):
        if found is None or job.options["sequential"]:
            found = _inputs(model, job.sequences, COLLECTORS[Inputs] if job.options["gate"] else _ungated)
        plans[layer] = _plan(job, job.stats[layer], found[layer], targets)
        if job.options["sequential"]:
            model = apply(job.parent, plans)
        job.progress(number, len(layers), "pruning layer by layer")
    return plans


@torch.inference_mode()
def _inputs(model: Classifier, sequences: Sequence[Any], collect: Callable[[Ran, Tokens], Inputs]) -> dict[int, Inputs]:
    """Sums over all tokens for each layer whose experts are dense; compressed ones run, and are not recorded."""
    recorder = Recorder(model.backend, (Inputs,))
    recorder.groups = {Inputs: collect}
    recorder.begin(_ANY)
    watched = copy.copy(model)  # the parameters are shared, the backend is its own
    watched.backend = recorder.backend
    for rows in by_length(sequences, BATCH_TOKENS):
        watched.hidden(model.pack([sequences[row] for row in rows]), recorder)
    return {layer: groups[Inputs] for layer, groups in recorder.sums.items()}


def _ungated(ran: Ran, tokens: Tokens) -> Inputs:
    found: Inputs = COLLECTORS[Inputs](replace(ran, gate_N=torch.ones_like(ran.gate_N)), tokens)
    return found


# What the recorder wants to know of tokens; sums of inputs do not depend on it.
_ANY = Tokens(np.zeros(0, np.uint64), torch.zeros(0, dtype=torch.int64), 0, torch.zeros(0, dtype=torch.int64), 1)

MOE_PRUNER = Method(
    name="moe-pruner",
    summary="zero the weights inside experts that matter least to routed tokens; keeps all experts (arXiv 2410.12013)",
    plan=moe_pruner,
    semantics=("zero",),
    keeps_all=True,
    needs=(Core,),
    options=(
        Option("pattern", "0.5", "share of each row to zero; or N:M, which keeps N of each M neighbouring inputs"),
        Option("gate", True, "weigh inputs by the router's gate; false is Wanda"),
        Option("targets", "up,gate,down", "which matrices of the experts"),
        Option("sequential", True, "take inputs through the layers before as pruned", needs={"False": (Inputs,)}),
    ),
)
