"""The smallest child that is not worse than its parent by more than a tolerance, over all methods.

Dev rows fall into two parts by groups. On a fifth of them candidates race (models/pruning/race.py) and are put into an
order, from the safest to the smallest (models/pruning/ladder.py); on the others, which nothing was chosen by, they are
tested in that order until the first failure (models/pruning/confirm.py). Of those that passed, the smallest is chosen
that is not behind the most faithful child of half the experts. Test rows are thrown away before anything is done.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoint import Checkpoint, load_checkpoint, source_of
from models.dataset import Row, describe, label_ids, read_rows
from models.errors import CheckpointError, DataError, PlanError
from models.manifest import combined_sha256
from models.progress import Progress, silent
from models.pruning import METHODS
from models.pruning.allocate import Rules
from models.pruning.candidates import BASELINE, HALF, PARENT, Candidate, methods, neighbours, ratios, recipes
from models.pruning.confirm import change, descend, is_not_worse, numbered
from models.pruning.findings import (
    WATCHED,
    WATCHED_RATIOS,
    Pool,
    confirming,
    described,
    experts,
    machine,
    row_counts,
    steps,
    tried,
    watched,
)
from models.pruning.front import front
from models.pruning.guards import refuse_compressed
from models.pruning.journal import Journal
from models.pruning.ladder import is_behind, ladder, taken
from models.pruning.prune import TaskRows, gather, prune, task_rows
from models.pruning.race import Result, Run, distance, doubling, race
from models.pruning.stats import Core, LayerStats, RouterPair
from models.pruning.workbench import DevRows, Workbench, digest, score

CHILD, SMALLEST, STATISTICS = "child", "smallest", "statistics.safetensors"
# The share of dev rows that choose. To confirm that nothing changed, to a point, takes 301 rows: 400 dev rows can.
CHOOSING = 1 / 5
FIRST_ROUND = 24
REFINEMENTS = 3
# Of children that tie in bytes and accuracy, so many have their latency measured.
FASTEST_OF = 4
log = logging.getLogger("secateur.pruning")


@dataclass(frozen=True)
class Request:
    """tolerance: in points of accuracy. budget: stored bytes that a child may have, or None. thorough: slow methods and
    more ratios too."""

    finetuned: Path
    data: Path
    out: Path
    pretrained: Path | None = None
    tolerance: float = 1.0
    budget: int | None = None
    thorough: bool = False
    seed: int = 0

    @property
    def fraction(self) -> float:
        return self.tolerance / 100


def plan(request: Request, progress: Progress = silent) -> dict[str, Any]:
    """Search, write the chosen child to out/child, and return what out/plan.json says.

    Chosen is the smallest that passes and, on all dev rows, is not behind the most faithful child of half the experts;
    if none is as good, the smallest that passes. One that is behind, but passes and is smaller, goes to out/smallest.

    An interrupted search goes on where it was: every measurement is in plan.json, and everything else follows from
    them. `chosen` is None if nothing passes, and then no child is written. Raises PlanError, DataError or
    CheckpointError.
    """
    _check(request)
    with _each_warning_once():
        return _planned(request, progress)


def _planned(request: Request, progress: Progress) -> dict[str, Any]:
    started = time.monotonic()
    parent = load_checkpoint(request.finetuned)
    refuse_compressed(parent.model.config)
    rows = _rows(parent, request)
    dev, choosing = _in_order(parent, rows.dev, request.seed)
    journal = Journal(request.out, _identity(request, parent, rows))
    known = _statistics(parent, rows, request, progress)
    bench = Workbench(parent, known, rows, dev, journal, request.seed)

    pool = _pool(bench, request, progress)
    outcome = _raced(bench, pool.candidates, choosing, request, progress)
    outcome = _refined(bench, outcome, choosing, request, progress)
    reference = _reference(bench, outcome.survivors, choosing)
    order = _order(bench, outcome.survivors, choosing, request.fraction)
    finalists = _finalists(bench, outcome.survivors, {*order, reference}, choosing, progress)

    def whole(candidate: Candidate) -> Run:
        return bench.run(candidate, len(bench.dev.truth))

    passed, failed = descend(order, lambda candidate: _passes(bench, candidate, choosing, request.fraction))
    chosen = taken(passed, reference, whole)
    smallest = passed[-1] if passed else None
    child = _written(bench, chosen, CHILD, choosing, request, progress) if chosen else None
    if smallest and smallest != chosen:
        _written(bench, smallest, SMALLEST, choosing, request, progress)

    journal.finish(
        {
            "machine": machine(parent),
            "rows": row_counts(rows, dev, choosing, request.fraction),
            "parent": described(bench, PARENT, choosing),
            "front": [described(bench, candidate, choosing) for candidate in finalists],
            "ladder": steps(order, passed, failed),
            "reference": str(reference) if reference else None,
            "chosen": str(chosen) if chosen else None,
            "behind_reference": is_behind(whole(chosen), whole(reference)) if chosen and reference else None,
            "child": child,
            "smallest": str(smallest) if smallest else None,
            "router_norm_change": watched(bench, pool, choosing),
            "tried": tried(bench, pool, outcome, finalists),
            "left_out": dict(pool.left_out),
            "seconds": round(time.monotonic() - started, 1),
        }
    )
    return journal.document


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """Of the many candidates, every one would warn of the same thin data."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        known = len(seen)
        seen.add(record.getMessage())
        return len(seen) > known

    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


