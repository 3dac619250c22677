"""What a plan says about itself: the document that is written, printed and shown on the page."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from models.checkpoint import Checkpoint
from models.evaluate import wilson
from models.pruning import METHODS
from models.pruning.candidates import BASELINE, PARENT, Candidate
from models.pruning.confirm import BoolArray, difference, rows_to_confirm
from models.pruning.prune import TaskRows
from models.pruning.race import Result
from models.pruning.workbench import DevRows, Workbench

# Measured to the end of the race at these ratios, so that a ranking that means nothing is seen.
WATCHED, WATCHED_RATIOS = "router-norm-change", (0.5, 0.25)


@dataclass(frozen=True)
class Pool:
    """What can be tried. same: candidates that make the child of another one. left_out: methods, impossible:
    candidates, and why."""

    candidates: tuple[Candidate, ...]
    same: Mapping[Candidate, Candidate]
    impossible: Mapping[Candidate, str]
    left_out: Mapping[str, str]


def confirming(bench: Workbench, candidate: Candidate, choosing: int) -> tuple[BoolArray, BoolArray, tuple[int, ...]]:
    """Right or wrong of parent and child on the rows that confirm, and their groups."""
    rows = len(bench.dev.truth)
    parent_N, child_N = bench.run(PARENT, rows).right_N, bench.run(candidate, rows).right_N
    return parent_N[choosing:], child_N[choosing:], bench.dev.group_N[choosing:]


def machine(parent: Checkpoint) -> dict[str, Any]:
    """Where latencies were measured."""
    model = parent.model
    cuda = model.device.type == "cuda"
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(model.device) if cuda else "cpu",
        "backend": model.backend.name,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def row_counts(rows: TaskRows, dev: DevRows, choosing: int, tolerance: float) -> dict[str, Any]:
    others = len(dev.truth) - choosing
    return {
        "calibration": rows.calibration.rows,
        "dev": len(dev.truth),
        "choosing": choosing,
        "confirming": others,
        "confirming_groups": len(set(dev.group_N[choosing:])),
        "needed_at_least": rows_to_confirm(tolerance) if tolerance > 0 else None,
        "test": 0,
    }


def described(bench: Workbench, candidate: Candidate, choosing: int) -> dict[str, Any]:
    """A finalist, or the parent, on all dev rows; the difference on those that confirm."""
    run = bench.run(candidate, len(bench.dev.truth))
    right, rows = int(run.right_N.sum()), len(run.right_N)
    return {
        **_named(candidate),
        "bytes": run.bytes,
        "accuracy": right / rows,
        "accuracy_interval": list(wilson(right, rows)),
        "difference": asdict(difference(*confirming(bench, candidate, choosing))) if candidate != PARENT else None,
        "flops_per_token": run.flops_per_token,
        "experts": experts(bench, candidate),
        "latency": bench.latency(candidate),
    }


def _named(candidate: Candidate) -> dict[str, Any]:
    keep = list(candidate.keep) if isinstance(candidate.keep, tuple) else candidate.keep
    return {
        "name": str(candidate),
        "method": candidate.method,
        "semantics": candidate.semantics,
        "keep": keep,
        "allocation": candidate.allocation,
        "options": dict(candidate.options),
    }


def experts(bench: Workbench, candidate: Candidate) -> list[int]:
    """Experts held by each layer that has any."""
    config, plans = bench.parent.model.config, bench.plan(candidate) if candidate != PARENT else {}
    return [plans[i].keep if i in plans else config.layers[i].num_experts for i in config.moe_layers]


def steps(ladder: Sequence[Candidate], passed: Sequence[Candidate], failed: Candidate | None) -> list[dict[str, str]]:
    results = {**dict.fromkeys(passed, "passed"), **({failed: "failed"} if failed else {})}
    return [{"name": str(candidate), "result": results.get(candidate, "not tested")} for candidate in ladder]


def watched(bench: Workbench, pool: Pool, choosing: int) -> list[dict[str, Any]]:
    """Router-norm change beside a random keep-set of the same size and meaning, on the rows that choose."""
    found = []
    for ratio in WATCHED_RATIOS:
        candidate, baseline = Candidate(WATCHED, "zero", ratio), Candidate(BASELINE, "zero", ratio)
        candidate, baseline = (pool.same.get(c, c) for c in (candidate, baseline))
        if candidate in pool.candidates and baseline in pool.candidates:
            own_N, random_N = bench.run(candidate, choosing).right_N, bench.run(baseline, choosing).right_N
            groups = bench.dev.group_N[:choosing]
            found.append(
                {
                    "keep": ratio,
                    "rows": choosing,
                    "accuracy": float(own_N.mean()),
                    "random": float(random_N.mean()),
                    "parent": float(bench.run(PARENT, choosing).right_N.mean()),
                    "ahead": difference(random_N, own_N, groups).lower > 0,
                    "behind": difference(own_N, random_N, groups).lower > 0,
                }
            )
    return found


def tried(
    bench: Workbench, pool: Pool, outcome: Result[Candidate], finalists: Sequence[Candidate]
) -> list[dict[str, Any]]:
    """Everything, in the order of methods: how far it came and why not further."""
    order = list(METHODS)
    reasons: dict[Candidate, tuple[str, str]] = {c: ("impossible", why) for c, why in pool.impossible.items()}
    reasons |= {c: ("same", f"the same child as {other}") for c, other in pool.same.items()}
    reasons |= {c: ("dropped", f"{why} after {rows} rows") for c, (rows, why) in outcome.dropped.items()}
    reasons |= dict.fromkeys(outcome.survivors, ("beaten", "another is no larger and nearer to the parent"))
    reasons |= dict.fromkeys(finalists, ("front", ""))
    rank = {name: number for number, name in enumerate(order)}
    return [
        {**_named(c), **_measured(bench, c), "state": reasons[c][0], "reason": reasons[c][1]}
        for c in sorted(reasons, key=lambda c: (rank[c.method], str(c)))
    ]


def _measured(bench: Workbench, candidate: Candidate) -> dict[str, Any]:
    known = bench.journal.document["measured"].get(str(candidate))
    if known is None:
        return {"bytes": None, "rows": 0, "accuracy": None}
    right = known["right"]
    return {"bytes": known["bytes"], "rows": len(right), "accuracy": right.count("1") / len(right)}
