"""`secateur plan` on the demo's tasks beside every method by itself at half of the experts, on dev and on test rows.

    python -m benchmarks.plans [--tasks spam,digits] [--tolerance 1]

Plans in runs/plans, where an interrupted one goes on, and writes docs/plans.md. The plan sees no test row: they are
read here, after it has ended.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.checkpoint import Checkpoint, load_checkpoint
from models.dataset import Row, read_rows
from models.evaluate import Agreement, Evaluation, agreement, evaluate
from models.progress import silent
from models.pruning import METHODS
from models.pruning.candidates import BASELINE, HALF, Candidate, methods
from models.pruning.journal import Journal
from models.pruning.planner import CHILD, SMALLEST, STATISTICS, Request, plan
from models.pruning.prune import gather, task_rows
from models.pruning.stats import Core
from models.pruning.workbench import DevRows, Workbench, digest
from service.cli.output import size
from service.demo import CHECKPOINTS, TASKS, DemoTask

RUNS, PAGE = Path("runs/plans"), Path("docs/plans.md")
# Moves weights inside the experts; at its own default, half of them.
WITHIN_EXPERTS = "moe-pruner"


@dataclass(frozen=True)
class Judged:
    """One child, on rows that chose and confirmed, and on rows that nobody saw."""

    name: str
    bytes: int
    dev: Evaluation
    test: Evaluation


@dataclass(frozen=True)
class Compared:
    """dev, test: of the single methods, the best there."""

    task: DemoTask
    plan: Mapping[str, Any]
    parent: Judged
    chosen: Judged
    smallest: Judged
    dev: Judged
    test: Judged


def compared(task: DemoTask, tolerance: float) -> Compared:
    """Plan, then judge what came out and each method at its defaults."""
    request = Request(
        CHECKPOINTS / task.name / "full", task.data, RUNS / task.name, CHECKPOINTS / task.base, tolerance=tolerance
    )
    found = plan(request)
    rows = read_rows(task.data)
    dev, test = ([row for row in rows if row.split == split] for split in ("dev", "test"))
    parent = load_checkpoint(request.finetuned)

    def judged(name: str, checkpoint: Checkpoint, size_: int) -> Judged:
        return Judged(name, size_, evaluate(checkpoint, dev), evaluate(checkpoint, test))

    def written(which: str, place: str) -> Judged:
        return judged(found[which], load_checkpoint(request.out / place), by_name[found[which]]["bytes"])

    by_name = {point["name"]: point for point in found["front"]}
    chosen = written("chosen", CHILD)
    smallest = chosen if found["smallest"] == found["chosen"] else written("smallest", SMALLEST)
    bench = _bench(parent, request, rows)
    singles: dict[str, Judged] = {}
    for candidate in _singles():
        if (same := digest(bench.plan(candidate))) not in singles:
            model = bench.child(candidate)
            singles[same] = judged(str(candidate), replace(parent, model=model), bench.bytes(model))
    return Compared(
        task,
        found,
        judged("parent", parent, found["parent"]["bytes"]),
        chosen,
        smallest,
        dev=max(singles.values(), key=lambda single: (single.dev.accuracy, -single.bytes)),
        test=max(singles.values(), key=lambda single: (single.test.accuracy, -single.bytes)),
    )


def _bench(parent: Checkpoint, request: Request, rows: Sequence[Row]) -> Workbench:
    """On the plan's own statistics."""
    needed: set[type] = {Core}
    for candidate in _singles():
        method = METHODS[candidate.method]
        needed |= method.needed(method.read_options({}))
    used = task_rows(parent, request.data.name, [row for row in rows if row.split != "test"], request.seed)
    known, _ = gather(parent, needed, request.pretrained, used, request.out / STATISTICS, request.seed, silent)
    journal = Journal(request.out / "singles", {})
    return Workbench(parent, known, used, DevRows((), (), ()), journal, request.seed)


def _singles() -> list[Candidate]:
    """Every method that a plan tries, with its own meaning of cut experts and its own way to share out; not chance."""
    found = []
    for name in methods(thorough=False, has_pretrained=True)[0]:
        if name == BASELINE:
            continue
        method = METHODS[name]
        keep = 1.0 if name == WITHIN_EXPERTS else HALF
        found.append(Candidate(name, method.semantics[0], keep, method.allocation))
    return found