# What is asked, and of which rows


def _check(request: Request) -> None:
    """What can be refused before anything is loaded."""
    if not 0 <= request.tolerance < 100:  # also true for NaN
        raise PlanError(f"--tolerance is {request.tolerance}, must be points of accuracy from 0 up to 100, such as 1.0")
    if request.budget is not None and request.budget < 1:
        raise PlanError(f"--budget is {request.budget}, must be a number of bytes above 0")


def _rows(parent: Checkpoint, request: Request) -> TaskRows:
    """Train rows that calibrate and dev rows that judge. Test rows end here, unread but for their split."""
    found = tuple(row for row in read_rows(request.data) if row.split != "test")
    if not found:
        raise DataError(f"{request.data.name} holds test rows only, which a plan never looks at")
    rows = task_rows(parent, request.data.name, found, request.seed)
    assert all(row.split != "test" for row in rows.dev)
    if not rows.dev:
        raise DataError(
            f"{request.data.name} has no dev rows: mark some with split 'dev', or give a file without splits, "
            "of which a tenth of each class is taken"
        )
    return rows


def _in_order(parent: Checkpoint, rows: Sequence[Row], seed: int) -> tuple[DevRows, int]:
    """Dev rows, groups in the order of a hash, and how many of the first choose: the rest confirms.

    No group is on both sides. Raises DataError if there are not two groups for each side.
    """
    group_N = numbered([row.group for row in rows])
    names = [row.group or f"{number}\0{row.text}" for number, row in enumerate(rows)]
    keys = [hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "replace")).digest() for name in names]
    order = sorted(range(len(rows)), key=lambda i: (keys[i], i))
    sizes = np.unique(group_N, return_counts=True)[1]
    if len(sizes) < 4:
        raise DataError(f"the dev rows are of {len(sizes)} groups, a plan needs at least 4: two choose, two confirm")
    edges = np.flatnonzero(np.diff(group_N[order])) + 1
    choosing = int(edges[np.abs(edges[1:-1] - CHOOSING * len(rows)).argmin() + 1])
    sequences = tuple(parent.encoder.encode(rows[i].source).ids for i in order)
    empty = next((i for i, ids in zip(order, sequences, strict=True) if not len(ids)), None)
    if empty is not None:
        raise DataError(f"dev row {empty + 1} has no tokens")
    truth = label_ids(rows, parent.labels)
    return DevRows(sequences, tuple(truth[i] for i in order), tuple(int(group_N[i]) for i in order)), choosing


def _identity(request: Request, parent: Checkpoint, rows: TaskRows) -> dict[str, Any]:
    """What a plan to be continued must share with this one."""
    return {
        "parent": parent.path.name,
        "parent_sha256": parent.artifact_sha256,
        "pretrained_sha256": combined_sha256(source_of(request.pretrained).files) if request.pretrained else None,
        "calibration": rows.calibration.model_dump(),
        "dev": describe(rows.name, rows.dev).model_dump(),
        "tolerance": request.tolerance,
        "budget": request.budget,
        "thorough": request.thorough,
        "seed": request.seed,
    }


