"""All pruning methods on the demo's tasks: accuracy on the test rows against the parent's, with paired intervals.

    python -m benchmarks.pruning [--minutes 60] [--processes 2] [--tasks spam,icd10] [--report]

Cuts, measures and writes docs/results.md with its plots. What was measured before is kept in runs/pruning and not
measured again, so an interrupted run goes on where it stopped; remove that folder to start anew, for instance after a
method was changed. Cells come in the order of their importance, and what does not fit into the minutes is named.
"""

import argparse
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.pruning_cells import RATIOS, Cell, grid
from benchmarks.pruning_report import write_report
from benchmarks.pruning_results import Outcome, Parent, append, is_settled, packed, read, read_parent, save_parent
from models.checkpoint import Checkpoint, load_checkpoint
from models.dataset import read_rows, split_rows, stratified
from models.errors import SecateurError
from models.evaluate import Evaluation, evaluate
from models.pruning import METHODS
from models.pruning.prune import CALIBRATION_ROWS, prune
from models.pruning.stats import RouterPair
from models.training.finetune import recover
from service.demo import CHECKPOINTS, TASKS, DemoTask

RUNS = Path("runs/pruning")
DOCS = Path("docs")


class Bench:
    """One task: its parent, its calibration rows and statistics, and what was measured of its children."""

    def __init__(self, task: DemoTask, runs: Path) -> None:
        self.task, self.folder = task, runs / task.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.full = full_of(task)
        self.rows = read_rows(task.data, "test")
        self.calibration = self._calibration()
        self.parent = self._parent()
        self.file = self.folder / "results.jsonl"
        self.outcomes = read(self.file, self.parent)

    def _calibration(self) -> Path:
        """What `prune` would draw from the task's texts, without the dev rows, by which it would judge every child.

        Images stay in their own file.
        """
        chosen = stratified(split_rows(read_rows(self.task.data))[0], CALIBRATION_ROWS)
        if chosen[0].image is not None:
            return self.task.data
        file = self.folder / "calibration.jsonl"
        rows = ({"text": row.text, "label": row.label, "split": "train", "group": row.group} for row in chosen)
        file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
        return file

    def _parent(self) -> Parent:
        """Measured once for each parent."""
        file, checkpoint = self.folder / "parent.json", load_checkpoint(self.full)
        if file.exists() and (known := read_parent(file)).sha256 == checkpoint.artifact_sha256:
            return known
        result, source = evaluate(checkpoint, self.rows), checkpoint.source()
        parent = Parent(
            task=self.task.name,
            sha256=checkpoint.artifact_sha256,
            accuracy=result.accuracy,
            rows=result.rows,
            right=right_of(result),
            groups=result.groups,
            bytes=source.bytes,
            parameters=source.parameters,
            experts=tuple(count for count in checkpoint.experts_total if count),
            setting=f"torch {torch.__version__} on the CPU, {torch.get_num_threads()} thread(s) per process",
        )
        save_parent(file, parent)
        return parent

    def measure(self, cell: Cell) -> Outcome:
        """Cut, train again if the cell says so, and judge on the test rows; a request that is refused is an outcome."""
        started = time.perf_counter()
        child, recovered = self.folder / "child", self.folder / "recovered"
        shutil.rmtree(child, ignore_errors=True)
        shutil.rmtree(recovered, ignore_errors=True)
        try:
            checkpoint = self._cut(cell, child)
            if cell.recovered:
                config = replace(self.task.recovery, seed=cell.seed)
                checkpoint = recover(child, self.task.data, recovered, config, teacher=self.full)
            outcome = self._judged(cell, checkpoint)
        except SecateurError as error:
            outcome = Outcome(cell, self.parent.sha256, refused=error.message)
        return replace(outcome, seconds=round(time.perf_counter() - started, 2))

    def _cut(self, cell: Cell, out: Path) -> Checkpoint:
        method = METHODS[cell.method]
        needed = method.needed(method.read_options(cell.options))
        return prune(
            self.full,
            cell.method,
            cell.keep,
            out,
            pretrained=CHECKPOINTS / self.task.base if RouterPair in needed else None,
            data=self.calibration,
            semantics=cell.semantics,
            seed=cell.seed,
            options=cell.options,
            stats=self.folder / f"statistics-{self.parent.sha256[:8]}-{cell.seed}.safetensors",
        )

    def _judged(self, cell: Cell, checkpoint: Checkpoint) -> Outcome:
        manifest = checkpoint.manifest
        assert manifest is not None
        routes = json.dumps([layer.route for layer in manifest.layers])
        fingerprint = hashlib.sha256(f"{manifest.files['model.safetensors']} {routes}".encode()).hexdigest()
        outcome = Outcome(
            cell,
            self.parent.sha256,
            bytes=manifest.bytes,
            parameters=manifest.parameters,
            fingerprint=fingerprint,
        )
        twin = next((o for o in self.outcomes.values() if o.fingerprint == fingerprint), None)
        if twin is not None:
            taken = {name: getattr(twin, name) for name in ("accuracy", "right", "kept_slots")}
            return replace(outcome, same_as=twin.same_as or twin.cell.name, **taken)
        result = evaluate(checkpoint, self.rows)
        kept_slots = 1.0 - result.dropped_share
        return replace(outcome, accuracy=result.accuracy, right=right_of(result), kept_slots=kept_slots)

    def expected(self, cell: Cell) -> float:
        """Seconds that cells like this one took; 0 where there was none."""
        alike = [outcome for known, outcome in self.outcomes.items() if known.recovered == cell.recovered]
        seconds = [outcome.seconds for outcome in alike if outcome.cell.method == cell.method or cell.recovered]
        return float(np.mean(seconds)) if seconds else 0.0

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.cell] = outcome
        append(self.file, outcome)


