"""MC-SMoE: merge experts, then store each merged matrix as U V + S. arXiv 2310.01334 (ICLR 2024).

Legend: E experts, K groups, D model width, F expert inner width.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from models.compressed import compressed_parameters, matrix_sizes
from models.config import LayerShape
from models.errors import PlanError
from models.pruning.compress import compression
from models.pruning.method import Job, Method, Option, each_layer
from models.pruning.methods.m_smoe import M_SMOE, m_smoe, usage
from models.pruning.plan import LayerPlan
from models.pruning.post import Factor
from models.pruning.stats import Inputs, LayerStats

log = logging.getLogger("secateur.pruning")
OWN_OPTIONS = (
    Option("rank", 32, "of U V"),
    Option("row_ratio", 0.1, "share of the residual's rows that is kept"),
    Option("structure", "row", "whether rows or columns of the residual are kept", ("row", "col")),
    Option(
        "importance",
        "norm",
        "of a residual's row: its norm, or that of what it adds for the calibration data",
        ("norm", "input"),
        needs={"input": (Inputs,)},
    ),
)


def mc_smoe(job: Job) -> dict[int, LayerPlan]:
    """Groups and merges of M-SMoE; each merged matrix W becomes U V + S, stored and run so.

    U V is the singular value decomposition of W cut at `rank`. S is the residual W - U V, of which the `row_ratio` rows
    (or columns) of greatest importance are kept whole; the rest of S is zero. The paper trains S with the task,
    scores each entry by an exponential mean (.85) of |s dL/ds|, adds that up per structure, keeps those above one
    threshold for all matrices, and lowers the share kept from 1 to .10 by a cubic schedule. Here nothing is trained:
    importance is the norm of the residual's row, with `input` weighted per column by the gated inputs of the
    group's experts, and every matrix keeps the same share, so that bytes are known beforehand. Recovery trains U, V and
    the kept rows. Layers that keep all experts stay as they are. Raises PlanError without task data.
    """
    _check(job)
    merging = {name: value for name, value in job.options.items() if name in _names(M_SMOE.options)}
    plans = each_layer(m_smoe)(replace(job, options=merging))
    for layer, plan in plans.items():
        _warn_if_larger(job, layer, plan.keep)
        plans[layer] = replace(plan, post=(*plan.post, _factor(job.options, job.stats[layer], plan)))
    return plans


def _check(job: Job) -> None:
    if job.options["rank"] < 1:
        raise PlanError(f"mc-smoe: rank is {job.options['rank']}, must be at least 1")
    if not 0.0 <= job.options["row_ratio"] <= 1.0:
        raise PlanError(f"mc-smoe: row-ratio is {job.options['row_ratio']}, must be from 0 to 1")


def _factor(options: Mapping[str, object], stats: LayerStats, plan: LayerPlan) -> Factor:
    chosen = {"rank": options["rank"], "ratio": options["row_ratio"], "structure": options["structure"]}
    if options["importance"] == "norm":
        return Factor(**chosen)  # type: ignore[arg-type]  # checked when the options were read
    inputs, members_KE = stats.need(Inputs), plan.mix_KE != 0
    # The group's neurons stand in the order of its heaviest member, whose own activations therefore speak for it.
    return Factor(
        **chosen,  # type: ignore[arg-type]
        inner_KD=np.sqrt(members_KE @ inputs.xg2_ED),
        down_KF=np.sqrt(inputs.ag2_EF[plan.mix_KE.argmax(1)]),
    )


def _warn_if_larger(job: Job, layer: int, keep: int) -> None:
    config, options = job.parent.config, job.options
    forms = compression(config, Factor(options["rank"], options["row_ratio"], options["structure"]))
    shape = LayerShape(keep, (), forms)
    stored = sum(int(np.prod(size)) for size in compressed_parameters(config, shape).values())
    dense = keep * sum(height * width for height, width in matrix_sizes(config).values())
    if stored >= dense:
        log.warning(
            "layer %d: rank %d and %.0f %% of the rows take %d numbers, the merged experts themselves %d",
            layer,
            options["rank"],
            100 * options["row_ratio"],
            stored,
            dense,
        )


def _names(options: tuple[Option, ...]) -> set[str]:
    return {option.name for option in options}


MC_SMOE = Method(
    name="mc-smoe",
    summary="m-smoe, then low rank plus whole rows for each merged matrix (arXiv 2310.01334)",
    plan=mc_smoe,
    semantics=M_SMOE.semantics,
    needs=M_SMOE.needs,
    options=(*M_SMOE.options, *OWN_OPTIONS),
    score=usage,
)