def _statistics(parent: Checkpoint, rows: TaskRows, request: Request, progress: Progress) -> dict[int, LayerStats]:
    """All that the methods of this search read, from one pass."""
    needed: set[type] = {Core}
    for name in methods(request.thorough, request.pretrained is not None)[0]:
        needed |= METHODS[name].needed(METHODS[name].read_options({}))
    known, _ = gather(parent, needed, request.pretrained, rows, request.out / STATISTICS, request.seed, progress)
    return known


# What is tried


def _pool(bench: Workbench, request: Request, progress: Progress) -> Pool:
    """Every candidate that can be planned and fits the budget, each child once."""
    names, left_out = methods(request.thorough, request.pretrained is not None)
    shares = ratios(bench.parent.model.config, request.thorough)
    wanted = [recipe for name in names for recipe in recipes(METHODS[name], shares, request.thorough)]
    candidates: dict[str, Candidate] = {}
    same, impossible = {}, {}
    for number, candidate in enumerate(wanted):
        progress(number, len(wanted), "planning")
        problem = _problem(bench, candidate, request.budget)
        if problem is not None:
            impossible[candidate] = problem
            continue
        first = candidates.setdefault(digest(bench.plan(candidate)), candidate)
        if first != candidate:
            same[candidate] = first
    if not candidates:
        raise PlanError(f"nothing can be tried: {next(iter(impossible.values()), 'no method fits')}")
    return Pool(tuple(candidates.values()), same, impossible, left_out)


def _problem(bench: Workbench, candidate: Candidate, budget: int | None) -> str | None:
    try:
        bench.plan(candidate)
        if budget is not None and (size := bench.bytes(bench.child(candidate))) > budget:
            return f"takes {size} bytes, the budget is {budget}"
    except PlanError as error:
        return str(error)
    return None


# What is tried first, and what next


def _raced(
    bench: Workbench, candidates: Sequence[Candidate], choosing: int, request: Request, progress: Progress
) -> Result[Candidate]:
    stay = {c for c in candidates if c.method in (WATCHED, BASELINE) and c.keep in WATCHED_RATIOS}
    rounds = doubling(min(FIRST_ROUND, choosing), choosing)[-4:]
    return race(candidates, bench.run, _parent(bench), rounds, request.fraction, stay, progress)


def _parent(bench: Workbench) -> Callable[[int], Run]:
    return lambda rows: bench.run(PARENT, rows)


