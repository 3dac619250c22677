"""Keep-sets of several tasks, united: one pruned model for all of them. arXiv 2505.17639 (PreMoe).

Legend: N tasks, E experts.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.config import Semantics
from models.errors import PlanError
from models.pruning.method import Job, Method, Option
from models.pruning.methods.scores import activation_score, task_mass
from models.pruning.plan import FloatArray, LayerPlan, keep_best
from models.pruning.stats import Core, LayerStats
from models.pruning.store import load


def tcess(stats: LayerStats) -> FloatArray:
    """float64 [E]: sum of g / tokens. The paper's task-conditioned expected selection score was not available as a
    formula; this is our reading of its name."""
    return np.asarray(activation_score(stats, 0, 1, 0) / stats.need(Core).tokens)


SCORES = {"task-mass": task_mass, "tcess": tcess}


def premoe_union(job: Job) -> dict[int, LayerPlan]:
    """Per layer, the union of what each task would keep, without calibrating anew.

    The first task is the one calibrated now; `also` names the saved statistics of others on the same parent.
    per_task_keep: experts that each task brings, 0 for as many as the layer may keep. The layer keeps at most
    job.keep: of a larger union, the experts with the lowest sum of scores go, each task's scores divided by their
    layer's sum. A union may be smaller, so layers may differ in size. Protected experts belong to every union.
    The paper also retrieves the saved pattern nearest to a query. That is left out: it is for a model that must guess
    the task of a prompt, and here a request names its task, which has a deployment of its own.
    Raises PlanError for statistics of another parent.
    """
    if job.options["per_task_keep"] < 0:
        raise PlanError(f"per_task_keep is {job.options['per_task_keep']}, must be 0 or more")
    score = SCORES[job.options["score"]]
    tasks = [
        job.stats,
        *(_matching(Path(path.strip()), job) for path in job.options["also"].split(",") if path.strip()),
    ]
    plans = {}
    for layer, stats in job.stats.items():
        most = job.keep[layer]
        each = min(job.options["per_task_keep"] or most, stats.num_experts)
        plan = union([score(task[layer]) for task in tasks], each, most, job.semantics, job.protect.get(layer, ()))
        if plan.keep < stats.num_experts:
            plans[layer] = plan
    return plans


def union(
    score_NE: Sequence[FloatArray], each: int, most: int, semantics: Semantics, protect: tuple[int, ...] = ()
) -> LayerPlan:
    """The `each` best experts of every task, together at most `most`; score_E is the sum of normalised scores.

    Raises PlanError if more experts are protected than may stay.
    """
    if len(protect) > most:
        raise PlanError(f"at most {most} experts may stay, but {len(protect)} are protected")
    total_E = summed_shares(score_NE)
    union_E = np.zeros(total_E.size, dtype=bool)
    for score_E in score_NE:
        union_E[list(keep_best(score_E, each, semantics).kept)] = True
    union_E[list(protect)] = True
    # Shares are never negative, and sum to at most one per task: whatever no task keeps comes last, protected first.
    rank_E = np.where(union_E, total_E, -1.0)
    rank_E[list(protect)] = len(score_NE) + 1.0
    return replace(keep_best(rank_E, min(most, int(union_E.sum())), semantics), score_E=total_E)


def summed_shares(score_NE: Sequence[FloatArray]) -> FloatArray:
    """float64 [E]: over tasks, the sum of each expert's share of its task's scores; exact, so order does not matter."""
    share_NE = [score_E / max(float(score_E.sum()), np.finfo(np.float64).tiny) for score_E in score_NE]
    return np.array([math.fsum(share_N) for share_N in zip(*share_NE, strict=True)])


def save_ranking(file: Path, stats: Mapping[int, LayerStats], data_sha256: str, score: str = "task-mass") -> None:
    """One JSON line per layer: all experts, best first, their scores in that order, and the hash of the task's rows.

    One ranking serves every ratio: a keep-set is its beginning.
    """
    lines = []
    for layer in sorted(stats):
        score_E = SCORES[score](stats[layer])
        order = np.argsort(-score_E, kind="stable").tolist()
        record = {"layer": layer, "experts": order, "scores": score_E[order].tolist(), "score": score}
        lines.append(json.dumps(record | {"data_sha256": data_sha256}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def _matching(path: Path, job: Job) -> Mapping[int, LayerStats]:
    """Saved statistics. Raises PlanError unless they are of the same parent."""
    stored = load(path)
    if stored.meta.parent_sha256 != job.parent_sha256:
        raise PlanError(f"{path.name} holds statistics of another checkpoint: calibrate this parent with --stats")
    return stored.layers


PREMOE_UNION = Method(
    name="premoe-union",
    summary="unite the experts that several tasks would keep (arXiv 2505.17639)",
    plan=premoe_union,
    semantics=("slice", "zero"),
    needs=(Core,),
    options=(
        Option("also", "", "saved statistics of further tasks, files separated by commas", names_files=True),
        Option("score", "task-mass", "what ranks a task's experts", tuple(SCORES)),
        Option("per_task_keep", 0, "experts each task brings to a layer; 0: as many as the layer may keep"),
    ),
)
