"""Every method on every demo task by the command line: `secateur prune`, then `secateur evaluate` beside the parent.

    python -m benchmarks.every_method [--tasks language] [--methods reap mone] [--keep 0.5]

Calls the commands in this process, as `secateur` would, in a directory of its own. Prints a table for each task: bytes
and accuracy of parent and children on the test rows, with intervals. Exits with 1 if a command fails.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pruning_cells import CHEAPER, WITHIN_EXPERTS
from models.pruning import METHODS
from service.cli import main as secateur
from service.demo import CHECKPOINTS, TASKS, DemoTask

HEAD = "| checkpoint | bytes | accuracy, 95 % | change | seconds |\n| --- | --- | --- | --- | --- |"


class CommandError(Exception):
    """A command of ours that ended with a status other than 0."""


def run(*arguments: object) -> str:
    """Call `secateur` with these arguments; returns its standard output. Raises CommandError."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            secateur([str(argument) for argument in arguments])
        except SystemExit as left:
            if left.code:
                raise CommandError(f"secateur {' '.join(map(str, arguments))}: {err.getvalue().strip()}") from None
    return out.getvalue()


def prune(task: DemoTask, method: str, keep: str, out: Path) -> None:
    """Cut the task's parent by a method with its own meaning of cut experts."""
    options = [word for name, value in CHEAPER.get(method, {}).items() for word in ("--option", f"{name}={value}")]
    arguments: list[object] = ["prune", "--method", method, "--finetuned", CHECKPOINTS / task.name / "full"]
    arguments += ["--pretrained", CHECKPOINTS / task.base] if method == "router-norm-change" else ["--data", task.data]
    run(*arguments, "--keep", "1.0" if method in WITHIN_EXPERTS else keep, *options, "--out", out)


def rows_of(task: DemoTask, methods: Sequence[str], keep: str, directory: Path) -> list[tuple[str, ...]]:
    """One line for the parent and each child: name, bytes, accuracy with its interval, change, seconds of pruning."""
    seconds = {}
    for method in methods:
        began = time.monotonic()
        prune(task, method, keep, directory / method)
        seconds[method] = time.monotonic() - began
        print(f"{task.name} {method}: {seconds[method]:.1f} s", file=sys.stderr, flush=True)
    children = [directory / method for method in methods]
    full = CHECKPOINTS / task.name / "full"
    document: dict[str, Any] = json.loads(run("evaluate", full, *children, "--data", task.data, "--json"))
    changes = {against["checkpoint"]: against["difference"] for against in document["against_first"]}
    lines: list[tuple[str, ...]] = []
    for found in document["checkpoints"]:
        name, (lower, upper) = found["checkpoint"], found["accuracy_interval"]
        accuracy = f"{100 * found['accuracy']:.1f} [{100 * lower:.1f}, {100 * upper:.1f}]"
        change = f"{100 * changes[name]:+.1f}" if name in changes else ""
        lines.append((name, f"{found['bytes']:,}", accuracy, change, f"{seconds[name]:.1f}" if name in seconds else ""))
    return lines


def main() -> None:
    """Run the grid and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=[task.name for task in TASKS], default=[t.name for t in TASKS])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--keep", default="0.5")
    options = parser.parse_args()
    for task in (task for task in TASKS if task.name in options.tasks):
        with tempfile.TemporaryDirectory() as directory:
            try:
                lines = rows_of(task, options.methods, options.keep, Path(directory))
            except CommandError as error:
                sys.exit(str(error))
        print(f"\n{task.name}\n\n{HEAD}")
        print("\n".join("| " + " | ".join(line) + " |" for line in lines), flush=True)


if __name__ == "__main__":
    main()