def _refined(
    bench: Workbench, outcome: Result[Candidate], choosing: int, request: Request, progress: Progress
) -> Result[Candidate]:
    """Between the smallest child that looks good and the next ratio: other allocations, layer by layer."""
    seen = {digest(bench.plan(candidate)) for candidate in outcome.survivors}
    survivors, dropped = outcome.survivors, dict(outcome.dropped)
    for _ in range(REFINEMENTS):
        leader = _leader(bench, survivors, choosing, request.fraction)
        fresh = []
        for candidate in _near(bench, leader) if leader else ():
            if (
                _problem(bench, candidate, request.budget) is None
                and (key := digest(bench.plan(candidate))) not in seen
            ):
                seen.add(key)
                fresh.append(candidate)
        if not fresh:
            break
        rounds = doubling(choosing // 2, choosing)
        found = race(fresh, bench.run, _parent(bench), rounds, request.fraction, progress=progress)
        survivors, dropped = (*survivors, *found.survivors), dropped | dict(found.dropped)
    return Result(survivors, dropped)


def _near(bench: Workbench, leader: Candidate) -> Iterator[Candidate]:
    return neighbours(bench.parent.model.config, leader, experts(bench, leader))


def _leader(bench: Workbench, survivors: Iterable[Candidate], choosing: int, tolerance: float) -> Candidate | None:
    """The smallest that is within the tolerance on the rows that choose, and of its size the nearest to the parent."""
    parent = bench.run(PARENT, choosing)
    good = [c for c in survivors if change(parent.right_N, bench.run(c, choosing).right_N)[0] > -tolerance]
    return min(good, key=lambda c: (bench.run(c, choosing).bytes, _distance(bench, c, choosing)), default=None)


def _distance(bench: Workbench, candidate: Candidate, rows: int) -> float:
    return distance(bench.run(PARENT, rows), bench.run(candidate, rows))


# What is left, and what is claimed of it


def _reference(bench: Workbench, survivors: Iterable[Candidate], choosing: int) -> Candidate | None:
    """Of children of half the experts, the most faithful: what a single method gives to one who can pick it.

    On the rows that choose, as the best of many on the rows that judge is mostly the luckiest.
    """
    halves = [candidate for candidate in survivors if candidate.keep == HALF]
    return min(halves, key=lambda c: _distance(bench, c, choosing), default=None)


def _order(bench: Workbench, survivors: Sequence[Candidate], choosing: int, tolerance: float) -> tuple[Candidate, ...]:
    """What is tested, from the safest to the smallest; fixed by the rows that choose alone."""
    found = ladder(survivors, lambda c: bench.run(c, choosing), bench.run(PARENT, choosing), tolerance)
    return tuple(_fastest(bench, candidate, survivors, choosing) for candidate in found)


def _finalists(
    bench: Workbench,
    survivors: Sequence[Candidate],
    wanted: Collection[Candidate | None],
    choosing: int,
    progress: Progress,
) -> tuple[Candidate, ...]:
    """By ascending bytes, all measured on all dev rows: those that are wanted, and those that no other beats in
    arithmetic and distance from the parent."""
    rows, ranked = len(bench.dev.truth), sorted(survivors, key=lambda c: bench.run(c, choosing).bytes)
    lean = front(ranked, lambda c: bench.run(c, choosing).flops_per_token, lambda c: -_distance(bench, c, choosing))
    finalists = tuple(c for c in ranked if c in wanted or c in lean)
    for number, candidate in enumerate((PARENT, *finalists)):
        progress(number, len(finalists) + 1, f"{rows} dev rows: {candidate}")
        bench.run(candidate, rows)
        bench.latency(candidate)
    return finalists


def _fastest(bench: Workbench, candidate: Candidate, survivors: Iterable[Candidate], choosing: int) -> Candidate:
    """Of those that tie with the candidate in bytes, right rows and distance to a thousandth, the one that answers
    soonest."""

    def tie(other: Candidate) -> tuple[int, int, float]:
        run = bench.run(other, choosing)
        return run.bytes, int(run.right_N.sum()), round(_distance(bench, other, choosing), 3)

    ties = sorted((c for c in survivors if tie(c) == tie(candidate)), key=lambda c: _distance(bench, c, choosing))
    if len(ties) == 1:
        return candidate
    return min(ties[:FASTEST_OF], key=lambda other: bench.latency(other)["single_seconds"])


def _passes(bench: Workbench, candidate: Candidate, choosing: int, tolerance: float) -> bool:
    return is_not_worse(*confirming(bench, candidate, choosing), tolerance)


def _written(
    bench: Workbench, chosen: Candidate, name: str, choosing: int, request: Request, progress: Progress
) -> dict[str, Any]:
    """The child through `prune`, as anybody else would make it; what is on disk must be what was measured."""
    out = request.out / name
    method = METHODS[chosen.method]
    if out.exists():
        child = load_checkpoint(out)
        child.verify()
    else:
        child = prune(
            request.finetuned,
            chosen.method,
            chosen.keep,
            out,
            pretrained=request.pretrained if RouterPair in method.needs else None,
            data=request.data,
            semantics=chosen.semantics,
            seed=request.seed,
            options=dict(chosen.options),
            rules=Rules(chosen.allocation),
            stats=request.out / STATISTICS,
            progress=progress,
        )
    rows, measured = bench.dev, bench.run(chosen, len(bench.dev.truth))
    found = score(child.model, rows.sequences[choosing:], rows.truth[choosing:])
    manifest = child.manifest
    if manifest is None or manifest.bytes != measured.bytes or (found.right_N != measured.right_N[choosing:]).any():
        raise CheckpointError(f"{out} is not the child that was measured: remove it, and plan again")
    return {"path": name, "artifact_sha256": child.artifact_sha256, "experts_kept": list(child.experts_kept)}