def full_of(task: DemoTask) -> Path:
    return CHECKPOINTS / task.name / "full"


def right_of(result: Evaluation) -> str:
    return packed(np.equal(result.predictions, result.truth))


def measure_all(benches: Mapping[str, Bench], cells: Sequence[Cell], seconds: float) -> None:
    """All cells that are missing and fit into the time, in order."""
    end = time.monotonic() + seconds
    missing = [cell for cell in cells if cell not in benches[cell.task].outcomes]
    for number, cell in enumerate(missing, start=1):
        bench = benches[cell.task]
        if is_settled(cell, bench.outcomes, bench.parent):
            continue
        if time.monotonic() + bench.expected(cell) > end:
            continue
        outcome = bench.measure(cell)
        bench.add(outcome)
        change = 100 * (outcome.accuracy - bench.parent.accuracy)
        said = f"refused: {outcome.refused}" if outcome.refused else f"{100 * outcome.accuracy:.1f} ({change:+.1f})"
        print(f"{number}/{len(missing)} {cell.name}: {said}, {outcome.seconds:.1f} s", flush=True)


def in_processes(tasks: Sequence[DemoTask], processes: int, arguments: Sequence[str]) -> None:
    """Share the tasks out, the largest files first, and run this module on each share."""
    shares: list[list[DemoTask]] = [[] for _ in range(processes)]
    for task in sorted(tasks, key=lambda task: -task.data.stat().st_size):
        min(shares, key=lambda share: sum(t.data.stat().st_size for t in share)).append(task)
    command = [sys.executable, "-m", "benchmarks.pruning", *arguments, "--no-report", "--tasks"]
    running = [subprocess.Popen([*command, ",".join(t.name for t in share)]) for share in shares if share]
    failed = [process.wait() for process in running]
    if any(failed):
        raise SystemExit("a process failed: see above")


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    known = {task.name: task for task in TASKS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long")
    parser.add_argument("--processes", type=int, default=1, help="tasks are shared out among so many")
    parser.add_argument("--tasks", default=",".join(known), help="names, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="names, separated by commas")
    parser.add_argument("--ratios", type=numbers, default=RATIOS, help="keep ratios, separated by commas")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where measurements are kept")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where results.md and its plots go")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page from what there is")
    parser.add_argument("--no-report", action="store_true", help="write no page")
    args = parser.parse_args()
    # Thin calibration data and the like would be said hundreds of times.
    logging.getLogger("secateur").setLevel(logging.ERROR)
    asked = [known[name] for name in args.tasks.split(",")]
    tasks = [task for task in asked if full_of(task).is_dir()]
    absent = [task.name for task in asked if task not in tasks]
    cells = grid([t.name for t in tasks], args.ratios, {name: METHODS[name] for name in args.methods.split(",")})
    if not args.report and args.processes > 1:
        passed = ["--minutes", str(args.minutes), "--methods", args.methods, "--runs", str(args.runs)]
        in_processes(tasks, args.processes, [*passed, "--ratios", ",".join(map(str, args.ratios))])
    benches = {task.name: Bench(task, args.runs) for task in tasks}
    if not args.report and args.processes == 1:
        measure_all(benches, cells, 60 * args.minutes)
    if not args.no_report:
        outcomes = {cell: bench.outcomes[cell] for bench in benches.values() for cell in bench.outcomes}
        command = " ".join(["python -m benchmarks.pruning", *(a for a in sys.argv[1:] if a != "--report")])
        write_report(args.docs, command, [bench.parent for bench in benches.values()], cells, outcomes, absent)


if __name__ == "__main__":
    main()