def page(results: Sequence[Compared], tolerance: float) -> str:
    return "\n".join(
        [
            f"# What `secateur plan` finds, by `python -m benchmarks.plans --tolerance {tolerance:g}`",
            "",
            INTRODUCTION.format(tolerance=tolerance),
            "",
            "## The chosen child",
            "",
            *_table(
                ("task", "dev rows: choose + confirm", "parent", "chosen", "bytes", "dev", "test", "confirmed loss"),
                [_chosen(result) for result in results],
            ),
            "",
            "## Beside the best single method at half of the experts",
            "",
            BESIDE.format(methods=len(_singles())),
            "",
            *_table(
                (
                    "task",
                    "best by",
                    "single method",
                    "bytes",
                    "dev",
                    "test",
                    "chosen: bytes",
                    "chosen on dev",
                    "on test",
                ),
                [row for result in results for row in _beside(result)],
            ),
            "",
            "## Smaller, and within the tolerance",
            "",
            SMALLER,
            "",
            *_table(
                ("task", "smallest that passes", "bytes", "dev", "test", "against the parent on test"),
                [_smaller(result) for result in results],
            ),
            "",
        ]
    )


INTRODUCTION = (
    "Each plan was asked for at most {tolerance:g} points of accuracy below the parent, at 95 % confidence. Dev rows "
    "choose and confirm; test rows were read when the plan had ended. Accuracies are percentages, in brackets their "
    "95 % Wilson intervals. A confirmed loss is what the plan claims, in points: the one-sided bound on the rows that "
    "confirm. How a plan chooses was settled on resampled dev rows of these tasks, so what it finds on them is no "
    "proof that it finds as much elsewhere."
)
BESIDE = (
    "What one would have without a plan: {methods} methods at their defaults, keeping half of the experts, and of them "
    "the best by accuracy, the smallest if several tie; once on the dev rows, as one would choose it, and once on the "
    "test rows, by which nobody can choose, and which flatter the best of so many. Differences are the chosen child "
    "minus the single method on the same rows, in points, with 95 % intervals of a paired bootstrap over groups."
)
SMALLER = (
    "The last that passes, whatever half of the experts would give. Where it is not the chosen child, it is written to "
    "`smallest/`."
)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _chosen(result: Compared) -> list[str]:
    rows, bound = result.plan["rows"], _point(result)["difference"]["lower"]
    return [
        result.task.name,
        f"{rows['choosing']:,} + {rows['confirming']:,}",
        f"{size(result.parent.bytes)}, test {100 * result.parent.test.accuracy:.1f}",
        result.chosen.name,
        _bytes(result.chosen, result),
        _accuracy(result.chosen.dev),
        _accuracy(result.chosen.test),
        f"at most {max(math.ceil(-10_000 * bound) / 100, 0):.2f}",
    ]


def _point(result: Compared) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(p for p in result.plan["front"] if p["name"] == result.plan["chosen"])
    return found


def _beside(result: Compared) -> list[list[str]]:
    return [
        [
            result.task.name,
            rows,
            single.name,
            f"{single.bytes:,}",
            f"{100 * single.dev.accuracy:.2f}",
            f"{100 * single.test.accuracy:.2f}",
            f"{100 * (result.chosen.bytes / single.bytes - 1):+.0f} %",
            _difference(agreement(single.dev, result.chosen.dev)),
            _difference(agreement(single.test, result.chosen.test)),
        ]
        for rows, single in (("dev", result.dev), ("test", result.test))
    ]


def _smaller(result: Compared) -> list[str]:
    child = result.smallest
    return [
        result.task.name,
        "the chosen one" if child is result.chosen else child.name,
        _bytes(child, result),
        _accuracy(child.dev),
        _accuracy(child.test),
        _difference(agreement(result.parent.test, child.test)),
    ]


def _bytes(child: Judged, result: Compared) -> str:
    return f"{child.bytes:,} ({100 * (1 - child.bytes / result.parent.bytes):.0f} % less)"


def _accuracy(found: Evaluation) -> str:
    low, high = found.accuracy_interval
    return f"{100 * found.accuracy:.2f} [{100 * low:.1f}, {100 * high:.1f}]"


def _difference(found: Agreement) -> str:
    low, high = found.difference_interval
    return f"{100 * found.difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(task.name for task in TASKS))
    parser.add_argument("--tolerance", type=float, default=1.0)
    given = parser.parse_args(arguments)
    names = given.tasks.split(",")
    results = [compared(task, given.tolerance) for task in TASKS if task.name in names]
    PAGE.write_text(page(results, given.tolerance), encoding="utf-8")
    summary = {
        r.task.name: {n: [j.name, j.bytes, j.dev.accuracy, j.test.accuracy] for n, j in _all(r)} for r in results
    }
    print(json.dumps(summary, indent=1))


def _all(result: Compared) -> list[tuple[str, Judged]]:
    return [(name, getattr(result, name)) for name in ("parent", "chosen", "smallest", "dev", "test")]


if __name__ == "__main__":
    main()
